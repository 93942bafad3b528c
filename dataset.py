"""From image files and labels to pixels: the one way for training, evaluation and inference.

A data set is described by a label file, UTF-8, a line an image, paths relative to
the file's folder:

    train/00000.png<TAB>pYaq
"""

import io
import math
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from tqdm import tqdm

COLUMN = 4  # pixels: the network reads an image in columns of this width
MAX_PIXELS = 2**23  # of an image file, 8.4 million: checked before it is decoded
MAX_WIDTH = 4096  # pixels, after resizing
# What people keep images in. Pillow knows more, some by starting other programs.
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
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
        mean, std: the network gets (pixel - mean) / std, a pixel is 0 to 255.
    """

    height: int = 32
    width: int | None = None
    mean: float = 127.5
    std: float = 127.5

    def __call__(self, image):
        """Resize an RGB `PIL.Image` to (3, height, W) uint8, W a multiple of 4.

        Raises ImageError where the aspect ratio makes it wider than 4,096 pixels.
        """
        width = self.width
        if width is None:
            columns = max(1, round(image.width * self.height / image.height / COLUMN))
            width = columns * COLUMN
        if width > MAX_WIDTH:
            raise ImageError(
                f"has {image.width}x{image.height} pixels, that is {width} pixels wide at height "
                f"{self.height}, more than {MAX_WIDTH}: cut it into lines of text"
            )
        if image.size != (width, self.height):
            image = image.resize((width, self.height), Image.Resampling.BILINEAR)
        return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))

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


def read_label_file(path):
    """Read a label file. A byte-order mark and CRLF line ends are accepted.

    Returns:
        [(line number, image path as written, label)], blank lines left out.

    Raises ValueError naming every line without a tab, a path or a label.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path}: the label file cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{line}: is not UTF-8, save the label file as UTF-8") from None
    lines, problems = [], []
    # Not splitlines: a label may hold characters that only it takes for line breaks.
    for number, line in enumerate(text.split("\n"), 1):
        line = line.removesuffix("\r")
        if not line:
            continue
        image, tab, label = line.partition("\t")
        if not tab:
            problems.append(f"{path}:{number}: no tab between the image's path and its label")
        elif not image:
            problems.append(f"{path}:{number}: no image path before the tab")
        elif not label:
            problems.append(f"{path}:{number}: the label is empty")
        else:
            lines.append((number, image, label))
    if problems:
        raise ValueError("\n".join(problems))
    if not lines:
        raise ValueError(f"{path}: the data set is empty, it needs lines of image<TAB>label")
    return lines


def columns_needed(label):
    """Columns that CTC needs for ``label``: one a character, and a blank between repeats."""
    return len(label) + sum(a == b for a, b in pairwise(label))


class TextImageDataset:
    """All images of a label file, decoded, as uint8 in memory.

    Args:
        label_file: path of the label file.
        alphabet: the characters that labels may hold.
        preprocess: a `Preprocess`.
        limit: only the first so many lines are read. None: all.

    Item i is ((3, height, W) uint8 array, label).

    Raises ValueError, naming file and line of everything that cannot be trained on.
    """

    def __init__(self, label_file, alphabet, preprocess, limit=None):
        lines = read_label_file(label_file)[:limit]
        folder = Path(label_file).parent
        known = set(alphabet)

        def load(line):
            """Returns (array, label), or the text of a problem."""
            number, path, label = line
            where = f"{label_file}:{number}"
            unknown = sorted(set(label) - known)
            if unknown:
                return f"{where}: {' '.join(map(repr, unknown))} in {label!r} not in the alphabet"
            try:
                pixels = preprocess(read_image(folder / path))
            except ImageError as error:
                return f"{where}: {folder / path} {error}"
            columns = pixels.shape[2] // COLUMN
            if columns_needed(label) > columns:
                return (
                    f"{where}: {label!r} needs {columns_needed(label)} columns of {COLUMN} pixels, "
                    f"{folder / path} has {columns} at height {preprocess.height}"
                )
            return pixels, label

        # Pillow decodes outside the interpreter's lock, so threads help.
        with ThreadPoolExecutor() as pool:
            name = Path(label_file).name
            items = list(tqdm(pool.map(load, lines), name, len(lines), leave=False, unit="img"))
        problems = [item for item in items if isinstance(item, str)]
        if problems:
            raise ValueError("\n".join(problems))
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def find_chinese_font():
    """Path of the first of CHINESE_FONTS that this machine has. None: it has none."""
    return next((path for path in CHINESE_FONTS if os.path.exists(path)), None)


def contact_sheet(images, captions, columns=8, colours=None):
    """Draw `PIL.Image`s in a grid, each with its caption below. Returns an RGB image.

    The captions are black, or each in its own of ``colours``.
    """
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
