"""Images of a line of text in the look of the world: any font, ground, wear and camera.

What `gen_image.py --task general` draws. The idea of learning to read real text from drawn
text alone is of Jaderberg et al., "Synthetic Data and Artificial Neural Networks for Natural
Scene Text Recognition", arXiv 1406.2227.

The path of an image: a text, its `Strokes`, ground and colours (`paint`), things drawn across
(`clutter`), light and camera (`wear`).
"""

import io
import math
import string
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from captcha.image import ImageCaptcha
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from ctc_label_converter import columns_needed
from image import PATCH, Preprocess
from metric import SIZE, glyph_mask, open_font, read_strokes


class Strokes(NamedTuple):
    """(H, W) uint8 arrays of the pixels that text covers, 0 to 255, and by which glyph."""

    cover: np.ndarray
    owner: np.ndarray


class Look(NamedTuple):
    """What goes together in images of a kind; how often something is there is from 0 to 1."""

    rows: tuple = (40, 61)  # the least and most that a line is high, in pixels
    colours: float = 0.2  # how often each glyph has its own
    contrast: tuple = (50, 75, 100, 140)  # of which a text has one at least, of 255
    white: float = 0.0  # how often the ground is plain white
    across: tuple = (0.25, 7)  # how often strokes go across, and how many at most
    worn: float = 1.0  # how often light, camera and file have left traces
    binarised: float = 0.06  # how often there are but two colours


CAPTCHA = Look((18, 61), 0.6, (15, 30, 50, 100), 0.5, (0.85, 9), 0.4, 0.01)
DISPLAY = Look(binarised=0.4)
KINDS = {"captcha": 40, "display": 6, "amount": 6, "line": 48}  # in a hundred images


class Canvas:
    """Where strokes are drawn, with ``pen``, and which glyph each pixel belongs to."""

    def __init__(self, width, height):
        self.size = int(width), int(height)
        self.cover, self.owner = Image.new("L", self.size), Image.new("L", self.size)
        self.pen, self._owners = ImageDraw.Draw(self.cover), ImageDraw.Draw(self.owner)

    def begin(self, glyph, x):
        """What stands to the right of x belongs to a glyph, given by its number."""
        self._owners.rectangle((x, 0, *self.size), min(glyph, 255))

    def add(self, glyph, image, x, y):
        """Draw the mask of a glyph with its upper left corner at (x, y), over the others."""
        place = round(x), min(max(0, round(y)), max(0, self.size[1] - image.height))
        part = (*place, place[0] + image.width, place[1] + image.height)
        self.cover.paste(ImageChops.lighter(self.cover.crop(part), image), place)
        self.owner.paste(min(glyph, 255), part, image.point(lambda value: 255 * (value > 60)))

    def spot(self, x, y, size):
        """Draw a round dot."""
        self.pen.ellipse((x - size / 2, y - size / 2, x + size / 2, y + size / 2), 255)

    def strokes(self):
        """What was drawn, as `Strokes`."""
        return Strokes(np.asarray(self.cover), np.asarray(self.owner))


