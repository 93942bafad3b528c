"""Training from image files to a checkpoint that reads, through the real command line."""

import csv
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from helpers import ENVIRONMENT, ROOT, assert_clear_error, load, run_script
from kill_and_resume import equal, outcome, saved_tensors
from PIL import Image

from collatefn import Batch
from ctc_label_converter import CTCLabelConverter
from infer_tool import SHIPPED_WEIGHTS, RecInfer
from loss import CTCLoss, Optimizer, fall_of, learning_rate, precision, take_step
from metric import EpochResult
from model import MicroNet
from settings import PRESETS

NAME, BRIEF_NAME = "digits_nh16_depth2", "digits_nh8_depth1"
CHOSEN = r"epoch (\d+) was the best on the held-out images: (.*)"
FINAL = r"test images: word accuracy (\S+) \(95 % interval \S+ to \S+\), CER (\S+), 100 images"
BRIEF = ["--nh", 8, "--depth", 1, "--epochs", 4, "--train", 400, "--device", "cpu"]


def test_it_learns_to_read(trained, digits):
    folder, process = trained
    best, cer = re.fullmatch(FINAL, process.stdout.splitlines()[-1]).groups()
    epoch, path = re.fullmatch(CHOSEN, process.stdout.splitlines()[-2]).groups()
    assert float(best) >= 0.95
    with (folder / "save_model" / f"{NAME}.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "epoch", "train_loss", "test_loss", "word_accuracy", "cer", "lr", "seconds",
    ]  # fmt: skip
    assert [int(row["epoch"]) for row in rows] == list(range(1, 9))
    accuracies = [float(row["word_accuracy"]) for row in rows]  # of the images held out
    assert accuracies[int(epoch) - 1] == max(accuracies) >= 0.9

    evaluation = run_script("train.py", "--evaluate", "--data", digits, cwd=folder)
    line = evaluation.stdout.splitlines()[-1]
    assert re.fullmatch(
        rf"word accuracy {best} \(95 % interval 0.\d+ to [01].\d+\), CER {cer}, 100 images", line
    )
    # What is shown to readers looks the same.
    form = r"word accuracy [01]\.\d{4} \(95 % interval \S+ to [01]\.\d{4}\), CER [\d.]+, \d+ images"
    pages = [ROOT / "README.md", ROOT / "benchmarks" / "RESULTS.md"]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    shown = re.findall("^ +(word accuracy .*)", text, re.M)
    assert shown
    assert all(re.fullmatch(form, line) for line in shown)
    assert str(folder / path) == str(folder / "save_model" / f"{NAME}.pth")


def train_briefly(digits, folder, *flags):
    return run_script(
        "train.py", "--data", digits, "--nh", 16, "--depth", 2, "--epochs", 1, *flags, cwd=folder
    )


def weights(path):
    return load(path)["state_dict"]


def test_same_seed_same_weights_and_earlier_runs_are_kept(digits, tmp_path):
    for flags in ([], [], ["--seed", 1]):
        assert train_briefly(digits, tmp_path, "--train", 400, *flags).returncode == 0
    saved = tmp_path / "save_model"
    kinds = ("csv", "pth", "png", "resume")
    names = {f"{NAME}{number}.{kind}" for number in ("", ".1", ".2") for kind in kinds}
    names |= {f"{NAME}.mistakes{number}.png" for number in ("", ".1", ".2")}
    assert {path.name for path in saved.iterdir()} == names | {f"{NAME}.data.png"}
    first, again, other = (
        load(saved / f"{NAME}{number}.pth")["state_dict"] for number in (".1", ".2", "")
    )
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["linear.weight"], other["linear.weight"])


