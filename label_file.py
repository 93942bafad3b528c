"""Where the labels of images are kept: every form that people have is read, or refused.

A data set is a folder, or one file that names its images. Of a folder these are taken, the
first that is there:

    train.* and test.* (or val.*, valid.*, dev.*)    label files, or folders that hold either
    one file that names the images                   of any name
    x.gt.txt or x.txt beside x.png                   the text of one image each
    8npd5.png, 8npd5-0.png                           the names of the images are their labels

A label file is UTF-8. It has lines of image<TAB>text, image text, or image, "text"; or it is a
table with or without a header, JSON (image to text, or a list of objects) or JSON lines.
"""

import contextlib
import csv
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from image import SUFFIXES, ImageFinder, find_images
from keys import NOT_UTF8, labels_of_names, text_lines

SPLITS = ("train", "test")
# Names of label files and folders, the best first.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "test": ("test", "testing", "val", "valid", "validation", "dev", "eval"),
}
KINDS = (".txt", ".csv", ".tsv", ".json", ".jsonl")
IMAGE_COLUMNS = {
    "image", "images", "img", "file", "filename", "file_name", "image_name", "img_name",
    "image_file", "path", "filepath", "file_path", "image_path", "img_path", "image_id", "id",
    "name", "url",
}  # fmt: skip
TEXT_COLUMNS = {
    "text", "texts", "label", "labels", "word", "words", "value", "values", "plate", "plate_text",
    "plate_number", "number", "transcription", "transcript", "ground_truth", "gt", "caption",
    "string", "target", "content", "annotation", "reading", "solution", "captcha",
}  # fmt: skip
WHICH = "{}: which label file is meant, {}? Name it: --data FILE"
UNREADABLE = "unreadable.txt"  # names images without a label, see label.py
SNIFFED = 200  # lines that decide how a file is understood
TABBED, SPACED = "image<TAB>text", "image text"


class Problem(NamedTuple):
    """What cannot be used, and why.

    place: the line or file, "train.txt:7", and the image if that is another.
    text: continues a sentence about it.
    """

    place: str
    text: str

    def __str__(self):
        return f"{self.place}: {self.text}"


class Sample(NamedTuple):
    """An image of a data set.

    where: its place, "train.txt:7" or the image's path.
    path: of the image.
    label: its text.
    """

    where: str
    path: Path
    label: str

    def problem(self, text):
        """The `Problem` that ``text`` says of the image."""
        place = self.where if self.where == str(self.path) else f"{self.where}: {self.path}"
        return Problem(place, text)


class Found(NamedTuple):
    """The samples of a data set, before anybody has looked at its images.

    samples: {"train": [`Sample`], "test": [...], "all": [...]}, "all" still has to be split.
    problems: a `Problem` for each line or name that is no sample.
    notes: what was taken for the labels, and what was passed over.
    """

    samples: dict
    problems: list
    notes: list


class Rows(NamedTuple):
    """What a label file holds.

    entries: [(line number, image as written, text)].
    problems: a `Problem` for each of the lines that are no entry.
    form: how it was understood, in words.
    """

    entries: list
    problems: list
    form: str


@dataclass(frozen=True)
class LabelOptions:
    """What flags say of how labels are kept.

    Attributes:
        separator: what ends a label in a file name, "" for nothing. None: find it.
        regex: of file names without suffix, whose first group is the label. None: none.
        image_column, text_column: of tables, a name or a number from 1. None: find them.
        names: whether the names of images are labels, where nothing else is.
    """

    separator: str | None = None
    regex: str | None = None
    image_column: str | None = None
    text_column: str | None = None
    names: bool = True


FOUND = LabelOptions()  # all of it is to be found out


def read_label_file(path, options=FOUND):
    """Read a label file of any form, see above.

    Returns:
        [(line number, image path as written, label)], blank lines left out.

    Raises ValueError naming every line that is no entry, or a file that is not understood.
    """
    path = Path(path)
    rows = _read(path, ImageFinder(path.parent), options)
    if rows.problems:
        raise ValueError("\n".join(map(str, rows.problems)))
    return rows.entries


