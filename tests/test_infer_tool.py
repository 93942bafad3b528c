"""Reading: all kinds of input alike, neighbours without influence, with and without PyTorch."""

import itertools
import json
import math
import multiprocessing
import os
import random
import re
import subprocess
import sys
import time
import venv
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from captcha.image import DEFAULT_FONTS
from helpers import ROOT, SAMPLES, assert_clear_error, run_script
from PIL import Image, ImageDraw, ImageFont, ImageOps

import train
from collatefn import evaluation_loader
from ctc_label_converter import Reading, vote
from dataset import DataOptions, check
from image import SURE, other_looks, read_image
from infer_tool import BATCH_SIZE, SHIPPED_WEIGHTS, RecInfer
from metric import word_accuracy
from model import load_checkpoint, save_checkpoint

SIMPLE = sorted((SAMPLES / "simple").glob("*.png"))  # named by their text


NETWORKS = [
    path.with_suffix(kind) for path in SHIPPED_WEIGHTS.values() for kind in (".pth", ".onnx")
]


@pytest.fixture(scope="module")
def reader():
    return RecInfer(SHIPPED_WEIGHTS["simple"])


def test_shipped_weights_read_the_samples_and_are_small(reader):
    assert SHIPPED_WEIGHTS["simple"].stat().st_size <= 70_000
    assert len(SIMPLE) >= 10
    readings = reader.predict(SIMPLE)
    assert [reading.text for reading in readings] == [path.stem for path in SIMPLE]
    for reading in readings:
        assert len(reading.char_confidences) == len(reading.text)
        assert 0.9 < reading.confidence <= 1
        assert all(0.9 < confidence <= 1 for confidence in reading.char_confidences)


def test_every_kind_of_input_gives_the_same(reader):
    path = SIMPLE[0]
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
    for path in SIMPLE:
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


def test_shipped_networks_are_exports_of_the_shipped_checkpoints():
    for path in SHIPPED_WEIGHTS.values():
        one, two = RecInfer(path), RecInfer(path.with_suffix(".onnx"))
        assert one.preprocess == two.preprocess
        assert one.converter.alphabet == two.converter.alphabet
        assert one.converter.temperature == two.converter.temperature
        assert one.converter.length == two.converter.length
        assert path.name.startswith(f"{one.task}_")
        assert path.stat().st_size < (1_500_000 if one.task == "general" else 5_000_000)
        assert one.task == two.task
        for image in sorted(SAMPLES.glob("*/*.png")):
            assert_same(one.predict(image), two.predict(image), 1e-4)


def assert_same(one, two, tolerance=1e-5):
    assert one.text == two.text
    assert one.confidence == pytest.approx(two.confidence, abs=tolerance)
    assert one.char_confidences == pytest.approx(two.char_confidences, abs=tolerance)


@pytest.mark.parametrize("weights", NETWORKS, ids=lambda path: path.name)
def test_neighbours_do_not_change_a_reading(weights):
    rng, dice = np.random.default_rng(0), random.Random(0)
    reader = RecInfer(weights)
    samples = [p.read_bytes() for p in sorted(SAMPLES.glob("*/*.png"))]
    noise = [
        rng.integers(0, 256, (32, width, 3)).astype(np.uint8) for width in (16, 60, 128, 128, 300)
    ]
    images = [*samples, *noise]
    alone = [reader.predict(image) for image in images]
    for size in (2, 3, 17, len(images), 2 * BATCH_SIZE + 2):
        chosen = dice.choices(range(len(images)), k=size)
        for i, reading in zip(chosen, reader.predict([images[i] for i in chosen]), strict=True):
            assert_same(reading, alone[i])


def test_export_of_a_training_reads_the_same(trained, digits, tmp_path):
    [weights], out = (trained[0] / "save_model").glob("*.pth"), tmp_path / "mine.onnx"
    flags = ["export", "--weights", weights, "--out", out]
    process = run_script("infer_tool.py", *flags, cwd=tmp_path)
    assert "the same texts" in process.stdout, process.stderr
    assert list(tmp_path.iterdir()) == [out]
    tables = [
        run_script("demo.py", digits / "test", "--json", "--weights", path, cwd=tmp_path).stdout
        for path in (weights, out)
    ]
    first, second = ([json.loads(line) for line in table.splitlines()] for table in tables)
    assert [entry["text"] for entry in first] == [entry["text"] for entry in second]
    assert len(first) == 100