def test_images_of_much_background_are_cut_to_their_text(digits, tmp_path):
    folder, lines = tmp_path / "set", (digits / "train.txt").read_text(encoding="utf-8")
    folder.mkdir()
    shares = {}  # of pixels that are not background
    for line in lines.splitlines()[:60]:
        path, label = line.split("\t")
        image = Image.open(digits / path)
        large = Image.new("RGB", (3 * image.width, 3 * image.height), image.getpixel((0, 0)))
        large.paste(image, (image.width, image.height))
        large.save(folder / f"{label}_{Path(path).stem}.png")
    for flags, trim in ([], True), (["--no-trim"], False):
        process = train_briefly(folder, tmp_path, *flags)
        assert ("images are cut to their text" in process.stdout) == trim, process.stderr
        weights = tmp_path / "save_model" / "set_nh16_depth2.pth"
        exported = weights.with_suffix(".onnx")
        flags = ["--weights", weights, "--out", exported]
        assert run_script("infer_tool.py", "export", *flags, cwd=tmp_path).returncode == 0
        for path in weights, exported:
            preprocess = RecInfer(path).preprocess
            assert preprocess.trim == trim
            pixels = preprocess(large).astype(int)
            shares[trim] = (abs(pixels - pixels[:, :1, :1]).max(0) > 60).mean()
    assert shares[True] > 3 * shares[False]


def test_a_few_images_are_enough_for_the_general_network(digits, tmp_path):
    read, starts = {}, {"general": [], "higher": ["--height", 40], "none": ["--weights", "none"]}
    for name, flags in starts.items():
        flags = ["--train", 60, "--epochs", 6, "--out", name, *flags]
        process = run_script("train.py", "--data", digits, *flags, cwd=tmp_path)
        read[name] = float(re.search(FINAL, process.stdout.splitlines()[-1])[1])
        known = f"10 of 10 characters are known to {SHIPPED_WEIGHTS['general']}"
        assert (known in process.stdout) == (name != "none")
    assert min(read["general"], read["higher"]) > max(0.8, read["none"] + 0.3)


# As train.py, but with a loss that never falls by enough: the training is done at once.
DONE_AT_ONCE = """
import sys, loss
loss.LEAST_GAIN, loss.PATIENT_STEPS = 1e9, (20, 20, 20)
import train
sys.exit(train.main())
"""


