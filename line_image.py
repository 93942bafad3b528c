"""Images of a line of text in the look of the world: any font, ground, wear and camera.

What `gen_image.py --task general` draws. The idea of learning to read real text from drawn
text alone is of Jaderberg et al., "Synthetic Data and Artificial Neural Networks for Natural
Scene Text Recognition", arXiv 1406.2227.

The path of an image: a text (`LineText`), its strokes (`strokes_of_line` or
`strokes_of_glyphs`: how much of each pixel is covered, and by which glyph), a ground and
colours (`paint`), things drawn across (`clutter`), light and camera (`wear`).
"""

import io
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from ctc_label_converter import columns_needed
from image import PATCH, Preprocess
from line_strokes import (
    HAND,
    SEGMENTS,
    fitted,
    smooth_noise,
    strokes_of_glyphs,
    strokes_of_hand,
    strokes_of_line,
    strokes_of_segments,
)  # fmt: skip
from line_text import DIGITS, LineText


def _ground(shape, rng, source):
    """(H, W, 3) float, 0 to 255: a plain, graded, woven, noisy or patchy ground."""
    base = np.array([rng.uniform(0, 255) for _ in range(3)])
    kind = rng.random()
    if kind < 0.65:  # paper, enamel, a dark display
        base = rng.choice((255, 255, rng.uniform(200, 255), rng.uniform(0, 60), 0)) + np.array(
            [rng.gauss(0, 8) for _ in range(3)]
        )
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
        cells = max(2, shape[0] // 3), max(2, shape[1] // 3)
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


def paint(strokes, rng, source):
    """(H, W, 3) float, 0 to 255: a ground with the text on it, plain, shadowed or in relief."""
    cover, owner = strokes.cover.astype(np.float32)[:, :, None] / 255, strokes.owner
    ground = _ground(owner.shape, rng, source)
    least = rng.choice((40, 70, 100, 140))
    colour = _colour_against(ground, least, rng)
    kind = rng.random()
    if kind < 0.22:  # each glyph in a colour of its own
        colours = np.array(
            [_colour_against(ground, least, rng) for _ in range(int(owner.max()) + 1)]
        )
        colour = colours[owner]
    elif kind < 0.27:
        colour = colour + 60 * smooth_noise(owner.shape, (3, 6), source)[:, :, None]
    elif kind < 0.34:  # embossed: its edges in light and shadow
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
        cover = cover * (
            0.75 + 0.6 * smooth_noise(owner.shape, (6, owner.shape[1] // 4 + 2), source)
        )[:, :, None].clip(0, 1)
    return (ground + (colour - ground) * cover).clip(0, 255)


def clutter(pixels, rng):
    """Draw lines, arcs, dots, frames and pieces of other lines across. (H, W, 3) -> `PIL.Image`."""
    image = Image.fromarray(pixels.astype(np.uint8))
    pen, (width, height) = ImageDraw.Draw(image), image.size

    def colour():
        if rng.random() < 0.4:
            return (rng.choice((0, 0, 255, rng.randint(0, 255))),) * 3
        return tuple(rng.randint(0, 255) for _ in range(3))

    kind = rng.random()
    if kind < 0.22:  # strokes across, as captchas have
        chosen = colour()
        for _ in range(rng.randint(1, 7)):
            own = chosen if rng.random() < 0.6 else colour()
            x, y = rng.uniform(-0.1, 0.9) * width, rng.uniform(0, height)
            to = x + rng.uniform(0.05, 1) * width, y + rng.gauss(0, 0.4) * height
            if rng.random() < 0.75:
                pen.line((x, y, *to), own, rng.choice((1, 1, 1, 2)))
            else:
                y0, y1 = sorted((y - rng.uniform(0, 1.5) * height, to[1] + 3))
                pen.arc(
                    (x, y0, to[0], max(y0, y1)),
                    rng.randint(0, 360),
                    rng.randint(0, 360),
                    own,
                    rng.choice((1, 2)),
                )
    elif kind < 0.32:  # the lines of a form, the edge of a plate or display
        own, thick = colour(), rng.choice((1, 1, 2, 3))
        for _ in range(rng.randint(1, 2)):
            y = rng.choice((rng.uniform(0, 0.12), rng.uniform(0.88, 1))) * height
            pen.line((0, y, width, y + rng.gauss(0, 1)), own, thick)
        if rng.random() < 0.4:
            x = rng.choice((rng.uniform(0, 0.02), rng.uniform(0.98, 1))) * width
            pen.line((x, 0, x, height), own, thick)
    elif kind < 0.37:  # the feet and heads of the lines above and below
        own = colour()
        for y in rng.sample((0, height), rng.randint(1, 2)):
            x = rng.uniform(0, 10)
            while x < width:
                step = rng.uniform(2, 8)
                depth = rng.uniform(0, 0.1) * height
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
    two = np.where(grey > level, 255, 0).astype(np.uint8)
    if rng.random() < 0.25:
        two = 255 - two
    return Image.fromarray(two).convert("RGB")


def wear(image, rng, source):
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
            image = image.resize(
                size, rng.choice((Image.Resampling.BILINEAR, Image.Resampling.BOX))
            )
    if rng.random() < 0.06:
        image = _binarised(image, rng, source)
    pixels = np.asarray(image).astype(np.float32)
    if rng.random() < 0.2:  # uneven light
        light = 1 + rng.uniform(0.1, 0.6) * smooth_noise(
            pixels.shape[:2], (2, rng.randint(2, 4)), source
        )
        pixels = pixels * light[:, :, None]
    if rng.random() < 0.15:  # little contrast
        pixels = rng.uniform(50, 205) + (pixels - pixels.mean()) * rng.uniform(0.3, 0.9)
    if rng.random() < 0.3:
        noise = source.standard_normal(pixels.shape[: rng.choice((2, 3))]).astype(np.float32)
        pixels = pixels + rng.choice((3, 6, 12, 22)) * (
            noise if noise.ndim == 3 else noise[:, :, None]
        )
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    if rng.random() < 0.2:
        image = image.convert("L").convert("RGB")
    if rng.random() < 0.4:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=rng.randint(15, 90))
        image = Image.open(buffer)
        image.load()
    return image


class LineImage:
    """The drawer of `gen_image.py --task general`.

    Args:
        families: {name: its `Font`s}, which are drawn evenly.
        alphabet: the characters that may occur.
        low, high: the fewest and most characters.
        rng: a `random.Random`, the only source of randomness.
    """

    def __init__(self, families, alphabet, low, high, rng):
        self.families = list(families.values())
        self.text = LineText(rng, low, high, alphabet)
        self.rng = rng

    def draw(self):
        """(RGB `PIL.Image`, its text), which has the columns that CTC needs."""
        while True:
            image, text = self._draw()
            if columns_needed(text) * PATCH <= Preprocess().width_of(*image.size):
                return image, text

    def _draw(self):
        rng = self.rng
        font = rng.choice(rng.choice(self.families))
        text = self.text.draw(font.can)
        if font.capitals:
            text = "".join(c.upper() if c.upper() in self.text.allowed else c for c in text)
        kind = rng.random()
        if kind < 0.05 or (kind < 0.3 and set(text) <= set(SEGMENTS) | set(".:")):
            text = self.text.draw([*DIGITS, *DIGITS, ".", ":", "-"]) if kind < 0.05 else text
            strokes = strokes_of_segments(text, rng)
        elif kind < 0.4 and set(text) <= set(HAND):
            strokes = strokes_of_hand(text, rng)
        elif kind < 0.7:
            strokes = strokes_of_line(text, font, rng)
        else:
            fonts = [font]
            if rng.random() < 0.4 and not font.capitals:
                others = (rng.choice(rng.choice(self.families)) for _ in range(6))
                fonts += [o for o in others if not o.capitals and set(text) <= set(o.can)][:3]
            strokes = strokes_of_glyphs(text, fonts, rng)
        source = np.random.default_rng(rng.getrandbits(64))
        pixels = paint(fitted(strokes, rng), rng, source)
        return wear(clutter(pixels, rng), rng, source), text
