"""From a file's bytes to pixels, and bytes to disk: for drawing, training and reading."""

import contextlib
import io
import math
import os
import queue
import re
import threading
import time
import warnings
from bisect import bisect
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

PATCH = 4  # pixels: the network sees patches of 4x4, and each column of them is one step of CTC
MAX_PIXELS = 2**23  # of an image file, 8.4 million: checked before it is decoded
MAX_WIDTH = 4096  # pixels, after resizing
# What people keep images in. Pillow knows more, some by starting other programs.
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm",
    ".pgm", ".pbm", ".pnm",
)  # fmt: skip
# What training and the check write: pictures that are no data.
NO_FOLDERS, OUR_PICTURES = ("save_model", "__MACOSX"), (".data.png", ".mistakes.png")
MORE, ORIENTATION = "more pages", 0x0112  # a key of an image's info; the EXIF tag
PAUSES = (0.05, 0.2, 0.8)  # seconds, while another program may hold a file
LOOKED_AT = 2**20  # pixels, at most, in which text is looked for
INK, NOISY = 30, 2.3  # of 255, or so many steps of the noise: what differs less is background
FEW, INKY = 4, 0.4  # runs of ink in a row of a few characters; share of ink that is none
STRAY, ABRUPT = 0.02, 0.75  # shares of a line: of a frame, less; where a frame ends, more
GRID, SLOPES = (32, 64), 15  # columns and rows in which slopes are tried, so many steps each way
STEEPEST, LEVEL, AGREED = 0.27, 0.12, 0.8  # slope; heights; share of what a half shows at most
ROOMY, ALONE = 0.8, 0.2  # shares: of an image, text that is cut out; of ink, beside text alone
CLOSE, WIDE = 14, 22  # pixels of a character: of fewer, columns miss some; of more, it falls apart
LOOKS = (  # each at close ones, others and wide ones: times the width, share of the rows left free
    ((1.25, 0), (0.8, 0), (0.7, 0)), ((1.4, 0), (1.12, 0), (1.25, 0)),
    ((1.6, 0), (1.25, 0), (0.8, 0.1)),
)  # fmt: skip
SURE = 0.9  # confidence that needs no other looks
BILINEAR = Image.Resampling.BILINEAR
# Good files carry more than a megabyte of text or of a colour profile.
PngImagePlugin.MAX_TEXT_CHUNK = 2**24
_LOADING = threading.Lock()
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
        trim: cut the image to its text before. None: leave it as it is, but where the
            text is less than ROOMY of it, read that too, or that alone, see `views`.
        mean, std: the network gets (pixel - mean) / std, a pixel is 0 to 255.
        sure: what is read with a lower confidence, 0 to 1, is read from `other_looks` too.
    """

    height: int = 32
    width: int | None = None
    trim: bool | None = False
    mean: float = 127.5
    std: float = 127.5
    sure: float = 0.0

    def __call__(self, image):
        """Resize an RGB `PIL.Image` to (3, height, W) uint8, W a multiple of 4; see `width_of`."""
        if self.trim:
            image = image.crop(find_text_lines(image)[0])
        size = self.width_of(*image.size), self.height
        if image.size != size:  # else it would be copied
            image = image.resize(size, BILINEAR)
        return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))

    def views(self, image):
        """What there is to read of an RGB image: its pixels, and maybe those of its text alone.

        The surest reading counts: text may be cut wrongly. Where it has less than half of the
        height, and hardly any ink is elsewhere, it is read alone: uncut, a dot is lost for sure.
        """
        if self.trim is not None:
            return [self(image)]
        image = image.crop(panel_box(image))
        found = self._whole_and_text(image)
        if slope := slope_of(image):
            found += self._whole_and_text(levelled(image, slope))[-1:]
        return found

    def _whole_and_text(self, image):
        box, _, stray = find_text_lines(image)  # maybe in a frame within the frame
        width, height = box[2] - box[0], box[3] - box[1]
        found = [self(image)]
        if width * height < ROOMY * image.width * image.height:
            with contextlib.suppress(ImageError):  # a line found as text may be too long
                found.append(self(image.crop(box)))
                if height < image.height / 2 and stray < ALONE:
                    del found[0]
        return found

    def width_of(self, width, height):
        """The W that an image of ``width`` x ``height`` pixels, cut if at all, is resized to.

        Raises ImageError where it would be more than 4,096.
        """
        resized = self.width or max(1, round(width * self.height / height / PATCH)) * PATCH
        if resized > MAX_WIDTH:
            size = f"{width}x{height} pixels, that is {resized} pixels wide at height {self.height}"
            raise ImageError(f"has {size}, more than {MAX_WIDTH}: cut it into lines of text")
        return resized

    def __str__(self):
        cut = "cut to their text and " if self.trim else ""
        return f"{cut}resized to height {self.height}, width {self.width or 'kept'}"

    def normalise(self, pixels, kind=None):
        """uint8 tensor or array of any shape -> the same by mean and std, float32 or ``kind``."""
        if isinstance(pixels, np.ndarray):
            return (pixels.astype(np.float32) - self.mean) / self.std
        pixels = pixels.to(kind) if kind else pixels.float()
        return pixels.sub_(self.mean).div_(self.std)


def other_looks(images, readings):
    """{key: [(3, height, W) uint8]} made by each of LOOKS in turn, of such ``images`` and their
    ``readings``, {key: [the `Reading` of each, and maybe later ones]}.
    """
    for look in LOOKS if images else ():
        yield {
            key: [
                stretched(pixels, *look[bisect((CLOSE, WIDE), room_of(pixels, first))])
                for pixels, first in zip(found, readings[key], strict=False)
            ]
            for key, found in images.items()
        }


def room_of(pixels, reading):
    """Pixels of the width of (3, height, W) that a character of its `Reading` takes."""
    return pixels.shape[2] / max(1, len(reading.text))


def stretched(pixels, by, free=0):
    """(3, height, W) uint8 -> the same, about ``by`` times as wide, MAX_WIDTH at most.

    A share ``free`` of the rows above, and below, repeats the outermost of those between.
    """
    rows, columns = round(free * pixels.shape[1]), max(1, round(pixels.shape[2] / PATCH * by))
    image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    made = Preprocess(pixels.shape[1] - 2 * rows, min(MAX_WIDTH, columns * PATCH))(image)
    return np.pad(made, ((0, 0), (rows, rows), (0, 0)), mode="edge")


def slope_of(image):
    """By how much the text of an RGB `PIL.Image` falls for each pixel to the right.

    Where text is level the rows of pixels differ the most from each other (Postl, US patent
    4,723,297): of slopes both ways, that is the one. 0 where that is hardly one, or where a half
    of the image says something else: glyphs that are turned one by one are no line that is.
    """
    (columns, rows), steps = GRID, np.arange(-SLOPES, SLOPES + 1)
    grid = np.asarray(image.resize(GRID, BILINEAR)).sum(2, dtype=np.int64)
    falls = min(1, STEEPEST * image.width / image.height) * steps / SLOPES  # in heights
    down = np.rint(((np.arange(columns) + 0.5) / columns - 0.5) * falls[:, None] * rows)
    places = (np.arange(rows)[:, None] + down[:, None].astype(int)).clip(0, rows - 1)
    halves = grid[places, np.arange(columns)].reshape(len(steps), rows, 2, -1).sum(3)
    sharp = (np.diff(halves, axis=1) ** 2).sum(1)
    best = int(sharp.sum(1).argmax())
    agreed = (sharp[best] >= AGREED * sharp.max(0)).all()
    is_slope = agreed and abs(falls[best]) >= LEVEL and 0 < best < 2 * SLOPES
    return float(falls[best]) * image.height / image.width if is_slope else 0.0


def levelled(image, slope):
    """An RGB `PIL.Image`, turned until what falls by ``slope`` is level, with all that it shows."""
    (width, height), cos = image.size, 1 / math.sqrt(1 + slope * slope)
    sin = slope * cos
    w, h = math.ceil(width * cos + height * abs(sin)), math.ceil(width * abs(sin) + height * cos)
    left, top = (width - w * cos + h * sin) / 2, (height - w * sin - h * cos) / 2
    turn, ground = (cos, -sin, left, sin, cos, top), tuple(_ground(np.asarray(image)).tolist())
    return image.transform((w, h), Image.Transform.AFFINE, turn, BILINEAR, fillcolor=ground)


def find_images(folder):
    """The images below a folder, in order. Links to folders are followed, loops are not.

    Left out are hidden files and folders, and the pictures that this project writes.
    """
    found, seen = [], set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if name[0] != "." and name not in NO_FOLDERS]
        names = [name for name in files if name.lower().endswith(SUFFIXES) and name[0] != "."]
        below = Path(parent)
        found += [below / name for name in names if not name.endswith(OUR_PICTURES)]
    return sorted(found, key=lambda path: path.parts)  # paths themselves compare slowly


class ImageFinder:
    """Finds the images that a label file in ``folder`` names, by paths relative to that."""

    def __init__(self, folder):
        self.folder = folder
        self.endings = None

    def find(self, written):
        """The path of the image that is written so, None where there is none or several.

        It may lie in a folder further down, or be written without its suffix.
        """
        for name in (written, written.replace("\\", "/")):
            path = os.path.join(self.folder, name)
            if name and "\0" not in name and os.path.isfile(path):
                return Path(path)
        if self.endings is None:
            self.endings = defaultdict(set)
            for path in find_images(self.folder):
                parts = path.relative_to(self.folder).parts
                for i in range(len(parts)):
                    ending = "/".join(parts[i:])
                    self.endings[ending].add(path)
                    self.endings[ending.removesuffix(path.suffix)].add(path)
        found = self.endings.get(written.replace("\\", "/").removeprefix("./"), ())
        return next(iter(found)) if len(found) == 1 else None

    def named_in(self, path):
        """Whether words at the beginning of a text file name images."""
        with path.open("rb") as file:
            text = file.read(65536).decode("utf-8", "replace")
        words = [word for word in re.split(r"[^\w./\\-]+", text) if "." in word]
        return any(self.find(word) for word in words[:200])


def read_image(source):
    """Read a path, the bytes of a file or a `PIL.Image` of any mode: upright, on white.

    Returns:
        an RGB `PIL.Image` of at least 2x2 pixels, of a file with several its first page or
        frame. Whether there were more is in its ``info``, under MORE.

    Raises:
        ImageError: there is no such file, it is no complete image in one of FORMATS,
            or it has too few or too many pixels.
    """
    try:
        if isinstance(source, Image.Image):
            with _LOADING:  # which is not safe where several threads are given the same one
                source.load()
            return _to_rgb(source)
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        with Image.open(file, formats=FORMATS) as image:
            first = _to_rgb(image)
            first.info[MORE] = False
            with contextlib.suppress(Exception):  # whatever a broken one leads to: it is not read
                first.info[MORE] = bool(getattr(image, "is_animated", False))
            return first
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
    size = f"{image.width}x{image.height} pixels"
    if min(image.size) < 2:
        raise ImageError(f"has {size}, at least 2x2 are needed")
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(f"has {size}, more than {MAX_PIXELS:,} are refused")
    if image.getexif().get(ORIENTATION, 1) != 1:
        from PIL import ImageOps  # here, for a quicker start of what seldom needs it

        image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        image = _to_8_bits(image)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_8_bits(image):
    """Scale 16-bit (0 to 65,535), 32-bit or float (0 to 1) grey to 'L', which Pillow would clip.

    Where 16 bits hold no value that takes more than 12, they are those of a 12-bit camera.
    """
    with np.errstate(all="ignore"):  # a broken file may hold any number
        pixels = np.nan_to_num(np.asarray(image, dtype=np.float64))
        most, is_float = pixels.max(), image.mode == "F"
        deep = most <= 1 if is_float else image.mode.startswith("I;16") or most > 255
        white = 1 if is_float else 4095 if most < 4096 else 65535
        scale = 255 / white if deep else 1
        return Image.fromarray((pixels * scale).round().clip(0, 255).astype(np.uint8))


def _moving_mean(values, size):
    """The mean of ``size`` neighbours around each of (N,) integers, rounded once everywhere."""
    return np.convolve(values, np.ones(size, int))[(size - 1) // 2 :][: len(values)] / size


def _small(image):
    """((H, W, 3) int16, by how much they are smaller): what stands out does so in them too."""
    scale = math.ceil(math.sqrt(max(1, image.width * image.height / LOOKED_AT)))
    return np.asarray(image.reduce(scale) if scale > 1 else image).astype(np.int16), scale


def _unlike(pixels, colour, least=INK):
    """(H, W) bool: which of (H, W, 3) int16 pixels differ from a colour by more than noise does."""
    steps = np.abs(np.diff(pixels[[0, -1]], axis=1)).max(2)  # at the edges, where hardly text is
    noise = np.median(steps) if steps.size else 0  # of one column, none
    red, green, blue = np.abs(pixels - colour).transpose(2, 0, 1)  # max(2) takes five times as long
    return np.maximum(np.maximum(red, green), blue) > max(least, NOISY * noise)


def _around(pixels):
    """(H, W, 3) int16: the mean colour around each pixel, of about a quarter of the height."""
    image = Image.fromarray(pixels.astype(np.uint8))
    small = image.resize((max(1, round(4 * image.width / image.height)), 4), BILINEAR)
    return np.asarray(small.resize(image.size, BILINEAR)).astype(np.int16)


def _ground(pixels):
    """The colour of the background of (H, W, 3) pixels, (3,) int16: the median of their edges."""
    edges = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    return np.median(edges, axis=0).astype(np.int16)


def panel_box(image):
    """Where an RGB `PIL.Image` is without frames, as (left, top, right, bottom) for its `crop`.

    Frames, as of screens or of what was made as wide as others, have one colour and end
    everywhere at once, as text on its own ground does not. An empty bar may be a letter.
    """
    pixels, scale = _small(image)
    left, top, right, bottom = 0, 0, pixels.shape[1], pixels.shape[0]
    for corner in (0, -1):  # a frame may be on one side only
        part = pixels[top:bottom, left:right]
        other = _unlike(part, part[corner, corner])
        rows, columns = (np.flatnonzero(other.mean(axis) > STRAY) for axis in (1, 0))
        if min(len(rows), len(columns)) < 8:
            continue
        a, b, c, d = int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
        inner = other[b:d, a:c]
        sides = (
            (a > 0, inner[:, :3].mean(0)), (b > 0, inner[:3].mean(1)),
            (c < other.shape[1], inner[:, -3:].mean(0)), (d < len(other), inner[-3:].mean(1)),
        )  # fmt: skip
        ends = [shares.max() for is_cut, shares in sides if is_cut]
        text = _unlike(part[b + 2 : d - 2, a + 2 : c - 2], part[b + 2, a + 2])
        if ends and min(ends) > ABRUPT and text.mean() > STRAY:
            left, top, right, bottom = left + a, top + b, left + c, top + d
    right, bottom = min(image.width, right * scale), min(image.height, bottom * scale)
    return left * scale, top * scale, right, bottom


def find_text_lines(image):
    """Where the text of an RGB `PIL.Image` is, with some background around it, and its lines.

    Along a row of pixels, text is many short runs of ink, a stray line one or few: the rows of the
    text are those with many runs. Its columns are those with more ink in these rows than a line
    leaves. Lines that are about as heavy as the heaviest are kept. Ink is what differs from the
    edges; where no text does, or nearly all, from what is around it: light may be uneven.

    Returns:
        ((left, top, right, bottom) for `Image.crop`, number of lines, share of the ink that
        is elsewhere); its `panel_box`, 1 and 0 where no text stands out.
    """
    panel = panel_box(image)
    image = image.crop(panel)
    pixels, scale = _small(image)
    ink = _unlike(pixels, _ground(pixels))
    found = _text_in(ink)
    if not found or (found[3] > ROOMY and ink.mean() > INKY):
        found = _text_in(_unlike(pixels, _around(pixels), INK / 2)) or found
    if not found:
        return panel, 1, 0.0
    box = np.minimum(np.multiply(found[0], scale), image.size * 2)
    return tuple((box + panel[:2] * 2).tolist()), *found[1:3]


def _text_in(ink):
    """`find_text_lines` of (H, W) ink, and the share of the image that it is; None without text."""
    (height, width), lines = ink.shape, _line_rows(ink)
    if not lines:
        return None
    top, bottom = int(lines[0][0]), int(lines[-1][-1]) + 1
    size = (bottom - top) // len(lines)
    amount = _moving_mean(ink[top:bottom].sum(0), min(max(3, size // 4), width))
    columns = np.flatnonzero(amount > 0.08 * size + 0.7)
    if size < max(3, min(height / 10, 12)) or not len(columns):
        return None
    left = _text_edge(ink[top:bottom], columns[0], size)
    right = width - _text_edge(ink[top:bottom, ::-1], width - 1 - columns[-1], size)
    top, bottom = max(0, top - size // 4), bottom + size // 4
    part = ink[top:bottom, left:right]
    return (left, top, right, bottom), len(lines), 1 - part.sum() / ink.sum(), part.size / ink.size


def _text_edge(ink, first, size):
    """Where to cut (rows, columns) of ink before the text whose first heavy column is given.

    Before it, or before a sign: one as light as a minus stands alone at half of the height.
    """
    begin = max(0, first - 3 * size // 2)
    empty = np.flatnonzero(~ink[:, begin:first].any(0))
    near = ink[:, begin : begin + max(empty, default=0)]  # where no glyph begins yet
    rows, columns = (np.flatnonzero(near.any(axis)) for axis in (1, 0))
    halfway = len(rows) and min(rows[0], len(ink) - rows[-1]) >= len(ink) / 5
    first = begin + columns[0] if halfway and columns[0] >= size // 4 else first
    return max(0, int(first) - size // 2)


def _line_rows(ink):
    """[(N,) rows of pixels] of each line of text in (H, W) ink, from the top."""
    height = len(ink)
    runs = _moving_mean(ink[:, 0] + (ink[:, 1:] & ~ink[:, :-1]).sum(1), min(3, height))
    rows = np.flatnonzero(runs > max(2.2, 0.3 * np.percentile(runs, 90)))
    # Accents and the dots of i stand apart from their line, other lines further.
    parts = np.split(rows, np.flatnonzero(np.diff(rows) > height // 20) + 1)
    heaviest = max(parts, key=lambda part: runs[part].sum())
    lines = [part for part in parts if part is heaviest or _is_another_line(part, heaviest, runs)]
    if len(lines) == 1 and 0 < runs.max() <= FEW:
        y, x = ink.nonzero()  # of a few characters all belongs to them, if it stands together
        if ink[1:-1, 1:-1].sum() == len(y) and np.ptp(x) <= 3 * np.ptp(y):
            return [np.arange(y[0], y[-1] + 1)]
    return lines if len(rows) else []


def _is_another_line(rows, heaviest, runs):
    """Whether some rows are a line of text beside the heaviest: about as high and as heavy."""
    is_high = len(rows) >= max(8, 0.6 * len(heaviest))
    is_heavy = runs[rows].sum() > 0.5 * runs[heaviest].sum()
    gap = max(rows[0] - heaviest[-1], heaviest[0] - rows[-1])  # less in a digit of a display
    return is_high and is_heavy and gap > 0.2 * len(heaviest)


def fitting_preprocess(sizes, text_sizes, needed, height=None, width=None, trim=None, learnt=None):
    """The `Preprocess` that suits some images and their labels.

    What is cut to its text, or has more detail, gets more rows of pixels, the rest those that a
    network has learnt; README.md says which. The ratio is kept, unless labels would not fit: all
    get one width then, at least 5 columns for 4 they need.

    Args:
        sizes, text_sizes: (width, height) in pixels of each image and of its text box.
        needed: columns that each label needs.
        height, width, trim: of the `Preprocess`, None for what suits.
        learnt: the height that a network reads already, None for a new network.
    """
    if not sizes:
        return Preprocess(height or 32, width, bool(trim))
    if trim is None:
        trim = bool(np.median(np.prod(text_sizes, 1) / np.prod(sizes, 1)) < 0.5)
    widths, heights = np.array(text_sizes if trim else sizes).T
    ratios, needed = widths / heights, np.maximum(needed, 1)
    if not height:
        few, more, least = (learnt, 40, 1.75 * learnt) if learnt else (32, 48, 50)
        height = 40 if trim else more if np.median(heights) > least else few
        close = height * np.median(ratios / needed) < 3 * PATCH
        if close and not width and 48 * ratios.max() <= MAX_WIDTH:
            height = max(height, 48)
    columns = np.maximum(1, np.round(height * ratios / PATCH))
    if width or np.mean(1.25 * needed > columns) <= 0.05:
        return Preprocess(height, width, trim)
    longest = np.sort(needed)[int(0.995 * len(needed))]  # not that of a mistaken label
    usual = np.sort(columns)[len(columns) // 2]
    return Preprocess(height, PATCH * int(max(usual, math.ceil(1.25 * longest))), trim)


def as_they_come(items, most):
    """Lists of at most ``most`` items: those that are there, one where others are waited for."""
    if isinstance(items, list | tuple):
        yield from (items[i : i + most] for i in range(0, len(items), most))
        return
    arrived, stopped = queue.Queue(most), threading.Event()

    def fetch():
        try:
            for item in items:
                arrived.put((item, None))
                if stopped.is_set():
                    return
            arrived.put((None, StopIteration))
        except BaseException as error:
            arrived.put((None, error))

    threading.Thread(target=fetch, daemon=True).start()
    try:
        end = None
        while end is None:
            batch = []
            while not end and len(batch) < most and not (batch and arrived.empty()):
                item, end = arrived.get()
                batch += [] if end else [item]
            if batch:
                yield batch
        if end is not StopIteration:
            raise end
    finally:
        stopped.set()
        while not arrived.empty():  # lets the thread go on to its end
            arrived.get()


def write_atomically(path, content):
    """Write bytes so that ``path`` is either as before or complete, whatever happens.

    Raises OSError, naming ``path``, where they cannot be, as while another program uses it.
    """
    # Of its own, whoever else writes to the same path.
    scratch = path.with_name(f"{path.name}.{os.urandom(6).hex()}.unfinished")
    try:
        with scratch.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # a power cut must not leave the new name without content
        for pause in (*PAUSES, None):
            try:
                os.replace(scratch, path)
                break
            except PermissionError:
                if pause is None:
                    raise
                time.sleep(pause)
    except OSError as error:
        problem = f"{path}: cannot be written ({error.strerror}), it is as before"
        raise type(error)(problem) from None
    finally:
        scratch.unlink(missing_ok=True)
