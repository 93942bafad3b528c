"""Find the images and labels of a data set, check them, split them and say what is there.

    python dataset.py my_images        # checks a data set: what is there, what is wrong

A data set is a folder with train.txt and test.txt; or with one label file, or such a file,
of which a part becomes the test set; or a folder of images whose file names are their
labels. A label file is UTF-8, one line per image, paths relative to the file's folder:

    train/00000.png<TAB>pYaq
"""

import argparse
import codecs
import random
import re
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tqdm.contrib.concurrent import thread_map

from ctc_label_converter import columns_needed
from image import (
    PATCH,
    SUFFIXES,
    ImageError,
    Look,
    Preprocess,
    contact_sheet,
    fitting_preprocess,
    look_at,
    read_image,
    save_picture,
)
from keys import load_alphabet

SPLITS = ("train", "test")
SEPARATORS = "_-.#@~"  # what may stand between a label and the rest of a file name
RARE = 5  # a character seen less often is hardly learnt
SHEET = 48  # images on the sheet of a data set


class Sample(NamedTuple):
    """An image of a data set.

    where: what an error names, "train.txt:7" or the image's path.
    path: of the image.
    label: its text.
    """

    where: str
    path: Path
    label: str

    def problem(self, text):
        """``text``, which continues a sentence about the image, with all that names it."""
        if self.where == str(self.path):
            return f"{self.path}: {text}"
        return f"{self.where}: {self.path} {text}"


class Found(NamedTuple):
    """The samples of a data set, before anybody has looked at its images.

    samples: {"train": [`Sample`], "test": [...], "all": [...]}, "all" still has to be split.
    problems: a text for each line or name that is no sample.
    notes: what was taken for the labels, and what was passed over.
    """

    samples: dict
    problems: list
    notes: list


