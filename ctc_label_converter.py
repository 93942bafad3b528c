"""Text to CTC targets, network output to text. Works on numpy arrays."""

import math
from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from keys import KINDS, Ngrams, as_usual, check_alphabet, kind_weight, reordered, share, word_weight

BLANK = 0  # the class of the CTC blank
WORDS = 500  # of a lexicon that are compared at a time
SHORT = 30  # characters up to which `short_text_probability` is the faster one
LEAST = -80  # logarithm of a probability: what float32 has of below 1e-38 takes CPUs far longer
SETTINGS = ("alphabet", "temperature", "length", "right_to_left", "expect_kinds", "ngrams")
# A gap of so many usual ones makes a space so much more probable, in texts of so many characters.
GAP, SPACE, SPACED = 1.3, 100.0, 6
# Below that confidence so many more texts compete, of what is not less probable in a column.
SURE, BEAM, PROBABLE = 0.9, 10, 0.01
HOPELESS = 1e-4  # a kind's best text is not looked for where all of its paths weigh so much less


class Reading(NamedTuple):
    """What was read in one image.

    text: the characters.
    confidence: probability of the whole text, 0 to 1.
    char_confidences: one probability per character, 0 to 1.
    alternatives, rivals: next best texts of a `Search`, of other `KINDS`, with probabilities.
    """

    text: str
    confidence: float
    char_confidences: list[float]
    alternatives: tuple[tuple[str, float], ...] = ()
    rivals: tuple[tuple[str, float], ...] = ()


def surest(readings):
    """The `Reading` of the highest confidence, one without text only where all are."""
    return max(readings, key=lambda reading: (reading.text != "", reading.confidence))


def vote(readings):
    """The `Reading` of an image that was read several times: the most probable of their texts.

    A text's confidence is the mean of those that the readings give it, as in an ensemble
    (Hansen and Salamon, IEEE PAMI 1990); no text counts only where none found any. The
    characters' are of the reading that is surest of it.
    """
    if len(readings) == 1:
        return readings[0]
    mean = defaultdict(float)
    for reading in readings:
        for text, confidence in (reading[:2], *reading.alternatives, *reading.rivals):
            mean[text] += confidence / len(readings)
    text = max((r.text for r in readings), key=lambda text: (text != "", mean[text]))
    best = surest([reading for reading in readings if reading.text == text])
    others = sorted(((p, other) for other, p in mean.items() if other != text), reverse=True)
    count = max(len(reading.alternatives) for reading in readings)
    others = tuple((other, p) for p, other in others[:count])
    return best._replace(confidence=mean[text], alternatives=others, rivals=())


@dataclass(frozen=True)
class Search:
    """How to look for the most probable text, where greedy decoding is not enough.

    Attributes:
        beam: prefixes that are kept from column to column.
        top: texts to return, the best one and its alternatives.
        shortest, longest: characters that a text may have.
        subset: characters that a text may hold, None: all.
        lexicon: the texts to choose from, None: any. All are compared, without a beam.

    Where no length is given, nor a lexicon, that of the `CTCLabelConverter` holds.
    A subset makes the probabilities conditional on it: they tell how probable a text
    is among those that it allows. So does a lexicon. A length does not. What a network
    expects of texts counts here too, but not where a lexicon says what they are.
    """

    beam: int = 10
    top: int = 1
    shortest: int = 0
    longest: int | None = None
    subset: str | None = None
    lexicon: tuple[str, ...] | None = None

    def allows(self, text):
        """Whether length and subset admit ``text``."""
        return self.shortest <= len(text) <= (self.longest or math.inf) and (
            self.subset is None or set(text) <= set(self.subset)
        )


def columns_needed(label):
    """Columns that CTC needs for a label: one per character, and a blank between repeats."""
    return len(label) + sum(a == b for a, b in pairwise(label))


