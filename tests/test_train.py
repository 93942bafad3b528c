"""Training from image files to a checkpoint that reads, through the real command line."""

import csv
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ENVIRONMENT, ROOT, assert_clear_error, run_script
from PIL import Image

from infer_tool import RecInfer
from model import MicroNet
from train import SAMPLED, learning_rate, sample_classes, supported_by

NAME = "digits_nh16_depth2"


def test_it_learns_to_read(trained, digits):
    folder, process = trained
    last = process.stdout.splitlines()[-1]
    best, epoch, path = re.fullmatch(
        r"best word accuracy (\S+) in epoch (\d+): (.*)", last
    ).groups()
    assert float(best) >= 0.95
    with (folder / "save_model" / f"{NAME}.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "epoch", "train_loss", "test_loss", "word_accuracy", "cer", "lr", "seconds",
    ]  # fmt: skip
    assert [int(row["epoch"]) for row in rows] == list(range(1, 13))
    assert rows[int(epoch) - 1]["word_accuracy"] == best
    assert float(best) == max(float(row["word_accuracy"]) for row in rows)

    evaluation = run_script("train.py", "--evaluate", "--data", digits, cwd=folder)
    line = evaluation.stdout.splitlines()[-1]
    cer = rows[int(epoch) - 1]["cer"]
    assert re.fullmatch(
        rf"word accuracy {best} \(95 % interval 0.\d+ to [01].\d+\), CER {cer}, 100 images", line
    )
    assert str(folder / path) == str(folder / "save_model" / f"{NAME}.pth")


def train_briefly(digits, folder, *flags):
    return run_script(
        "train.py", "--data", digits, "--nh", 16, "--depth", 2, "--epochs", 1, *flags, cwd=folder
    )


def weights(path):
    return torch.load(path, weights_only=True)["state_dict"]


def test_same_seed_same_weights_and_earlier_runs_are_kept(digits, tmp_path):
    for flags in ([], [], ["--seed", 1]):
        assert train_briefly(digits, tmp_path, *flags).returncode == 0
    saved = tmp_path / "save_model"
    kinds = ("csv", "pth", "png", "resume")
    names = {f"{NAME}{number}.{kind}" for number in ("", ".1", ".2") for kind in kinds}
    names |= {f"{NAME}.mistakes{number}.png" for number in ("", ".1", ".2")}
    assert {path.name for path in saved.iterdir()} == names | {f"{NAME}.data.png"}
    first, again, other = (weights(saved / f"{NAME}{number}.pth") for number in (".1", ".2", ""))
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


def test_start_from_weights(trained, digits, tmp_path):
    start = trained[0] / "save_model" / f"{NAME}.pth"
    flags = ["--epochs", 1, "--lr", 0.001, "--weights", start]
    process = run_script("train.py", "--data", digits, *flags, cwd=tmp_path)
    assert float(re.search(r"best word accuracy (\S+)", process.stdout)[1]) >= 0.95


def test_half_precision_halves_the_file_and_reads_the_same(trained, digits, tmp_path):
    start = trained[0] / "save_model" / f"{NAME}.pth"
    flags = ["--epochs", 1, "--lr", 1e-9, "--train", 64, "--augment", "none", "--half"]
    process = run_script("train.py", "--data", digits, "--weights", start, *flags, cwd=tmp_path)
    assert "\n64 training and 100 test images" in process.stdout
    half = tmp_path / "save_model" / f"{NAME}.pth"
    assert {t.dtype for t in weights(half).values() if t.is_floating_point()} == {torch.float16}
    assert half.stat().st_size < 0.75 * start.stat().st_size  # names and layout take the rest
    accuracy = float(re.search(r"best word accuracy (\S+)", process.stdout)[1])
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


