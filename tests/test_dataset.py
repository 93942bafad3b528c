"""Reading images and label files: every kind that is good, and every kind that is not."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dataset import (
    MAX_PIXELS,
    ImageError,
    Preprocess,
    TextImageDataset,
    columns_needed,
    read_image,
    read_label_file,
)


def png(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def picture():
    """A grey picture of 64x32 pixels, dark to light from left to right."""
    return Image.fromarray(np.tile(np.linspace(0, 255, 64, dtype=np.uint8), (32, 1)))


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


def bomb(width, height):
    """A small PNG that declares ``width`` x ``height`` pixels."""

    def chunk(name, body):
        checksum = struct.pack(">I", zlib.crc32(name + body))
        return struct.pack(">I", len(body)) + name + body + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


BAD_FILES = {
    "missing.png": None,
    "empty.png": b"",
    "text.png": b"hello",
    "truncated.png": png(Image.effect_noise((64, 32), 50))[:1000],
    "one_pixel.png": png(Image.new("RGB", (1, 1))),
    "thin.png": png(Image.new("RGB", (1, 30))),
    "zero.png": bomb(0, 0),
    "bomb.png": bomb(12000, 12000),
    "large_bomb.png": bomb(60000, 60000),
    "long.png": png(Image.new("RGB", (6000, 10))),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # pytest resets ours
def test_every_bad_file_is_named_with_its_line_all_at_once(tmp_path):
    assert MAX_PIXELS < 12000 * 12000
    (tmp_path / "good.png").write_bytes(png(picture()))
    lines = ["good.png\t12"]
    for name, content in BAD_FILES.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        lines.append(f"{name}\t12")
    # 16 columns: 9 equal characters need 17, 16 different ones need 16.
    lines += ["good.png\t111111111", "good.png\t1 2", "good.png\t1x2"]
    (tmp_path / "train.txt").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(ValueError) as error:
        TextImageDataset(tmp_path / "train.txt", "0123456789", Preprocess())
    problems = str(error.value).splitlines()
    assert len(problems) == len(BAD_FILES) + 3
    for number, (name, problem) in enumerate(zip(BAD_FILES, problems, strict=False), 2):
        assert f"train.txt:{number}: " in problem
        assert name in problem
    assert "needs 17 columns" in problems[-3]
    assert "' '" in problems[-2]
    assert "'x'" in problems[-1]


def test_a_good_data_set_with_bom_crlf_spaces_and_mixed_widths(tmp_path):
    (tmp_path / "ä.png").write_bytes(png(picture()))
    (tmp_path / "b.png").write_bytes(png(Image.new("RGB", (31, 31))))
    content = "\ufeffä.png\t 1 2\r\n\r\nb.png\t3\r\n"
    (tmp_path / "train.txt").write_bytes(content.encode("utf-8"))
    data = TextImageDataset(tmp_path / "train.txt", "123 ", Preprocess())
    assert [(pixels.shape, label) for pixels, label in data] == [
        ((3, 32, 64), " 1 2"),
        ((3, 32, 32), "3"),
    ]
    assert data[0][0].dtype == np.uint8


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a.png 12\n", ":1: no tab"),
        (b"a.png\t1\n\t2\n", ":2: no image path"),
        (b"a.png\t1\na.png\t\n", ":2: the label is empty"),
        (b"a.png\t1\nb.png\t\xe4\n", ":2: is not UTF-8"),
        (b"\n\n", "empty"),
        (None, "cannot be read"),
    ],
)
def test_bad_label_files(tmp_path, content, message):
    path = tmp_path / "train.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_label_file(path)
    assert str(path) in str(error.value)


def test_columns_needed():
    assert [columns_needed(label) for label in ("a", "ab", "aa", "aaa", "abba")] == [1, 2, 3, 5, 5]
