"""How good readings are, in numbers, in the table of a training, and in pictures.

Accuracy, its interval, error rate, confusions, calibration; curves and mistakes, captions
under them; the fonts of the machine, and which of them show what text.
"""

import contextlib
import io
import math
import os
import random
import sys
from collections import Counter
from difflib import SequenceMatcher
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from image import read_image, write_atomically
from keys import ALPHABETS, import_or_say

# Below 1 only a little: a network that read every test image right would ask for 0.
TEMPERATURES = tuple(round(0.7 * 1.1**i, 3) for i in range(15))
CURVES_PAUSE = 60  # seconds; drawing them takes longer than an epoch may
MISTAKES = 40  # images on the sheet of mistakes
SHEET = 48  # images on the sheet of a data set
SHEET_IMAGE = (320, 96)  # pixels of an image on a contact sheet, at most
WINDOWS_FONTS = os.environ.get("WINDIR", r"C:\Windows") + r"\Fonts"
FONT_FOLDERS = (
    "/usr/share/fonts", "/usr/local/share/fonts", "~/.fonts", "~/.local/share/fonts",
    "/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts", WINDOWS_FONTS,
)  # fmt: skip
SIZE = 40  # pixels of the font in which `open_font` looks at texts and draws them
LIKENESS = 0.22  # the least median correlation of a font's glyphs with an ordinary one's
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
    *(rf"{WINDOWS_FONTS}\{name}" for name in ("msyh.ttc", "simhei.ttf", "simsun.ttc", "Deng.ttf")),
)


def edit_distance(a, b):
    """Levenshtein distance: fewest insertions, deletions and substitutions from a to b."""
    if a == b:
        return 0
    previous = list(range(len(b) + 1))
    for i, character in enumerate(a, 1):
        current = [i]
        for j, other in enumerate(b, 1):
            current.append(
                min(previous[j] + 1, current[j - 1] + 1, previous[j - 1] + (character != other))
            )
        previous = current
    return previous[-1]


def word_accuracy(texts, labels):
    """Share of ``texts`` equal to their label, 0 to 1. Both are non-empty lists of strings."""
    return sum(text == label for text, label in zip(texts, labels, strict=True)) / len(labels)


def character_error_rate(texts, labels):
    """Edit distance to the labels over their length, both summed over all. 0 is perfect."""
    errors = sum(edit_distance(text, label) for text, label in zip(texts, labels, strict=True))
    return errors / sum(map(len, labels))


def wilson_interval(share, count):
    """The 95 % interval of a ``share`` seen in ``count`` trials (Wilson, JASA 1927).

    Returns (low, high), 0 to 1.
    """
    z = 1.96
    centre = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return tuple((centre + sign * half) / (1 + z * z / count) for sign in (-1, 1))


