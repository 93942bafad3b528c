"""Pixels of every kind of file, the size that fits, the text in them, and safe writing."""

import io
import math
import random
import subprocess
import sys
import tracemalloc
from statistics import median
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import ROOT, dashes, jpeg, picture, png
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin

from ctc_label_converter import columns_needed
from dataset import look_at
from image import (
    PATCH,
    ImageError,
    Preprocess,
    find_images,
    find_text_lines,
    fitting_preprocess,
    levelled,
    other_looks,
    panel_box,
    read_image,
    slope_of,
)


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
    assert fitting((430, 80), "abcd", text=(200, 60), learnt=32) == Preprocess(40, None, True)
    assert fitting((430, 80), "abcd", learnt=32) == Preprocess(40, None)
    assert fitting((155, 52), "abcd", learnt=32) == Preprocess(32, None)
    # Characters that stand closer than three columns.
    assert fitting((120, 32), "abcd" * 3, learnt=32) == Preprocess(48, None)
    assert fitting((120, 32), "abcd" * 3) == Preprocess(48, None)
    assert fitting((60, 32), "abcd" * 3, learnt=64).height == 64
    assert fitting((120, 32), "abcd" * 3, width=240) == Preprocess(32, 240)
    assert fitting((3000, 32), "abcd" * 75) == Preprocess(32, None)  # and would be too wide
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
        found = find_text_lines(image)[0]
        assert found[0] <= left and found[1] <= top, text
        assert found[2] >= right and found[3] >= bottom, text
        area = (found[2] - found[0]) * (found[3] - found[1])
        times.append(area / (right - left) / (bottom - top))
    assert median(times) < 3


def test_a_sign_belongs_to_its_number_and_a_line_across_does_not():
    """A minus is as light as a line, but it stands alone."""
    number = drawn((400, 90), ((140, 20), "1250.75"), height=32)
    alone = find_text_lines(number)[0]
    for begin, end in ((121, 133), (268, 280)):
        assert alone[0] > begin or alone[2] < end
        for rows in ((40,), (37, 43)):  # a minus, and an equals sign
            signed = number.copy()
            for row in rows:
                ImageDraw.Draw(signed).line([(begin, row), (end, row)], "black", width=2)
            left, _, right, _ = find_text_lines(signed)[0]
            assert left < begin
            assert right > end
    ImageDraw.Draw(number).line([(0, 40), (400, 40)], "black", width=2)
    lined = find_text_lines(number)[0]
    assert max(abs(a - b) for a, b in zip(alone, lined, strict=True)) < 5


@pytest.mark.parametrize("text", ["7", "W", "-3", "35", "4.5", "Ab"])
def test_few_characters_are_found_in_much_background(text):
    """All of them and little else, though no row of pixels has as many runs as a line of text."""
    for height in (18, 26, 40):
        image = drawn((300, 100), ((120, 30), text), height=height)
        rows, columns = (np.flatnonzero((np.asarray(image)[..., 0] < 200).any(i)) for i in (1, 0))
        left, top, right, bottom = find_text_lines(image)[0]
        assert left <= columns[0] < columns[-1] < right <= columns[-1] + height
        assert top <= rows[0] < rows[-1] < bottom <= rows[-1] + height


@pytest.mark.parametrize("look", ["noise", "faint", "uneven light", "a label"])
def test_text_is_found_in_what_a_camera_sees(look):
    """In noise, of little contrast, where one side is dark, and on a label that lies on a thing."""
    rng = np.random.default_rng(0)
    image, place = drawn((420, 110), ((200, 60), "AB 1234")), (200, 60)
    if look == "a label":
        image, place = Image.new("RGB", (420, 110), (110, 90, 60)), (212, 64)
        image.paste(drawn((130, 40), ((12, 4), "AB 1234")), (200, 60))
    pixels = np.asarray(image).astype(float) * 0.95
    if look == "faint":
        pixels = 200 - (255 - pixels) / 10
    if look == "uneven light":
        pixels *= np.linspace(0.4, 1, 420)[:, None]
    pixels += rng.normal(0, {"noise": 20, "faint": 1}.get(look, 9), pixels.shape)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    left, top, right, bottom = find_text_lines(image)[0]
    assert place[0] - 24 < left <= place[0]
    assert place[1] - 12 < top <= place[1] + 6
    assert place[0] + 80 < right < place[0] + 150
    assert place[1] + 20 < bottom < place[1] + 50


def test_what_is_found_as_text_is_not_read_where_it_is_too_long():
    """The image alone is not, so it is read whole."""
    left, top, right, bottom = find_text_lines(dashes())[0]
    assert (right - left) / (bottom - top) * 32 > 4096
    assert [view.shape for view in Preprocess(32, trim=None).views(dashes())] == [(3, 32, 1280)]


