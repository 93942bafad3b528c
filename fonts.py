"""The fonts of a machine, and which characters they can show."""

import math
import os
import string
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFont

FONT_FOLDERS = (
    "/usr/share/fonts", "/usr/local/share/fonts", "~/.fonts", "~/.local/share/fonts",
    "/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts", r"C:\Windows\Fonts",
)  # fmt: skip
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
ASCII = "".join(map(chr, range(32, 127)))
LETTERS = string.ascii_letters + string.digits
SIZE = 40  # pixels of the font in which `open_font` looks at texts and draws them
LIKENESS = 0.22  # the least median correlation of a font's glyphs with an ordinary one's


def find_chinese_font():
    """Path of the first of CHINESE_FONTS that this machine has. None: it has none."""
    return next((path for path in CHINESE_FONTS if os.path.exists(path)), None)


def lacking(font, characters):
    """Those of some characters for which an `ImageFont` has no glyph."""

    def drawn(character):
        mask = font.getmask(character)
        return mask.size, bytes(mask)

    # What a font draws for a code point that Unicode will never assign: its
    # "not defined" box, or nothing.
    missing_glyph = drawn("\U0010ffff")
    return [c for c in characters if not c.isspace() and drawn(c) == missing_glyph]


def font_files(folders):
    """Paths of the TrueType and OpenType fonts in some folders, searched in depth, in order."""
    folders = [Path(folder).expanduser() for folder in folders]
    return [str(path) for folder in folders for path in sorted(folder.rglob("*.[to]t[fc]"))]


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


def load_font(path, size):
    """Return the font at ``path`` in ``size`` pixels. Raises ValueError if there is none."""
    try:
        # The basic layout is the same on every machine, Raqm may be missing.
        return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)
    except OSError as error:
        raise ValueError(
            f"--font {path}: cannot be used as a TrueType or OpenType font ({error})"
        ) from None


def check_glyphs(path, alphabet):
    """Raise ValueError if the font at ``path`` lacks a glyph for a character of ``alphabet``."""
    missing = lacking(load_font(path, 32), alphabet)
    if missing:
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


@lru_cache(128)
def open_font(path, size=SIZE):
    """The `ImageFont` in a size of pixels."""
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


def _shape(font, character, slant=0):
    """(24, 24) float, the glyph stretched to a square, its mean 0. ValueError of an empty one."""
    mask = font.getmask(character)
    glyph = Image.frombytes("L", mask.size, bytes(mask))
    if slant:
        how = (1, slant, -slant * mask.size[1], 0, 1, 0)
        size = mask.size[0] + math.ceil(slant * mask.size[1]), mask.size[1]
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
    return {c: (_shape(font, c), _shape(font, c, 0.3)) for c in LETTERS}


def usable_font(path):
    """The `Font` of a file. Raises ValueError where no text can be drawn with it."""
    try:
        font = ImageFont.truetype(path, SIZE, layout_engine=ImageFont.Layout.BASIC)
        missing = lacking(font, LETTERS)
        if missing:
            raise ValueError(f"no glyphs for {' '.join(missing[:5])}")
        shapes = {c: _shape(font, c) for c in LETTERS}
        can = set(ASCII).difference(lacking(font, ASCII))
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
    try:
        return usable_font(path)
    except ValueError:
        return None