def _read(path, images, options):
    """The `Rows` of a label file. Raises ValueError where it is not understood."""
    lines, problems = _lines(path)
    start = lines[0][1].lstrip()[:1] if lines else ""
    each = len(lines) > 1 and lines[0][1].rstrip().endswith("}")  # an object per line
    if not lines and not problems:
        raise ValueError(f"{path}: the data set is empty, it needs lines of image<TAB>label")
    if path.suffix.lower() == ".jsonl" or (start == "{" and each):
        rows = _read_json(path, lines, images, options)
    elif path.suffix.lower() == ".json" or start in ("{", "["):
        text = "\n".join(line for _, line in lines)
        rows = _read_json(path, [(1, text)], images, options)
    else:
        rows = _read_lines(path, lines, images, options)
    return rows._replace(problems=[*problems, *rows.problems])


def _lines(path):
    """[(line number, text)] of the lines that are not blank, and a `Problem` for the others."""
    lines, bad = text_lines(path)
    return lines, [Problem(f"{path}:{number}", NOT_UTF8) for number in bad]


def _read_json(path, texts, images, options):
    """The `Rows` of [(line number, JSON)]: {image: text}, [{...}, ...], or an object per line."""
    found, problems = [], []
    for number, text in texts:
        try:
            # Pairs, so that an image with two labels has two.
            found.append((number, json.loads(text, object_pairs_hook=tuple)))
        except ValueError as error:
            problems.append(Problem(f"{path}:{number}", f"is no JSON ({error})"))
    if len(texts) == 1 and found and isinstance(found[0][1], list | tuple):
        found = list(enumerate(found[0][1], 1))  # one text for all: its entries count as lines
    if found and all(isinstance(entry, tuple) and _is_pair(entry) for _, entry in found):
        table = [(number, list(pair)) for number, pair in found]
        return _rows(path, table, (2, 0, 1), "JSON, image to text", problems)
    objects = [
        (number, dict(entry))
        for number, entry in found
        if isinstance(entry, tuple) and entry and all(map(_is_pair, entry))
    ]
    if problems and not found:
        raise ValueError(str(problems[0]))
    if not objects or len(objects) < len(found):
        raise ValueError(f"{path}: needs an object image to text, or a list of objects")
    names = list(dict.fromkeys(name for _, entry in objects[:SNIFFED] for name in entry))
    table = [(number, [entry.get(name) for name in names]) for number, entry in objects]
    image, text = _choose_columns(path, names, table, images, options)
    form = f"JSON, {names[image]} and {names[text]}"
    return _rows(path, table, (len(names), image, text), form, problems)


def _is_pair(value):
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str)


def _rows(path, table, columns, form, problems=()):
    """The `Rows` of [(number, fields)]. columns: (number of fields, the image's, the text's)."""
    count, image, text = columns
    entries, problems = [], list(problems)
    for number, row in table:
        problem = None
        if len(row) < 2:
            what = {TABBED: "tab", SPACED: "space"}.get(form, "delimiter")
            problem = f"no {what} between the image's path and its label"
        elif len(row) != count:
            problem = f"has {len(row)} columns, not {count}"
        elif not isinstance(row[image], str) or not isinstance(row[text], str):
            problem = "holds no text in quotes for its image or its label"
        elif not row[image]:
            problem = "no image path before the label"
        elif not row[text]:
            problem = "the label is empty"
        if problem:
            problems.append(Problem(f"{path}:{number}", problem))
        else:
            entries.append((number, row[image], row[text]))
    return Rows(entries, problems, form)


def _choose_columns(path, names, table, images, options):
    """(index of the image's column, index of the text's) of a table whose columns have names.

    Raises ValueError, which names the columns and the flags, where more than one or none
    could be meant.
    """
    chosen = []
    for given, known, flag in (
        (options.image_column, IMAGE_COLUMNS, "--image-column"),
        (options.text_column, TEXT_COLUMNS, "--text-column"),
    ):
        found = [i for i, name in enumerate(names) if _simple(name) in known]
        if known is IMAGE_COLUMNS and len(found) > 1:  # an id is an image only if it names one
            found = [i for i in found if _hits(table, images, i)] or found
        if not found and len(names) == 2 and chosen:  # the other one
            found = [1 - chosen[0]]
        if given is not None:
            found = [_given_column(path, names, given, flag)]
        if len(found) != 1:
            shown = ", ".join(names[i] for i in found) or ", ".join(map(str, names))
            kind = "more than one column could be meant" if found else "no column is known"
            raise ValueError(f"{path}:1: {kind}, choose with {flag}: {shown}")
        chosen += found
    return chosen