@pytest.mark.parametrize("size", [(2, 2), (2, 90), (90, 2), (33, 17)])
def test_an_image_without_text_is_kept_whole(size):
    assert find_text_lines(Image.new("RGB", size, "red"))[0] == (0, 0, *size)
    noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8)
    left, top, right, bottom = find_text_lines(Image.fromarray(noise))[0]
    assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
    assert Preprocess(trim=True)(Image.fromarray(noise)).shape[1] == 32


@pytest.mark.parametrize("height", [32, 40, 48])
@pytest.mark.parametrize(("room", "narrowest"), [(10, 1.25), (18, 0.8), (30, 0.7)])
def test_other_looks_fit_the_network_and_the_characters(height, room, narrowest):
    pixels = np.random.default_rng(0).integers(0, 256, (3, height, 8 * room), np.uint8)
    first = SimpleNamespace(text="8 digits")
    looks = [made["a"][0] for made in other_looks({"a": [pixels]}, {"a": [first]})]
    assert len(looks) == 3
    assert all(look.shape[1] == height and look.shape[2] % PATCH == 0 for look in looks)
    assert min(look.shape[2] for look in looks) == pytest.approx(narrowest * 8 * room, abs=2)
    # Wide ones are seen lower too, between rows that repeat: nothing of them is lost.
    lower = [look for look in looks if (look[:, 0] == look[:, 1]).all()]
    assert len(lower) == (room > 22)
    for look in lower:
        assert (look[:, -1] == look[:, -2]).all()
        inner = look[:, round(0.1 * height) : -round(0.1 * height)]
        image = Image.fromarray(pixels.transpose(1, 2, 0).copy())
        resized = image.resize(inner.shape[:0:-1], Image.Resampling.BILINEAR)
        assert (inner == np.asarray(resized).transpose(2, 0, 1)).all()


def drawn(size, *texts, height=24):
    """An image with texts: (place, text)."""
    image = Image.new("RGB", size, "white")
    for place, text in texts:
        font = ImageFont.load_default(height)
        ImageDraw.Draw(image).text(place, text, font=font, fill="black")
    return image


def test_frames_of_one_colour_are_cut_off():
    """On any of the sides, dark or light, also where a JPEG has blurred their ends."""
    rng = random.Random(0)
    for turn in range(60):
        panel = drawn((rng.randrange(90, 300), rng.randrange(30, 90)), ((8, 2), "AB 1234"))
        frames = [rng.choice((0, rng.randrange(1, 80))) for _ in range(4)]
        image = ImageOps.expand(panel, tuple(frames), rng.choice(("black", "grey", "#20c0ff")))
        image = read_image(jpeg(image)) if turn % 2 else image
        left, top, _, _ = frames
        wanted = left, top, left + panel.width, top + panel.height
        assert np.abs(np.subtract(panel_box(image), wanted)).max() <= 2
        own, panel = Preprocess(trim=None).views(image)[0], image.crop(panel_box(image))
        text = panel.crop(find_text_lines(panel)[0])
        read = text if text.height < panel.height / 2 else panel
        assert np.array_equal(own, Preprocess()(read))


@pytest.mark.parametrize("text", ["I", "-", "E", "H", "11", "AB 1234"])
def test_text_on_its_own_ground_is_not_taken_for_what_a_frame_holds(text):
    for height in (12, 24, 60):
        image = drawn((400, 100), ((30, 20), text), height=height)
        assert panel_box(image) == (0, 0, 400, 100)
    letter = Image.new("RGB", (90, 90), "white")
    ImageDraw.Draw(letter).rectangle((35, 10, 55, 80), "black")
    assert panel_box(letter) == (0, 0, 90, 90)


def test_text_is_read_without_the_ground_around_it_where_nothing_else_is():
    """What is elsewhere may be text too, as far as the search for it knows."""
    image, preprocess = drawn((600, 200), ((200, 80), "AB 1234")), Preprocess(trim=None)
    [alone] = preprocess.views(image)
    assert np.array_equal(alone, preprocess(image.crop(find_text_lines(image)[0])))
    ImageDraw.Draw(image).rectangle((500, 20, 580, 60), "black")
    whole, cut = preprocess.views(image)
    assert np.array_equal(whole, preprocess(image))
    assert np.array_equal(cut, alone)


@pytest.mark.parametrize("degrees", [-12, -8, -4, 4, 8, 12])
@pytest.mark.parametrize("size", [(180, 50), (180, 60), (230, 90)])
def test_text_that_falls_or_rises_is_seen_level_too(degrees, size):
    """With nothing of it lost; what is level already has no slope."""
    image = drawn(size, ((size[0] / 10, size[1] / 4), "AB 1234 xyz"), height=28)
    preprocess = Preprocess(trim=None)
    assert slope_of(image) == 0
    turned = image.rotate(-degrees, Image.Resampling.BICUBIC, expand=True, fillcolor="white")
    slope = slope_of(turned)
    assert slope == pytest.approx(math.tan(math.radians(degrees)), abs=0.03)
    level = levelled(turned, slope)
    assert slope_of(level) == 0
    ink, kept = ((255 - np.asarray(seen, int)).sum() for seen in (turned, level))
    assert kept == pytest.approx(ink, rel=0.02)
    assert np.array_equal(preprocess.views(turned)[-1], preprocess.views(level)[-1])