def test_a_training_that_is_done_ends_with_all_images_and_resumes_to_the_same(digits, tmp_path):
    def start(*flags):
        command = ["--data", digits, "--nh", 8, "--depth", 1, "--train", 200, "--device", "cpu"]
        return subprocess.Popen(
            [sys.executable, "-c", DONE_AT_ONCE, *map(str, command), *flags], cwd=tmp_path,
            env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, encoding="utf-8",
        )  # fmt: skip

    output = start("--out", "whole").communicate()[0]
    assert "the loss of the held-out images falls no more" in output
    last = int(re.findall(r"epoch +(\d+)/300 ", output)[-1])
    assert 4 < last < 10
    assert f"epoch {last} was trained on all images" in output
    assert "160 training" in output  # the others are held out until then
    process = start("--out", "part")
    state = tmp_path / "part" / "digits_nh8_depth1.resume"
    while not (state.exists() and load(state)["progress"]["fall"]):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert "resumed after epoch" in start("--out", "part", "--resume").communicate()[0]
    states = [weights(tmp_path / name / "digits_nh8_depth1.pth") for name in ("whole", "part")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_start_from_weights(trained, digits, tmp_path):
    start = trained[0] / "save_model" / f"{NAME}.pth"
    flags = ["--epochs", 1, "--lr", 0.001, "--weights", start]
    process = run_script("train.py", "--data", digits, *flags, cwd=tmp_path)
    assert float(re.search(r"test images: word accuracy (\S+)", process.stdout)[1]) >= 0.95


def test_weights_that_are_trained_on_in_their_folder_are_replaced(trained, digits, tmp_path):
    """As benchmarks/RESULTS.md trains the complex network in two parts."""
    shutil.copytree(trained[0] / "save_model", tmp_path / "save_model")
    weights = tmp_path / "save_model" / f"{NAME}.pth"
    before = weights.read_bytes()
    flags = ["--epochs", 1, "--lr", 0.001, "--weights", weights]
    assert run_script("train.py", "--data", digits, *flags, cwd=tmp_path).returncode == 0
    assert weights.with_suffix(".1.pth").read_bytes() == before
    assert weights.read_bytes() != before
    process = run_script("demo.py", digits / "test" / "00000.png", cwd=tmp_path)
    assert str(Path("save_model", f"{NAME}.pth")) in process.stderr


def test_what_evaluation_takes_for_the_test_images(trained, digits, tmp_path):
    """Of a list without a test set all images, a part only where one asks for it."""
    weights = trained[0] / "save_model" / f"{NAME}.pth"
    for data, flags, images, sentence in [
        (digits / "test.txt", [], 100, "all of the images are test images"),
        (digits / "test.txt", ["--val-fraction", 0.1], 10, "10% of the images are the test set"),
        (digits, [], 100, "labels are in"),
    ]:
        flags = ["--evaluate", "--weights", weights, "--data", data, *flags]
        process = run_script("train.py", *flags, cwd=tmp_path)
        assert process.stdout.endswith(f", {images} images\n"), process.stderr
        assert sentence in process.stdout


def test_evaluation_without_case(tmp_path):
    """Of labels in either case, with a network that reads both."""
    samples = sorted((ROOT / "assets" / "samples" / "simple").glob("*.png"))
    texts = RecInfer(SHIPPED_WEIGHTS["simple"]).predict(samples)
    lines = [f"{path}\t{r.text.swapcase()}\n" for path, r in zip(samples, texts, strict=True)]
    (tmp_path / "test.txt").write_text("".join(lines), encoding="utf-8")
    flags = ["--evaluate", "--data", tmp_path / "test.txt", "--skip-bad"]
    flags += ["--weights", SHIPPED_WEIGHTS["simple"]]
    for more, accuracy in ([], "0."), (["--ignore-case"], "1.0000"):
        process = run_script("train.py", *flags, *more, cwd=tmp_path)
        assert f"word accuracy {accuracy}" in process.stdout, process.stderr


def test_only_weights_of_ones_own_are_calibrated(trained, digits, tmp_path):
    shipped = {path: path.read_bytes() for path in SHIPPED_WEIGHTS.values()}
    for task in ([], ["--task", "simple"]):
        process = run_script("train.py", "--calibrate", *task, "--data", digits, cwd=tmp_path)
        assert_clear_error(process, "--calibrate", "no weights of a training", "--weights")
    assert shipped == {path: path.read_bytes() for path in SHIPPED_WEIGHTS.values()}
    (tmp_path / "save_model").mkdir()
    own = tmp_path / "save_model" / "own.pth"
    content = load(trained[0] / "save_model" / f"{NAME}.pth")
    torch.save(content | {"temperature": 50.0}, own)
    process = run_script("train.py", "--calibrate", "--data", digits, cwd=tmp_path)
    assert "own.pth: the temperature is now" in process.stdout, process.stderr
    assert load(own)["temperature"] == content["temperature"]


def test_half_precision_halves_the_file_and_reads_the_same(trained, digits, tmp_path):
    start = trained[0] / "save_model" / f"{NAME}.pth"
    flags = ["--epochs", 1, "--lr", 1e-9, "--train", 64, "--augment", "none", "--half"]
    process = run_script("train.py", "--data", digits, "--weights", start, *flags, cwd=tmp_path)
    assert "\n64 training and 100 test images" in process.stdout
    half = tmp_path / "save_model" / f"{NAME}.pth"
    assert {t.dtype for t in weights(half).values() if t.is_floating_point()} == {torch.float16}
    assert half.stat().st_size < 0.75 * start.stat().st_size  # names and layout take the rest
    accuracy = float(re.search(r"test images: word accuracy (\S+)", process.stdout)[1])
    read = run_script("train.py", "--evaluate", "--data", digits, cwd=tmp_path).stdout
    assert f"word accuracy {accuracy:.4f}" in read


def test_a_known_length_is_carried_by_the_weights(trained, digits, tmp_path):
    start = trained[0] / "save_model" / f"{NAME}.pth"
    flags = ["--data", digits, "--weights", start, "--length", 3, "--epochs", 1, "--lr", 1e-9]
    refused = run_script("train.py", *flags, cwd=tmp_path)
    assert_clear_error(refused, "train.txt:", "4 characters, not 3 (--length, 0 for any)")
    process = run_script("train.py", *flags, "--skip-bad", cwd=tmp_path)
    three = tmp_path / "save_model" / f"{NAME}.pth"
    flags = ["export", "--weights", three, "--out", tmp_path / "three.onnx"]
    assert run_script("infer_tool.py", *flags, cwd=tmp_path).returncode == 0, process.stderr

    images = sorted((digits / "test").glob("*.png"))
    free = [reading.text for reading in RecInfer(start).predict(images)]
    assert {len(text) for text in free} >= {3, 4}
    for weights in three, tmp_path / "three.onnx":
        texts = [reading.text for reading in RecInfer(weights).predict(images)]
        assert all(len(text) == 3 for text in texts)
        assert all(text == own for text, own in zip(texts, free, strict=True) if len(own) == 3)
    flags = ["--evaluate", "--data", digits]
    assert_clear_error(run_script("train.py", *flags, cwd=tmp_path), "test.txt:", "not 3")
    last = [
        run_script("train.py", *flags, "--length", 0, cwd=folder).stdout.splitlines()[-1]
        for folder in (tmp_path, trained[0])
    ]
    assert last[0] == last[1]


def test_evaluation_shows_the_mistakes(trained, digits, tmp_path):
    shutil.copytree(digits, tmp_path / "data")
    lines = (digits / "test.txt").read_text(encoding="utf-8").splitlines()
    wrong = [  # labels that call each 7 a 1
        path + "\t" + label.replace("7", "1")
        for path, label in (line.split("\t") for line in lines)
    ]
    (tmp_path / "data" / "test.txt").write_text("\n".join(wrong), encoding="utf-8")
    process = run_script(
        "train.py", "--evaluate", "--data", tmp_path / "data", "--weights",
        trained[0] / "save_model" / f"{NAME}.pth", "--mistakes", "wrong.png", cwd=tmp_path,
    )  # fmt: skip
    assert re.search(r"most confused: 1 read as 7 \d+x", process.stdout), process.stderr
    with Image.open(tmp_path / "wrong.png") as sheet:
        assert sheet.width > 300


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process")
def test_ctrl_c_keeps_the_best_checkpoint(digits, tmp_path):
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", "--data", digits, "--nh", "16", "--depth", "2"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
    )
    output = ""
    while not re.search(r"epoch +2/", output):
        output += process.stdout.read(1) or pytest.fail(output)
    process.send_signal(signal.SIGINT)
    output += process.communicate(timeout=60)[0]
    assert process.returncode == 130
    assert "Traceback" not in output
    assert re.search(rf"epoch \d+ was the best on the held-out images: .*{NAME}.pth", output)
    assert load(tmp_path / "save_model" / f"{NAME}.pth")