def strokes_of_line(text, font, rng):
    """The `Strokes` of a line as a typesetter or printer sets it."""
    face, pad = open_font(font.path), SIZE // 4
    tracking = rng.choice((0, 0, 0, rng.uniform(-0.03, 0.3))) * SIZE
    bold = rng.choice((0, 0, 0, 0, 0, 0, 0, 0, 0, 1))
    advances = [face.getlength(text[:i]) + i * tracking for i in range(len(text) + 1)]
    canvas = Canvas(advances[-1] + 2 * pad + SIZE // 2, sum(face.getmetrics()) + 2 * pad)
    parts = zip(text, advances, strict=False) if tracking else [(text, 0)]
    for part, x in parts:  # in one piece it has the font's kerning
        canvas.pen.text((pad + x, pad), part, 255, face, stroke_width=bold)
    for i, x in enumerate(advances[:-1]):
        canvas.begin(i, pad + x - 1)
    style = rng.random()
    if style < 0.06:
        canvas.cover = _dots(text, font, rng) or canvas.cover
        canvas.owner = canvas.owner.resize(canvas.cover.size, Image.Resampling.NEAREST)
    elif style < 0.11:  # only its outline
        inner = canvas.cover.filter(ImageFilter.MinFilter(rng.choice((3, 5))))
        canvas.cover = ImageChops.subtract(canvas.cover, inner)
    elif style < 0.14:  # stencil: bars without paint
        for start, end in pairwise(advances):
            x = pad + (start + end) / 2
            canvas.pen.rectangle((x - 1, 0, x + 1, canvas.size[1]), 0)
    return canvas.strokes()


def _dots(text, font, rng):
    """A line as a dot matrix prints or shows it, None where its glyphs are too fine."""
    small = open_font(font.path, rng.randint(9, 14))
    grid = np.asarray(glyph_mask(small, text)) > 100
    if not grid.any():
        return None
    step = max(2, round(SIZE * 0.8 / grid.shape[0]))
    dot = np.zeros((step, step), np.uint8)
    if rng.random() < 0.5:
        dot[:] = 255  # pixels of a display
        if rng.random() < 0.5 and step > 2:
            dot[-1] = dot[:, -1] = 0
    else:
        y, x = np.mgrid[:step, :step] - (step - 1) / 2
        dot[:] = (255 * (x * x + y * y < (step * rng.uniform(0.4, 0.6)) ** 2)).astype(np.uint8)
    return Image.fromarray(np.pad(np.kron(grid.astype(np.uint8), dot), SIZE // 6))


LIT = read_strokes("lit")  # of seven segments, named from the top clockwise, then the middle one
# Of a segment, left, top, right and bottom, in units of the width and half the height.
ENDS = {segment: list(map(int, ends)) for segment, [ends] in read_strokes("ends").items()}


def strokes_of_segments(text, rng):
    """The `Strokes` of a line on a display of seven segments; a dot takes no place of its own."""
    height, width = SIZE * 0.75, SIZE * rng.uniform(0.3, 0.5)
    thick, gap = rng.uniform(2.5, 6.5), rng.uniform(-0.5, 1.2)
    step = width + thick + SIZE * rng.uniform(0.08, 0.3)
    dim = rng.choice((0, 0, rng.randint(10, 60)))  # segments that are off
    canvas, x, top = Canvas(step * (len(text) + 1), height + thick + SIZE / 2), SIZE / 4, SIZE / 4
    for i, c in enumerate(text):
        canvas.begin(i, x - thick)
        if c in ".:":
            for y in (height,) if c == "." else (height * 0.3, height * 0.7):
                canvas.spot(x - step + width + thick * 1.4, top + y, thick)
            continue
        for segment, ends in ENDS.items():
            lit = 255 if segment in LIT.get(c, [""])[0] else dim
            line = np.reshape(ends, (2, 2)) * (width, height / 2) + (x, top)
            short = np.sign(line[1] - line[0]) * (gap + thick / 4)
            if lit:
                canvas.pen.line([*(line[0] + short), *(line[1] - short)], lit, round(thick))
        x += step
    return canvas.strokes()


HAND = read_strokes("hand")  # points of strokes, x from 0 to 6, y from 0 to 9 downwards


def _curve(points, fine=6):
    """Points on a smooth line through some (x, y): a Catmull-Rom spline."""
    p = np.array([points[0], *points, points[-1]], float)
    t = np.linspace(0, 1, fine, endpoint=False)[:, None]
    parts = [
        p[i] + t / 2 * (p[i + 1] - p[i - 1])
        + t**2 * (p[i - 1] - 2.5 * p[i] + 2 * p[i + 1] - p[i + 2] / 2)
        + t**3 * (1.5 * (p[i] - p[i + 1]) + (p[i + 2] - p[i - 1]) / 2)
        for i in range(1, len(p) - 2)
    ]  # fmt: skip
    return np.concatenate([*parts, p[-1:]])


def _pen_lines(way, curved, scale, slant, wild, rng):
    """Each stroke of a way to write a character, (N, 2) x and y in units of `HAND`."""
    for stroke in way.split("/"):
        points = [[ord(n) - 48 + rng.gauss(0, wild) for n in xy] for xy in stroke.split()]
        line = (_curve(points) if curved else np.array(points)) * scale
        line[:, 0] += slant * (9 - line[:, 1])
        yield line + (0, (1 - scale) * 9)


def strokes_of_hand(text, rng):
    """The `Strokes` of digits that somebody has written, in one hand."""
    unit = np.array([SIZE * rng.uniform(0.25, 0.6) / 6, SIZE * 0.8 / 9])  # of HAND, in pixels
    manner = rng.gauss(0.15, 0.2), rng.uniform(0.2, 0.7)  # how slanted, how wild
    thick, space = rng.uniform(1.5, 5), rng.uniform(-0.5, 3)
    habits = {c: rng.choice(ways) for c, ways in HAND.items()}
    small, joined, end = rng.uniform(0.6, 1), rng.random() < 0.25, None
    canvas = Canvas((len(text) + 2) * (9 + space) * unit[0] + 2 * SIZE, 2 * SIZE)
    place = np.array([SIZE * 0.8, SIZE * 0.5])
    for i, c in enumerate(text):
        way = habits[c] if rng.random() < 0.8 else rng.choice(HAND[c])
        scale = rng.uniform(0.8, 1.15) * (small if c == "0" else 1)
        canvas.begin(i, place[0] - unit[0])
        for line in _pen_lines(way, c in "0235689", scale, *manner, rng):
            line = line * unit + place
            canvas.pen.line(list(map(tuple, line)), 255, round(thick), "curve")
            if joined and end is not None and c in "023":
                canvas.pen.line([*end, *line[0]], 255, round(thick))
            for end in line[[0, -1]]:
                canvas.spot(*end, thick)
        end = end if c in "0247" else None
        advance = (3 if c in ".,:" else 6) * scale + space + rng.gauss(1, 0.7)
        place += (advance * unit[0], rng.gauss(0, 0.4))
    if text[-1] in string.digits and rng.random() < 0.3:
        _fill_up(canvas, place, unit[0], thick, rng)
    return canvas.strokes()


def _fill_up(canvas, place, unit, thick, rng):
    """Draw one or two strokes after a number, so that nobody adds a digit."""
    y, length = place[1] + SIZE * rng.uniform(0.3, 0.6), rng.uniform(2, 9) * unit
    for top in (y, y + SIZE * 0.15)[: rng.choice((1, 1, 2))]:
        ends = place[0], top + rng.gauss(0, 1), place[0] + length, top + rng.gauss(0, 1)
        canvas.pen.line(ends, 255, round(thick))


def strokes_of_glyphs(text, fonts, rng):
    """The `Strokes` of glyphs, each by itself in one of the `Font`s, turned, sized and shifted."""
    turn, shift = rng.choice((3, 12, 25, 40)), rng.choice((0.03, 0.1, 0.22)) * SIZE
    spread, bold = rng.choice((0.0, 0.1, 0.25)), rng.choice((0, 0, 0, 1, 1, 2))
    space = rng.choice((rng.uniform(-0.12, 0.05), rng.uniform(0, 0.5), rng.uniform(0.3, 1.3)))
    glyphs, x = [], SIZE * 0.6
    for c in text:
        face = open_font(rng.choice(fonts).path)
        image, top = glyph_mask(face, c, bold), face.getbbox(c, anchor="ls", stroke_width=bold)[1]
        factor = rng.uniform(1 - spread, 1 + spread)
        middle = SIZE * 1.1 + (top + image.height / 2) * factor + rng.uniform(-shift, shift)
        size = [max(1, round(n * factor)) for n in image.size]
        image = image.resize(size, Image.Resampling.BILINEAR)
        image = image.rotate(rng.gauss(0, turn / 2), Image.Resampling.BILINEAR, expand=True)
        x += SIZE * 0.4 if c == " " else 0
        glyphs.append((image, x, middle - image.height / 2))
        x += size[0] + space * SIZE * rng.uniform(0.7, 1.3)
    canvas = Canvas(x + SIZE * 0.6, SIZE * 2.1)
    for i, placed in enumerate(glyphs):
        canvas.add(i, *placed)
    return canvas.strokes()


def _frame(rng):
    """Space left of, above, right of and below a text, in units of its height."""
    kind = rng.random()
    if kind < 0.35:  # cut tightly, or a little into it
        return [rng.uniform(-0.04, 0.15) for _ in range(4)]
    if kind < 0.8:
        return [rng.uniform(0, most) for most in (0.8, 0.5, 0.8, 0.5)]
    return [rng.uniform(0.1, most) for most in (3, 1, 3, 1)]  # alone in a wide picture


def fitted(strokes, rng, rows):
    """`Strokes` bent, slanted and seen at an angle, in a frame, of a height about ``rows``."""
    cover, owner = map(Image.fromarray, strokes)
    left, top, right, bottom = cover.getbbox() or (0, 0, *cover.size)
    height, unit = bottom - top, min(bottom - top, SIZE)
    frame = zip((left, top, right, bottom), (-unit, -unit, unit, unit), _frame(rng), strict=True)
    left, top, right, bottom = (edge + size * space for edge, size, space in frame)
    scale = rng.uniform(*rows) / max(0.67 * unit, bottom - top)
    size = (right - left) * scale * (math.exp(rng.gauss(0, 0.16)) if rng.random() < 0.6 else 1)
    size = max(8, round(size)), max(8, round((bottom - top) * scale))
    # Corners of the frame in the strokes' picture: the view of a camera that stands askew.
    slant = rng.gauss(0, 0.12) * height if rng.random() < 0.4 else 0
    turn = rng.gauss(0, 0.03) * min(right - left, 5 * height) if rng.random() < 0.5 else 0
    wild = 0.06 * height if rng.random() < 0.4 else 0
    corners = [
        left + slant, top + turn, left - slant, bottom + turn,
        right - slant, bottom - turn, right + slant, top - turn,
    ]  # fmt: skip
    corners = [n + rng.uniform(-wild, wild) for n in corners]
    if scale < 0.7:
        cover = cover.filter(ImageFilter.GaussianBlur(0.35 / scale))
    how = size, Image.Transform.QUAD, corners
    cover = np.asarray(cover.transform(*how, Image.Resampling.BILINEAR))
    owner = np.asarray(owner.transform(*how))
    return _bent(cover, owner, rng) if rng.random() < 0.25 else Strokes(cover, owner)


def smooth_noise(shape, cells, source):
    """(H, W) float from about -1 to 1 that changes slowly: noise of ``cells`` = (rows, columns)."""
    noise = Image.fromarray(source.uniform(-1, 1, cells).astype(np.float32))
    return np.asarray(noise.resize(shape[::-1], Image.Resampling.BICUBIC))


def _bent(cover, owner, rng):
    """`Strokes` smoothly bent by some pixels: as by hand, on cloth, or through old glass."""
    source = np.random.default_rng(rng.getrandbits(64))
    height, width = cover.shape
    cells = rng.choice((2, 3, 4)), max(2, width // rng.choice((12, 20, 40)))
    amount = height * rng.uniform(0.02, 0.07)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    y = np.clip(y + amount * smooth_noise(cover.shape, cells, source), 0, height - 1.001)
    x = np.clip(x + amount * smooth_noise(cover.shape, cells, source), 0, width - 1.001)
    top, left = y.astype(int), x.astype(int)
    y, x, padded = y - top, x - left, np.pad(cover, ((0, 1), (0, 1))).astype(np.float32)
    above = padded[top, left] * (1 - x) + padded[top, left + 1] * x
    below = padded[top + 1, left] * (1 - x) + padded[top + 1, left + 1] * x
    return Strokes((above * (1 - y) + below * y).astype(np.uint8), owner[top, left])


def _ground(shape, rng, source, white):
    """(H, W, 3) float, 0 to 255: a plain, graded, woven, noisy or patchy ground."""
    if rng.random() < white:
        return np.full((*shape, 3), 255, np.float32)
    base = np.array([rng.uniform(0, 255) for _ in range(3)])
    kind = rng.random()
    if kind < 0.65:  # paper, enamel, a dark display
        grey = rng.choice((255, 255, rng.uniform(200, 255), rng.uniform(0, 60), 0))
        base = np.array([grey + rng.gauss(0, 8) for _ in range(3)])
    ground = np.broadcast_to(base.astype(np.float32), (*shape, 3)).copy()
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
    kind = rng.random()
    if kind < 0.2:
        slope = rng.uniform(-1, 1) * x / shape[1] + rng.uniform(-1, 1) * y / shape[0]
        ground += slope[:, :, None] * np.array([rng.uniform(-90, 90) for _ in range(3)])
    elif kind < 0.35:
        cells = rng.randint(2, 10), rng.randint(2, 30)
        ground += rng.uniform(10, 60) * smooth_noise(shape, cells, source)[:, :, None]
    elif kind < 0.5:  # guilloche, cloth, paper with lines
        for _ in range(rng.randint(1, 3)):
            angle, period = rng.uniform(0, math.pi), rng.uniform(2.5, 12)
            bend = rng.uniform(0, 4) * np.sin(x / rng.uniform(5, 30) + rng.uniform(0, 6))
            wave = np.sin((x * math.cos(angle) + y * math.sin(angle) + bend) * 2 * math.pi / period)
            if rng.random() < 0.5:
                wave = wave > 0.6
            ground += rng.uniform(-40, 40) * wave[:, :, None]
    elif kind < 0.58:
        cells = [max(2, n // 3) for n in shape]
        patches = [smooth_noise(shape, cells, source) for _ in range(3)]
        ground += rng.uniform(10, 50) * np.stack(patches, 2)
    return ground.clip(0, 255)


def _colour_against(ground, least, rng):
    """(3,) that stands out from the mean of a ground by at least ``least`` of 255."""
    mean = ground.mean((0, 1))
    for _ in range(30):
        kind = rng.random()
        if kind < 0.4:
            colour = np.array([rng.uniform(0, 255)] * 3) + [rng.gauss(0, 10) for _ in range(3)]
        elif kind < 0.55:
            colour = np.full(3, rng.choice((0, 255)) + rng.gauss(0, 15))
        else:
            colour = np.array([rng.uniform(0, 255) for _ in range(3)])
        colour = colour.clip(0, 255)
        if abs((colour - mean) @ (0.3, 0.59, 0.11)) + 0.3 * np.abs(colour - mean).max() > least:
            return colour
    return np.full(3, 0.0 if mean.mean() > 127 else 255.0)


def paint(strokes, rng, source, look):
    """(H, W, 3) float, 0 to 255: a ground with the text on it, plain, shadowed or in relief."""
    cover, owner = strokes.cover.astype(np.float32)[:, :, None] / 255, strokes.owner
    ground = _ground(owner.shape, rng, source, look.white)
    least = rng.choice(look.contrast)
    colour = _colour_against(ground, least, rng)
    kind = rng.random()
    if rng.random() < look.colours:  # each glyph in its own
        colours = [_colour_against(ground, least, rng) for _ in range(int(owner.max()) + 1)]
        colour = np.array(colours)[owner]
    elif kind < 0.06:
        colour = colour + 60 * smooth_noise(owner.shape, (3, 6), source)[:, :, None]
    elif kind < 0.15:  # embossed: its edges in light and shadow
        y, x = rng.choice((-1, 1)), rng.choice((-1, 0, 1))
        light = cover - np.roll(cover, (y, x), (0, 1))
        depth = rng.uniform(50, 160)
        faint = ground + (colour - ground) * cover * rng.choice((0, 0, rng.uniform(0.1, 0.6)))
        return (faint + depth * light).clip(0, 255)
    if rng.random() < 0.1:  # a shadow, or a light edge
        moved = np.roll(cover, (rng.randint(-2, 3), rng.randint(-2, 3)), (0, 1))
        ground = ground + (rng.uniform(0, 255) - ground) * moved * rng.uniform(0.3, 0.9)
    if rng.random() < 0.05:
        wide = Image.fromarray(strokes.cover).filter(ImageFilter.MaxFilter(5))
        wide = np.asarray(wide).astype(np.float32)[:, :, None] / 255
        ground = ground + (255 - colour.mean() - ground) * wide
    if rng.random() < 0.1:  # ink that has worn off in places
        left = 0.75 + 0.6 * smooth_noise(owner.shape, (6, owner.shape[1] // 4 + 2), source)
        cover = cover * left[:, :, None].clip(0, 1)
    return (ground + (colour - ground) * cover).clip(0, 255)


def clutter(pixels, ink, rng, across):
    """A `PIL.Image` of (H, W, 3) with lines, some of the text's ``ink``, dots and frames on it."""
    image = Image.fromarray(pixels.astype(np.uint8))
    pen, (width, height) = ImageDraw.Draw(image), image.size

    def colour():
        if rng.random() < 0.4:
            return (rng.choice((0, 0, 255, rng.randint(0, 255))),) * 3
        return tuple(rng.randint(0, 255) for _ in range(3))

    kind = rng.random()
    if rng.random() < across[0]:
        chosen = rng.choice((ink, (0, 0, 0), colour()))
        for _ in range(rng.randint(1, across[1])):
            own = chosen if rng.random() < 0.8 else colour()
            x, y = rng.uniform(-0.1, 0.9) * width, rng.uniform(0, height)
            line = [(x, y), (x + rng.uniform(0.05, 1) * width, y + rng.gauss(0, 0.4) * height)]
            if rng.random() < 0.2:
                line[1:1] = [(x + t * (line[1][0] - x), height * rng.random()) for t in (0.35, 0.7)]
                line = list(map(tuple, _curve(line)))
            pen.line(line, own, rng.choice((1, 1, 1, 1, 2, 3)), "curve")
    elif kind < 0.12:  # the lines of a form, the edge of a plate or display
        own, thick = colour(), rng.choice((1, 1, 2, 3))
        for _ in range(rng.randint(1, 2)):
            y = rng.choice((rng.uniform(0, 0.12), rng.uniform(0.88, 1))) * height
            pen.line((0, y, width, y + rng.gauss(0, 1)), own, thick)
        if rng.random() < 0.4:
            x = rng.choice((rng.uniform(0, 0.02), rng.uniform(0.98, 1))) * width
            pen.line((x, 0, x, height), own, thick)
    elif kind < 0.18:  # the feet and heads of the lines above and below
        own = colour()
        for y in rng.sample((0, height), rng.randint(1, 2)):
            x = rng.uniform(0, 10)
            while x < width:
                step, depth = rng.uniform(2, 8), rng.uniform(0, 0.1) * height
                pen.rectangle((x, y - depth, x + step / 2, y + depth), own)
                x += step + rng.uniform(1, 6)
    if rng.random() < 0.12:
        for _ in range(rng.randint(5, 60)):
            x, y, r = rng.uniform(0, width), rng.uniform(0, height), rng.choice((0, 0, 0.5, 1, 1.5))
            pen.ellipse((x - r, y - r, x + r, y + r), colour())
    return image


def _binarised(image, rng, source):
    """A scan or frame in two colours, with islands and bays where the light was wrong."""
    grey = np.asarray(image.convert("L")).astype(np.float32)
    low, high = np.percentile(grey, (3, 97))
    level = low + (high - low) * rng.uniform(0.35, 0.65)
    if rng.random() < 0.5:
        cells = rng.randint(2, 5), rng.randint(2, 8)
        level = level + rng.uniform(0, 0.5) * (high - low) * smooth_noise(grey.shape, cells, source)
    two = np.where((grey > level) ^ (rng.random() < 0.25), 255, 0).astype(np.uint8)
    return Image.fromarray(two).convert("RGB")


def wear(image, rng, source, binarised):
    """What light, camera and file do to an RGB `PIL.Image`, which may become smaller."""
    if rng.random() < 0.12:
        image = image.filter(rng.choice((ImageFilter.MinFilter(3), ImageFilter.MaxFilter(3))))
    if rng.random() < 0.3:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.5)))
    if rng.random() < 0.07:  # moved while it was exposed
        length, across = rng.choice((3, 5)), rng.random() < 0.6
        kernel = np.zeros((5, 5))
        middle = slice(2 - length // 2, 3 + length // 2)
        kernel[(2, middle) if across else (middle, 2)] = 1
        image = image.filter(ImageFilter.Kernel((5, 5), kernel.ravel().tolist()))
    if rng.random() < 0.3:  # few pixels
        factor = max(rng.uniform(0.3, 1), 11 / image.height)
        size = max(4, round(image.width * factor)), max(4, round(image.height * factor))
        if factor < 1:
            how = rng.choice((Image.Resampling.BILINEAR, Image.Resampling.BOX))
            image = image.resize(size, how)
    if rng.random() < binarised:
        image = _binarised(image, rng, source)
    pixels = np.asarray(image).astype(np.float32)
    if rng.random() < 0.2:  # uneven light
        depth, cells = rng.uniform(0.1, 0.6), (2, rng.randint(2, 4))
        pixels = pixels * (1 + depth * smooth_noise(pixels.shape[:2], cells, source)[:, :, None])
    if rng.random() < 0.1:  # little contrast
        pixels = rng.uniform(50, 205) + (pixels - pixels.mean()) * rng.uniform(0.3, 0.9)
    if rng.random() < 0.3:
        noise = source.standard_normal(pixels.shape[: rng.choice((2, 3))]).astype(np.float32)
        pixels = pixels + rng.choice((3, 6, 12, 22)) * noise.reshape(*pixels.shape[:2], -1)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    if rng.random() < 0.2:
        image = image.convert("L").convert("RGB")
    if rng.random() < 0.4:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=rng.randint(15, 90))
        image = Image.open(buffer).convert("RGB")
    return image


class LineImage:
    """Draws a `gen_image.LineText` in {family: its `Font`s}, evenly, with the same ``rng``."""

    def __init__(self, families, text, rng):
        self.families, self.text, self.rng = list(families.values()), text, rng

    def draw(self):
        """(RGB `PIL.Image`, its text), which has the columns that CTC needs."""
        while True:
            image, text = self._draw()
            if columns_needed(text) * PATCH <= Preprocess().width_of(*image.size):
                return image, text

    def _code(self):
        """A text as on captchas: letters and digits without a sense, now and then a sum."""
        rng, small, digits = self.rng, string.ascii_lowercase, string.digits
        letters = rng.choice((small, small.upper(), small + small.upper(), ""))
        letters = rng.choice((letters, letters + digits, letters + digits)) or digits
        text = "".join(rng.choices(letters, k=rng.randint(4, 8)))
        if rng.random() < 0.06:
            text = f"{rng.randint(0, 99)}{rng.choice('+-*/x')}{rng.randint(0, 20)}"
            text += rng.choice(("=", "=?", ""))
        return text

    def _text(self, kind, can):
        """A text for one of KINDS, of the characters that a font ``can`` show."""
        rng, text = self.rng, ""
        if kind == "captcha":
            text = self._code()
        elif kind == "display":
            text = self.text.draw(string.digits + ".:-")
        elif kind == "amount":  # as one writes it by hand
            text = f"{int(10 ** rng.uniform(1, 6)):,}".replace(",", rng.choice(("", ".", ",")))
        fits = self.text.low <= len(text) <= self.text.high
        return text if fits and set(text) <= self.text.allowed & set(can) else self.text.draw(can)

    def _packaged(self, text, font):
        """An image as the captcha package draws it, in one case: c is as high as C there."""
        rng, folded = self.rng, self.rng.choice((str.upper, str.lower))(text)
        text = folded if set(folded) <= self.text.allowed & set(font.can) else text
        height, turn = rng.randint(32, 80), rng.choice((5, 15, 30, 40))
        width = round(height * len(text) * rng.uniform(0.5, 0.85))
        sizes = [round(height * share) for share in (0.7, 0.83, 0.93)]
        drawer, colours = ImageCaptcha(width, height, [font.path], sizes), ()
        drawer.character_rotate, drawer.word_offset_dx = (-turn, turn), rng.uniform(0, 0.35)
        drawer.word_space_probability = rng.choice((0.2, 0.5, 1))
        if rng.random() < 0.3:  # not dark on light
            ground = tuple(rng.randint(0, 255) for _ in range(3))
            ink = _colour_against(np.array([[ground]]), 50, rng)
            colours = ground, tuple(map(int, ink))
        return drawer.generate_image(text, *colours), text

    def _draw(self):
        rng = self.rng
        font = rng.choice(rng.choice(self.families))
        [kind] = rng.choices(list(KINDS), KINDS.values())
        text, look = self._text(kind, font.can), CAPTCHA if kind == "captcha" else Look()
        if font.capitals:
            text = "".join(c.upper() if c.upper() in self.text.allowed else c for c in text)
        style = rng.random()
        if kind == "captcha" and style < 0.35:
            return self._packaged(text, font)
        if set(text) <= set(LIT) | set(".:") and (kind == "display" or style < 0.2):
            look, strokes = DISPLAY, strokes_of_segments(text, rng)
        elif set(text) <= set(HAND) and (kind == "amount" or style < 0.3):
            strokes = strokes_of_hand(text, rng)
        elif style < 0.7 and kind != "captcha":
            strokes = strokes_of_line(text, font, rng)
        else:
            fonts = [font]
            if rng.random() < 0.3 and not font.capitals:
                others = (rng.choice(rng.choice(self.families)) for _ in range(6))
                fonts += [o for o in others if not o.capitals and set(text) <= set(o.can)][:3]
            strokes = strokes_of_glyphs(text, fonts, rng)
        source = np.random.default_rng(rng.getrandbits(64))
        strokes = fitted(strokes, rng, look.rows)
        pixels = paint(strokes, rng, source, look)
        ink = tuple(map(int, pixels.reshape(-1, 3)[strokes.cover.argmax()]))
        image = clutter(pixels, ink, rng, look.across)
        if rng.random() < look.worn:
            image = wear(image, rng, source, look.binarised)
        return image, text
