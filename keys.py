"""The characters MicroOCR can read: alphabets, labels and usual texts; and the console.

    from keys import load_alphabet
    load_alphabet("alnum59")      # a name from ALPHABETS
    load_alphabet("my_keys.txt")  # or a UTF-8 text file that holds the characters

The CTC blank is not part of an alphabet: it is class 0 of the network, the
characters follow in order, so ``nclass = len(alphabet) + 1``.
"""

import _thread
import atexit
import codecs
import contextlib
import gc
import importlib
import math
import os
import re
import signal
import string
import sys
import threading
import unicodedata
from collections import Counter, defaultdict
from functools import lru_cache
from pathlib import Path

import numpy as np

# GB 2312 keeps its 3,755 most frequent characters, ordered by pronunciation, in rows 16
# to 55 of 94 (GB 2312-1980); of the last row 89. In EUC-CN 0xA0 is added to row and cell.
LEVEL_1 = np.mgrid[16:56, 1:95].transpose(1, 2, 0).astype(np.uint8) + 0xA0

ALPHABETS = {
    "digits": string.digits,
    "digits_upper": string.digits + string.ascii_uppercase,
    # Without I, O and l, which look like other characters. nclass = 60.
    "alnum59": "".join(c for c in string.digits + string.ascii_letters if c not in "IOl"),
    "alnum62": string.digits + string.ascii_letters,
    "ascii": "".join(map(chr, range(32, 127))),
    "gb2312_level1": LEVEL_1.tobytes()[: 2 * 3755].decode("gb2312"),
}

NOT_UTF8 = "is not UTF-8, save the label file as UTF-8"
SEPARATORS = "_-.#@~ "  # what may stand between a label and the rest of a file name
# Seen by nobody; the joiners of Arabic and Indian scripts count only at an edge.
ZERO_WIDTH = dict.fromkeys(map(ord, "\u00ad\u200b\u200e\u200f\u2060\ufeff"))
JOINERS = "\u200c\u200d"
FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: 0x20}
# Cyrillic and Greek letters, and the Latin ones that nobody can tell from them.
LIKE_LATIN = "АВЕЅІЈКМНОРСТХҮаесорхуѕіјΑΒΕΖΗΙΚΜΝΟΡΤΥΧο"  # noqa: RUF001
LOOK_ALIKES = dict(zip(LIKE_LATIN, "ABESIJKMHOPCTXYaecopxysijABEZHIKMNOPTYXo", strict=True))
SAME_IN_BOTH = frozenset("cosuvwxz")  # letters whose two cases differ in size alone
NUMBER = re.compile(r"\b(?=\w*\d\w*\d)[\doOlI]*[\doO]\b", re.ASCII)
DIGITS = str.maketrans("oOlI", "0011")
CASES, MARKS = (string.ascii_uppercase, string.ascii_lowercase), " -.,'&/"
# Where texts of the usual kinds are to be expected: how much more than others those of these
# characters weigh, of several the last. What looks as much like "loo" as like "100" is a number.
KINDS = {
    **{case + string.digits + MARKS: 3.0 for case in CASES},  # codes
    **{case + string.digits: 6.0 for case in CASES},
    string.ascii_letters + MARKS: 5.0,  # words
    **{case + MARKS: 15.0 for case in CASES},
    **dict.fromkeys(CASES, 25.0),
    string.digits + ".,:-/ +*=?%x": 20.0,
    string.digits + ".,:-/ ": 20.0,
    string.digits: 600.0,
}
# A number whose marks stand where they belong, such as 12:30, -0.5, 3/8, 7+4=? or 50%. It weighs
# half as much as digits alone: a speck is easily taken for a mark.
MARKED = re.compile(r"[-+]?\d+([-+*/:.,= ]\d+)*(%|=?\??)", re.ASCII)
# Text of letters and digits, its letters that are read as 9 or 2 more often than the other way, and
# as 1 where it has no space, but not beside a digit: many codes have all their digits in a row.
CODE = re.compile(r"(?=.*\d)(?=.*[A-Za-z])[A-Za-z0-9 ]+", re.ASCII)
DIGIT_LIKE = re.compile(r"[gqQzZ]", re.ASCII)
STROKE = re.compile(r"(?<!\d)[lIi](?!\d)", re.ASCII)
LETTERS = Path(__file__).parent / "assets" / "letters.txt"  # by benchmarks/count_letters.py
ZERO, STEPS, MOST = 98, 8, 30  # its code for a logarithm of 0, codes to 1, and the most of a text
WORD = re.compile(r"\b[A-Za-z]{3,}\b", re.ASCII)
END = "\n"  # stands before and behind each label that n-grams are counted in
LONGEST, NGRAMS = 4, 2**14  # characters of an n-gram, and n-grams that are kept, at most
TRUST = 0.5  # the part of what they say that counts: a network has learnt some of it