def _label_lines(path):
    """[(line number, image path as written, label)] of a label file, and its problems."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: the label file cannot be read ({error.strerror})") from None
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f"{path}:1: is not UTF-8, save the label file as UTF-8")
    lines, problems = [], []
    # Not splitlines: a label may hold characters that only it takes for line breaks.
    for number, line in enumerate(content.removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        line = line.removesuffix(b"\r")
        if not line:
            continue
        try:
            image, tab, label = line.decode("utf-8").partition("\t")
        except UnicodeDecodeError:
            problems.append(f"{path}:{number}: is not UTF-8, save the label file as UTF-8")
            continue
        if not tab:
            problems.append(f"{path}:{number}: no tab between the image's path and its label")
        elif not image:
            problems.append(f"{path}:{number}: no image path before the tab")
        elif not label:
            problems.append(f"{path}:{number}: the label is empty")
        else:
            lines.append((number, image, label))
    if not lines and not problems:
        raise ValueError(f"{path}: the data set is empty, it needs lines of image<TAB>label")
    return lines, problems


def read_label_file(path):
    """Read a label file. A byte-order mark and CRLF line ends are accepted.

    Returns:
        [(line number, image path as written, label)], blank lines left out.

    Raises ValueError naming every line without a tab, a path or a label.
    """
    lines, problems = _label_lines(Path(path))
    if problems:
        raise ValueError("\n".join(problems))
    return lines


def find_separators(stems):
    """The characters of SEPARATORS at which the labels of file names without suffix end.

    A separator is in every name, or only counters and hexadecimal numbers follow it:
    8npd5.png, 8npd5-0.png, 8npd5_3f2a.png.
    """
    found = ""
    for separator in SEPARATORS:
        rests = [stem.partition(separator)[2] for stem in stems if separator in stem]
        counts = all(re.fullmatch(r"\d+|[0-9a-f-]{4,}", rest) for rest in rests)
        if rests and (len(rests) == len(stems) or counts):
            found += separator
    return found


def _named_images(folder, separator):
    """The `Found` of a folder of images whose names are their labels."""
    paths, ignored = [], []
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in SUFFIXES and not hidden:
            paths.append(path)
        elif path.is_file():
            ignored.append(path.name)
    if not paths:
        raise ValueError(
            f"{folder}: holds neither a label file (train.txt and test.txt, or one of any name, "
            "with lines of image<TAB>label) nor images whose names are their labels"
        )
    separators = find_separators([path.stem for path in paths])
    end = f"[{re.escape(separators)}]" if separators else r"\Z"
    if separator is not None:
        separators, end = separator, re.escape(separator) or r"\Z"
    split_folders = all((folder / split).is_dir() for split in SPLITS)
    samples, problems = {split: [] for split in (*SPLITS, "all")}, []
    for path in paths:
        label = re.split(end, path.stem, maxsplit=1)[0]
        first = path.relative_to(folder).parts[0]
        split = first if split_folders and first in SPLITS else "all"
        if label:
            samples[split].append(Sample(str(path), path, label))
        else:
            problems.append(f"{path}: its name holds no label before {separators!r}")
    rule = f"up to {' or '.join(map(repr, separators))}" if separators else "as a whole"
    notes = [f"labels are the file names, {rule} (--label-separator): {paths[0].name}"]
    if ignored:
        shown = ", ".join(ignored[:5]) + (", ..." if len(ignored) > 5 else "")
        notes.append(f"{len(ignored)} other files are not read: {shown}")
    return Found(samples, problems, notes)


def _label_files(data):
    """{split: label file} of a data set, empty where it has none."""
    if data.is_file():
        return {"all": data}
    if not data.is_dir():
        raise ValueError(f"{data}: there is no such folder or label file")
    files = {s: data / f"{s}.txt" for s in SPLITS if (data / f"{s}.txt").is_file()}
    if list(files) == ["train"]:
        return {"all": files["train"]}
    if files:
        return files
    listed = []
    for path in sorted(data.glob("*.txt")):
        with path.open("rb") as file:
            if b"\t" in file.read(4096):
                listed.append(path)
    if len(listed) > 1:
        names = ", ".join(path.name for path in listed)
        raise ValueError(f"{data}: which label file is meant, {names}? Name it: --data FILE")
    return {"all": listed[0]} if listed else {}


def find_samples(data, separator=None):
    """Find out how a data set is kept, and list its samples.

    Args:
        data: path of a folder or a label file, see above.
        separator: what ends a label in a file name, "" for nothing. None: find it.

    Returns:
        a `Found`.

    Raises ValueError where there is no data set, or more than one could be meant.
    """
    data = Path(data)
    files = _label_files(data)
    if not files:
        return _named_images(data, separator)
    samples, problems = {split: [] for split in (*SPLITS, "all")}, []
    for split, file in files.items():
        lines, bad = _label_lines(file)
        problems += bad
        samples[split] = [
            Sample(f"{file}:{number}", file.parent / image, label) for number, image, label in lines
        ]
    return Found(samples, problems, [f"labels are in {' and '.join(map(str, files.values()))}"])


def problem_list(problems):
    """All problems as one text, their number first."""
    kind = "problem" if len(problems) == 1 else "problems"
    return "\n".join([f"{len(problems)} {kind} in the data:", *problems])


@dataclass(frozen=True)
class DataOptions:
    """How a data set is read, and what its images and labels have to be.

    Attributes:
        alphabet: the characters that labels may hold. None: those that they hold.
        preprocess: a `Preprocess`. None: one that fits the images and labels.
        height, width, trim: of the one that fits, None for what fits.
        length: characters that every label must have, None for any number.
        separator: see `find_samples`.
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
    length: int | None = None
    separator: str | None = None
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
    problems: a text for each line or image that cannot be used.
    notes: the lines of the report.
    """

    train: list
    test: list
    sizes: dict
    alphabet: str
    preprocess: Preprocess
    problems: list
    notes: list

    def widths(self, samples):
        """The pixels that each of ``samples`` is wide after preprocessing."""
        return [self.preprocess.width_of(*self.sizes[sample.path]) for sample in samples]


def check(data, options=DataOptions(), splits=SPLITS):
    """Look at every image and label of a data set.

    Args:
        data: see `find_samples`.
        options: a `DataOptions`.
        splits: those that are wanted.

    Returns:
        a `Checked`.

    Raises ValueError where there is no data set at all.
    """
    found = find_samples(data, options.separator)
    samples = _wanted(found.samples, options, splits)
    looks, refused = _look_at_all(samples, options)
    readable = {split: [s for s in own if s.path in looks] for split, own in samples.items()}
    parts, split_note = _split(readable, looks, options)
    refused += _repeated(parts, looks)
    usable = [sample for split in splits for sample in parts[split]]
    alphabet = options.alphabet
    if alphabet is None:
        alphabet = "".join(sorted({c for sample in usable for c in sample.label}))
    preprocess = options.preprocess or fitting_preprocess(
        [looks[s.path].size for s in usable],
        [looks[s.path].text_size for s in usable],
        [columns_needed(s.label) for s in usable],
        options.height, options.width, options.trim,
    )  # fmt: skip
    sizes = {path: look.resized(preprocess.trim) for path, look in looks.items()}
    refused += _misfits(usable, sizes, set(alphabet), preprocess, options.length)
    problems = [*found.problems, *(sample.problem(text) for sample, text in refused)]
    bad = {sample.where for sample, _ in refused}
    train, test = ([s for s in parts[split] if s.where not in bad] for split in SPLITS)
    notes = [found.notes[0] + split_note, *found.notes[1:]]
    notes += _report(train, test, looks, alphabet)
    return Checked(train, test, sizes, alphabet, preprocess, problems, notes)


def _wanted(samples, options, splits):
    """The samples of the splits that are wanted and of "all", with their case folded if asked."""
    fold = str
    if options.ignore_case:
        alphabet = options.alphabet
        fold = str.upper if alphabet and alphabet.upper() == alphabet else str.lower
    wanted = {
        split: [sample._replace(label=fold(sample.label)) for sample in own]
        for split, own in samples.items()
        if split in (*splits, "all")
    }
    if "train" in wanted:
        wanted["train"] = wanted["train"][: options.limit]
    return wanted


def _look_at_all(samples, options):
    """({path: `Look`}, [(sample, what is wrong with its image)])."""
    trim = options.preprocess.trim if options.preprocess else options.trim

    def look(sample):
        try:
            return look_at(sample.path, find_text=trim is not False)
        except ImageError as error:
            return str(error)

    listed = [sample for own in samples.values() for sample in own]
    results = thread_map(look, listed, desc="checking", leave=False, unit="img")
    pairs = list(zip(listed, results, strict=True))
    looks = {sample.path: result for sample, result in pairs if isinstance(result, Look)}
    return looks, [(sample, result) for sample, result in pairs if isinstance(result, str)]


def _split(samples, looks, options):
    """({split: samples}, what to say of it); the same content is always on one side.

    Of the splits that are not wanted, none has samples.
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


