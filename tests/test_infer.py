"""Reading: all kinds of input alike, neighbours without influence, the demo."""

import json
import random
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_clear_error, run_script
from PIL import Image

from dataset import read_label_file
from infer_tool import SHIPPED_WEIGHTS, RecInfer

SAMPLES = sorted((ROOT / "assets" / "samples" / "simple").glob("*.png"))  # named by their text


@pytest.fixture(scope="module")
def reader():
    return RecInfer(SHIPPED_WEIGHTS["simple"])


def test_shipped_weights_read_the_samples_and_are_small(reader):
    assert SHIPPED_WEIGHTS["simple"].stat().st_size <= 70_000
    assert len(SAMPLES) >= 10
    readings = reader.predict(SAMPLES)
    assert [reading.text for reading in readings] == [path.stem for path in SAMPLES]
    for reading in readings:
        assert len(reading.char_confidences) == len(reading.text)
        assert 0.9 < reading.confidence <= 1
        assert all(0.9 < confidence <= 1 for confidence in reading.char_confidences)


def test_every_kind_of_input_gives_the_same(reader):
    path = SAMPLES[0]
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
        readings = [
            reader.predict(source) for source in (path, str(path), path.read_bytes(), image, pixels)
        ]
    assert len(set(map(str, readings))) == 1
    assert reader.predict([]) == []
    assert isinstance(reader.predict([path]), list)


def test_a_batch_changes_nothing(reader):
    """Images of random widths, in random order and company, read as if alone."""
    rng = random.Random(0)
    images = []
    for path in SAMPLES:
        with Image.open(path) as image:
            images.append(image.resize((rng.randrange(40, 300), rng.randrange(20, 80))))
    alone = [reader.predict(image) for image in images]
    order = rng.choices(range(len(images)), k=60)
    for i, reading in zip(order, reader.predict([images[i] for i in order]), strict=True):
        assert reading.text == alone[i].text
        assert reading.confidence == pytest.approx(alone[i].confidence, abs=1e-5)
        assert reading.char_confidences == pytest.approx(alone[i].char_confidences, abs=1e-5)


def test_bad_images_are_named(reader, tmp_path):
    (tmp_path / "text.png").write_text("hello", encoding="utf-8")
    for source, message in [
        (tmp_path / "none.png", "none.png: cannot be opened"),
        (tmp_path / "text.png", "text.png: is not an image"),
        (b"", "image 0: is not an image"),
        (np.zeros((32, 32), np.uint8), "image 0: .*shape"),
        (np.zeros((1, 1, 3), np.uint8), "at least 2x2"),
    ]:
        with pytest.raises(ValueError, match=message):
            reader.predict(source)


@pytest.mark.parametrize(("task", "limit"), [("complex", 1_500_000), ("chinese", 5_000_000)])
def test_demo_picks_a_task(task, limit, tmp_path):
    assert SHIPPED_WEIGHTS[task].stat().st_size <= limit
    folder = ROOT / "assets" / "samples" / task
    samples = sorted(folder.glob("*.png"))
    labels = {path.name: path.stem for path in samples}
    if task == "chinese":  # not every system can hold their texts in file names
        labels = {name: label for _, name, label in read_label_file(folder / "labels.txt")}
    process = run_script("demo.py", "--task", task, "--save", "sheet.png", cwd=tmp_path)
    lines = [line.split("\t") for line in process.stdout.splitlines()]
    assert [line[1] for line in lines] == [labels[path.name] for path in samples]
    assert len(lines) >= 8
    assert (tmp_path / "sheet.png").exists()


def test_demo_without_arguments_reads_the_samples(tmp_path):
    process = run_script("demo.py", cwd=tmp_path)
    assert process.returncode == 0
    assert str(SHIPPED_WEIGHTS["simple"]) in process.stderr
    lines = [line.split("\t") for line in process.stdout.splitlines()]
    assert [line[1] for line in lines] == [path.stem for path in SAMPLES]


def test_demo_reads_files_as_json_with_the_weights_last_written(trained, digits, tmp_path):
    shutil.copytree(trained[0] / "save_model", tmp_path / "save_model")
    image = digits / "test" / "00000.png"
    label = (digits / "test.txt").read_text(encoding="utf-8").splitlines()[0].split("\t")[1]
    process = run_script(
        "demo.py", image, "none.png", image, "--json", "--save", "sheet.png", cwd=tmp_path
    )
    assert_clear_error(process, "none.png", "save_model")
    results = [json.loads(line) for line in process.stdout.splitlines()]
    assert list(results.pop(1)) == ["image", "error"]
    assert len(results) == 2
    assert list(results[0]) == ["image", "text", "confidence", "characters"]
    assert results[0]["text"] == label
    assert [entry["char"] for entry in results[0]["characters"]] == list(label)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 2 * 96


class Hostile:
    def __reduce__(self):
        return print, ("this code must not run",)


def test_a_checkpoint_cannot_run_code(tmp_path, capfd):
    torch.save({"nh": Hostile()}, tmp_path / "hostile.pth")
    with pytest.raises(ValueError, match=r"hostile.pth: is not a MicroOCR checkpoint"):
        RecInfer(tmp_path / "hostile.pth")
    assert "must not run" not in capfd.readouterr().out