def test_learning_rate_rises_then_falls():
    preset = replace(PRESETS["simple"], lr=0.5, power=4)
    rates = [learning_rate(preset, step, 1000) for step in range(1000)]
    peak = rates.index(max(rates))
    assert max(rates) == 0.5
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert 0 < rates[0] < 0.05
    assert rates[-1] < 1e-6


def test_the_rate_is_level_until_the_loss_falls_no_more():
    preset = replace(PRESETS["simple"], lr=0.5, epochs=100, until_done=True)
    losses = [20 * 0.9**epoch for epoch in range(40)] + [20 * 0.9**40] * 60
    rows = [EpochResult(i, 0, loss, 0, 0, 0, 0) for i, loss in enumerate(losses, 1)]
    falls = [fall_of(rows[:n], preset, 30, 100) for n in range(1, 101)]
    begun = next(n for n, fall in enumerate(falls, 1) if fall)
    assert 45 < begun < 60  # some epochs after the last that was better
    first, last = 30 * begun, 30 * (begun + falls[begun - 1])
    assert last <= 3000
    rates = [learning_rate(preset, step, 3000, (first, last)) for step in range(last)]
    assert set(rates[100:first]) == {0.5}
    assert rates[first:] == sorted(rates[first:], reverse=True)
    assert rates[-1] < 0.01
    assert fall_of(rows[:35], replace(preset, epochs=40), 30, 100) == 5  # no more epochs