@pytest.mark.parametrize("degrees", [-6, -3, 3, 6])
def test_text_is_found_on_a_plate_that_lies_askew_on_another_ground(degrees):
    """Which is no frame, and both plate and text differ from it."""
    plate = drawn((150, 48), ((12, 12), "AB 1234"))
    image = ImageOps.expand(plate, 8, "green").rotate(degrees, fillcolor="green")
    left, top, right, bottom = find_text_lines(image)[0]
    assert left < 30
    assert right > 120
    assert bottom - top < 0.75 * image.height
    fall = 4 + 50 * math.sin(math.radians(abs(degrees)))
    assert top < 20 + fall
    assert bottom > 44 - fall


def test_two_lines_of_text_are_told_apart_and_kept():
    one = drawn((300, 200), ((60, 80), "AB 1234"))
    two = drawn((300, 200), ((60, 50), "ABC"), ((60, 110), "1234"), height=36)
    display = drawn((300, 60), ((60, 10), "88:88"), height=36)
    assert [find_text_lines(image)[1] for image in (one, two, display)] == [1, 2, 1]
    _, top, _, bottom = find_text_lines(two)[0]
    assert top <= 60
    assert bottom >= 140


def test_small_text_in_a_photo_is_found_in_little_memory():
    photo = Image.new("RGB", (3264, 2448), (225, 222, 216))
    photo.paste(drawn((600, 120), ((20, 10), "2YNPY2"), height=90), (1000, 1100))
    tracemalloc.start()
    left, top, right, bottom = find_text_lines(photo)[0]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert left <= 1020 and top <= 1120 and right >= 1300 and bottom >= 1190
    assert (bottom - top) < 300
    assert peak < 100 * 2**20


def test_twelve_bits_in_sixteen_are_scaled():
    deep = Image.fromarray(np.asarray(picture(), np.uint16) * 16)
    difference = np.asarray(read_image(png(deep)), int) - np.asarray(picture().convert("RGB"), int)
    assert np.abs(difference).max() <= 2


def test_large_text_and_profiles_are_no_reason_to_refuse():
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * 3_000_000, zip=True)
    content = png(picture(), pnginfo=text, icc_profile=bytes(3_000_000))
    assert read_image(content).size == (64, 32)


@pytest.mark.parametrize("kind", ["TIFF", "GIF"])
def test_further_pages_are_named(kind):
    pages, one = io.BytesIO(), io.BytesIO()
    picture().save(pages, kind, save_all=True, append_images=[picture().rotate(180)])
    picture().save(one, kind)
    assert [look_at(file.getvalue()).more for file in (pages, one)] == [True, False]
    assert read_image(pages.getvalue()).getpixel((0, 0)) == (0, 0, 0)  # of the first


def test_images_are_found_whatever_their_suffix_and_ours_are_not(tmp_path):
    names = [
        "a.JPG",
        "b.jfif",
        "c.jpe",
        "d.pgm",
        "sub/e.png",
        "._a.png",
        ".ipynb_checkpoints/a.png",
    ]
    names += ["save_model/set.data.png", "set.mistakes.png", "notes.txt"]
    for name in names:
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(png(picture()))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "f.png").write_bytes(png(picture()))
    try:
        (tmp_path / "set" / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
        (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "set", target_is_directory=True)
    except OSError:
        pytest.skip("this system has no links to folders")
    found = [path.name for path in find_images(tmp_path / "set")]
    assert sorted(found) == ["a.JPG", "b.jfif", "c.jpe", "d.pgm", "e.png", "f.png"]


RACE = """
import sys
from pathlib import Path
from image import write_atomically
for i in range(100):
    write_atomically(Path(sys.argv[1]), bytes([int(sys.argv[2])]) * (1000 + i))
"""


def test_racing_writes_never_break_a_file(tmp_path):
    """600 of them from six processes: at any time the file is one of those written."""
    path = tmp_path / "file"
    command = [sys.executable, "-c", RACE, path]
    processes = [subprocess.Popen([*command, str(i)], cwd=ROOT) for i in range(6)]
    seen = 0
    while any(process.poll() is None for process in processes):
        if path.exists():
            content = path.read_bytes()
            assert len(set(content)) == 1
            assert 1000 <= len(content) < 1100
            seen += 1
    assert not any(process.returncode for process in processes)
    assert seen
    assert list(tmp_path.iterdir()) == [path]
