"""From image files and labels to pixels: the one way for training, evaluation and inference.

    python dataset.py my_images        # checks a data set: what is there, what is wrong

A data set is a folder with train.txt and test.txt; or with one label file, or such a file,
of which a part becomes the test set; or a folder of images whose file names are their
labels. A label file is UTF-8, a line an image, paths relative to the file's folder:

    train/00000.png<TAB>pYaq
"""

import argparse
import codecs
import hashlib
import io
import math
import os
import random
import re
import sys
import warnings
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from keys import load_alphabet

COLUMN = 4  # pixels: the network reads an image in columns of this width
MAX_PIXELS = 2**23  # of an image file, 8.4 million: checked before it is decoded
MAX_WIDTH = 4096  # pixels, after resizing
# What people keep images in. Pillow knows more, some by starting other programs.
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
SPLITS = ("train", "test")
# What may stand between a label and the rest of a file name.
SEPARATORS = "_-.#@~"
SHEET_IMAGE = (320, 96)  # pixels of an image on a contact sheet, at most
INK = 30  # of 255: what differs less from an image's edges is background
RARE = 5  # a character seen less often is hardly learnt
# Where systems keep a font with Chinese characters, best known first.
CHINESE_FONTS = (
    "/usr/share/fonts/truetype/wqy/wqy-microhei.ttc",
    "/usr/share/fonts/wqy-microhei/wqy-microhei.ttc",
    "/usr/share/fonts/opentype/noto/NotoSansCJK-Regular.ttc",
    "/usr/share/fonts/noto-cjk/NotoSansCJK-Regular.ttc",
    "/usr/share/fonts/google-noto-sans-cjk-fonts/NotoSansCJK-Regular.ttc",
    "/usr/share/fonts/truetype/wqy/wqy-zenhei.ttc",
    "/usr/share/fonts/truetype/droid/DroidSansFallbackFull.ttf",
    "/System/Library/Fonts/PingFang.ttc",
    "/System/Library/Fonts/Hiragino Sans GB.ttc",
    "/System/Library/Fonts/STHeiti Light.ttc",
    "/Library/Fonts/Arial Unicode.ttf",
    *(
        os.path.join(os.environ.get("WINDIR", r"C:\Windows"), "Fonts", name)
        for name in ("msyh.ttc", "simhei.ttf", "simsun.ttc", "Deng.ttf")
    ),
)

# Pillow warns of much that it then reads or refuses; what matters is in our errors.
warnings.filterwarnings("ignore", module=r"PIL\.")


class ImageError(ValueError):
    """An image that cannot be read; the message continues a sentence that names it."""


@dataclass(frozen=True)
class Preprocess:
    """What is done to an image before the network sees it. Travels with the checkpoint.

    Attributes:
        height: pixels, every image is resized to it.
        width: pixels, a multiple of 4, or None to keep the aspect ratio.
        trim: cut the image to its `text_box` before.
        mean, std: the network gets (pixel - mean) / std, a pixel is 0 to 255.
    """

    height: int = 32
    width: int | None = None
    trim: bool = False
    mean: float = 127.5
    std: float = 127.5

    def __call__(self, image):
        """Resize an RGB `PIL.Image` to (3, height, W) uint8, W a multiple of 4.

        Raises ImageError where the aspect ratio makes it wider than 4,096 pixels.
        """
        if self.trim:
            image = image.crop(text_box(image))
        width = self.width_of(*image.size)
        if image.size != (width, self.height):
            image = image.resize((width, self.height), Image.Resampling.BILINEAR)
        return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))

    def width_of(self, width, height):
        """The W that an image of ``width`` x ``height`` pixels, cut if at all, is resized to.

        Raises ImageError where it would be more than 4,096.
        """
        resized = self.width or max(1, round(width * self.height / height / COLUMN)) * COLUMN
        if resized > MAX_WIDTH:
            raise ImageError(
                f"has {width}x{height} pixels, that is {resized} pixels wide at height "
                f"{self.height}, more than {MAX_WIDTH}: cut it into lines of text"
            )
        return resized

    def __str__(self):
        cut = "cut to their text and " if self.trim else ""
        return f"{cut}resized to height {self.height}, width {self.width or 'kept'}"

    def normalise(self, pixels):
        """uint8 tensor or array of any shape -> the same in float32, by mean and std."""
        if isinstance(pixels, np.ndarray):
            pixels = pixels.astype(np.float32)
            pixels -= self.mean
            pixels /= self.std
            return pixels
        return pixels.float().sub_(self.mean).div_(self.std)