def spread(values):
    """The range of some numbers, with their median where it is a range."""
    values = sorted(values)
    low, middle, high = values[0], values[len(values) // 2], values[-1]
    return f"{low}" if low == high else f"{low} to {high} (median {middle})"


def confusions(texts, labels):
    """What was read for what, as a Counter of (right, read) pairs of strings.

    Mostly single characters; "" stands for one that was missed or made up.
    """
    pairs = Counter()
    for text, label in zip(texts, labels, strict=True):
        if text == label:
            continue
        if len(text) == len(label):
            pairs.update((a, b) for a, b in zip(label, text, strict=True) if a != b)
        else:
            for kind, a, b, c, d in SequenceMatcher(None, label, text, False).get_opcodes():
                if kind != "equal":
                    pairs[label[a:b], text[c:d]] += 1
    return pairs


def expected_calibration_error(confidences, right, bins=15):
    """How far confidences are from the share of right readings (Guo et al., ICML 2017).

    Args:
        confidences: floats, 0 to 1.
        right: for each whether the reading was right.
        bins: of equal width, whose mean confidence and share are compared.

    Returns:
        the mean difference, weighted by the readings in each bin, 0 to 1.
    """
    gaps = Counter()
    for confidence, is_right in zip(confidences, right, strict=True):
        gaps[min(int(confidence * bins), bins - 1)] += confidence - is_right
    return sum(map(abs, gaps.values())) / len(confidences)


def fit_temperature(converter, batches, fold=str):
    """The one of TEMPERATURES with which confidences fit best how often texts are right.

    The fit is the likelihood of right and wrong, given the confidences of whole texts.

    Args:
        converter: a `CTCLabelConverter`, whose own temperature plays no part.
        batches: an iterable of (logits (N, T, nclass), columns (N,), labels).
        fold: what is done to a text before it is compared with its label.
    """
    # Usual texts are told from others by n-grams afterwards.
    scaled = [converter.replaced(temperature=t, ngrams=None) for t in TEMPERATURES]
    loss = dict.fromkeys(TEMPERATURES, 0.0)
    for logits, columns, labels in batches:
        for own in scaled:
            for reading, label in zip(own.decode(logits, columns), labels, strict=True):
                right = fold(reading.text) == label
                share = reading.confidence if right else 1 - reading.confidence
                loss[own.temperature] -= math.log(max(share, 1e-9))
    return min(loss, key=loss.get)


def compare(reader, other, paths):
    """(number of images, largest difference of a probability, 0 to 1) of two `RecInfer`s.

    Raises ValueError if a text differs.
    """
    difference = 0.0
    for path in paths:
        one, two = reader.predict(path), other.predict(path)
        if one.text != two.text:
            raise ValueError(
                f"{other.weights}: reads {two.text!r} in {path}, {reader.weights} {one.text!r}"
            )
        pairs = zip(one.char_confidences, two.char_confidences, strict=True)
        parts = [(one.confidence, two.confidence), *pairs]
        difference = max(difference, *(abs(ours - theirs) for ours, theirs in parts))
    return len(paths), difference


def summary(texts, labels):
    """Word accuracy, its interval and the character error rate, as one line."""
    accuracy = word_accuracy(texts, labels)
    low, high = wilson_interval(accuracy, len(labels))
    return (
        f"word accuracy {accuracy:.4f} (95 % interval {low:.4f} to {high:.4f}), "
        f"CER {character_error_rate(texts, labels):.4f}, {len(labels)} images"
    )


def print_calibration(readings, labels, temperature):
    """Print how far the confidences are from how often texts are right."""
    right = [reading.text == label for reading, label in zip(readings, labels, strict=True)]
    error = expected_calibration_error([reading.confidence for reading in readings], right)
    print(f"expected calibration error {error:.4f}, temperature {temperature}")


def show_mistakes(samples, readings, path=None):
    """Print the ten most frequent confusions, and save a picture of the worst mistakes.

    Args:
        samples: what was read, with ``path`` and ``label``.
        readings: a `Reading` of each.
        path: of the picture, which shows the most confident mistakes first. None: no picture.
    """
    texts, labels = [r.text for r in readings], [s.label for s in samples]
    pairs = [
        f"{right or 'nothing'} read as {read or 'nothing'} {times}x"
        for (right, read), times in confusions(texts, labels).most_common(10)
    ]
    if pairs:
        print(f"most confused: {', '.join(pairs)}")
    if path:
        wrong = zip(samples, readings, strict=True)
        _save_mistakes(path, [(s, reading) for s, reading in wrong if reading.text != s.label])


def _save_mistakes(path, wrong):
    """Save a picture of [(sample, `Reading`)] that are wrong."""
    if not wrong:
        print(f"nothing was misread, {path} is not written")
        return
    shown = sorted(wrong, key=lambda pair: -pair[1].confidence)[:MISTAKES]
    captions = [
        f"{sample.label} read as {reading.text}  {reading.confidence:.2f}"
        for sample, reading in shown
    ]
    images = [read_image(sample.path) for sample, _ in shown]
    save_picture(path, contact_sheet(images, captions, columns=5))
    print(f"{path} shows {len(shown)} of {len(wrong)} misread images")


def _shortened(text, font):
    """A caption that is not much wider than the widest image."""
    if font.getlength(text) <= SHEET_IMAGE[0]:
        return text
    while font.getlength(f"{text}...") > SHEET_IMAGE[0]:
        text = text[:-1]
    return f"{text}..."


def font_files(folders):
    """Paths of the TrueType and OpenType fonts in some folders, searched in depth, in order."""
    folders = [Path(folder).expanduser() for folder in folders]
    return [str(path) for folder in folders for path in sorted(folder.rglob("*.[to]t[fc]"))]


def find_chinese_font():
    """Path of the first of CHINESE_FONTS that this machine has. None: it has none."""
    return next((path for path in CHINESE_FONTS if os.path.exists(path)), None)


@cache
def system_fonts():
    """Paths of the fonts of this machine, those with most scripts first."""
    return [*filter(os.path.exists, CHINESE_FONTS), *font_files(FONT_FOLDERS)]


@cache
def caption_font(text):
    """(font, text) to show a caption with: escapes stand for what no font here can show."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    font = ImageFont.load_default(14)
    if text.isascii() or not lacking(font, text):
        return font, text
    for path in system_fonts():
        try:
            font = ImageFont.truetype(path, 15)
            if not lacking(font, text):
                return font, text
        except (OSError, ValueError):  # a broken one
            continue
    return ImageFont.load_default(14), ascii(text)[1:-1]


def save_picture(path, image):
    """Write a `PIL.Image` as PNG, by `write_atomically`."""
    image.save(buffer := io.BytesIO(), "PNG")
    write_atomically(path, buffer.getvalue())


def contact_sheet(images, captions, columns=8, colours=None):
    """Draw `PIL.Image`s in a grid, each with its caption below. Returns an RGB image.

    The captions are black, or each in its own of ``colours``. Images larger than
    SHEET_IMAGE are shown smaller.
    """
    images = [image.copy() for image in images]
    for image in images:
        image.thumbnail(SHEET_IMAGE)
    fonts, captions = zip(*map(caption_font, captions), strict=True)
    captions = [_shortened(text, font) for text, font in zip(captions, fonts, strict=True)]
    widths = [image.width for image in images]
    widths += [font.getlength(text) for font, text in zip(fonts, captions, strict=True)]
    cell_width = math.ceil(max(widths)) + 8
    cell_height = max(image.height for image in images) + 26
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (min(columns, len(images)) * cell_width, rows * cell_height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, caption, font, colour) in enumerate(
        zip(images, captions, fonts, colours or ["black"] * len(images), strict=True)
    ):
        x, y = i % columns * cell_width + 4, i // columns * cell_height + 4
        sheet.paste(image, (x, y))
        middle = x + max(image.width, font.getlength(caption)) / 2, y + image.height + 9
        draw.text(middle, caption, font=font, fill=colour, anchor="mm")
    return sheet


def data_sheet(samples, preprocess, seed=0):
    """A contact sheet of SHEET random images as the network gets them, with their labels."""
    chosen = random.Random(seed).sample(samples, min(SHEET, len(samples)))
    images = [
        Image.fromarray(preprocess(read_image(sample.path)).transpose(1, 2, 0)) for sample in chosen
    ]
    return contact_sheet(images, [sample.label for sample in chosen], columns=6)


def save_problems(path, problems):
    """Write all `Problem`s as a text file, one per line."""
    text = "".join(f"{problem}\n" for problem in problems)
    write_atomically(path, text.encode("utf-8", "backslashreplace"))


class EpochResult(NamedTuple):
    """What an epoch of a training came to, one line of its table.

    train_loss, test_loss: nats per image. word_accuracy, cer: of the test images.
    lr: the last learning rate. seconds: since the first step.
    """

    epoch: int
    train_loss: float
    test_loss: float
    word_accuracy: float
    cer: float
    lr: float
    seconds: float

    def __str__(self):
        return (
            f"train loss {self.train_loss:7.4f}  test loss {self.test_loss:7.4f}  word accuracy "
            f"{self.word_accuracy:.4f}  CER {self.cer:.4f}  {self.seconds:6.1f} s"
        )

    def csv(self):
        """The line of the table."""
        losses = f"{self.train_loss:.4f},{self.test_loss:.4f}"
        return (
            f"{self.epoch},{losses},{self.word_accuracy:.4f},{self.cer:.4f},{self.lr:.6f},"
            f"{self.seconds:.2f}"
        )


def save_table(path, results):
    """Save `EpochResult`s as CSV, UTF-8."""
    lines = [",".join(EpochResult._fields), *(result.csv() for result in results)]
    write_atomically(path, "".join(f"{line}\n" for line in lines).encode("utf-8"))


def save_curves(path, results):
    """Draw `EpochResult`s over the epochs, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogFormatter
    except ModuleNotFoundError:
        return
    # By hand: layouts that matplotlib finds, and powers of ten, take more than all the rest.
    figure = Figure(figsize=(9, 6))
    figure.subplots_adjust(left=0.07, right=0.98, top=0.95, bottom=0.08, hspace=0.35)
    shown = (
        ("loss, nats per image", ("train_loss", "test_loss"), "log"),
        ("word accuracy", ("word_accuracy",), "linear"),
        ("character error rate", ("cer",), "linear"),
        ("learning rate", ("lr",), "linear"),
    )
    epochs = [result.epoch for result in results]
    for axes, (title, names, scale) in zip(figure.subplots(2, 2).flat, shown, strict=True):
        for name in names:
            axes.plot(epochs, [getattr(r, name) for r in results], marker=".", label=name)
        axes.set(title=title, xlabel="epoch", yscale=scale)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(LogFormatter())  # the usual one sets formulas
        axes.grid(alpha=0.3)
        if len(names) > 1:
            axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomically(path, buffer.getvalue())


def save_progress(table, curves, results, at_end=True):
    """`save_table` and `save_curves`; a file that another program holds open is a warning.

    Before the end the curves are drawn every CURVES_PAUSE seconds, not every epoch.
    """
    parts = [(save_table, table), (save_curves, curves)]
    turns = [int(result.seconds / CURVES_PAUSE) for result in results[-2:]]
    for save, path in parts if at_end or turns[-1] > turns[0] else parts[:1]:
        try:
            save(path, results)
        except PermissionError as error:
            print(f"warning: {error}", file=sys.stderr)


def tensorboard_writer(folder):
    """A `SummaryWriter`. Raises ValueError where tensorboard is not installed."""
    import_or_say("tensorboard", "--tensorboard needs a package")
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder)