class CTCLabelConverter:
    """Converts between texts and classes: class 0 is the blank, the alphabet follows.

    Args:
        alphabet: a string of distinct characters, see `keys.check_alphabet`.
        temperature: what logits are divided by before they become probabilities, greater
            than 0. Fitted after the training, it makes the confidences say how often
            texts are right (Guo et al., ICML 2017). It changes no greedy text.
        length: characters that every text has, at least 1; None for any number.
        right_to_left: whether texts have letters that are written so: the network reads
            from left to right, and texts are turned on their way to it and back.
        expect_kinds: whether `decode` expects spaces in wide gaps, and texts `as_usual`, of
            `KINDS` and of words: for networks that read whatever there is, where a network of
            one's own has seen what to expect.
        ngrams: what `keys.count_ngrams` returns for labels as they look: `decode` expects texts
            to be like those. None: any.

    Raises ValueError for another alphabet, temperature, length or n-grams.
    """

    def __init__(
        self, alphabet, temperature=1.0, length=None, right_to_left=False, expect_kinds=False,
        ngrams=None,
    ):  # fmt: skip
        if not 0 < temperature < math.inf:
            raise ValueError(f"the temperature {temperature} is not greater than 0")
        if length is not None and not (isinstance(length, int) and length >= 1):
            raise ValueError(f"the length {length!r} is not at least 1")
        self.alphabet = check_alphabet(alphabet)
        self.temperature = float(temperature)
        self.length = length
        self.right_to_left = bool(right_to_left)
        self.expect_kinds = bool(expect_kinds)
        self.ngrams, self._ngrams = ngrams, Ngrams(ngrams) if ngrams else None
        self.nclass = len(alphabet) + 1
        self._class_of = {character: i for i, character in enumerate(alphabet, 1)}
        self._character_of = ["", *alphabet]
        # A kind's characters, (nclass,) 1 for their classes, how much more its texts weigh.
        self._kinds = [
            (set(own) & set(alphabet), np.array([1.0, *(c in own for c in alphabet)]), weight)
            for own, weight in (KINDS.items() if expect_kinds else ())
        ]

    def settings(self):
        """The arguments that make the same converter."""
        return {name: getattr(self, name) for name in SETTINGS}

    def replaced(self, **settings):
        """The same converter with some other `settings`."""
        return CTCLabelConverter(**self.settings() | settings)

    def encode(self, labels):
        """Labels to CTC targets.

        Returns:
            (targets, lengths): int64 arrays, the classes of all labels in a row and
            the number of characters of each.

        Raises ValueError for a character outside the alphabet.
        """
        if self.right_to_left:
            labels = [reordered(label)[0] for label in labels]
        try:
            targets = [self._class_of[character] for label in labels for character in label]
        except KeyError as error:
            raise ValueError(f"{error.args[0]!r} is not in the alphabet") from None
        return np.array(targets, np.int64), np.array([len(label) for label in labels], np.int64)

    def _text(self, classes):
        return "".join([self._character_of[k] for k in classes])

    def decode(self, logits, columns=None):
        """Greedy decoding, see `best_path`.

        A text that comes out longer or shorter than ``length`` is searched once more, for
        the most probable one of that many characters. Where `KINDS` are expected, the best one
        of each competes with it; where they or n-grams are, and it is doubtful, others.

        Args:
            logits: (N, T, nclass) float array.
            columns: (N,) number of columns of each image that count, None: all T.

        Returns:
            N `Reading`s. A character's confidence is that of `best_path`; the text's is
            the sum over all alignments of `text_probability`.
        """
        probs = softmax(logits / self.temperature)
        if columns is None:
            columns = [probs.shape[1]] * len(probs)
        if self.expect_kinds or self.ngrams:
            usual = Search(BEAM, shortest=self.length or 0, longest=self.length)
            parts = zip(probs, columns, strict=True)
            readings = [self._expecting(image[:count], usual, PROBABLE) for image, count in parts]
        elif len(probs) == 1:
            readings = [self._decode_one(probs[0, : columns[0]])]
        else:
            readings = self._decode_many(probs, np.asarray(columns))
        for i, reading in enumerate(readings):
            if self.length not in (None, len(reading.text)):
                [readings[i]] = self._search(logits[i : i + 1, : columns[i]], Search())
        return self._turned(readings)

    def _decode_many(self, probs, columns):
        """`decode` of several images' (N, T, nclass) probabilities."""
        targets, char_confidences, lengths = best_path(probs, columns)
        confidences = text_probability(probs, targets, columns, lengths)
        ends = np.cumsum(lengths)
        return [
            Reading(self._text(targets[a:b].tolist()), float(p), char_confidences[a:b].tolist())
            for a, b, p in zip(ends - lengths, ends, confidences, strict=True)
        ]

    def _decode_one(self, probs):
        """`decode` of one image's (T, nclass) probabilities, where numpy's calls cost the most."""
        targets, confidences, before = [], [], BLANK
        for t, k in enumerate(probs.argmax(1).tolist()):
            if k != BLANK:
                best = probs.item(t, k)
                if k == before:
                    confidences[-1] = max(confidences[-1], best)
                else:
                    targets.append(k)
                    confidences.append(best)
            before = k
        if len(targets) > SHORT:
            [confidence] = text_probability(
                probs[None], np.array(targets), np.array([len(probs)]), np.array([len(targets)])
            )
        else:
            confidence = short_text_probability(probs, targets)
        return Reading(self._text(targets), float(confidence), confidences)

    def _expecting(self, probs, search, least):
        """The `Reading` of one image's (T, nclass): the best of what competes, `as_usual`."""
        probs = self._with_spaces(probs) if self.expect_kinds else probs
        found = self._competing(probs, search, least)
        if not found:
            return Reading("", 0.0, [])
        confidences = [reading.confidence for reading in found.values()]
        kinds = [kind_weight(text) if self.expect_kinds else 1.0 for text in found]
        weights = [1.0] * len(found)
        if max(confidences) < SURE:
            weights = self._ngrams.weights(found) if self.ngrams else [*map(word_weight, found)]
        probable = share(confidences, kinds, weights, few=bool(self.ngrams))
        shares, readings = defaultdict(float), {}
        for text, part in sorted(zip(found, probable, strict=True), key=lambda pair: pair[1]):
            usual = as_usual(text) if self.expect_kinds else text
            usual = usual if search.allows(usual) else text
            shares[usual] += part
            readings[usual] = found[text]
        (text, confidence), *others = sorted(shares.items(), key=lambda pair: -pair[1])
        classes = [self._class_of[c] for c in readings[text].text]
        sure = readings[text].char_confidences or aligned_probabilities(probs, classes)
        others = tuple(others[: search.top - 1]), tuple(others[search.top - 1 :])
        return Reading(text, min(1.0, confidence), sure, *others)

    def _competing(self, probs, search, least):
        """{text: its `Reading`}: the plain one, each kind's best; in doubt or asked a beam's."""
        plain = self._decode_one(probs)
        # No text competes only where it is the plain one.
        found, best = {plain.text: plain}, [(self._class_of.keys(), plain.text)]
        for own, classes, weight in self._kinds:
            # The best path of a larger kind that has no other classes is the best of these too.
            if any(own <= kind and own.issuperset(text) for kind, text in best):
                continue
            if (probs @ classes).prod() * weight >= HOPELESS * plain.confidence:
                reading = self._decode_one(probs * classes)
                best.append((own, reading.text))
                found.setdefault(reading.text or plain.text, reading)
        if not least or plain.confidence < SURE:
            limits = search.beam, search.shortest, search.longest, least
            for prefix, confidence in prefix_beam_search(probs, *limits):
                text = " ".join(self._text(prefix).split())
                found.setdefault(text or plain.text, Reading(text, confidence, []))
        return {text: found[text] for text in found if search.allows(text)}

    def _with_spaces(self, probs):
        """(T, nclass) probabilities, a space more probable in gaps that are wider than others."""
        space, classes = self._class_of.get(" ", BLANK), probs.argmax(1)
        begins = (classes != BLANK) & (classes != space) & (np.diff(classes, prepend=BLANK) != 0)
        [begins] = begins.nonzero()
        if space == BLANK or len(begins) < SPACED:
            return probs
        gaps = np.diff(begins)
        probs, wide = probs.copy(), np.repeat(gaps > GAP * np.median(gaps), gaps)
        probs[begins[0] : begins[-1], space][wide] *= SPACE
        return probs / probs.sum(1, keepdims=True)

    def _turned(self, readings):
        """`Reading`s in the order in which their texts are written."""
        if not self.right_to_left:
            return readings
        turned = []
        for reading in readings:
            text, places = reordered(reading.text)
            confidences = [reading.char_confidences[place] for place in places]
            others, rivals = [
                tuple((reordered(other)[0], p) for other, p in texts)
                for texts in (reading.alternatives, reading.rivals)
            ]
            turned.append(Reading(text, reading.confidence, confidences, others, rivals))
        return turned

    def search(self, logits, search):
        """The most probable texts of each image, summed over their alignments.

        Args:
            logits: (N, T, nclass) float array.
            search: a `Search`.

        Returns:
            N `Reading`s, with an empty text and a confidence of 0 where the search
            allows none. A character's confidence is the highest probability among its
            columns in the text's best alignment.

        Raises ValueError for a subset or lexicon that the alphabet has nothing of.
        """
        return self._turned(self._search(logits, search))

    def _search(self, logits, search):
        """`search`, with texts as they look."""
        probs = softmax(logits / self.temperature)
        if search.subset is not None:
            allowed = [BLANK, *(self._class_of[c] for c in search.subset if c in self._class_of)]
            if len(allowed) == 1:
                raise ValueError(f"no character of the subset {search.subset!r} is in the alphabet")
            only = np.zeros_like(probs)
            only[:, :, allowed] = probs[:, :, allowed]
            probs = only / only.sum(2, keepdims=True)
        words = None
        if search.lexicon is not None:
            known = (word for word in search.lexicon if set(word) <= set(self.alphabet))
            words = [*filter(search.allows, known)]
            if not words:
                raise ValueError("no text of the lexicon fits the alphabet and the constraints")
        if self.length is not None and not search.shortest and search.longest is None:
            search = replace(search, shortest=self.length, longest=self.length)
        if words is None and (self.expect_kinds or self.ngrams):
            return [self._expecting(image, search, 0) for image in probs]
        readings = []
        for image in probs:
            if words is None:
                paths = prefix_beam_search(image, search.beam, search.shortest, search.longest)
                found = [(self._text(prefix), probability) for prefix, probability in paths]
            else:
                found = self._choose(image, words)
            (text, confidence), *others = found[: search.top] or [("", 0.0)]
            sure = aligned_probabilities(image, [self._class_of[c] for c in text])
            readings.append(Reading(text, confidence, sure, tuple(others)))
        return readings

    def _choose(self, probs, words):
        """[(word, its probability among ``words``)], the most probable first."""
        parts = []
        for start in range(0, len(words), WORDS):  # of a large lexicon, in bounded memory
            targets, lengths = self.encode(words[start : start + WORDS])
            shape = (len(lengths), *probs.shape)
            columns = np.full(len(lengths), len(probs))
            parts.append(text_probability(np.broadcast_to(probs, shape), targets, columns, lengths))
        scores = np.concatenate(parts)
        scores /= max(scores.sum(), np.finfo(float).tiny)
        if self.right_to_left:
            words = [reordered(word)[0] for word in words]
        return [(words[i], float(scores[i])) for i in np.argsort(-scores, kind="stable")]