def test_sampled_classes_are_a_fair_share_of_all():
    torch.manual_seed(0)
    model, images = MicroNet(4, 1, 2000).eval(), torch.randn(2, 3, 32, 32)
    targets = torch.tensor([5, 9, 5, 1999])
    classes, places, correction = sample_classes(targets, 2000)
    assert classes[places].tolist() == targets.tolist()
    assert classes[0] == 0
    assert len(classes.unique()) == len(classes) == 1 + 3 + SAMPLED
    with torch.no_grad():
        assert torch.allclose(model(images, classes=classes), model(images)[:, :, classes])
    # Equal logits: the sample weighs as much as all classes together.
    assert correction.exp().sum().item() == pytest.approx(2000, rel=1e-4)


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
    assert re.search(rf"best word accuracy \S+ in epoch \d+: .*{NAME}.pth", output)
    assert weights(tmp_path / "save_model" / f"{NAME}.pth")


def test_bad_input(digits, trained, tmp_path):
    (tmp_path / "file").write_text("xyz", encoding="utf-8")
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "resnet.pth")
    checkpoint = torch.load(trained[0] / "save_model" / f"{NAME}.pth", weights_only=True)
    torch.save(checkpoint | {"nh": 32}, tmp_path / "wrong_nh.pth")
    (tmp_path / "text.pth").write_text("hello", encoding="utf-8")
    shutil.copytree(digits, tmp_path / "broken")
    lines = (digits / "train.txt").read_text(encoding="utf-8").splitlines()
    lines[6] = "train/00006.png 123"
    (tmp_path / "broken" / "train.txt").write_text("\n".join(lines), encoding="utf-8")
    data = ["--data", digits]
    for arguments, fragments in [
        (["--data", tmp_path / "nowhere"], ["nowhere", "no such folder or label file"]),
        (["--data", tmp_path / "broken", "--alphabet", "digits"], ["train.txt:7: no tab"]),
        (["--data", digits, "--alphabet", tmp_path / "file"], ["train.txt:1: ", "alphabet"]),
        ([*data, "--out", tmp_path / "file" / "out"], ["--out", "cannot be written"]),
        ([*data, "--device", "cuda:99"], ["--device cuda:99"]),
        ([*data, "--device", "toaster"], ["--device toaster"]),
        ([*data, "--width", "30"], ["--width 30"]),
        ([*data, "--lr", "-1"], ["--lr"]),
        (["--evaluate", "--weights", "resnet.pth"], ["resnet.pth", "not a MicroOCR checkpoint"]),
        (["--evaluate", "--weights", "wrong_nh.pth"], ["wrong_nh.pth", "not a MicroOCR"]),
        (["--evaluate", "--weights", "text.pth"], ["text.pth", "not a MicroOCR checkpoint"]),
        (["--evaluate", "--weights", "none.pth"], ["none.pth", "cannot be read"]),
        (["--weights", "none.pth", "--nh", "8"], ["--nh"]),
        (["--weights", "none.pth", "--no-trim"], ["--trim", "leave it out"]),
        (["--mistakes", "wrong.png"], ["--mistakes", "--evaluate"]),
        ([*data, "--fine-tune"], ["--fine-tune", "--weights"]),
        ([*data, "--ema", "1"], ["--ema"]),
        ([*data, "--val-fraction", "1"], ["--val-fraction"]),
        ([*data, "--stop-at", "90"], ["--stop-at"]),
    ]:
        assert_clear_error(run_script("train.py", *arguments, cwd=tmp_path), *fragments)
    assert not (tmp_path / "save_model" / f"{NAME}.pth").exists()


def test_which_torch_runs_on_which_card():
    pascal_build, new_build = ["sm_50", "sm_60", "sm_70", "sm_90"], ["sm_75", "sm_90", "sm_100"]
    assert supported_by((6, 1), pascal_build)  # GTX 1060: machine code for 6.0 serves 6.1
    assert not supported_by((6, 1), new_build)
    assert not supported_by((12, 0), pascal_build)
    assert supported_by((12, 0), [*pascal_build, "compute_90"])
    assert not supported_by((8, 0), ["sm_86"])


def test_learning_rate_rises_then_falls():
    rates = [learning_rate(step, 1000, 0.5, 4) for step in range(1000)]
    peak = rates.index(max(rates))
    assert max(rates) == 0.5
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert 0 < rates[0] < 0.05
    assert rates[-1] < 1e-6