@pytest.fixture(scope="module")
def undisturbed(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    process = run_script("train.py", "--data", digits, *BRIEF, cwd=folder)
    assert process.returncode == 0, process.stderr
    return folder


def test_killed_and_resumed_ends_as_if_nothing_had_happened(digits, undisturbed, tmp_path):
    command = [sys.executable, "-u", ROOT / "train.py", "--data", digits, *BRIEF, "--resume"]
    command = list(map(str, command))
    moments = random.Random(0)
    for epoch in (1, 2, 3):  # killed in the epoch after it
        process = subprocess.Popen(
            command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        shown = b""
        while f"epoch   {epoch}/4".encode() not in shown:
            shown += process.stdout.read(1) or pytest.fail(shown.decode())
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(moments.uniform(0, 0.03))
        process.kill()
        process.communicate()
        for path in saved_tensors(tmp_path / "save_model"):
            assert load(path)
    process = run_script("train.py", "--data", digits, *BRIEF, "--resume", cwd=tmp_path)
    assert re.search(r"resumed after epoch [34]", process.stdout), process.stderr
    expected = outcome(undisturbed / "save_model")
    assert equal(outcome(tmp_path / "save_model"), expected)
    # A finished one is not trained again.
    process = run_script("train.py", "--data", digits, *BRIEF, "--resume", cwd=tmp_path)
    assert "resumed after epoch 4" in process.stdout
    assert equal(outcome(tmp_path / "save_model"), expected)


def test_only_the_same_training_is_resumed(digits, undisturbed, tmp_path):
    state = undisturbed / "save_model" / f"{BRIEF_NAME}.resume"
    (tmp_path / "save_model").mkdir()
    copy = tmp_path / "save_model" / f"{BRIEF_NAME}.resume"
    copy.write_bytes(state.read_bytes())
    for flags, fragment in [(["--lr", 0.5], "lr was 0.01"), (["--train", 399], "images was")]:
        process = run_script("train.py", "--data", digits, *BRIEF, *flags, "--resume", cwd=tmp_path)
        assert_clear_error(process, f"{BRIEF_NAME}.resume", fragment)
    copy.write_bytes(state.read_bytes()[:-1000])
    process = run_script("train.py", "--data", digits, *BRIEF, "--resume", cwd=tmp_path)
    assert_clear_error(process, f"{BRIEF_NAME}.resume", "no state of an unfinished training")
    for part in {"average": {}}, {"optimizer": {"mean": []}}:  # which was a list of tensors once
        torch.save({**torch.load(state, weights_only=True), **part}, copy)
        process = run_script("train.py", "--data", digits, *BRIEF, "--resume", cwd=tmp_path)
        assert_clear_error(process, f"{BRIEF_NAME}.resume", "another version of this program")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit of file sizes")
def test_a_full_disk_leaves_the_earlier_files(digits, undisturbed, tmp_path):
    (tmp_path / "save_model").mkdir()
    before = {}
    for path in (undisturbed / "save_model").iterdir():
        name = path.name.replace("nh8", "nh64")
        before[name] = path.read_bytes()
        (tmp_path / "save_model" / name).write_bytes(before[name])
    # No file may grow beyond 200,000 bytes, as if the disk were full by then: the picture of
    # the data and the checkpoint fit, the state for --resume does not.
    limited = (
        "import resource, runpy, sys; sys.argv.pop(0); sys.path.insert(0, sys.argv[0][:-8]);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200000, 200000));"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", limited, ROOT / "train.py", "--data", digits, *BRIEF]
    process = subprocess.run(
        list(map(str, [*command, "--nh", 64])), cwd=tmp_path, env=ENVIRONMENT,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert_clear_error(process, "digits_nh64_depth1.resume", "cannot be written")
    after = {path.name: path.read_bytes() for path in (tmp_path / "save_model").iterdir()}
    del before["digits_nh64_depth1.data.png"]  # drawn anew each time
    kept = set(after.values())
    assert all(content in kept for content in before.values())
    assert not [name for name in after if "unfinished" in name]
    assert load(tmp_path / "save_model" / "digits_nh64_depth1.pth")["nh"] == 64


def digits_batch(labels):
    converter = CTCLabelConverter("0123456789")
    targets, lengths = map(torch.from_numpy, converter.encode(labels))
    images = torch.zeros(len(labels), 3, 32, 64, dtype=torch.uint8)
    indices, widths = list(range(len(labels))), torch.full((len(labels),), 64)
    return Batch(images, widths, targets, lengths, labels, indices, len(labels))


def test_a_step_that_is_not_finite_changes_nothing():
    torch.manual_seed(0)
    model = MicroNet(4, 1, 11)
    optimizer, scaler = Optimizer(model, 2), precision(False, torch.device("cpu"))[2]
    optimizer.lr = 0.01
    for labels, finite in ((["12"], True), (["1" * 30], False), (["34"], True)):
        batch = digits_batch(labels)  # 30 equal characters need more columns than there are
        loss = CTCLoss()(
            model(torch.randn(1, 3, 32, 64)), batch.targets, batch.columns, batch.target_lengths
        )
        before = [p.clone() for p in model.parameters()]
        assert take_step(optimizer, scaler, [loss])[1] == finite
        same = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert same != finite
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_training_that_stays_infinite_ends_with_the_reason(digits, undisturbed, tmp_path):
    start = undisturbed / "save_model" / f"{BRIEF_NAME}.pth"
    broken = load(start)
    broken["state_dict"]["linear.bias"][3] = float("nan")
    torch.save(broken, tmp_path / "nan.pth")
    flags = ["--epochs", 5, "--train", 400, "--batch-size", 8, "--weights", "nan.pth"]
    process = run_script("train.py", "--data", digits, *flags, cwd=tmp_path)
    assert_clear_error(process, "not finite in 20 steps in a row", "--lr")
    assert not (tmp_path / "save_model" / f"{BRIEF_NAME}.pth").exists()


def test_ending_early(digits, trained, tmp_path):
    weights = trained[0] / "save_model" / "digits_nh16_depth2.pth"
    flags = ["--data", digits, "--weights", weights, "--train", 100, "--epochs", 20]
    process = run_script("train.py", *flags, "--stop-at", 0.5, "--lr", 1e-6, cwd=tmp_path)
    assert process.returncode == 0
    assert "stopped: the word accuracy is" in process.stderr
    # Nothing is learnt, and small batches bring batch normalisation to where it stays soon.
    flags += ["--lr", 1e-9, "--ema", 0, "--augment", "none", "--batch-size", 10]
    process = run_script("train.py", *flags, "--patience", 2, cwd=tmp_path)
    assert "no better for 2 epochs" in process.stderr
    with (tmp_path / "save_model" / "digits_nh16_depth2.csv").open(encoding="utf-8") as file:
        assert 3 <= len(list(csv.DictReader(file))) < 20


def test_pictures_of_a_training(undisturbed):
    saved = undisturbed / "save_model"
    for suffix in (".png", ".mistakes.png", ".data.png"):
        with Image.open(saved / f"{BRIEF_NAME}{suffix}") as image:
            assert min(image.size) > 100


def test_fine_tuning_keeps_what_is_known(digits, trained, tmp_path):
    """Digits with one that has become a letter: after a brief training the others are read."""
    lines = (digits / "test.txt").read_text(encoding="utf-8").splitlines()
    lines += (digits / "train.txt").read_text(encoding="utf-8").splitlines()[:400]
    for name, own in (("test", lines[:100]), ("train", lines[100:])):
        pairs = [line.split("\t") for line in own]
        renamed = [f"{digits / path}\t{label.replace('7', 'A')}" for path, label in pairs]
        (tmp_path / f"{name}.txt").write_text("\n".join(renamed), encoding="utf-8")
    start = trained[0] / "save_model" / "digits_nh16_depth2.pth"
    flags = ["--data", tmp_path, "--weights", start]
    assert_clear_error(run_script("train.py", *flags, cwd=tmp_path), "not in the alphabet")
    for height in 32, 40:
        more = ["--fine-tune", "--height", height, "--epochs", 6]
        process = run_script("train.py", *flags, *more, cwd=tmp_path)
        assert re.search(rf"(?s)height {height}, .*9 of 10 char", process.stdout), process.stderr
        assert float(re.search(r"test images: word accuracy (\S+)", process.stdout)[1]) >= 0.7


def test_images_read_again_each_epoch_and_bfloat16_train_the_same(digits, undisturbed, tmp_path):
    one_epoch = [*BRIEF, "--epochs", 1]
    losses = []
    for flags in (["--no-amp"], ["--no-amp", "--memory", 0], ["--amp"]):
        process = run_script("train.py", "--data", digits, *one_epoch, *flags, cwd=tmp_path)
        assert ("do not fit into memory" in process.stdout) == ("--memory" in flags), process.stderr
        losses.append(float(re.search(r"test loss +(\S+)", process.stdout)[1]))
    assert losses[1] == losses[0]
    assert losses[2] == pytest.approx(losses[0], rel=0.05)


def test_tensorboard_or_what_to_install(digits, tmp_path):
    process = run_script("train.py", "--data", digits, *BRIEF, "--tensorboard", cwd=tmp_path)
    if find_spec("tensorboard"):
        assert list(tmp_path.glob("save_model/*.tensorboard/*"))
    else:
        assert_clear_error(process, "pip install tensorboard")


def test_two_trainings_do_not_write_to_the_same_files(digits, tmp_path):
    command = [sys.executable, "-u", ROOT / "train.py", "--data", digits, "--nh", "8", "--out", "o"]
    first = subprocess.Popen(
        [*map(str, command), "--epochs", "300"], cwd=tmp_path, env=ENVIRONMENT,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while b"training and 100 test images, " not in first.stdout.readline():
        assert first.poll() is None
    try:
        flags = ["--data", digits, "--nh", 8, "--epochs", 1, "--train", 64]
        second = run_script("train.py", *flags, "--out", "o", cwd=tmp_path)
        assert_clear_error(second, f"process {first.pid}", "another --out")
        assert run_script("train.py", *flags, cwd=tmp_path).returncode == 0
    finally:
        first.kill()
        first.wait()
    assert run_script("train.py", *flags, "--out", "o", cwd=tmp_path).returncode == 0
    assert not list(tmp_path.glob("*/*.lock")) + list(tmp_path.glob("*/*.owner"))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process")
@pytest.mark.parametrize(
    ("script", "flags", "moments"),
    [
        ("train.py", ["--nh", 8, "--epochs", 2], (0.2, 0.9, 1.6, 2.1, 2.6, 4.0, 5.0)),
        ("infer_tool.py", ["export"], (0.1, 0.8, 2.0)),
    ],
)
def test_ctrl_c_in_any_phase_leaves_no_traceback_and_nothing_half_written(
    script, flags, moments, digits, trained, tmp_path
):
    """While importing, checking, training, calibrating, exporting."""
    data = ["--data", digits] if script == "train.py" else ["--weights", tmp_path / "mine.pth"]
    shutil.copy(trained[0] / "save_model" / f"{NAME}.pth", tmp_path / "mine.pth")
    for moment in moments:
        process = subprocess.Popen(
            list(map(str, [sys.executable, ROOT / script, *flags, *data])), cwd=tmp_path,
            env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            output = process.communicate(timeout=moment)[0]
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            output = process.communicate(timeout=60)[0]
        assert b"Traceback" not in output, output.decode()
        assert not list(tmp_path.rglob("*unfinished*"))
        for path in tmp_path.rglob("*.pth"):
            assert load(path)
