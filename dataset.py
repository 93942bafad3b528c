"""Check a data set: look at every image and label, split them, say what is there and wrong.

    python dataset.py my_images
    python dataset.py labels.csv --text-column plate --normalise

What a data set may be is in label_file.py.
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports: an end without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import contextlib
import hashlib
import os
import random
import re
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from ctc_label_converter import columns_needed
from image import (
    MORE,
    PATCH,
    ImageError,
    Preprocess,
    find_text_lines,
    fitting_preprocess,
    read_image,
)
from keys import (
    LOOK_ALIKES,
    command,
    is_right_to_left,
    load_alphabet,
    named,
    normalised,
    oddities,
    unusable,
)
from label_file import FOUND, SPLITS, LabelOptions, find_samples
from metric import SHEET, data_sheet, save_picture, save_problems, spread

RARE = 5  # a character seen less often is hardly learnt
NEEDS_BIDI = (
    "has a label that is written from right to left, which needs a package that is missing: "
    "pip install python-bidi"
)
WORKERS = os.cpu_count()  # a photo takes 100 MB while it is looked at
QUICK = 0.4  # milliseconds for an image, below which threads wait for each other
KEPT = 10000  # images that are kept decoded between the check and the training
SHOWN = 50  # lines of problems on the screen, at most
LEGIBLE = 10  # pixels: text that is not as high is hardly read


def problem_list(problems):
    """`Problem`s as one text of at most SHOWN lines, their number first, equal ones as one."""
    groups = defaultdict(list)
    for problem in problems:
        groups[problem.text].append(problem)
    lines = []
    for text, group in groups.items():
        if len(group) <= 4:
            lines += map(str, group)
        else:
            first = ", ".join(problem.place for problem in group[:3])
            lines.append(f"{len(group)} times: {text}: {first}, ... {group[-1].place}")
    if len(lines) > SHOWN:
        lines = [*lines[:SHOWN], f"and {len(lines) - SHOWN} lines more"]
    kind = "problem" if len(problems) == 1 else "problems"
    return "\n".join([f"{len(problems)} {kind} in the data:", *lines])


@dataclass(frozen=True)
class DataOptions:
    """How a data set is read, and what its images and labels have to be.

    Attributes:
        alphabet: the characters that labels may hold. None: those that they hold.
        preprocess: a `Preprocess`. None: one that fits the images and labels.
        height, width, trim: of the one that fits, None for what fits.
        learnt: the height that a network reads already, None for a new network.
        length: characters that every label must have, None for any number.
        labels: a `LabelOptions`.
        normalise: bring labels into one form, see `keys.normalised`.
        ignore_case: make labels lower case (upper case, if the alphabet has no lower).
        val_fraction: share of the images that becomes the test set where none is given,
            1 for all of them.
        seed: of that choice. Images of the same content stay together.
        limit: take only the first so many training images, None for all.
    """

    alphabet: str | None = None
    preprocess: Preprocess | None = None
    height: int | None = None
    width: int | None = None
    trim: bool | None = None
    learnt: int | None = None
    length: int | None = None
    labels: LabelOptions = FOUND
    normalise: bool = False
    ignore_case: bool = False
    val_fraction: float = 0.1
    seed: int = 0
    limit: int | None = None


class Checked(NamedTuple):
    """A data set that was looked at.

    train, test: the `Sample`s that can be used.
    sizes: {path: (width, height) of what is resized: the image, or what it is cut to}.
    alphabet: a string.
    preprocess: a `Preprocess`.
    problems: a `Problem` for each line or image that cannot be used.
    notes: the lines of the report.
    pixels: {path: what the preprocess makes of it}, of no image where it was not known before
        or there are many.
    """

    train: list
    test: list
    sizes: dict
    alphabet: str
    preprocess: Preprocess
    problems: list
    notes: list
    pixels: dict

    def widths(self, samples):
        """The pixels that each of ``samples`` is wide after preprocessing."""
        return [self.preprocess.width_of(*self.sizes[sample.path]) for sample in samples]


def check(data, options=None, splits=SPLITS):
    """Look at every image and label of a data set.

    Args:
        data: see `find_samples`.
        options: a `DataOptions`, None for its defaults.
        splits: those that are wanted.

    Returns:
        a `Checked`.

    Raises ValueError where there is no data set at all.
    """
    options = options or DataOptions()
    found = find_samples(data, options.labels)
    samples, notes = _wanted(found.samples, options, splits)
    looks, refused = _look_at_all(samples, options)
    refused += _unusable(samples)
    bad = {sample.where for sample, _ in refused}
    readable = {split: [s for s in own if s.where not in bad] for split, own in samples.items()}
    parts, split_note = _split(readable, looks, options, refused)
    refused += _repeated(parts, looks)
    usable = [sample for split in splits for sample in parts[split]]
    alphabet = options.alphabet
    if alphabet is None:
        alphabet = "".join(sorted({c for sample in usable for c in sample.label}))
    preprocess = options.preprocess or _fitting(usable, looks, options)
    sizes = {path: look.resized(preprocess.trim) for path, look in looks.items()}
    refused += _misfits(usable, sizes, set(alphabet), preprocess, options.length)
    problems = [*found.problems, *(sample.problem(text) for sample, text in refused)]
    bad = {sample.where for sample, _ in refused}
    train, test = ([s for s in parts[split] if s.where not in bad] for split in SPLITS)
    notes = [found.notes[0] + split_note, *found.notes[1:], *notes]
    notes += _report(train, test, looks, alphabet)
    notes += _warnings([*train, *test], looks, preprocess)
    pixels = {path: look.pixels for path, look in looks.items() if look.pixels is not None}
    return Checked(train, test, sizes, alphabet, preprocess, problems, notes, pixels)


def case_folding(alphabet):
    """What makes texts alike in case: `str.lower`, `str.upper` where an alphabet has no lower."""
    return str.upper if alphabet and alphabet.upper() == alphabet else str.lower


def _wanted(samples, options, splits):
    """({split: its samples} of those wanted and of "all", what was done to labels)."""
    fold, changed = case_folding(options.alphabet), 0
    wanted = {}
    for split, own in samples.items():
        if split not in (*splits, "all"):
            continue
        if split == "train":
            own = own[: options.limit]
        if options.normalise:
            mended = [sample._replace(label=normalised(sample.label)) for sample in own]
            changed += sum(a != b for a, b in zip(own, mended, strict=True))
            own = mended
        if options.ignore_case:
            own = [sample._replace(label=fold(sample.label)) for sample in own]
        wanted[split] = own
    return wanted, [f"{changed} labels were changed by --normalise"] if options.normalise else []


def _unusable(samples):
    """[(sample, problem)] of labels that no file of labels or weights could hold."""
    found = []
    for own in samples.values():
        for sample in own:
            controls = unusable(sample.label)
            if controls:
                shown = ", ".join(map(named, controls))
                found.append((sample, f"has a label with {shown}, which no label can hold"))
            elif not sample.label:
                found.append((sample, "has an empty label"))
            elif is_right_to_left(sample.label) and not find_spec("bidi"):
                found.append((sample, NEEDS_BIDI))
    return found


def _fitting(samples, looks, options):
    """The `Preprocess` that fits, where none is given."""
    trim = options.trim
    # What is cut to one line loses the other.
    if trim is None and sum(looks[s.path].lines > 1 for s in samples) > len(samples) / 4:
        trim = False
    return fitting_preprocess(
        [looks[s.path].size for s in samples],
        [looks[s.path].text_size for s in samples],
        [columns_needed(s.label) for s in samples],
        options.height, options.width, trim, options.learnt,
    )  # fmt: skip


def _warnings(samples, looks, preprocess):
    """What may be wrong: kinds of labels and images, with their number and the first of them."""
    kinds = defaultdict(list)
    letters = {c for sample in samples for c in sample.label}
    alike = {c for c in letters if LOOK_ALIKES.get(c) in letters}
    for sample in samples:
        for kind in oddities(sample.label):
            kinds[f"labels have {kind} (--normalise mends that)"].append(sample)
        for character in sorted(alike & set(sample.label)):
            kinds[
                f"labels have {named(character)}, which looks like {LOOK_ALIKES[character]!r}, "
                "which others have"
            ].append(sample)
        look = looks[sample.path]
        width, height = look.resized(preprocess.trim)
        if look.lines > 1:
            kinds["images seem to hold two lines of text, a label has one"].append(sample)
        if look.more:
            kinds["images have more pages or frames than the first, which is read"].append(sample)
        if height > 2 * width and len(sample.label) > 1:
            kinds["images are much higher than wide: is their text turned?"].append(sample)
        # Of small images nobody can say where their text is.
        large = height > 2 * preprocess.height
        if large and look.text_size[1] * preprocess.height < LEGIBLE * height:
            kinds[
                f"images have text of fewer than {LEGIBLE} pixels when they are resized: cut "
                "them to their text, or --trim"
            ].append(sample)
    return [
        f"{len(found)} {kind}: {', '.join(sample.where for sample in found[:3])}"
        for kind, found in kinds.items()
    ]


class Look(NamedTuple):
    """What is known of an image that was read.

    size: (width, height) in pixels.
    text_size: the same of its text box, or of the image where none was wanted.
    lines: of text, as far as they can be told apart.
    more: whether its file has pages or frames that are not read.
    digest: of its pixels.
    pixels: what a preprocess made of it, None without one.
    """

    size: tuple
    text_size: tuple
    lines: int
    more: bool
    digest: bytes
    pixels: np.ndarray | None = None

    def resized(self, trim):
        """The size of what is resized: the image, or what ``trim`` leaves of it."""
        return self.text_size if trim else self.size


def look_at(source, find_text=True, preprocess=None):
    """The `Look` of an image that `read_image` reads, and what that raises."""
    image = read_image(source)
    box, lines = find_text_lines(image)[:2] if find_text else ((0, 0, *image.size), 1)
    digest = hashlib.blake2b(image.tobytes(), digest_size=16).digest()
    text_size, pixels = (box[2] - box[0], box[3] - box[1]), None
    if preprocess:
        with contextlib.suppress(ImageError):  # whether it fits is asked later
            pixels = preprocess(image)
    return Look(image.size, text_size, lines, image.info.get(MORE, False), digest, pixels)


def for_each(function, items, what):
    """A list of ``function(item)``, under a bar; by threads where they help.

    Args:
        what: is done, for the bar.
    """
    bar, began = tqdm(total=len(items), desc=what, leave=False, unit="img"), time.perf_counter()
    with bar, ThreadPoolExecutor(WORKERS) as pool:
        results = []
        while len(results) < len(items):
            part = items[len(results) : len(results) + (64 if results else 8)]
            quick = 1000 * (time.perf_counter() - began) <= QUICK * len(results)
            results += map(function, part) if quick or not results else pool.map(function, part)
            bar.update(len(part))
    return results


def _look_at_all(samples, options):
    """({path: `Look`}, [(sample, what is wrong with its image)])."""
    trim = options.preprocess.trim if options.preprocess else options.trim
    keep = options.preprocess if sum(map(len, samples.values())) <= KEPT else None

    def look(sample):
        try:
            return look_at(sample.path, trim is not False, keep)
        except ImageError as error:
            return str(error)

    listed = [sample for own in samples.values() for sample in own]
    results = for_each(look, listed, "checking")
    pairs = list(zip(listed, results, strict=True))
    looks = {sample.path: result for sample, result in pairs if isinstance(result, Look)}
    return looks, [(sample, result) for sample, result in pairs if isinstance(result, str)]


def _split(samples, looks, options, refused):
    """({split: samples}, what to say of it); the same content is always on one side.

    Of the splits that are not wanted, none has samples. One image is too few, unless some
    were ``refused``, of which the reasons say more.
    """
    parts = {split: samples.get(split, []) for split in SPLITS}
    unsplit, fraction = samples["all"], options.val_fraction
    if not unsplit:
        return parts, ""
    if fraction == 1:
        return {"train": [], "test": unsplit}, "; all of the images are test images"
    groups = defaultdict(list)
    for sample in unsplit:
        groups[looks[sample.path].digest].append(sample)
    groups = list(groups.values())
    if len(groups) < 2 and refused:
        return {"train": unsplit, "test": []}, ""
    if len(groups) < 2:
        raise ValueError(f"{unsplit[0].where}: one image is too few, training and test need some")
    random.Random(options.seed).shuffle(groups)
    count = min(max(1, round(fraction * len(groups))), len(groups) - 1)
    test = {sample for group in groups[:count] for sample in group}
    if "train" in samples:
        parts["train"] = [s for s in unsplit if s not in test][: options.limit]
    if "test" in samples:
        parts["test"] = [s for s in unsplit if s in test]
    return parts, f"; {fraction:.0%} of the images are the test set (--val-fraction, --seed)"


def _repeated(parts, looks):
    """[(sample, problem)]: test images that are trained on, and images with two labels."""
    problems, first = [], {}
    for split in reversed(SPLITS):  # of a pair, the training image is the one to leave out
        for sample in parts[split]:
            other_split, other = first.setdefault(looks[sample.path].digest, (split, sample))
            if other_split != split:
                problems.append((sample, f"is also a test image, {other.where}"))
            elif other.label != sample.label:
                text = f"is {sample.label!r} here and {other.label!r} in {other.where}"
                problems.append((sample, text))
    return problems


def _misfits(samples, sizes, known, preprocess, length):
    """[(sample, why the network cannot learn that its image has this label)]."""
    found = ((s, _misfit(s.label, sizes[s.path], known, preprocess, length)) for s in samples)
    return [(sample, problem) for sample, problem in found if problem]


def _misfit(label, size, known, preprocess, length):
    """What `_misfits` says of one label and image, None if it fits."""
    unknown = sorted(set(label) - known)
    if unknown:
        return f"is labelled {label!r}, {' '.join(map(repr, unknown))} not in the alphabet"
    if length not in (None, len(label)):
        count = f"{len(label)} characters, not {length} (--length, 0 for any)"
        return f"is labelled {label!r}, which has {count}"
    try:
        columns = preprocess.width_of(*size) // PATCH
    except ImageError as error:
        return str(error)
    needed = columns_needed(label)
    if needed > columns:
        return (
            f"is labelled {label!r}, which needs {needed} columns of {PATCH} pixels, it has "
            f"{columns} at height {preprocess.height}"
        )
    return None


def _report(train, test, looks, alphabet):
    """The lines that say what a data set holds."""
    samples = [*train, *test]
    if not samples:
        return []
    widths, heights = zip(*(looks[sample.path].size for sample in samples), strict=True)
    counts = Counter(dict.fromkeys(alphabet, 0))
    counts.update(character for sample in train or test for character in sample.label)
    ranked = counts.most_common()
    if len(ranked) > 120:
        ranked = [*ranked[:40], ("...", None), *ranked[-40:]]
    frequencies = " ".join(
        character if times is None else f"{_visible(character)} {times}x"
        for character, times in ranked
    )
    rare = sorted(character for character, times in counts.items() if times < RARE)
    lengths = Counter(len(sample.label) for sample in samples)
    lines = [
        f"{len(train)} training and {len(test)} test images, {spread(widths)} pixels wide, "
        f"{spread(heights)} high",
        "label lengths: " + ", ".join(f"{length} {n}x" for length, n in sorted(lengths.items())),
        f"alphabet, {len(alphabet)} characters: {frequencies}",
    ]
    if rare and train:
        shown = " ".join(map(_visible, rare[:100])) + (" ..." if len(rare) > 100 else "")
        lines.append(f"seen fewer than {RARE} times in training, {len(rare)} characters: {shown}")
    return lines


def _visible(character):
    """A character as it is, or its escape where it would not be seen."""
    return character if character.isprintable() and not character.isspace() else repr(character)


def add_data_flags(parser):
    """Add the flags that say how a data set is read, those of `data_options`."""
    parser.add_argument(
        "--alphabet",
        help="an alphabet's name or a UTF-8 text file (default: the task's, else the labels')",
    )
    parser.add_argument("--ignore-case", action="store_true", help="make all labels lower case")
    parser.add_argument(
        "--normalise",
        action="store_true",
        help="bring labels that look equal into one form: composed, half width, without quotes, "
        "edge and zero-width spaces",
    )
    parser.add_argument(
        "--label-separator",
        metavar="TEXT",
        help="where file names are labels: what ends the label, '' for nothing (default: found)",
    )
    parser.add_argument(
        "--label-regex",
        metavar="REGEX",
        help="where file names are labels: matches them without suffix, the first group is the "
        "label",
    )
    parser.add_argument(
        "--image-column", metavar="NAME", help="of a table, or its number (default: found)"
    )
    parser.add_argument(
        "--text-column", metavar="NAME", help="of a table, or its number (default: found)"
    )
    parser.add_argument(
        "--val-fraction",
        type=float,
        metavar="F",
        help="share of the images that becomes the test set where none is given (default: "
        f"{DataOptions.val_fraction})",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="same seed, same test images and same weights (default: %(default)s)",
    )


def data_options(args, **others):
    """The `DataOptions` of parsed flags, with ``others`` that the flags do not give.

    Raises ValueError for flags that cannot be used.
    """
    if args.val_fraction is not None:
        if not 0 < args.val_fraction < 1:
            raise ValueError(f"--val-fraction {args.val_fraction}: must be between 0 and 1")
        others["val_fraction"] = args.val_fraction
    if args.label_regex is not None:
        try:
            groups = re.compile(args.label_regex).groups
        except re.error as error:
            raise ValueError(f"--label-regex {args.label_regex}: {error}") from None
        if not groups:
            raise ValueError(f"--label-regex {args.label_regex}: needs a group for the label")
    labels = LabelOptions(
        args.label_separator, args.label_regex, args.image_column, args.text_column
    )
    flags = {"normalise": args.normalise, "ignore_case": args.ignore_case, "seed": args.seed}
    return DataOptions(labels=labels, **flags, **others)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, metavar="DATA", help="folder or label file")
    add_data_flags(parser)
    parser.add_argument(
        "--sheet",
        type=Path,
        metavar="OUT.png",
        help="where to save a picture of random images with their labels (default: "
        "save_model/DATA.data.png)",
    )
    args = parser.parse_args()
    alphabet = load_alphabet(args.alphabet) if args.alphabet else None
    checked = check(args.data, data_options(args, alphabet=alphabet))
    print("\n".join(checked.notes))
    print(f"to train on it, images are {checked.preprocess}")
    samples = checked.train + checked.test
    name = args.data.resolve().stem
    sheet = args.sheet or Path("save_model", f"{name}.data.png")
    sheet.parent.mkdir(parents=True, exist_ok=True)
    if samples:
        save_picture(sheet, data_sheet(samples, checked.preprocess, args.seed))
        print(f"{sheet} shows {min(SHEET, len(samples))} of the images, as the network gets them")
    if checked.problems:
        path = sheet.with_name(f"{name}.problems.txt")
        save_problems(path, checked.problems)
        raise ValueError(f"{problem_list(checked.problems)}\nthe whole list is in {path}")
    print("no problems")


if __name__ == "__main__":
    command(main)