def _simple(name):
    return re.sub(r"[\s-]+", "_", str(name).strip().lower())


def _given_column(path, names, given, flag):
    if given in names:
        return names.index(given)
    if given.isdecimal() and 1 <= int(given) <= len(names):
        return int(given) - 1
    raise ValueError(f"{path}:1: {flag} {given}: the columns are {', '.join(map(str, names))}")


def _hits(table, images, column=None):
    """How many of the first rows name an image, in a column or in any of several."""
    rows = [row for _, row in table[:SNIFFED] if len(row) > 1]
    if column is not None:
        rows = [[row[column]] for row in rows if len(row) > column]
    return sum(any(isinstance(v, str) and images.find(v) is not None for v in row) for row in rows)


def _read_lines(path, lines, images, options):
    """The `Rows` of a text file: of the delimiters the one with which most images are named."""
    first = lines[:SNIFFED]
    delimiters = [d for d in "\t;," if any(d in line for _, line in first)]
    hits = {}
    for d in delimiters:
        with contextlib.suppress(ValueError):  # it is no table of this kind
            hits[d] = _hits(_split_lines(path, first, d), images)
    hits[" "] = _hits(_split_at_spaces(first, images), images, 0)
    best = max(hits.values())
    if best == 0 and "\t" not in delimiters:
        named = images.find(lines[0][1].strip())
        why = "it has no text behind the image" if named else "no image of this name is there"
        raise ValueError(
            f"{path}:{lines[0][0]}: is not understood, {why}: {lines[0][1][:60]!r}; write "
            "image<TAB>text"
        )
    # Where no image is there at all, it is the images that are missing.
    delimiter = next(d for d, count in hits.items() if count == best)
    if delimiter == " ":
        return _rows(path, _split_at_spaces(lines, images), (2, 0, 1), SPACED)
    return _read_table(path, _split_lines(path, lines, delimiter), delimiter, images, options)


def _split_lines(path, lines, delimiter):
    """[(line number, fields)]. Quotes count in tables, not where a tab alone separates."""
    if delimiter == "\t" and path.suffix not in (".tsv", ".csv"):
        return [(number, line.split("\t")) for number, line in lines]
    escaped = any('\\"' in line for _, line in lines)
    reader = csv.reader(
        (line + "\n" for _, line in lines),
        delimiter=delimiter,
        skipinitialspace=True,
        escapechar="\\" if escaped else None,
    )
    table, began = [], 0
    try:
        for row in reader:
            table.append((lines[began][0], row))
            began = reader.line_num
    except csv.Error as error:
        raise ValueError(f"{path}:{lines[began][0]}: {error}") from None
    return table


def _split_at_spaces(lines, images):
    """[(line number, [image, text])], at the first space that an image's name stands before."""
    table = []
    for number, line in lines:
        places = [match.start() for match in re.finditer(" ", line)]
        at = next((i for i in places[:8] if images.find(line[:i])), places[0] if places else None)
        table.append((number, [line] if at is None else [line[:at], line[at + 1 :]]))
    return table


