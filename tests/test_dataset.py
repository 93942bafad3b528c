"""Data sets however they are kept, and everything that can be wrong with them."""

import re
import struct
import zlib
from collections import Counter

import numpy as np
import pytest
from helpers import assert_clear_error, jpeg, picture, png, run_script
from PIL import Image, ImageDraw, ImageFont

from collatefn import TextImageDataset
from dataset import DataOptions, check, data_sheet, problem_list
from image import MAX_PIXELS, Preprocess
from label_file import LabelOptions, Problem, Sample


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
    "page.png": b"<html><body>404 Not Found</body></html>",
    "drawing.png": b'<svg xmlns="http://www.w3.org/2000/svg" width="64" height="32"/>',
    "truncated.jpg": jpeg(Image.effect_noise((64, 32), 50))[:-200],
    "header.gif": b"GIF89a" + bytes(2),
    "header.bmp": b"BM" + bytes(60),
    "zeros.png": bytes(2000),
    "folder.png": "folder",
    "elsewhere/nowhere.png": None,
}


def write_broken_set(folder):
    """A label file of 1,000 lines; 29 cannot be used. Returns [(line, fragments of its error)]."""
    noise = np.random.default_rng(0)
    for i in range(990):
        Image.fromarray(noise.integers(0, 256, (32, 64), np.uint8)).save(folder / f"{i}.png")
    lines = [f"{i}.png\t{i % 100:02d}".encode() for i in range(973)]
    broken = {}
    for number, (name, content) in enumerate(BAD_FILES.items()):
        if content == "folder":
            (folder / name).mkdir()
        elif content is not None:
            (folder / name).write_bytes(content)
        broken[50 * number + 7] = f"{name}\t12".encode(), [name]
    # 16 columns: 9 equal characters need 17, 16 different ones need 16.
    broken[3] = b"981.png\t111111111", ["needs 17 columns"]
    broken[13] = b"982.png\t1 2", ["' '", "alphabet"]
    broken[23] = b"983.png\t1x2", ["'x'", "alphabet"]
    broken[33] = b"984.png 12", ["no tab"]
    broken[43] = b"\t12", ["no image path"]
    broken[53] = b"985.png\t", ["label is empty"]
    broken[63] = b"986.png\t1\xff2", ["not UTF-8"]
    broken[73] = b"987\0.png\t12", ["987"]
    broken[993] = b"0.png\t99", ["'99' here and '00' in"]
    for number, (line, _) in sorted(broken.items()):
        lines.insert(number - 1, line)
    (folder / "train.txt").write_bytes(b"\n".join(lines[:1000]))
    (folder / "extra.png").write_bytes(png(picture().rotate(180)))
    (folder / "test.txt").write_text("extra.png\t12\n5.png\t05\n", encoding="utf-8")
    listed = [line.partition(b"\t")[0] for line in lines]
    broken[listed.index(b"5.png") + 1] = b"", ["also a test image"]
    return [(number, fragments) for number, (_, fragments) in sorted(broken.items())]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # pytest resets ours
def test_everything_broken_is_named_with_its_line_all_at_once(tmp_path):
    assert MAX_PIXELS < 12000 * 12000
    broken = write_broken_set(tmp_path)
    checked = check(tmp_path, DataOptions(alphabet="0123456789", preprocess=Preprocess()))
    texts = [str(problem) for problem in checked.problems]
    problems = {int(text.split("train.txt:")[1].split(":")[0]): text for text in texts}
    assert len(problems) == len(checked.problems)
    assert sorted(problems) == [number for number, _ in broken]
    for number, fragments in broken:
        assert all(fragment in problems[number] for fragment in fragments), problems[number]
    assert len(broken) >= 20
    assert len(checked.train) == 1000 - len(broken)

    name = f"{tmp_path.name}.problems.txt"
    commands = [["dataset.py", tmp_path], ["train.py", "--data", tmp_path]]
    for command in commands:
        process = run_script(*command, "--alphabet", "digits", cwd=tmp_path)
        assert_clear_error(process, f"{len(broken)} problems", name)
        # Those that are alike are told once, with the first three and the last.
        alike = Counter(problem.text for problem in checked.problems)
        assert max(alike.values()) > 4
        for problem in checked.problems:
            assert problem.text in process.stderr
            assert alike[problem.text] > 4 or str(problem) in process.stderr
        whole = tmp_path / "save_model" / name
        assert whole.read_text(encoding="utf-8").splitlines() == texts
        whole.unlink()
    assert not list(tmp_path.glob("save_model/*.pth"))
    process = run_script(
        *commands[1], "--alphabet", "digits", "--skip-bad", "--epochs", 1, "--nh", 4, "--depth", 1,
        cwd=tmp_path,
    )  # fmt: skip
    assert f"left out {len(broken)} lines" in process.stdout, process.stderr
    assert f"\n{1000 - len(broken)} training and 2 test images" in process.stdout
    assert whole.read_text(encoding="utf-8").splitlines() == texts