def add_to_tensorboard(writer, result):
    """Add the values of an `EpochResult` to its `SummaryWriter`."""
    for column, value in zip(result._fields[1:], result[1:], strict=True):
        writer.add_scalar(column, value, result.epoch)


def lacking(font, characters):
    """Those of some characters for which an `ImageFont` has no glyph."""

    def drawn(character):
        mask = font.getmask(character)
        return mask.size, bytes(mask)

    # Its "not defined" box, or nothing: Unicode will never assign this code point.
    missing_glyph = drawn("\U0010ffff")
    return [c for c in characters if not c.isspace() and drawn(c) == missing_glyph]


def load_font(path, size):
    """Return the font at ``path`` in ``size`` pixels. Raises ValueError if there is none."""
    try:
        return open_font(path, size)
    except OSError as error:
        raise ValueError(
            f"--font {path}: cannot be used as a TrueType or OpenType font ({error})"
        ) from None


def check_glyphs(path, alphabet):
    """Raise ValueError if the font at ``path`` lacks a glyph for a character of ``alphabet``."""
    if missing := lacking(load_font(path, 32), alphabet):
        shown = " ".join(missing[:20]) + (" ..." if len(missing) > 20 else "")
        raise ValueError(
            f"--font {path}: has no glyph for {len(missing)} of {len(alphabet)} characters "
            f"({shown}); choose another font or another --alphabet"
        )