def test_reading_needs_no_torch(tmp_path):
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    packages = ["numpy", "pillow", "tqdm", "onnxruntime"]
    subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True, timeout=300)
    assert subprocess.run(
        [python, "-c", "import torch"], capture_output=True, check=False
    ).returncode
    weights = SHIPPED_WEIGHTS["simple"].with_suffix(".onnx")
    samples = SAMPLES / "simple"
    process = subprocess.run(
        [python, ROOT / "demo.py", "--weights", weights, samples],
        capture_output=True, text=True, encoding="utf-8", check=False, cwd=tmp_path,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    texts = [line.split("\t")[1] for line in process.stdout.splitlines()]
    assert texts == [path.stem for path in sorted(samples.glob("*.png"))]
    loaded = "import sys, demo; print(*(set(sys.argv) & set(sys.modules)))"
    modules = ["torch", "captcha", "dataset", "collatefn", "model"]
    process = subprocess.run(
        [python, "-c", loaded, *modules], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert process.stdout.split() == []
    # Of the other kind of file it can only say what is missing.
    process = subprocess.run(
        [python, ROOT / "demo.py", "--task", "simple"],
        capture_output=True, text=True, encoding="utf-8", check=False, cwd=tmp_path,
    )  # fmt: skip
    assert_clear_error(process, "pip install torch", ".onnx")


@pytest.mark.parametrize(
    ("missing", "command"),
    [
        ("onnxruntime", ["demo.py", "--weights", SHIPPED_WEIGHTS["simple"].with_suffix(".onnx")]),
        ("onnx", ["infer_tool.py", "export", "--out", "new.onnx"]),
    ],
)
def test_a_missing_package_is_answered_with_the_line_that_installs_it(missing, command, tmp_path):
    script, *arguments = command
    code = (
        f"import sys, runpy; sys.modules[{missing!r}] = None; sys.path.insert(0, {str(ROOT)!r}); "
        f"sys.argv = [{script!r}, *{list(map(str, arguments))}]; "
        f"runpy.run_path({str(ROOT / script)!r}, run_name='__main__')"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert_clear_error(process, "pip install", missing)


def test_broken_and_foreign_networks_are_refused(tmp_path):
    onnx = pytest.importorskip("onnx")
    whole = SHIPPED_WEIGHTS["simple"].with_suffix(".onnx").read_bytes()
    cases = {"empty": b"", "text": b"hello", "cut": whole[: len(whole) // 2]}
    network = onnx.load_from_string(whole)
    metadata = {entry.key: entry.value for entry in network.metadata_props}
    for name, change in {
        "no_alphabet": {"alphabet": ""},
        "other_alphabet": {"alphabet": "ab"},
        "no_temperature": {"temperature": "0"},
        "tall": {"preprocess": json.dumps({"height": 64})},
        "unknown": {"preprocess": json.dumps({"hight": 32})},
        "ngrams": {"ngrams": json.dumps({"a": -1})},
    }.items():
        onnx.helper.set_model_props(network, metadata | change)
        cases[name] = network.SerializeToString()
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    huge = helper.make_node("ConstantOfShape", ["shape"], ["zeros"])
    elsewhere = onnx.TensorProto(name="w", data_type=kind, dims=[1], data_location=1)
    elsewhere.external_data.add(key="location", value="/etc/passwd")
    for name, nodes, tensors in (("huge", [huge], []), ("elsewhere", [], [elsewhere])):
        hostile = onnx.load_from_string(whole)
        hostile.graph.node.extend(nodes)
        hostile.graph.initializer.extend(tensors)
        cases[name] = hostile.SerializeToString()
    for name, content in cases.items():
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.onnx: is not a MicroOCR network"):
            RecInfer(path)
    with pytest.raises(ValueError, match="cannot be read"):
        RecInfer(tmp_path / "none.onnx")


BOTH = [SHIPPED_WEIGHTS["simple"], SHIPPED_WEIGHTS["simple"].with_suffix(".onnx")]


def read_in_process(reader, paths, results):
    results.put([reading.text for reading in reader.predict(paths)])


@pytest.mark.parametrize("weights", BOTH, ids=lambda path: path.suffix)
@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_a_reader_works_in_other_processes(weights, method):
    reader = RecInfer(weights)
    reader.predict(SIMPLE[:4])
    context = multiprocessing.get_context(method)
    results = context.Queue()
    process = context.Process(target=read_in_process, args=(reader, SIMPLE[:4], results))
    process.start()
    try:
        assert results.get(timeout=60) == [path.stem for path in SIMPLE[:4]]
    finally:
        process.kill()


@pytest.mark.parametrize("weights", BOTH, ids=lambda path: path.suffix)
def test_a_reader_is_shared_by_threads(weights):
    reader = RecInfer(weights)
    with Image.open(SIMPLE[0]) as lazy, ThreadPoolExecutor(8) as pool:
        found = list(pool.map(reader.predict, SIMPLE * 10))
        assert [r.text for r in found] == [path.stem for path in SIMPLE * 10]
        # Opened, not loaded yet, and given several times.
        same = list(pool.map(lambda _: reader.predict([lazy, lazy, lazy]), range(8)))
    assert {reading.text for readings in same for reading in readings} == {SIMPLE[0].stem}


@pytest.mark.parametrize("weights", BOTH, ids=lambda path: path.suffix)
def test_a_reading_does_not_wait_for_the_next_image(weights):
    """A camera gives an image only after what it showed before was read."""
    reader, answered = RecInfer(weights), []

    def camera():
        for i, path in enumerate(SIMPLE):
            deadline = time.monotonic() + 10
            while len(answered) < i and time.monotonic() < deadline:
                time.sleep(0.001)
            assert len(answered) == i
            yield path

    for path, reading in reader.stream(camera()):
        assert reading.text == path.stem
        answered.append(path)
    assert answered == SIMPLE

    def broken():
        yield SIMPLE[0]
        raise RuntimeError("the camera is gone")

    with pytest.raises(RuntimeError, match="the camera is gone"):
        list(reader.stream(broken()))
    endless = (path for _ in range(10**9) for path in SIMPLE)
    assert next(reader.stream(endless))[1].text == SIMPLE[0].stem


def test_wide_images_are_read_in_small_batches():
    """64 of them at once took gigabytes with thousands of classes."""
    reader = RecInfer(SHIPPED_WEIGHTS["chinese"].with_suffix(".onnx"))
    sizes, logits = [], reader.logits
    reader.logits = lambda pixels: sizes.append(pixels.size // 3) or logits(pixels)
    wide = np.full((32, 2048, 3), 255, np.uint8)
    assert len(reader.predict([wide] * 9)) == 9
    assert max(sizes) * 3756 // (32 * 4) <= 2**23
    assert sum(sizes) == 9 * 32 * 2048


def test_a_device_that_is_not_there():
    with pytest.raises(ValueError, match="toaster"):
        RecInfer(SHIPPED_WEIGHTS["simple"], device="toaster")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="finds no NVIDIA GPU"):
            RecInfer(SHIPPED_WEIGHTS["simple"], device="cuda")


@pytest.mark.parametrize("package", ["onnxruntime", "torch"])
def test_a_broken_installation_is_shown_as_it_is(package, tmp_path):
    (tmp_path / package).mkdir()
    broken = 'raise ImportError("DLL load failed while importing it")'
    (tmp_path / package / "__init__.py").write_text(broken, encoding="utf-8")
    weights = BOTH[package == "onnxruntime"]
    process = subprocess.run(
        [sys.executable, ROOT / "demo.py", "--weights", weights], cwd=tmp_path, text=True,
        capture_output=True, check=False, env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert_clear_error(process, "ImportError: DLL load failed while importing it")
    assert "pip install" not in process.stderr


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    """{0: a `RecInfer` that looks once, SURE: one that looks again}, and some images."""
    recogniser = load_checkpoint(SHIPPED_WEIGHTS["general"])
    folder, readers = tmp_path_factory.mktemp("looks"), {}
    for sure in (0, SURE):
        preprocess = replace(recogniser.preprocess, trim=False, sure=sure)
        save_checkpoint(folder / f"{sure}.pth", replace(recogniser, preprocess=preprocess))
        readers[sure] = RecInfer(folder / f"{sure}.pth")
    return readers, sorted(SAMPLES.glob("[cs][oi]m*/*.png"))[::2]


def test_what_is_unsure_is_read_at_other_widths_too(readers):
    """Then the texts vote."""
    readers, paths = readers
    for path, first in zip(paths, readers[0].predict(paths), strict=True):
        looks = [first]
        for others in other_looks({0: [readers[0].preprocess(read_image(path))]}, {0: [first]}):
            looks.append(readers[0].predict(np.moveaxis(others[0][0], 0, 2)))
        expected = first if first.confidence >= SURE else vote(looks)
        found = readers[SURE].predict(path)
        assert found.text == expected.text
        assert found.confidence == pytest.approx(expected.confidence, abs=1e-5)


def words_of(least, most):
    """Words of the project's list, of so many characters."""
    words = (ROOT / "assets" / "words.txt").read_text(encoding="utf-8").split()
    return [word for word in words if least <= len(word) <= most]


def drawn(word, size, margin, height):
    """A word in the captcha package's font, in the middle of an image."""
    font = ImageFont.truetype(DEFAULT_FONTS[0], size)
    image = Image.new("RGB", (round(font.getlength(word)) + 2 * margin, height), "white")
    ImageDraw.Draw(image).text((margin, height / 2), word, "black", font, anchor="lm")
    return image


def test_characters_that_stand_close_are_looked_at_wider(readers):
    """In columns of 4 pixels i and l get lost where a character has 6."""
    words = words_of(8, math.inf)
    images = [drawn(word, 28, 6, 40).resize((6 * len(word) + 8, 32)) for word in words]
    readings = readers[0][SURE].predict(images)
    assert word_accuracy([reading.text for reading in readings], words) >= 0.9


def test_printed_lines_are_read_with_their_spaces():
    rng, words = random.Random(0), words_of(3, 8)
    texts = [" ".join(rng.choices(words, k=rng.randint(3, 5))) for _ in range(40)]
    readings = RecInfer(SHIPPED_WEIGHTS["general"]).predict([drawn(t, 22, 6, 34) for t in texts])
    assert word_accuracy([reading.text for reading in readings], texts) >= 0.95


@pytest.mark.parametrize("degrees", [-11, 11])
def test_lines_that_fall_or_rise_are_read(degrees):
    """As on a page that lay askew: uncut, their characters are small and lean."""
    rng, words = random.Random(0), words_of(4, 8)
    texts = [f"{rng.choice(words)} {rng.choice(words)} {rng.randrange(10**4)}" for _ in range(20)]
    images = [
        drawn(text, 26, 4, 36).rotate(degrees, Image.Resampling.BILINEAR, True, fillcolor="white")
        for text in texts
    ]
    readings = RecInfer(SHIPPED_WEIGHTS["general"]).predict(images)
    assert word_accuracy([reading.text for reading in readings], texts) >= 0.85


def test_images_that_were_stretched_are_read():
    """To a common size, maybe: the general network does not know what they were."""
    words = words_of(5, 7)[:60]
    images = [drawn(word, 50, 10, 70) for word in words]
    images = [image.resize((round(3.3 * image.width), 70)) for image in images]
    readings = RecInfer(SHIPPED_WEIGHTS["general"]).predict(images)
    assert word_accuracy([reading.text for reading in readings], words) >= 0.9


@pytest.mark.parametrize(("text", "least"), [("0", 0.33), ("10", 0.05)])
def test_one_character_of_another_shape_is_believed_later_than_a_text(text, least, monkeypatch):
    """Squeezed enough, whatever is doubtful looks like an I or a 0."""
    reader, pixels = RecInfer(SHIPPED_WEIGHTS["general"]), np.zeros((3, 32, 64), np.uint8)
    for share, confidence in itertools.product((0.55, 0.72), (0.9 * least, 1.1 * least)):
        found = Reading(text, confidence / share, [0.5] * len(text))
        monkeypatch.setattr(reader, "_looks", lambda made, _, one=found: {i: [one] for i in made})
        length = 2 if share == 0.55 else 12  # of wide characters, and of narrow ones
        first = Reading("A" * length, 0.01, [0.5] * length)
        believed = list(reader._other_shapes({0: [pixels]}, {0: first}, None))
        assert len(believed) == (1 if confidence > least else 0)


@pytest.mark.parametrize("margin", [0, 12, 48, 96])
def test_small_dots_are_read_however_much_ground_is_around_the_text(margin):
    """Uncut the text is small: a dot is not seen, and nothing tells that it is not."""
    rng, font = random.Random(0), ImageFont.load_default(24)
    prices = [f"{rng.randrange(10, 100)}.{rng.randrange(10, 100)}" for _ in range(40)]
    images = []
    for price in prices:
        image = Image.new("RGB", [side + 12 for side in font.getbbox(price)[2:]], "white")
        ImageDraw.Draw(image).text((6, 2), price, font=font, fill="black")
        images.append(np.asarray(ImageOps.expand(image, margin, "white")))
    readings = RecInfer(SHIPPED_WEIGHTS["general"]).predict(images)
    assert word_accuracy([reading.text for reading in readings], prices) >= 0.95


def test_an_image_too_wide_for_other_looks_is_read(readers):
    noise = np.random.default_rng(0).integers(0, 256, (32, 3900, 3), np.uint8)
    assert readers[0][SURE].predict(noise).confidence < SURE


@pytest.mark.parametrize("sure", [0, SURE])
def test_evaluation_and_training_look_as_a_reader_does(sure, readers, tmp_path):
    """Were its readings right, an evaluation would say so, and a training choose such looks."""
    readers, paths = readers
    texts = {path: reading.text for path, reading in readers[sure].stream(paths)}
    assert texts != {path: reading.text for path, reading in readers[SURE - sure].stream(paths)}
    lines = [f"{path}\t{text}\n" for path, text in texts.items() if text.strip()]
    (tmp_path / "right.txt").write_text("".join(lines), encoding="utf-8")
    flags = ["--data", tmp_path / "right.txt", "--weights", readers[sure].weights]
    process = run_script("train.py", "--evaluate", *flags, cwd=tmp_path)
    assert "word accuracy 1.0000 (95 % interval 0." in process.stdout, process.stderr

    recogniser = readers[0].recogniser
    alphabet, preprocess = recogniser.converter.alphabet, recogniser.preprocess
    options = DataOptions(alphabet, preprocess, val_fraction=1)
    checked = check(tmp_path / "right.txt", options, ["test"])
    batches = evaluation_loader(checked, checked.test, recogniser.converter)
    plan = SimpleNamespace(held_out=checked.test, checked=checked._replace(test=[]))
    chosen = train.choose_looks(recogniser, plan, batches, torch.device("cpu"))
    assert chosen.preprocess.sure == sure


def test_evaluation_reads_text_alone_in_a_wide_picture_as_a_reader_does(tmp_path):
    """Whole and cut to its text, and it believes what it is surer of."""
    network, lines = SHIPPED_WEIGHTS["general"], []
    general = RecInfer(network)
    for path in SIMPLE[:8]:
        image = Image.open(path).convert("RGB")
        wide = Image.new("RGB", (5 * image.width, 3 * image.height), image.getpixel((0, 0)))
        wide.paste(image, (image.width, image.height))
        wide.save(tmp_path / path.name)
        lines.append(f"{path.name}\t{general.predict(tmp_path / path.name).text}\n")
    (tmp_path / "read.txt").write_text("".join(lines), encoding="utf-8")
    whole = load_checkpoint(network)
    whole = replace(whole, preprocess=replace(whole.preprocess, trim=False))
    save_checkpoint(tmp_path / "whole.pth", whole)
    accuracies = []
    for weights in network, tmp_path / "whole.pth":
        flags = ["--data", tmp_path / "read.txt", "--weights", weights, "--skip-bad"]
        process = run_script("train.py", "--evaluate", *flags, cwd=tmp_path)
        accuracies.append(re.search(r"word accuracy (\S+)", process.stdout)[1])
    assert accuracies[0] == "1.0000" > accuracies[1]