def test_the_list_of_problems_is_short():
    problems = [Problem(f"a.txt:{i}", f"has {i // 100} columns") for i in range(100, 900)]
    problems += [Problem(f"b.txt:{i}", f"is wrong in the way {i}") for i in range(200)]
    lines = problem_list(problems).splitlines()
    assert len(lines) <= 52
    assert lines[0] == "1000 problems in the data:"
    assert lines[1] == "100 times: has 1 columns: a.txt:100, a.txt:101, a.txt:102, ... a.txt:199"
    assert lines[-1] == "and 158 lines more"


def test_a_good_data_set_with_bom_crlf_spaces_and_mixed_widths(tmp_path):
    (tmp_path / "ä.png").write_bytes(png(picture()))
    (tmp_path / "b.png").write_bytes(png(Image.new("RGB", (31, 31))))
    content = "\ufeffä.png\t 1 2\r\n\r\nb.png\t3\r\n"
    (tmp_path / "train.txt").write_bytes(content.encode("utf-8"))
    png_of_test = png(Image.new("RGB", (40, 32), "red"))
    (tmp_path / "c.png").write_bytes(png_of_test)
    (tmp_path / "test.txt").write_text("c.png\t2\n", encoding="utf-8")
    checked = check(tmp_path)
    assert not checked.problems
    assert checked.alphabet == " 123"
    for in_memory in (True, False):
        data = TextImageDataset(checked.train, Preprocess(), in_memory)
        assert [(data[i][0].shape, *data[i][1:]) for i in range(len(data))] == [
            ((3, 32, 64), " 1 2", 0),
            ((3, 32, 32), "3", 1),
        ]
        assert data[0][0].dtype == np.uint8


def named_images(folder, names):
    folder.mkdir()
    for i, name in enumerate(names):
        picture().rotate(i).save(folder / name)


def labels(samples):
    return sorted(sample.label for sample in samples)


def test_the_same_set_however_it_is_kept(tmp_path):
    words = [f"{i:03d}x{i % 7}" for i in range(60)]
    # A counter or a hash after the label, only where a name needs one.
    ends = ["", "-{0}", "_{0:02x}fa{0:02x}"]
    names = [f"{word}{ends[i % 3].format(i // 3)}.png" for i, word in enumerate(words)]
    named_images(tmp_path / "names", names)
    (tmp_path / "names" / "notes.txt").write_text("drawn by hand", encoding="utf-8")
    named_images(tmp_path / "list", [f"{i}.png" for i in range(60)])
    lines = [f"{i}.png\t{word}\n" for i, word in enumerate(words)]
    (tmp_path / "list" / "labels.txt").write_text("".join(lines), encoding="utf-8")
    for data in ("names", "list", "list/labels.txt"):
        checked = check(tmp_path / data, DataOptions(val_fraction=0.25, seed=3))
        again = check(tmp_path / data, DataOptions(val_fraction=0.25, seed=3))
        other = check(tmp_path / data, DataOptions(val_fraction=0.25, seed=4))
        assert labels(checked.train + checked.test) == words
        assert len(checked.test) == 15
        assert checked == again
        assert labels(checked.test) != labels(other.test)
        assert checked.alphabet == "0123456789x"
    (tmp_path / "list" / "train.txt").write_text("".join(lines[:50]), encoding="utf-8")
    (tmp_path / "list" / "test.txt").write_text("".join(lines[50:]), encoding="utf-8")
    checked = check(tmp_path / "list")
    assert (labels(checked.train), labels(checked.test)) == (words[:50], words[50:])
    (tmp_path / "split").mkdir()
    for split, own in (("train", names[:50]), ("test", names[50:])):
        (tmp_path / "split" / split).mkdir()
        for name in own:
            (tmp_path / "names" / name).rename(tmp_path / "split" / split / name)
    checked = check(tmp_path / "split")
    assert (labels(checked.train), labels(checked.test)) == (words[:50], words[50:])