class Font(NamedTuple):
    """A font that texts can be drawn in.

    path, family: of its file. can: the printable characters that it has. capitals: whether
    its small letters look like its capitals.
    """

    path: str
    family: str
    can: str
    capitals: bool


def read_strokes(kind):
    """{character: the ways to draw it} of a kind in assets/strokes.txt."""
    text = (Path(__file__).parent / "assets" / "strokes.txt").read_text(encoding="utf-8")
    lines = [line.split(" ", 2) for line in text.splitlines()]
    return {c: [way for *of, way in lines if of == [own, c]] for own, c, _ in lines if own == kind}


@lru_cache(128)
def open_font(path, size=SIZE):
    """The `ImageFont` in a size of pixels."""
    # The basic layout is the same on every machine, Raqm may be missing.
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


def glyph_mask(font, text, bold=0):
    """An "L" image of what an `ImageFont` draws, ``bold`` pixels bolder; (2, 2) for nothing."""
    mask = font.getmask(text, stroke_width=bold)
    size = mask.size if all(mask.size) else (2, 2)
    return Image.frombytes("L", size, bytes(mask) or bytes(4))


def _shape(font, character, slant=0):
    """(24, 24) float, the glyph stretched to a square, its mean 0. ValueError of an empty one."""
    glyph = glyph_mask(font, character)
    if slant:
        how = (1, slant, -slant * glyph.height, 0, 1, 0)
        size = glyph.width + math.ceil(slant * glyph.height), glyph.height
        glyph = glyph.transform(size, Image.Transform.AFFINE, how, Image.Resampling.BILINEAR)
    box = glyph.getbbox()
    if not box:
        raise ValueError(f"nothing is drawn for {character}")
    shape = np.asarray(glyph.crop(box).resize((24, 24))).astype(np.float32)
    return shape - shape.mean()