def _unquoted(text):
    """``text`` without the quotes that a spreadsheet has put around it."""
    quoted = len(text) > 1 and text[0] == text[-1] == '"'
    return text[1:-1].replace('""', '"') if quoted else text


# What makes labels that look equal differ, and how it is mended.
MENDS = {
    "decomposed characters": lambda text: unicodedata.normalize("NFC", text),
    "zero-width characters": lambda text: text.translate(ZERO_WIDTH).strip(JOINERS),
    "full-width characters": lambda text: text.translate(FULL_WIDTH),
    "quotes around them": _unquoted,
    "spaces at an edge": str.strip,
}


def normalised(text):
    """``text`` in the one form that all texts which look like it have."""
    for mend in MENDS.values():
        text = mend(text)
    return text


def oddities(text):
    """The names of those MENDS that would change ``text``."""
    return [name for name, mend in MENDS.items() if mend(text) != text]


def length_range(text):
    """Parse how many characters texts have: "4" is (4, 4), "3-8" is (3, 8).

    Raises ValueError for anything else, and for a range that holds no number from 1.
    """
    shortest, _, longest = text.partition("-")
    bounds = int(shortest), int(longest or shortest)
    if not 1 <= bounds[0] <= bounds[1]:
        raise ValueError(text)
    return bounds


def is_right_to_left(text):
    """Whether ``text`` has letters that are written from right to left."""
    return any(unicodedata.bidirectional(character) in ("R", "AL") for character in text)


def as_usual(text):
    """A text with look-alikes as those beside them: 1O05 becomes 1005, SeCret Secret.

    What may be a number of two digits is one, unless it ends in l, as 10l. Of a word the letters
    SAME_IN_BOTH cases have the case of the others, but for the first, where two tell it.
    """
    text = NUMBER.sub(lambda found: found[0].translate(DIGITS), text)
    return re.sub("[A-Za-z]+", lambda found: _in_one_case(found[0]), text)


def _in_one_case(word):
    """`as_usual` of letters in a row."""
    first, rest = word[0], word[1:]
    sure = "".join([c for c in rest if c.lower() not in SAME_IN_BOTH])
    if len(sure) < 2 or not (sure.islower() or sure.isupper()):
        return word
    if sure.islower():
        return first + rest.lower()
    return (first.upper() if first in SAME_IN_BOTH else first) + rest.upper()


def code_weight(text):
    """How much more than others a CODE weighs for its letters that are read as digits."""
    if not CODE.fullmatch(text):
        return 1.0
    like = DIGIT_LIKE.findall(text) + ([] if " " in text else STROKE.findall(text))
    return 3.0 ** len(like)


def kind_weight(text):
    """How much more than others a text weighs: one of `KINDS`, a number that is MARKED, a code."""
    kinds = [weight for own, weight in KINDS.items() if text and all(c in own for c in text)]
    marked = 300.0 if MARKED.fullmatch(text) else 1.0
    return max(kinds[-1] if kinds else 1.0, marked) * code_weight(text)


@lru_cache(1)
def letters():
    """27 * 27 * 27 bytes: how usual a letter is behind two others, as count_letters.py says."""
    return b"".join(LETTERS.read_bytes().split())


def word_weight(text):
    """How much more than others a text weighs for its words, 1 where it has none.

    By how many times more probable in English their letters are than letters at random, each
    behind the two before it (Shannon, Bell System Technical Journal 1951).
    """
    words, table, steps = WORD.findall(text), letters(), 0
    for word in words:
        a = b = 0
        for c in [*(ord(letter) - 96 for letter in word.lower()), 0]:
            steps += table[729 * a + 27 * b + c] - ZERO
            a, b = b, c
    return 1 + math.exp(min(steps / STEPS, MOST)) if words else 1.0


