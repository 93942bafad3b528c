"""Pixels of every kind of file, the size that fits, the text in them, and safe writing."""

import io
import random
from statistics import median

import numpy as np
import pytest
from helpers import picture, png
from PIL import Image, ImageDraw, ImageFont

from ctc_label_converter import columns_needed
from image import ImageError, Preprocess, fitting_preprocess, read_image, text_box


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "F"])
def test_every_mode_looks_the_same(mode):
    image = read_image(picture().convert(mode))
    assert image.mode == "RGB"
    difference = np.asarray(image, float) - np.asarray(picture().convert("RGB"), float)
    # Black and white is dithered: equal on average, not pixel by pixel.
    assert np.abs(difference.mean() if mode == "1" else difference).max() < 8


def test_sixteen_bits_are_scaled_and_not_clipped():
    deep = Image.fromarray(np.asarray(picture(), np.uint16) * 257)
    assert np.array_equal(read_image(png(deep)), picture().convert("RGB"))


def test_transparency_is_white():
    for image in (Image.new("RGBA", (8, 8), (0, 0, 0, 0)), Image.new("LA", (8, 8), (0, 0))):
        assert read_image(png(image)).getpixel((4, 4)) == (255, 255, 255)
    palette = picture().convert("P")
    black = palette.getpixel((0, 0))
    image = read_image(png(palette, transparency=black))
    assert image.getpixel((0, 0)) == (255, 255, 255)
    assert image.getpixel((32, 0)) == palette.convert("RGB").getpixel((32, 0))


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    buffer = io.BytesIO()
    picture().save(buffer, "JPEG", exif=exif)
    assert read_image(buffer.getvalue()).size == (32, 64)


def test_resizing():
    assert Preprocess()(Image.new("RGB", (160, 60))).shape == (3, 32, 84)
    assert Preprocess(width=128)(Image.new("RGB", (160, 60))).shape == (3, 32, 128)
    assert Preprocess()(Image.new("RGB", (2, 200))).shape == (3, 32, 4)
    with pytest.raises(ImageError, match="wide"):
        Preprocess()(Image.new("RGB", (9000, 10)))


def test_the_size_fits_the_labels():
    def fitting(size, label, text=None, **given):
        needed = columns_needed(label)
        return fitting_preprocess([size] * 20, [text or size] * 20, [needed] * 20, **given)

    assert fitting((160, 40), "abcd") == Preprocess(32, None)
    assert fitting((430, 80), "abcd") == Preprocess(48, None)
    assert fitting((430, 80), "abcd", width=128) == Preprocess(48, 128)
    assert fitting((430, 80), "abcd", height=64) == Preprocess(64, None)
    assert fitting((430, 80), "abcd", text=(200, 60)) == Preprocess(40, None, True)
    assert fitting((430, 80), "abcd", text=(400, 60)) == Preprocess(48, None)
    assert fitting((430, 80), "abcd", text=(200, 60), trim=False) == Preprocess(48, None)
    wide = fitting((40, 60), "12345678")
    assert wide.width // 4 >= 10
    # Not what the image has room for, but what its text has.
    assert fitting((430, 80), "12345678", text=(30, 60)).width // 4 >= 10
    needed = [*[columns_needed("12345678")] * 400, columns_needed("1" * 300)]
    mistaken = fitting_preprocess([(40, 60)] * 401, [(40, 60)] * 401, needed)
    assert mistaken == wide


def test_text_is_found_in_much_background():
    """Of any size, anywhere, light or dark, with lines across: all of it, and little else."""
    rng, times = random.Random(0), []
    for turn in range(60):
        ground, ink = rng.sample([(255, 250, 240), (20, 30, 60)], 2)
        image = Image.new("RGB", (400, 90), ground)
        draw = ImageDraw.Draw(image)
        for _ in range(turn % 3):
            points = [(x, rng.randrange(90)) for x in (0, 399)]
            draw.line(points, fill=ink)
        font = ImageFont.load_default(rng.randrange(18, 40))
        place = rng.randrange(10, 150), rng.randrange(5, 40)
        text = "".join(rng.choices("ABEHKMRSX2345689", k=rng.randrange(4, 8)))
        draw.text(place, text, font=font, fill=ink)
        left, top, right, bottom = draw.textbbox(place, text, font=font)
        found = text_box(image)
        assert found[0] <= left and found[1] <= top, text
        assert found[2] >= right and found[3] >= bottom, text
        area = (found[2] - found[0]) * (found[3] - found[1])
        times.append(area / (right - left) / (bottom - top))
    assert median(times) < 3


@pytest.mark.parametrize("size", [(2, 2), (2, 90), (90, 2), (33, 17)])
def test_an_image_without_text_is_kept_whole(size):
    assert text_box(Image.new("RGB", size, "red")) == (0, 0, *size)
    noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8)
    left, top, right, bottom = text_box(Image.fromarray(noise))
    assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
    assert Preprocess(trim=True)(Image.fromarray(noise)).shape[1] == 32