def read_image(source):
    """Read an image of any mode as RGB, upright, transparency on white.

    Args:
        source: a path, the bytes of a file, or a `PIL.Image`.

    Returns:
        an RGB `PIL.Image` of at least 2x2 pixels.

    Raises:
        ImageError: there is no such file, it is no complete image in one of FORMATS,
            or it has too few or too many pixels.
    """
    try:
        if isinstance(source, Image.Image):
            return _to_rgb(source)
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        with Image.open(file, formats=FORMATS) as image:
            return _to_rgb(image)
    except ImageError:
        raise
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise ImageError(f"cannot be opened ({error.strerror})") from None
    except UnidentifiedImageError:
        raise ImageError(f"is not an image that can be read ({', '.join(FORMATS)})") from None
    except Image.DecompressionBombError:
        raise ImageError(f"has more than {MAX_PIXELS:,} pixels") from None
    except Exception as error:  # Pillow's decoders raise nearly anything on broken files
        raise ImageError(f"is a broken image file ({error})") from None


def _to_rgb(image):
    if min(image.size) < 2:
        raise ImageError(f"has {image.width}x{image.height} pixels, at least 2x2 are needed")
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(
            f"has {image.width}x{image.height} pixels, more than {MAX_PIXELS:,} are refused"
        )
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        image = _to_8_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _to_8_bits(image):
    """Scale 16-bit (0 to 65,535), 32-bit or float (0 to 1) grey to 'L', which Pillow would clip."""
    with np.errstate(all="ignore"):  # a broken file may hold any number
        pixels = np.nan_to_num(np.asarray(image, dtype=np.float64))
        if image.mode == "F":
            scale = 255 if pixels.max() <= 1 else 1
        else:
            scale = 1 / 257 if image.mode.startswith("I;16") or pixels.max() > 255 else 1
        return Image.fromarray((pixels * scale).round().clip(0, 255).astype(np.uint8))


