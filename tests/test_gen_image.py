"""Drawing: reproducible, distinct, complete or not there at all."""

import hashlib
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from captcha.image import DEFAULT_FONTS, ImageCaptcha
from helpers import ROOT, assert_clear_error, run_script
from PIL import Image

import gen_image
from dataset import DataOptions, check
from image import Preprocess
from keys import ALPHABETS
from metric import find_chinese_font

SMALL = ["--train", 130, "--test", 20]


def digest(folder):
    """{relative path: hash of the bytes} of all files below ``folder``."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn") / "one"
    process = run_script("gen_image.py", "--out", folder, *SMALL, "--workers", 1, cwd=folder.parent)
    assert process.returncode == 0, process.stderr
    return folder


def test_a_data_set_is_what_the_readme_says(drawn):
    labels = []
    for split, count in (("train", 130), ("test", 20)):
        text = (drawn / f"{split}.txt").read_bytes().decode("utf-8")
        lines = [line.split("\t") for line in text.removesuffix("\n").split("\n")]
        assert [path for path, _ in lines] == [f"{split}/{i:05d}.png" for i in range(count)]
        labels.append([label for _, label in lines])
        for path, label in lines:
            assert len(label) == 4
            with Image.open(drawn / path) as image:
                assert (image.size, image.mode) == ((128, 32), "RGB")
    assert labels[0][:20] != labels[1]  # train and test do not share their random stream
    assert Image.open(drawn / "preview.png").width > 500


def test_characters_that_are_hard_may_be_drawn_more_often(drawn, tmp_path):
    flags = [*SMALL, "--often", "3B", "--out", tmp_path / "often"]
    process = run_script("gen_image.py", *flags, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    shares = {}
    for folder in (drawn, tmp_path / "often"):
        for split in ("train", "test"):
            lines = (folder / f"{split}.txt").read_text(encoding="utf-8").splitlines()
            text = "".join(line.split("\t")[1] for line in lines)
            shares[folder.name, split] = sum(map(text.count, "3B")) / len(text)
    assert shares["often", "train"] > 3 * shares["one", "train"]
    assert shares["often", "test"] == shares["one", "test"]  # which stays as it is


def test_same_seed_same_bytes_whatever_the_workers_and_no_two_alike(drawn, tmp_path):
    again, other = tmp_path / "again", tmp_path / "other"
    run_script("gen_image.py", "--out", again, *SMALL, "--workers", 3, cwd=tmp_path)
    run_script("gen_image.py", "--out", other, *SMALL, "--seed", 1, cwd=tmp_path)
    first = digest(drawn)
    assert digest(again) == first
    pictures = [hash for folder in (drawn, other) for hash in digest(folder).values()]
    assert len(set(pictures)) == len(pictures)


def test_complex_images_are_the_captcha_packages_own_but_seeded(tmp_path):
    flags = ["--task", "complex", "--train", 120, "--test", 10]
    for name, workers in (("one", 1), ("two", 2)):
        process = run_script(
            "gen_image.py", "--out", tmp_path / name, *flags, "--workers", workers, cwd=tmp_path
        )
        assert process.returncode == 0, process.stderr
    first = digest(tmp_path / "one")
    assert digest(tmp_path / "two") == first
    assert len(set(first.values())) == len(first)
    lines = (tmp_path / "one" / "train.txt").read_text(encoding="utf-8").splitlines()
    text = "".join(line.split("\t")[1] for line in lines)
    assert set(text) == set(ALPHABETS["digits_upper"])
    assert min(text.count("O"), text.count("0")) > 4 * len(text) / 36  # hard to tell apart
    with Image.open(tmp_path / "one" / "train" / "00000.png") as image:
        assert (image.size, image.mode) == ((160, 60), "RGB")
    assert (ImageCaptcha.character_rotate, ImageCaptcha.character_warp_dx) == (
        (-30, 30),
        (0.1, 0.3),
    )
    flags += ["--alphabet", "digits", "--out", tmp_path / "digits"]  # no O to draw often
    process = run_script("gen_image.py", *flags, cwd=tmp_path)
    assert process.returncode == 0, process.stderr


def test_chinese_images_hold_the_whole_alphabet(tmp_path):
    if not find_chinese_font():
        pytest.skip("no Chinese font on this machine: install fonts-wqy-microhei")
    out = tmp_path / "chinese"
    process = run_script(
        "gen_image.py", "--task", "chinese", "--out", out, "--train", 8000, "--test", 1,
        cwd=tmp_path,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    lines = (out / "train.txt").read_text(encoding="utf-8").splitlines()
    assert set("".join(line.split("\t")[1] for line in lines)) == set(ALPHABETS["gb2312_level1"])
    with Image.open(out / "train" / "07999.png") as image:
        assert image.size == (128, 32)
        assert max(spread[1] - spread[0] for spread in image.getextrema()) > 80  # ink on ground


def few_fonts(folder):
    """A folder with fonts of three families, and files that are none."""
    listed = Path("/usr/share/fonts/truetype")
    names = ("dejavu/DejaVuSans.ttf", "dseg/DSEG7Classic-Regular.ttf", "essays1743/Essays1743.ttf")
    fonts = [*DEFAULT_FONTS, *(listed / name for name in names if (listed / name).exists())]
    if len(fonts) < 3:
        pytest.skip("too few fonts on this machine: install those of assets/fonts.txt")
    (folder / "deep").mkdir(parents=True)
    for font in fonts:
        shutil.copy(font, folder / "deep")
    (folder / "broken.ttf").write_bytes(b"no font")
    return folder


def test_general_images_are_reproducible_of_any_look_and_fit_the_network(tmp_path):
    fonts = few_fonts(tmp_path / "fonts")
    flags = ["--task", "general", "--fonts", fonts, "--train", 230, "--test", 20]
    for name, workers in (("one", 1), ("two", 2)):
        process = run_script(
            "gen_image.py", "--out", tmp_path / name, *flags, "--workers", workers, cwd=tmp_path
        )
        assert process.returncode == 0, process.stderr
    count = len(list(fonts.rglob("*.ttf")))
    assert f"{count - 1} of {count} font files can be used" in process.stdout
    first = digest(tmp_path / "one")
    assert digest(tmp_path / "two") == first
    assert len(set(first.values())) == len(first)
    checked = check(tmp_path / "one", DataOptions(preprocess=Preprocess(32)))
    assert not checked.problems
    texts = [sample.label for sample in checked.train]
    assert {len(text) for text in texts} == set(range(1, 13))
    assert set("".join(texts)) <= set(ALPHABETS["ascii"])
    grounds = [np.asarray(Image.open(s.path)).mean() for s in checked.train]
    assert min(grounds) < 40
    assert max(grounds) > 215


def test_no_family_of_fonts_is_in_training_and_test(tmp_path):
    families = gen_image.find_families(few_fonts(tmp_path / "fonts"), 1)
    assert families["train"]
    assert families["test"]
    first_words = [{name.split()[0] for name in families[split]} for split in families]
    assert not first_words[0] & first_words[1]


def test_general_without_fonts_says_what_to_install(tmp_path):
    process = run_script("gen_image.py", "--task", "general", "--fonts", tmp_path, cwd=tmp_path)
    assert_clear_error(process, "gen_image.py", "0 families", "assets/fonts.txt", "--fonts")


def test_without_a_chinese_font_the_error_names_one(monkeypatch):
    monkeypatch.setattr(gen_image, "find_chinese_font", lambda: None)
    with pytest.raises(ValueError, match=r"fonts-wqy-microhei.*--font"):
        gen_image.parse_args(["--task", "chinese"])


def test_flags(tmp_path):
    (tmp_path / "keys.txt").write_text("xyz", encoding="utf-8")
    process = run_script(
        "gen_image.py", "--out", tmp_path / "a b", "--train", 40, "--test", 5, "--length", "3-8",
        "--alphabet", tmp_path / "keys.txt", "--font", DEFAULT_FONTS[0], "--font", DEFAULT_FONTS[0],
        "--height", 48, cwd=tmp_path,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    lines = (tmp_path / "a b" / "train.txt").read_text(encoding="utf-8").splitlines()
    lengths = {len(line.split("\t")[1]) for line in lines}
    assert lengths == {3, 4, 5, 6, 7, 8}
    with Image.open(tmp_path / "a b" / "train" / "00000.png") as image:
        assert image.size == (8 * 48, 48)


def test_nothing_on_disk_is_overwritten_unasked(tmp_path):
    out = tmp_path / "set"
    few = ["--out", out, "--train", 3, "--test", 2]
    assert run_script("gen_image.py", *few, cwd=tmp_path).returncode == 0
    before = digest(out)
    again = run_script("gen_image.py", *few, "--seed", 1, cwd=tmp_path)
    assert_clear_error(again, "already holds a data set", "--force")
    assert digest(out) == before
    assert run_script("gen_image.py", *few, "--seed", 1, "--force", cwd=tmp_path).returncode == 0
    assert digest(out) != before

    (out / "thesis.doc").write_text("years of work", encoding="utf-8")
    foreign = run_script("gen_image.py", *few, "--force", cwd=tmp_path)
    assert_clear_error(foreign, "other files")
    assert (out / "thesis.doc").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["set"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_leaves_no_data_set(tmp_path, how):
    out = tmp_path / "set"
    process = subprocess.Popen(
        [sys.executable, ROOT / "gen_image.py", "--out", out], stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("*/new/train/*.png")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(how)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode != 0
    assert b"Traceback" not in stderr
    assert not out.exists()
    if how == signal.SIGINT:
        assert list(tmp_path.iterdir()) == []


def test_bad_input(tmp_path):
    (tmp_path / "han.txt").write_text("a中文", encoding="utf-8")
    (tmp_path / "not_a_font.ttf").write_text("hello", encoding="utf-8")
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    for arguments, fragments in [
        (["--font", "nowhere.ttf"], ["nowhere.ttf"]),
        (["--task", "chinese", "--font", DEFAULT_FONTS[0]], ["no glyph for 3755 of 3755"]),
        (["--font", "not_a_font.ttf"], ["not_a_font.ttf"]),
        (["--alphabet", "han.txt"], ["no glyph for 2 of 3", "中"]),
        (["--length", "8-3"], ["--length"]),
        (["--width", "20"], ["--width"]),
        (["--train", "0"], ["--train"]),
        (["--out", tmp_path / "file" / "set"], ["cannot be written"]),
    ]:
        process = run_script("gen_image.py", *arguments, cwd=tmp_path)
        assert_clear_error(process, *fragments)
    assert not (tmp_path / "data").exists()
