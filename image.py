"""From a file's bytes to pixels, and pictures to disk.

Drawing, training and reading without PyTorch share this: which files are read, what an
image becomes before the network sees it (`Preprocess`), and how a picture is written.
"""

import hashlib
import io
import math
import os
import tempfile
import warnings
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

PATCH = 4  # pixels: the network sees patches of 4x4, and each column of them is one step of CTC
MAX_PIXELS = 2**23  # of an image file, 8.4 million: checked before it is decoded
MAX_WIDTH = 4096  # pixels, after resizing
# What people keep images in. Pillow knows more, some by starting other programs.
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
SHEET_IMAGE = (320, 96)  # pixels of an image on a contact sheet, at most
INK = 30  # of 255: what differs less from an image's edges is background
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
        resized = self.width or max(1, round(width * self.height / height / PATCH)) * PATCH
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


class Look(NamedTuple):
    """What is known of an image that was read.

    size: (width, height) in pixels.
    text_size: the same of its text box, or of the image where none was wanted.
    digest: of its pixels.
    """

    size: tuple
    text_size: tuple
    digest: bytes

    def resized(self, trim):
        """The size of what is resized: the image, or what ``trim`` leaves of it."""
        return self.text_size if trim else self.size


def look_at(source, find_text=True):
    """The `Look` of an image that `read_image` reads, and what that raises."""
    image = read_image(source)
    left, top, right, bottom = text_box(image) if find_text else (0, 0, *image.size)
    digest = hashlib.blake2b(image.tobytes(), digest_size=16).digest()
    return Look(image.size, (right - left, bottom - top), digest)


def fitting_preprocess(sizes, text_sizes, needed, height=None, width=None, trim=None):
    """The `Preprocess` that suits some images and their labels.

    Images are cut to their text where that leaves less than half of them in the median,
    and get 40 rows of pixels. Others, of much detail, higher than 50 pixels in the
    median, get 48, the rest 32. The ratio is kept, unless labels would not fit: then
    all images get one width, with at least 5 columns for 4 that the labels need.

    Args:
        sizes, text_sizes: (width, height) in pixels of each image and of its text box.
        needed: columns that each label needs.
        height, width, trim: of the `Preprocess`, None for what suits.
    """
    if not sizes:
        return Preprocess(height or 32, width, bool(trim))
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
    columns = [max(1, round(w * height / h / PATCH)) for w, h in sizes]
    tight = sum(1.25 * n > c for n, c in zip(needed, columns, strict=True))
    if tight <= len(sizes) / 20:
        return Preprocess(height, None, trim)
    longest = sorted(needed)[int(0.995 * len(needed))]  # not that of a mistaken label
    usual = sorted(columns)[len(columns) // 2]
    return Preprocess(height, PATCH * max(usual, math.ceil(1.25 * longest)), trim)


def check_writable(folder):
    """Make ``folder`` if needed. Raises ValueError, before any training, if it cannot be used."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"--out {folder}: cannot be written to ({error.strerror})") from None


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


def keep_previous(paths):
    """Rename files of an earlier run: name.pth -> name.1.pth, with the first free number."""
    number = 1
    while any(path.with_suffix(f".{number}{path.suffix}").exists() for path in paths):
        number += 1
    for path in paths:
        if path.exists():
            path.rename(path.with_suffix(f".{number}{path.suffix}"))


def save_picture(path, image):
    """Write a `PIL.Image` as PNG, by `write_atomically`."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())


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