def _alike(one, other):
    """The correlation of two shapes, -1 to 1."""
    return float((one * other).sum() / (np.linalg.norm(one) * np.linalg.norm(other) + 1e-6))


@lru_cache(1)
def _ordinary():
    """{character: shapes} of a font that everyone reads, upright and slanted."""
    from captcha.image import DEFAULT_FONTS  # reading needs no captcha package

    font = open_font(DEFAULT_FONTS[0])
    return {c: (_shape(font, c), _shape(font, c, 0.3)) for c in ALPHABETS["alnum62"]}


def usable_font(path):
    """The `Font` of a file. Raises ValueError where no text can be drawn with it."""
    try:
        font = open_font(path)
        missing = lacking(font, ALPHABETS["alnum62"])
        if missing:
            raise ValueError(f"no glyphs for {' '.join(missing[:5])}")
        shapes = {c: _shape(font, c) for c in ALPHABETS["alnum62"]}
        can = set(ALPHABETS["ascii"]).difference(lacking(font, ALPHABETS["ascii"]))
        empty = [c for c in can if c != " " and not font.getbbox(c)[2] > font.getbbox(c)[0]]
    except (OSError, ValueError, TypeError, SystemError) as error:  # broken in many ways
        raise ValueError(str(error)) from None
    ordinary = _ordinary()
    likeness = np.median([max(_alike(shapes[c], o) for o in ordinary[c]) for c in shapes])
    if likeness < LIKENESS:
        raise ValueError(f"symbols, or letters that few can read ({likeness:.2f})")
    # Letters whose two cases differ in most fonts.
    twins = np.median([_alike(shapes[c], shapes[c.upper()]) for c in "abdeghnqr"])
    can = "".join(sorted(can.difference(empty)))
    return Font(str(path), font.getname()[0] or Path(path).stem, can, bool(twins > 0.9))


def look_at_font(path):
    """The `usable_font` of a file, None where it is of no use."""
    with contextlib.suppress(ValueError):
        return usable_font(path)