def share(probabilities, kinds, weights, few):
    """How probable each of some texts is if some weigh more than others.

    Args:
        probabilities: theirs before. What is left of 1 is that of all others, not looked at.
        kinds: how much more each weighs for its kind. Other texts are of none, and weigh 1.
        weights: how much more for its words or n-grams. Others weigh as these do in the mean.
        few: whether few texts are usual, the most probable ones closer to them than most are:
            then others weigh no more than the median.
    """
    own = [p * kind for p, kind in zip(probabilities, kinds, strict=True)]
    all_in_all = [p * weight for p, weight in zip(own, weights, strict=True)]
    usual = sum(all_in_all) / (sum(own) or 1)
    usual = min(usual, float(np.median(weights))) if few else usual
    total = sum(all_in_all) + max(0.0, 1 - sum(probabilities)) * usual
    return [p / (total or 1) for p in all_in_all]


def count_ngrams(labels, longest):
    """{n-gram of up to ``longest`` characters, END among them: how often it is in labels}.

    All of one character, and of the longer ones the NGRAMS most frequent.
    """
    counts = Counter()
    for label in labels:
        text = END + label + END
        for size in range(1, longest + 1):
            counts.update(text[i : i + size] for i in range(size == 1, len(text) - size + 1))
    order = sorted(counts, key=lambda ngram: (len(ngram) > 1, -counts[ngram], ngram))
    return {ngram: counts[ngram] for ngram in order[: NGRAMS + sum(len(n) == 1 for n in order)]}


def choose_ngrams(labels, others):
    """`count_ngrams` of all labels, as they look: as long as fits the others best by the first.

    None where single characters fit about as well, as they do labels drawn at random.
    """
    labels, others = ([reordered(text)[0] for text in part] for part in (labels, others))
    losses = []
    for longest in range(1, LONGEST + 1):
        ngrams = Ngrams(count_ngrams(labels, longest))
        losses.append(-sum(map(ngrams.log_probability, others)))
    best = losses.index(min(losses)) + 1
    return count_ngrams([*labels, *others], best) if losses[best - 1] < 0.98 * losses[0] else None


class Ngrams:
    """How usual texts are: how probable their characters behind others are by n-grams of labels.

    Witten and Bell, IEEE Transactions on Information Theory 1991: the fewer characters have
    been seen behind others, the more of those that were seen behind fewer of them count.

    Args:
        counts: what `count_ngrams` returns. ValueError where it is something else.
    """

    def __init__(self, counts):
        self.counts, self.behind = counts, defaultdict(lambda: [0, 0])
        for ngram, count in counts.items():
            if not (isinstance(ngram, str) and ngram and isinstance(count, int) and count > 0):
                raise ValueError(f"{ngram!r}: {count!r} is no n-gram and how often it occurs")
            seen = self.behind[ngram[:-1]]
            seen[0] += count
            seen[1] += 1
        if "" not in self.behind:
            raise ValueError("n-grams of one character are missing")
        self.even = 1 / (self.behind[""][1] + 1)

    def _probabilities(self, text):
        """For each character of a text and its end, how probable it is by ever longer n-grams.

        The first is that of one among all that are known, the next that by n-grams of one.
        """
        text = END + text + END
        for i in range(1, len(text)):
            found = [self.even]
            for start in range(i, -1, -1):
                seen, kinds = self.behind.get(text[start:i], (0, 0))
                if not seen:
                    break
                count = self.counts.get(text[start : i + 1], 0)
                found.append((count + kinds * found[-1]) / (seen + kinds))
            yield found

    def log_probability(self, text):
        """The logarithm of how probable a text and its end are."""
        return sum(math.log(found[-1]) for found in self._probabilities(text))

    def weights(self, texts):
        """How much less than the most usual of some texts each weighs, 0 to 1."""
        more = [sum(math.log(p[-1] / p[1]) for p in self._probabilities(text)) for text in texts]
        return [math.exp(TRUST * (own - max(more))) for own in more]


def reordered(text):
    """A line of a text from right to left as it looks from left to right, or the other way.

    The Unicode bidirectional algorithm (UAX 9) in a paragraph from right to left. A text
    without letters that run so is left as it is.

    Returns:
        (text, places): for each of its characters the place that it had.

    Raises ValueError where python-bidi is not installed.
    """
    if not is_right_to_left(text):
        return text, list(range(len(text)))
    algorithm = import_or_say("bidi.algorithm", f"{text!r} runs right to left: it takes a package")
    storage = algorithm.get_empty_storage()
    storage["base_level"], storage["base_dir"] = 1, "R"
    algorithm.get_embedding_levels(text, storage)
    for place, character in enumerate(storage["chars"]):
        character["place"] = place
    for step in (
        algorithm.explicit_embed_and_overrides,
        algorithm.resolve_weak_types,
        algorithm.resolve_neutral_types,
        algorithm.resolve_implicit_levels,
        algorithm.reorder_resolved_levels,
        algorithm.apply_mirroring,
    ):
        step(storage, False)
    return "".join(c["ch"] for c in storage["chars"]), [c["place"] for c in storage["chars"]]