def softmax(logits):
    """Probabilities along the last axis, of logits in any shape."""
    probs = np.maximum(logits - logits.max(-1, keepdims=True), LEAST)
    np.exp(probs, out=probs)
    probs /= probs.sum(-1, keepdims=True)
    return probs


def best_path(probs, columns):
    """Greedy decoding: the best class of each column, repeats merged, blanks removed.

    Args:
        probs: (N, T, nclass) probabilities.
        columns: (N,) columns of each image that count.

    Returns:
        (targets, confidences, lengths): the classes of all texts in a row, for each the
        highest probability among the columns that were merged into it, and (N,) the
        number of characters of each text.
    """
    count, total, _ = probs.shape
    inside = np.arange(total) < columns[:, None]
    classes = np.where(inside, probs.argmax(2), BLANK)
    # A run of equal classes starts wherever the class differs from the one before.
    starts = np.ones_like(inside)
    starts[:, 1:] = classes[:, 1:] != classes[:, :-1]
    first = np.flatnonzero(starts)
    run_class = classes.ravel()[first]
    run_best = np.maximum.reduceat(probs.max(2).ravel(), first)
    is_character = run_class != BLANK
    lengths = np.bincount(first[is_character] // total, minlength=count)
    return run_class[is_character], run_best[is_character], lengths


def prefix_beam_search(probs, beam, shortest=0, longest=None, least=0.0):
    """The most probable texts, over all alignments (Graves and Jaitly, ICML 2014).

    Args:
        probs: (T, nclass) probabilities of one image.
        beam: prefixes kept after each column.
        shortest, longest: lengths that a text may have, None: any.
        least: probability in a column below which a class goes on with no prefix.

    Returns:
        [(tuple of classes, probability)], the most probable first, at most ``beam``.
    """
    # What is less probable cannot pass the beam, unless all is improbable.
    order = np.argsort(-probs, 1)[:, : beam + 1]
    allowed = (order != BLANK) & (np.take_along_axis(probs, order, 1) >= least)
    # prefix -> [probability of all paths to it that end in a blank, and in its last class]
    prefixes = {(): [1.0, 0.0]}
    for t, row in enumerate(probs):
        column, candidates = row.tolist(), order[t][allowed[t]].tolist()
        grown = defaultdict(lambda: [0.0, 0.0])
        for prefix, (blank, last) in prefixes.items():
            grown[prefix][0] += (blank + last) * column[BLANK]
            if prefix:
                grown[prefix][1] += last * column[prefix[-1]]
            if longest is not None and len(prefix) == longest:
                continue
            for k in candidates:
                # A repeat of the last class is a new character only behind a blank.
                before = blank if prefix and k == prefix[-1] else blank + last
                if before:
                    grown[(*prefix, k)][1] += before * column[k]
        # A prefix that the columns left cannot complete takes no place in the beam.
        if len(grown) > beam or shortest:
            able = [item for item in grown.items() if len(item[0]) + len(probs) - t > shortest]
            grown = dict(sorted(able, key=lambda item: -sum(item[1]))[:beam])
        prefixes = grown
    found = sorted(((p, sum(parts)) for p, parts in prefixes.items()), key=lambda item: -item[1])
    return [item for item in found if len(item[0]) >= shortest and item[1] > 0]


def aligned_probabilities(probs, targets):
    """For each class of ``targets`` its highest probability in the text's best alignment.

    Args:
        probs: (T, nclass) probabilities of one image.
        targets: (S,) classes of a text that fits the T columns.

    Returns:
        S floats, 0 to 1.
    """
    if not len(targets):
        return []
    states = np.full(2 * len(targets) + 1, BLANK)
    states[1::2] = targets
    skip = np.zeros(len(states), bool)
    skip[2:] = (states[2:] != BLANK) & (states[2:] != states[:-2])
    with np.errstate(divide="ignore"):
        scores = np.log(probs[:, states])  # (T, states)
    best = np.full(len(states), -np.inf)
    best[:2] = scores[0, :2]
    steps = np.zeros(scores.shape, np.int64)  # states that the best path came up by, 0 to 2
    for t in range(1, len(scores)):
        options = np.full((3, len(states)), -np.inf)
        options[0] = best
        options[1, 1:] = best[:-1]
        options[2, 2:] = np.where(skip[2:], best[:-2], -np.inf)
        steps[t] = options.argmax(0)
        best = options.max(0) + scores[t]
    state = len(states) - 1 - int(best[-2] > best[-1])
    confidences = [0.0] * len(targets)
    for t in range(len(scores) - 1, -1, -1):
        if state % 2:
            confidences[state // 2] = max(confidences[state // 2], float(probs[t, states[state]]))
        state -= steps[t, state]
    return confidences


def text_probability(probs, targets, columns, lengths):
    """Probability of texts, over all their alignments with the columns.

    The forward pass of CTC (Graves et al., ICML 2006, section 4.1): the best single
    alignment says little, since a character may as well start one column later.

    Args:
        probs: (N, T, nclass) probabilities.
        targets: (sum of lengths,) the classes of all texts in a row.
        columns: (N,) columns of each image that count.
        lengths: (N,) characters of each text.

    Returns:
        (N,) float64, 0 to 1.
    """
    count, total, _ = probs.shape
    rows = np.arange(count)
    # Each text with blanks around its characters, and blanks behind it up to the longest.
    states = np.full((count, 2 * lengths.max(initial=0) + 1), BLANK)
    row = np.repeat(rows, lengths)
    position = np.arange(len(targets)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    states[row, 2 * position + 1] = targets
    # The blank between two different characters may be left out.
    skip = np.zeros(states.shape)
    skip[:, 2:] = (states[:, 2:] != BLANK) & (states[:, 2:] != states[:, :-2])

    # A path goes on in its state, or steps to the next or, where it may, the one after.
    size = states.shape[1]
    steps = np.zeros((count, size, size)) + np.eye(size) + np.eye(size, k=1)
    steps[:, range(size - 2), range(2, size)] = skip[:, 2:]
    emission = probs[rows[:, None, None], np.arange(total)[:, None], states[:, None]]
    forward = np.zeros((count, 1, size))
    forward[:, 0, :2] = emission[:, 0, :2]
    padded = columns.min(initial=total) < total
    for t in range(1, total):
        step = forward @ steps
        step[:, 0] *= emission[:, t]
        forward = np.where((t < columns)[:, None, None], step, forward) if padded else step
    forward = forward[:, 0]
    # A text ends in its last character or in the blank after it.
    return np.minimum(
        forward[rows, 2 * lengths] + forward[rows, 2 * lengths - 1] * (lengths > 0), 1
    )


def short_text_probability(probs, targets):
    """`text_probability` of one short text, without numpy, whose calls would cost the most.

    Args:
        probs: (T, nclass) probabilities.
        targets: the classes of the text, a list.

    Returns:
        a float, 0 to 1.
    """
    # Of all ways to the column: those that stand on character i, and on the blank before it.
    characters, blanks = [0.0] * len(targets), [1.0] + [0.0] * len(targets)
    repeated = [True, *(a == b for a, b in pairwise(targets))]
    certain = False
    for blank, *emission in probs[:, [BLANK, *targets]].tolist():
        if certain and blank == 1:  # of all ways, nothing has been on a character since
            continue
        certain, before = blank == 1, 0.0  # before: that stood on character i - 1
        for i, probability in enumerate(emission):
            standing, here = characters[i], blanks[i]
            blanks[i] = (here + before) * blank
            here += standing if repeated[i] else standing + before
            characters[i] = here * probability
            before = standing
        blanks[-1] = (blanks[-1] + before) * blank
    return min(1.0, blanks[-1] + sum(characters[-1:]))