def test_the_same_picture_is_never_on_both_sides_of_a_split(tmp_path):
    for i in range(100):
        picture().rotate(i // 4).save(tmp_path / f"{i // 4:03d}-{i % 4}.png")
    checked = check(tmp_path, DataOptions(val_fraction=0.3))
    assert not checked.problems
    assert len(checked.train) + len(checked.test) == 100
    assert not {s.label for s in checked.train} & {s.label for s in checked.test}


def test_given_separator_and_folded_case(tmp_path):
    named_images(tmp_path / "plates", ["AB-12.png", "CD-34.png", "eF-56.png"])
    with pytest.raises(ValueError, match="AB-12, CD-34, eF-56"):
        check(tmp_path / "plates")
    whole = check(tmp_path / "plates", DataOptions(labels=LabelOptions(separator="")))
    assert labels(whole.train + whole.test) == ["AB-12", "CD-34", "eF-56"]
    folded = check(
        tmp_path / "plates", DataOptions(labels=LabelOptions(separator=""), ignore_case=True)
    )
    assert folded.alphabet == "-123456abcdef"
    upper = check(
        tmp_path / "plates",
        DataOptions(labels=LabelOptions(separator="-"), alphabet="ABCDEF", ignore_case=True),
    )
    assert labels(upper.train + upper.test) == ["AB", "CD", "EF"]


def test_the_report(tmp_path):
    named_images(tmp_path / "set", [f"{'ab' * (i % 3 + 1)}-{i}.png" for i in range(30)])
    picture().rotate(99).save(tmp_path / "set" / "Q-30.png")
    process = run_script("dataset.py", tmp_path / "set", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    for fragment in (
        "28 training and 3 test images, 64 pixels wide, 32 high",
        "label lengths: 1 1x, 2 10x, 4 10x, 6 10x",
        "alphabet, 3 characters:",
        "seen fewer than 5 times in training, 1 characters: Q",
        "no problems",
    ):
        assert fragment in process.stdout, process.stdout
    with Image.open(tmp_path / "save_model" / "set.data.png") as sheet:
        assert sheet.width > 300


def test_no_data_set_or_several(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("1.png\t1\n", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    (tmp_path / "one").mkdir()
    picture().save(tmp_path / "one" / "1.png")
    for data, fragment in [
        (tmp_path, "which label file is meant, a.txt, b.txt"),
        (tmp_path / "empty", "neither a label file"),
        (tmp_path / "missing", "no such folder"),
        (tmp_path / "one", "one image is too few"),
    ]:
        assert_clear_error(run_script("dataset.py", data, cwd=tmp_path), fragment)


def listed(folder, texts, name="labels.txt", size=(64, 32)):
    """A folder of images, no two alike, and a label file with their texts."""
    folder.mkdir(parents=True)
    noise = np.random.default_rng(0)
    lines = []
    for i, text in enumerate(texts):
        pixels = noise.integers(0, 256, (size[1], size[0]), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        lines.append(f"{i}.png\t{text}\n".encode())
    (folder / name).write_bytes(b"".join(lines))
    return folder


def test_labels_that_look_equal_and_are_not_are_named_and_mended(tmp_path):
    texts = ["été", "e\u0301te\u0301", "AB ", "AB", "A\u200bB", "ＡＢ", '"AB"', "АB"]  # noqa: RUF001
    folder = listed(tmp_path / "set", texts * 2)
    process = run_script("dataset.py", folder, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    for kind, line in [
        ("2 labels have decomposed characters (--normalise", 2),
        ("2 labels have spaces at an edge", 3),
        ("2 labels have zero-width characters", 5),
        ("2 labels have full-width characters", 6),
        ("2 labels have quotes around them", 7),
        ("2 labels have U+0410 CYRILLIC CAPITAL LETTER A, which looks like 'A'", 8),
    ]:
        [shown] = [text for text in process.stdout.splitlines() if text.startswith(kind)]
        assert re.search(rf"labels.txt:{line}\b", shown)
    process = run_script("dataset.py", folder, "--normalise", cwd=tmp_path)
    assert "10 labels were changed by --normalise" in process.stdout
    assert "(--normalise" not in process.stdout
    checked = check(folder, DataOptions(normalise=True))
    assert set(labels(checked.train + checked.test)) == {"été", "AB", "АB"}  # noqa: RUF001


CONTROLS = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029\0\x07\x1b\x7f\x80"


def test_twenty_more_kinds_of_what_cannot_be_used_are_named_all_at_once(tmp_path):
    """Characters that no label can hold, lines that are no entry, images of other kinds."""
    good = [f"{i:02d}x" for i in range(60)]
    folder = listed(tmp_path / "set", good)
    lines = (folder / "labels.txt").read_bytes().splitlines(keepends=True)
    broken = {}
    for i, character in enumerate(CONTROLS):
        lines[i] = f"{i}.png\tA{character}B\n".encode()
        broken[i + 1] = f"U+{ord(character):04X}"
    others = [
        (b"20.png\tA\tB\n", "3 columns"),
        (b"21.png\tA\rB\n", "U+000D"),
        (b"no such image.png\tAB\n", "no such image.png"),
        (b"\\\\server\\share\\24.png\tAB\n", "server"),
        (b"25.png,AB\n", "no tab"),
        (b"26.png\t\n", "empty"),
        (b"27.png\t\xed\xa0\x80\n", "UTF-8"),
        (b"x" * 300 + b".png\tAB\n", "too long"),
    ]
    for i, (line, fragment) in enumerate(others, 20):
        lines[i] = line
        broken[i + 1] = fragment
    (folder / "labels.txt").write_bytes(b"".join(lines))
    checked = check(folder)
    problems = {
        int(problem.place.split("labels.txt:")[1].split(":")[0]): str(problem)
        for problem in checked.problems
    }
    assert sorted(problems) == sorted(broken)
    assert len(broken) >= 20
    for line, fragment in broken.items():
        assert fragment in problems[line]
    assert not set(checked.alphabet) & set(CONTROLS)
    process = run_script("train.py", "--data", folder, cwd=tmp_path)
    assert_clear_error(process, f"{len(broken)} problems", "--skip-bad")


def test_crcrlf_is_a_line_end(tmp_path):
    folder = listed(tmp_path / "set", ["AB", "CD", "EF"])
    content = (folder / "labels.txt").read_bytes().replace(b"\n", b"\r\r\n")
    (folder / "labels.txt").write_bytes(content)
    checked = check(folder)
    assert labels(checked.train + checked.test) == ["AB", "CD", "EF"]


def test_our_own_pictures_are_no_data(tmp_path):
    named_images(tmp_path / "set", [f"W{i:02d}.png" for i in range(20)])
    for _ in range(2):
        process = run_script("dataset.py", ".", cwd=tmp_path / "set")
        assert "18 training and 2 test images" in process.stdout, process.stderr
    assert (tmp_path / "set" / "save_model" / "set.data.png").exists()


def test_odd_images_are_named(tmp_path):
    folder = listed(tmp_path / "set", ["ABC"] * 4)
    Image.new("RGB", (30, 200), "white").save(folder / "0.png")
    page = Image.new("RGB", (300, 200), "white")
    font = ImageFont.load_default(36)
    for y, text in ((40, "ABC"), (110, "1234")):
        ImageDraw.Draw(page).text((60, y), text, font=font, fill="black")
    page.save(folder / "1.png")
    photo = Image.new("RGB", (2000, 1500), "white")
    ImageDraw.Draw(photo).text((600, 700), "ABC", font=font, fill="black")
    photo.save(folder / "2.png")
    notes = "\n".join(check(folder, DataOptions(trim=None, height=32)).notes)
    for fragment in (
        "1 images are much higher than wide: is their text turned?: ",
        "1 images seem to hold two lines of text, a label has one: ",
        "1 images have text of fewer than 10 pixels",
    ):
        assert fragment in notes


def test_texts_from_right_to_left_need_a_package(tmp_path, monkeypatch):
    folder = listed(tmp_path / "set", ["שלום", "למל", "12", "מדגמ"])
    assert not check(folder).problems
    monkeypatch.setattr("dataset.find_spec", lambda name: None)
    problems = check(folder).problems
    assert len(problems) == 3
    assert all("pip install python-bidi" in problem.text for problem in problems)


def test_the_sheet_shows_what_the_network_gets(tmp_path):
    image = Image.new("RGB", (640, 320), "white")
    ImageDraw.Draw(image).rectangle((300, 140, 340, 180), fill="black")
    image.save(tmp_path / "A.png")
    sample = Sample("A.png", tmp_path / "A.png", "A")
    sheet = data_sheet([sample], Preprocess(32))
    assert sheet.height < 70
    assert sheet.crop((4, 4, 68, 36)).getextrema()[0][0] < 60