def _spread(values):
    """The range of some numbers, with their median where it is a range."""
    values = sorted(values)
    low, middle, high = values[0], values[len(values) // 2], values[-1]
    return f"{low}" if low == high else f"{low} to {high} (median {middle})"


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
        f"{len(train)} training and {len(test)} test images, {_spread(widths)} pixels wide, "
        f"{_spread(heights)} high",
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


def data_sheet(samples, seed=0):
    """A contact sheet of SHEET random images with their labels, an RGB image."""
    chosen = random.Random(seed).sample(samples, min(SHEET, len(samples)))
    images = [read_image(sample.path) for sample in chosen]
    return contact_sheet(images, [sample.label for sample in chosen], columns=6)


def add_data_flags(parser):
    """Add the flags that say how a data set is read, those of `data_options`."""
    parser.add_argument(
        "--alphabet",
        help="an alphabet's name or a UTF-8 text file (default: the task's, else the labels')",
    )
    parser.add_argument("--ignore-case", action="store_true", help="make all labels lower case")
    parser.add_argument(
        "--label-separator",
        metavar="TEXT",
        help="where file names are labels: what ends the label, '' for nothing (default: found)",
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
    return DataOptions(
        separator=args.label_separator, ignore_case=args.ignore_case, seed=args.seed, **others
    )


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
    sys.stdout.reconfigure(encoding="utf-8")  # whatever the console's own is
    alphabet = load_alphabet(args.alphabet) if args.alphabet else None
    checked = check(args.data, data_options(args, alphabet=alphabet))
    print("\n".join(checked.notes))
    print(f"to train on it, images are {checked.preprocess}")
    samples = checked.train + checked.test
    if samples:
        sheet = args.sheet or Path("save_model", f"{args.data.resolve().stem}.data.png")
        sheet.parent.mkdir(parents=True, exist_ok=True)
        save_picture(sheet, data_sheet(samples, args.seed))
        print(f"{sheet} shows {min(SHEET, len(samples))} of the images")
    if checked.problems:
        raise ValueError(problem_list(checked.problems))
    print("no problems")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"dataset.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit("dataset.py: interrupted")