def unusable(text):
    """The characters of ``text`` that no label can hold: line breaks, tabs, other controls."""
    return sorted({c for c in text if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")})


def named(character):
    """A character's code point and, where it has one, its name: U+2028 LINE SEPARATOR."""
    return f"U+{ord(character):04X} {unicodedata.name(character, '')}".rstrip()


def find_separators(stems):
    """The characters of SEPARATORS at which the labels of file names without suffix end.

    What follows a separator must clearly be none of the label, in all names that have it:
    a browser's " (1)"; hexadecimal digits that name a file once; or counters, which run from
    0 or 1 over all names or over those of one label.

    Returns:
        (those that end a label, those that occur but may be a part of it).
    """
    ends, unclear = "", ""
    for separator in SEPARATORS:
        pairs = [stem.partition(separator)[::2] for stem in stems if separator in stem]
        rests = [rest for _, rest in pairs]
        copied = separator == " " and all(re.fullmatch(r"\(\d+\)", rest) for rest in rests)
        if rests and (copied or _are_hashes(rests) or _are_counters(pairs)):
            ends += separator
        elif rests and separator != " ":  # which words may have between them
            unclear += separator
    return ends, unclear


def labels_of_names(stems, options):
    """The labels in file names without suffix.

    Args:
        stems: the names.
        options: a `label_file.LabelOptions`, of which ``separator`` and ``regex`` count.

    Returns:
        (labels, rule): a string for each, None where the regex finds none; the rule in words.

    Raises ValueError, which shows examples and asks, where a label may end in two places.
    """
    if options.regex is not None:
        matches = [re.search(options.regex, stem) for stem in stems]
        rule = f"by {options.regex!r} (--label-regex)"
        return [match and match[1] for match in matches], rule
    ends, unclear = find_separators(stems)
    if options.separator is not None:
        ends, unclear = [options.separator] if options.separator else [], ""
    if unclear:
        shown = ", ".join([stem for stem in stems if any(c in stem for c in unclear)][:5])
        raise ValueError(
            f"the names of the images are their labels, but where do these end, {shown}? Say so: "
            f"--label-separator '' for the whole name, --label-separator {unclear[0]!r} for what "
            "stands before it, or --label-regex with a group for the label"
        )
    rule = f"up to {' or '.join(map(repr, ends))}" if ends else "as a whole"
    labels = stems
    for end in ends:
        labels = [label.partition(end)[0] for label in labels]
    return labels, f"{rule} (--label-separator)"


def _are_hashes(rests):
    """Whether they are hexadecimal numbers with letters, each another."""
    shaped = all(re.fullmatch(r"[0-9a-f]{4,}(-[0-9a-f]{4,})*", rest) for rest in rests)
    lettered = sum(bool(re.search("[a-f]", rest)) for rest in rests)
    return shaped and len(set(rests)) == len(rests) and 2 * lettered >= len(rests)


def _are_counters(pairs):
    """Whether the second ones of (label, rest) count, over all or for each label."""
    if not all(re.fullmatch(r"\d{1,9}", rest) for _, rest in pairs):
        return False
    groups = defaultdict(list)
    for label, rest in pairs:
        groups[label].append(int(rest))
    everything = sorted(number for numbers in groups.values() for number in numbers)
    dense = len(set(everything)) == len(everything) and everything[-1] < 1.2 * len(everything) + 1
    each = all(len(set(own)) == len(own) >= max(own) for own in groups.values())
    # Many labels that all have the one counter 1 say as little as decimals would.
    return (dense and len(everything) > 1) or (each and len(groups) < len(pairs))


def text_lines(path):
    """The lines of a UTF-8 text file, whatever ends them.

    Returns:
        ([(line number, text)] of those that are not blank, numbers of those that are not UTF-8).

    Raises ValueError where the file cannot be read or is UTF-16.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: the label file cannot be read ({error.strerror})") from None
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f"{path}:1: {NOT_UTF8}")
    content = content.removeprefix(codecs.BOM_UTF8)
    # Not splitlines, which takes more for line breaks: those are refused later.
    end = b"\n" if b"\n" in content else b"\r"
    lines, bad = [], []
    for number, line in enumerate(content.split(end), 1):
        try:
            text = line.rstrip(b"\r").decode("utf-8")
        except UnicodeDecodeError:
            bad.append(number)
            continue
        if text.strip():
            lines.append((number, text))
    return lines, bad


def _interrupt_again(unraisable):
    """Repeat a Ctrl-C that came where Python only prints and forgets it, as in a callback."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        threading.Timer(0.05, _thread.interrupt_main).start()
    else:
        sys.__unraisablehook__(unraisable)


def end_process(status):
    """End as `sys.exit` does, but free nothing, which takes PyTorch 0.1 seconds and more."""
    atexit.unregister(end_process)
    atexit._run_exitfuncs()  # those that were there before
    with contextlib.suppress(OSError):  # `command` has said it
        sys.stdout.flush()
    os._exit(status if isinstance(status, int) else int(status is not None))


def command(main):
    """Run a script's ``main``, and end with its exit status.

    What is printed is UTF-8, whatever the console's own is. Errors that people can mend are
    one line on stderr, without a traceback; so is Ctrl-C.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.freeze()  # what the imports made stays
    gc.enable()
    sys.unraisablehook = _interrupt_again
    name = Path(sys.argv[0]).name
    for stream in ("stdin", "stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed
            setattr(sys, stream, open(os.devnull, "r+", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(getattr(sys, stream), "reconfigure"):  # a notebook's has none
            errors = "surrogateescape" if stream == "stdin" else "backslashreplace"
            getattr(sys, stream).reconfigure(encoding="utf-8", errors=errors)
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except ImportError as error:  # a broken installation, as it is
        status = f"{name}: error: {type(error).__name__}: {error}"
    except (ValueError, OSError) as error:
        status = f"{name}: error: {error}"
    except (KeyboardInterrupt, RuntimeError) as error:  # before 3.12 the second may hide the first
        if not isinstance(error.__cause__ or error, KeyboardInterrupt):
            raise
        status = f"{name}: interrupted"
    if not sys._getframe(1).f_back:  # or something goes on, a notebook or a profiler
        atexit.register(end_process, status)
    sys.exit(status)


def import_or_say(package, purpose):
    """Import a package that is optional.

    Raises ValueError, with the line that installs it, where it is missing. What a broken
    installation raises is passed on. Ctrl-C waits: it makes some native code abort.
    """
    held, before = [], signal.getsignal(signal.SIGINT)
    hold = before is not None and threading.current_thread() is threading.main_thread()
    if hold:
        signal.signal(signal.SIGINT, lambda *_: held.append(True))
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package.partition(".")[0]:
            raise
        name = {"bidi": "python-bidi"}.get(error.name, error.name)
        raise ValueError(f"{purpose}, which is missing: pip install {name}") from None
    finally:
        if hold:
            signal.signal(signal.SIGINT, before)
        if held:
            signal.raise_signal(signal.SIGINT)


def check_alphabet(alphabet, source="the alphabet"):
    """Return ``alphabet`` (a string, one character a class) if it can be used.

    Raises ValueError, naming ``source``, where it is empty, repeats a character or
    contains what is `unusable` (a label is one line of a text file).
    """
    if not alphabet:
        raise ValueError(f"{source}: an alphabet needs at least one character, this one is empty")
    if controls := unusable(alphabet):
        raise ValueError(
            f"{source}: an alphabet cannot contain a line break or another control character, "
            f"remove {', '.join(map(named, controls))}"
        )
    repeated = sorted(c for c, times in Counter(alphabet).items() if times > 1)
    if repeated:
        raise ValueError(
            f"{source}: each character may stand once in an alphabet, "
            f"remove the repeats of {' '.join(map(repr, repeated))}"
        )
    return alphabet


def load_alphabet(name_or_path):
    """Return the alphabet called ``name_or_path``, or the one in that UTF-8 text file.

    A file holds the characters on one line; a byte-order mark and the line break
    at its end are not part of the alphabet.

    Raises ValueError for an unknown name, an unreadable file, or what
    `check_alphabet` refuses.
    """
    if name_or_path in ALPHABETS:
        return ALPHABETS[name_or_path]
    path = Path(name_or_path)
    try:
        # newline="" keeps a lone carriage return visible to check_alphabet.
        with path.open(encoding="utf-8-sig", newline="") as file:
            text = file.read()
    except FileNotFoundError:
        names = ", ".join(ALPHABETS)
        raise ValueError(
            f"{name_or_path}: neither an alphabet's name ({names}) nor an existing text file"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as a UTF-8 text file ({error})") from None
    return check_alphabet(text.removesuffix("\n").removesuffix("\r"), source=str(path))