def _read_table(path, table, delimiter, images, options):
    """The `Rows` of [(number, fields)] with or without a header."""
    form = {"\t": TABBED, ",": "comma-separated", ";": "semicolon-separated"}[delimiter]
    names = table[0][1]
    simple = {_simple(name) for name in names}
    given = {options.image_column, options.text_column} - {None}
    known = simple & IMAGE_COLUMNS and (simple & TEXT_COLUMNS or len(names) == 2)
    if not any(map(images.find, names)) and (known or given & set(names)):
        image, text = _choose_columns(path, names, table[1:], images, options)
        form += f", columns {names[image]} and {names[text]}"
        return _rows(path, table[1:], (len(names), image, text), form)
    counts = sorted(len(row) for _, row in table[:SNIFFED])
    usual = max(2, counts[len(counts) // 2])
    if given:
        numbers = [str(i + 1) for i in range(usual)]
        image = _given_column(path, numbers, options.image_column or "1", "--image-column")
        text = _given_column(path, numbers, options.text_column or "2", "--text-column")
        return _rows(path, table, (usual, image, text), f"{form}, columns {image + 1}, {text + 1}")
    if usual > 2:
        raise ValueError(
            f"{path}:{table[0][0]}: has {usual} columns and no header that is known, choose with "
            f"--image-column 1 --text-column 2: {', '.join(map(repr, names))}"
        )
    # The image may stand behind the text.
    turned = _hits(table, images, 1) > _hits(table, images, 0)
    return _rows(path, table, (2, 1, 0) if turned else (2, 0, 1), form)


def _named(folder, paths, options):
    """The `Found` of images whose names are their labels."""
    try:
        labels, rule = labels_of_names([path.stem for path in paths], options)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    samples, problems = [], []
    for path, label in zip(paths, labels, strict=True):
        if label:
            samples.append(Sample(str(path), path, label))
        else:
            problems.append(Problem(str(path), f"its name holds no label {rule}"))
    notes = [f"labels are the file names, {rule}"]
    ignored = sorted(path.name for path in folder.rglob("*") if path.is_file())
    ignored = [name for name in ignored if not name.lower().endswith(SUFFIXES)]
    if ignored:
        shown = ", ".join(ignored[:5]) + (", ..." if len(ignored) > 5 else "")
        notes.append(f"{len(ignored)} other files are not read: {shown}")
    return Found({"all": samples}, problems, notes)


def _beside(paths):
    """{image: file with its text} of images that have one: x.gt.txt or x.txt beside x.png."""
    found = {}
    for path in paths:
        stem = path.name.removesuffix(path.suffix)
        for name in dict.fromkeys((stem, re.sub(r"\.(nrm|bin)$", "", stem))):  # mostly one
            texts = [path.with_name(f"{name}{kind}") for kind in (".gt.txt", ".txt")]
            text = next((text for text in texts if text.is_file()), None)
            if text:
                found[path] = text
                break
    return found


def _from_texts(paths, beside):
    """The `Found` of images with a text file each."""
    samples, problems = [], []
    for path in paths:
        if path not in beside:
            problems.append(Problem(str(path), "has no text beside it, as others have"))
            continue
        lines, bad = _lines(beside[path])
        problems += bad
        if len(lines) == 1:
            samples.append(Sample(str(path), path, lines[0][1]))
        elif not bad:
            problem = f"has {len(lines)} lines of text, one is needed"
            problems.append(Problem(str(beside[path]), problem))
    return Found({"all": samples}, problems, ["labels are in the text files beside the images"])


def _from_file(file, options):
    """The `Found` of one label file."""
    images = ImageFinder(file.parent)
    return _from_rows(file, _read(file, images, options), images)


def _from_rows(file, rows, images):
    """The `Found` of a label file that was read."""
    samples = [
        Sample(f"{file}:{number}", images.find(image) or file.parent / image, label)
        for number, image, label in rows.entries
    ]
    return Found({"all": samples}, rows.problems, [f"labels are in {file} ({rows.form})"])


def _named_files(folder, names=(*SPLIT_NAMES["train"], *SPLIT_NAMES["test"])):
    """The files of a folder that are called so and may hold labels."""
    paths = (folder / f"{name}{kind}" for name in names for kind in KINDS)
    return {path for path in paths if path.is_file()}


def _split_files(folder):
    """{split: the label file that is named after it}, the best name first."""
    found = {}
    for split, names in SPLIT_NAMES.items():
        for name in names:
            files = sorted(_named_files(folder, (name,)))
            if len(files) > 1:
                raise ValueError(WHICH.format(folder, ", ".join(path.name for path in files)))
            if files:
                found.setdefault(split, files[0])
    return found


def _split_folders(folder):
    """{split: the folder that is named after it}, empty where one is missing."""
    found = {}
    for split, names in SPLIT_NAMES.items():
        found[split] = next((folder / name for name in names if (folder / name).is_dir()), None)
    return found if all(found.values()) else {}


def _label_file_in(folder, beside, options):
    """The `Found` of the one file of a folder that names images, None where there is none.

    Raises ValueError where there are several, or only one that is not understood.
    """
    texts = set(beside.values())
    candidates = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in KINDS]
    found, refused, images = {}, None, ImageFinder(folder)
    for path in candidates:
        if path in texts or path.name == UNREADABLE or not path.is_file():
            continue
        try:
            rows = _read(path, images, options)
        except ValueError as error:
            if images.named_in(path):
                refused = refused or error
            continue
        named = any(images.find(image) for _, image, _ in rows.entries[:SNIFFED])
        if named or (rows.problems and images.named_in(path)):
            found[path] = _from_rows(path, rows, images)
    if len(found) > 1:
        raise ValueError(WHICH.format(folder, ", ".join(path.name for path in found)))
    if refused and not found:
        raise ValueError(f"{refused}; if it holds no labels, move it away")
    return next(iter(found.values()), None)


def find_samples(data, options=FOUND):
    """Find out how a data set is kept, and list its samples.

    Args:
        data: path of a folder or a label file.
        options: a `LabelOptions`.

    Returns:
        a `Found`; its first note says what was taken for the labels, and shows three of them.

    Raises ValueError where there is no data set, where more than one could be meant, or where
    its labels are not understood.
    """
    if not os.path.exists(data):
        raise ValueError(f"{data}: there is no such folder or label file")
    found = _find(Path(data), options)
    everything = {split: found.samples.get(split, []) for split in (*SPLITS, "all")}
    shown = [sample for own in everything.values() for sample in own][:3]
    examples = ", ".join(f"{sample.path.name} is {sample.label!r}" for sample in shown)
    first = f"{found.notes[0]}: {examples}" if shown else found.notes[0]
    return Found(everything, found.problems, [first, *found.notes[1:]])


def _find(data, options):
    """The `Found` of a folder or file, without examples."""
    if data.is_file():
        return _from_file(data, options)
    files = _split_files(data)
    if files:
        train_only = list(files) == ["train"]
        found = _from_file(files["train"], options) if train_only else _joined(files, options)
        others = sorted(_named_files(data) - set(files.values()))
        if others:
            found.notes.append(f"not read: {', '.join(path.name for path in others)}")
        return found
    paths = find_images(data)
    if not paths:
        raise ValueError(
            f"{data}: holds neither a label file (train.txt and test.txt, or one of any name, "
            "with lines of image<TAB>label) nor images whose names are their labels"
        )
    beside = _beside(paths)
    found = _label_file_in(data, beside, options)
    if found:
        named = {os.path.abspath(sample.path) for sample in found.samples["all"]}
        unnamed = sum(os.path.abspath(path) not in named for path in paths)
        if unnamed:
            found.notes.append(f"{unnamed} images of the folder are not named in it")
        return found
    folders = _split_folders(data)
    if any(_split_files(own) or _label_file_in(own, beside, options) for own in folders.values()):
        return _joined(folders, options)
    if not options.names and not beside:
        return Found({}, [], ["nothing is labelled yet"])
    texts = 2 * len(beside) > len(paths) or not options.names
    found = _from_texts(paths, beside) if texts else _named(data, paths, options)
    if not folders:
        return found
    parts = {"train": [], "test": []}
    for sample in found.samples["all"]:
        parts["test" if folders["test"] in sample.path.parents else "train"].append(sample)
    return found._replace(samples=parts)


def _joined(entries, options):
    """The `Found` of {split: label file or folder}."""
    parts = {split: _find(entry, options) for split, entry in entries.items()}
    samples = {
        split: [sample for own in part.samples.values() for sample in own]
        for split, part in parts.items()
    }
    problems = [problem for part in parts.values() for problem in part.problems]
    notes = dict.fromkeys(part.notes[0].removeprefix("labels are ") for part in parts.values())
    others = [note for part in parts.values() for note in part.notes[1:]]
    return Found(samples, problems, [f"labels are {' and '.join(notes)}", *others])