def _moving_mean(values, size):
    """The mean of ``size`` neighbours around each of (N,) values."""
    return np.convolve(values, np.ones(size) / size)[(size - 1) // 2 :][: len(values)]


def text_box(image):
    """Where the text of an image is, with some background around it.

    Along a row of pixels, text is many short runs of ink, a stray line one or few: the
    rows of the text are those with many runs. Its columns are those with more ink in
    these rows than a line leaves.

    Args:
        image: an RGB `PIL.Image` of one line of text.

    Returns:
        (left, top, right, bottom) for `Image.crop`, the whole image where no text stands out.
    """
    pixels = np.asarray(image).astype(np.int16)
    height, width = pixels.shape[:2]
    whole = 0, 0, width, height
    edges = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground = np.median(edges, axis=0).astype(np.int16)
    ink = np.abs(pixels - ground).max(2) > INK
    runs = ink[:, 0] + (ink[:, 1:] & ~ink[:, :-1]).sum(1)
    runs = _moving_mean(runs, min(3, height))
    rows = np.flatnonzero(runs > max(2.2, 0.3 * np.percentile(runs, 90)))
    if not len(rows):
        return whole
    # Accents and the dots of i stand apart from their line, other lines further.
    parts = np.split(rows, np.flatnonzero(np.diff(rows) > height // 20) + 1)
    rows = max(parts, key=lambda part: runs[part].sum())
    top, bottom = int(rows[0]), int(rows[-1]) + 1
    size = bottom - top
    if size < max(3, height / 10):
        return whole
    amount = _moving_mean(ink[top:bottom].sum(0), min(max(3, size // 4), width))
    columns = np.flatnonzero(amount > 0.08 * size + 0.7)
    if not len(columns):
        return whole
    left, right = int(columns[0]), int(columns[-1]) + 1
    return (
        max(0, left - size // 2),
        max(0, top - size // 4),
        min(width, right + size // 2),
        min(height, bottom + size // 4),
    )


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


def columns_needed(label):
    """Columns that CTC needs for ``label``: one a character, and a blank between repeats."""
    return len(label) + sum(a == b for a, b in pairwise(label))


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
    """The samples of a folder of images with their labels as file names, problems, notes."""
    samples, problems, ignored = {split: [] for split in (*SPLITS, "all")}, [], []
    paths = []
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
    separators = find_separators([path.stem for path in paths]) if separator is None else separator
    split_folders = all((folder / split).is_dir() for split in SPLITS)
    for path in paths:
        label = path.stem
        if separators:
            end = re.search(f"[{re.escape(separators)}]" if separator is None
                            else re.escape(separators), label)  # fmt: skip
            label = label[: end.start()] if end else label
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
    return samples, problems, notes


def find_samples(data, separator=None):
    """Find out how a data set is kept, and list its samples.

    Args:
        data: path of a folder or a label file, see above.
        separator: what ends a label in a file name, "" for nothing. None: find it.

    Returns:
        (samples, problems, notes): {"train": [`Sample`], "test": [...], "all": [...]}, where
        "all" still has to be split; the texts of what is wrong and of what was found.

    Raises ValueError where there is no data set, or more than one could be meant.
    """
    data = Path(data)
    if data.is_file():
        files = {"all": data}
    elif not data.is_dir():
        raise ValueError(f"{data}: there is no such folder or label file")
    else:
        files = {s: data / f"{s}.txt" for s in SPLITS if (data / f"{s}.txt").is_file()}
        if not files:
            listed = []
            for path in sorted(data.glob("*.txt")):
                with path.open("rb") as file:
                    if b"\t" in file.read(4096):
                        listed.append(path)
            if len(listed) > 1:
                names = ", ".join(path.name for path in listed)
                raise ValueError(
                    f"{data}: which label file is meant, {names}? Name it: --data FILE"
                )
            if not listed:
                return _named_images(data, separator)
            files = {"all": listed[0]}
        elif list(files) == ["train"]:
            files = {"all": files["train"]}
    samples, problems = {split: [] for split in (*SPLITS, "all")}, []
    for split, file in files.items():
        lines, bad = _label_lines(file)
        problems += bad
        samples[split] = [
            Sample(f"{file}:{number}", file.parent / image, label) for number, image, label in lines
        ]
    return samples, problems, [f"labels are in {' and '.join(map(str, files.values()))}"]


def problem_list(problems):
    """All problems as one text, their number first."""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return f"{count} in the data:\n" + "\n".join(problems)


def write_atomically(path, content):
    """Write bytes so that ``path`` is either as before or complete, whatever happens.

    Raises OSError, naming ``path``, where they cannot be written.
    """
    scratch = path.with_name(f"{path.name}.unfinished")
    try:
        with scratch.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # a power cut must not leave the new name without content
        os.replace(scratch, path)
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error.strerror}), it is as before") from None
    finally:
        scratch.unlink(missing_ok=True)


def save_picture(path, image):
    """Write a `PIL.Image` as PNG, by `write_atomically`."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())


def in_threads(function, items, name):
    """[function(item)] with a bar. Pillow decodes outside the interpreter's lock."""
    with ThreadPoolExecutor() as pool:
        return list(tqdm(pool.map(function, items), name, len(items), leave=False, unit="img"))


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


def check(
    data, alphabet=None, preprocess=None, separator=None, val_fraction=0.1, seed=0,
    ignore_case=False, limit=None, splits=SPLITS, size=(None, None), trim=None, length=None,
):  # fmt: skip
    """Look at every image and label of a data set.

    Args:
        data, separator: see `find_samples`.
        alphabet: the characters that labels may hold. None: those that they hold.
        preprocess: a `Preprocess`. None: one that fits the images and labels.
        val_fraction: share of the images that becomes the test set where none is given.
        seed: of that choice. Images of the same content stay together.
        ignore_case: make labels lower case (upper case, if the alphabet has no lower).
        limit: take only the first so many training images.
        splits: those that are wanted.
        size, trim: (height, width) and trim of the `Preprocess`, None for what fits.
        length: characters that every label must have, None for any number.

    Returns:
        a `Checked`.

    Raises ValueError where there is no data set at all.
    """
    samples, problems, notes = find_samples(data, separator)
    samples["train"] = samples["train"][:limit]
    samples = {split: own for split, own in samples.items() if split in (*splits, "all")}
    if ignore_case:
        upper = alphabet and alphabet.upper() == alphabet
        fold = str.upper if upper else str.lower
        samples = {
            split: [sample._replace(label=fold(sample.label)) for sample in own]
            for split, own in samples.items()
        }

    bad = set()

    def refuse(sample, problem):
        bad.add(sample.where)
        problems.append(sample.problem(problem))

    listed = [sample for own in samples.values() for sample in own]
    if preprocess:
        trim = preprocess.trim
    look = partial(_look, find_text=trim is not False)
    sizes, text_sizes, digests = {}, {}, {}
    for sample, result in zip(listed, in_threads(look, listed, "checking"), strict=True):
        if isinstance(result, str):
            refuse(sample, result)
        else:
            sizes[sample.path], text_sizes[sample.path], digests[sample.path] = result
    readable = {split: [s for s in own if s.path in sizes] for split, own in samples.items()}
    if readable["all"]:
        parts = _split(readable["all"], digests, val_fraction, seed)
        readable = {
            split: part for split, part in zip(SPLITS, parts, strict=True) if split in splits
        }
        readable["train"] = readable.get("train", [])[:limit]
        notes[0] += f"; {val_fraction:.0%} of the images are the test set (--val-fraction, --seed)"
    usable = [sample for split in splits for sample in readable[split]]
    for sample, problem in _repeated(readable, digests):
        refuse(sample, problem)

    if alphabet is None:
        alphabet = "".join(sorted({c for sample in usable for c in sample.label}))
    if preprocess is None:
        preprocess = fitting_preprocess(
            [(sizes[s.path], text_sizes[s.path], s.label) for s in usable], *size, trim
        )
    resized = text_sizes if preprocess.trim else sizes
    known = set(alphabet)
    for sample in usable:
        unknown = sorted(set(sample.label) - known)
        if unknown:
            shown = " ".join(map(repr, unknown))
            refuse(sample, f"is labelled {sample.label!r}, {shown} not in the alphabet")
            continue
        if length not in (None, len(sample.label)):
            refuse(
                sample,
                f"is labelled {sample.label!r}, which has {len(sample.label)} characters, not "
                f"{length} (--length, 0 for any)",
            )
            continue
        try:
            columns = preprocess.width_of(*resized[sample.path]) // COLUMN
        except ImageError as error:
            refuse(sample, str(error))
            continue
        if columns_needed(sample.label) > columns:
            refuse(
                sample,
                f"is labelled {sample.label!r}, which needs {columns_needed(sample.label)} columns "
                f"of {COLUMN} pixels, it has {columns} at height {preprocess.height}",
            )
    train, test = (
        [sample for sample in readable.get(split, []) if sample.where not in bad]
        for split in SPLITS
    )
    notes += _report(train, test, sizes, alphabet)
    return Checked(train, test, resized, alphabet, preprocess, problems, notes)


def _look(sample, find_text):
    """(size, size of the text box, digest of the pixels) of a sample's image, or a problem.

    The sizes are (width, height); without ``find_text`` both are the image's.
    """
    try:
        image = read_image(sample.path)
    except ImageError as error:
        return str(error)
    left, top, right, bottom = text_box(image) if find_text else (0, 0, *image.size)
    digest = hashlib.blake2b(image.tobytes(), digest_size=16).digest()
    return image.size, (right - left, bottom - top), digest


def _split(samples, digests, val_fraction, seed):
    """(train, test) of samples, the same content always on one side."""
    groups = defaultdict(list)
    for sample in samples:
        groups[digests[sample.path]].append(sample)
    groups = list(groups.values())
    if len(groups) < 2:
        raise ValueError(f"{samples[0].where}: one image is too few, training and test need some")
    random.Random(seed).shuffle(groups)
    count = min(max(1, round(val_fraction * len(groups))), len(groups) - 1)
    test = {sample for group in groups[:count] for sample in group}
    return [s for s in samples if s not in test], [s for s in samples if s in test]


def _repeated(readable, digests):
    """[(sample, problem)]: test images that are trained on, and images with two labels."""
    problems, first = [], {}
    for split in reversed(SPLITS):  # of a pair, the training image is the one to leave out
        for sample in readable.get(split, []):
            other_split, other = first.setdefault(digests[sample.path], (split, sample))
            if other_split != split:
                problems.append((sample, f"is also a test image, {other.where}"))
            elif other.label != sample.label:
                text = f"is {sample.label!r} here and {other.label!r} in {other.where}"
                problems.append((sample, text))
    return problems


def _spread(values):
    """The range of some numbers, with their median where it is a range."""
    values = sorted(values)
    low, middle, high = values[0], values[len(values) // 2], values[-1]
    return f"{low}" if low == high else f"{low} to {high} (median {middle})"


def _report(train, test, sizes, alphabet):
    """The lines that say what a data set holds."""
    samples = [*train, *test]
    if not samples:
        return []
    widths, heights = zip(*(sizes[sample.path] for sample in samples), strict=True)
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


def fitting_preprocess(items, height=None, width=None, trim=None):
    """The `Preprocess` that suits the images and labels, where none is given.

    Images are cut to their text where that leaves less than half of them in the median,
    and get 40 rows of pixels. Others, of much detail, higher than 50 pixels in the
    median, get 48, the rest 32. The ratio is kept, unless labels would not fit: then
    all images get one width, with at least 5 columns for 4 that the labels need.

    Args:
        items: [((width, height) of the image, the same of its text box, label)], in pixels.
        height, width, trim: of the `Preprocess`, None for what suits.
    """
    if not items:
        return Preprocess(height or 32, width, bool(trim))
    sizes, text_sizes, labels = zip(*items, strict=True)
    if trim is None:
        shares = [
            math.prod(text) / math.prod(size) for size, text in zip(sizes, text_sizes, strict=True)
        ]
        trim = median(shares) < 0.5
    if trim:
        sizes = text_sizes
    if not height:
        detailed = median(h for _, h in sizes) > 50
        height = 40 if trim else 48 if detailed else 32
    if width:
        return Preprocess(height, width, trim)
    columns = [max(1, round(w * height / h / COLUMN)) for w, h in sizes]
    needed = [columns_needed(label) for label in labels]
    tight = sum(1.25 * n > c for n, c in zip(needed, columns, strict=True))
    if tight <= len(items) / 20:
        return Preprocess(height, None, trim)
    longest = sorted(needed)[int(0.995 * len(needed))]  # not that of a mistaken label
    usual = sorted(columns)[len(columns) // 2]
    return Preprocess(height, COLUMN * max(usual, math.ceil(1.25 * longest)), trim)


def data_sheet(samples, seed=0, count=48):
    """A contact sheet of a random sample of images with their labels, an RGB image."""
    chosen = random.Random(seed).sample(samples, min(count, len(samples)))
    images = [read_image(sample.path) for sample in chosen]
    return contact_sheet(images, [sample.label for sample in chosen], columns=6)


class TextImageDataset:
    """Images and labels, as uint8 in memory or read when they are asked for.

    Args:
        samples: a list of `Sample`.
        preprocess: a `Preprocess`.
        in_memory: decode all images now.

    Item i is ((3, height, W) uint8 array, label).

    Raises ValueError, naming file and line of everything that cannot be read.
    """

    def __init__(self, samples, preprocess, in_memory=True):
        self.samples, self.preprocess = samples, preprocess
        self.arrays = None
        if in_memory:
            arrays = in_threads(self._load, samples, "loading")
            problems = [str(array) for array in arrays if isinstance(array, ValueError)]
            if problems:
                raise ValueError("\n".join(problems))
            self.arrays = arrays

    def _load(self, sample):
        """The pixels of a sample, or a ValueError."""
        try:
            return self.preprocess(read_image(sample.path))
        except ImageError as error:
            return ValueError(sample.problem(error))

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        sample = self.samples[index]
        pixels = self.arrays[index] if self.arrays else self._load(sample)
        if isinstance(pixels, ValueError):
            raise pixels
        return pixels, sample.label


def find_chinese_font():
    """Path of the first of CHINESE_FONTS that this machine has. None: it has none."""
    return next((path for path in CHINESE_FONTS if os.path.exists(path)), None)


def contact_sheet(images, captions, columns=8, colours=None):
    """Draw `PIL.Image`s in a grid, each with its caption below. Returns an RGB image.

    The captions are black, or each in its own of ``colours``. Images larger than
    SHEET_IMAGE are shown smaller.
    """
    images = [image.copy() for image in images]
    for image in images:
        image.thumbnail(SHEET_IMAGE)
    font = ImageFont.load_default(14)
    chinese = find_chinese_font()
    if chinese and not all(caption.isascii() for caption in captions):
        font = ImageFont.truetype(chinese, 15)  # Pillow's own font has Latin letters only
    widths = [image.width for image in images] + [font.getlength(text) for text in captions]
    cell_width = math.ceil(max(widths)) + 8
    cell_height = max(image.height for image in images) + 26
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (min(columns, len(images)) * cell_width, rows * cell_height), "white")
    draw = ImageDraw.Draw(sheet)
    colours = colours or ["black"] * len(images)
    for i, (image, caption, colour) in enumerate(zip(images, captions, colours, strict=True)):
        x, y = i % columns * cell_width + 4, i // columns * cell_height + 4
        sheet.paste(image, (x, y))
        middle = x + image.width / 2, y + image.height + 9
        draw.text(middle, caption, font=font, fill=colour, anchor="mm")
    return sheet


def add_data_flags(add):
    """Add the flags that say how a data set is read to a parser's ``add_argument``."""
    add(
        "--alphabet",
        help="an alphabet's name or a UTF-8 text file (default: the task's, else the labels')",
    )
    add("--ignore-case", action="store_true", help="make all labels lower case")
    add(
        "--label-separator",
        metavar="TEXT",
        help="where file names are labels: what ends the label, '' for nothing (default: found)",
    )
    add(
        "--val-fraction",
        type=float,
        default=0.1,
        metavar="F",
        help="share of the images that becomes the test set where none is given (default: "
        "%(default)s)",
    )


def main():
    parser = argparse.ArgumentParser(description="Check a data set before training on it.")
    add = parser.add_argument
    add("data", type=Path, metavar="DATA", help="folder or label file")
    add_data_flags(add)
    add("--seed", type=int, default=0, help="of the choice of test images (default: %(default)s)")
    add(
        "--sheet",
        type=Path,
        metavar="OUT.png",
        help="where to save a picture of random images with their labels (default: "
        "save_model/DATA.data.png)",
    )
    args = parser.parse_args()
    sys.stdout.reconfigure(encoding="utf-8")  # whatever the console's own is
    alphabet = load_alphabet(args.alphabet) if args.alphabet else None
    checked = check(
        args.data, alphabet, None, args.label_separator, args.val_fraction, args.seed,
        args.ignore_case,
    )  # fmt: skip
    print("\n".join(checked.notes))
    print(f"to train on it, images are {checked.preprocess}")
    samples = checked.train + checked.test
    if samples:
        sheet = args.sheet or Path("save_model", f"{args.data.resolve().stem}.data.png")
        sheet.parent.mkdir(parents=True, exist_ok=True)
        save_picture(sheet, data_sheet(samples, args.seed))
        print(f"{sheet} shows {min(48, len(samples))} of the images")
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
