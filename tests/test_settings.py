"""What a training decides: which flags cannot be used, who trains together, what labels tell."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ENVIRONMENT, ROOT, assert_clear_error, load, run_script
from PIL import Image, ImageFilter

from dataset import Checked
from image import Preprocess
from infer_tool import SHIPPED_WEIGHTS, RecInfer
from loss import fall_of
from metric import EpochResult
from model import load_checkpoint
from settings import own_preset

NAME = "digits_nh16_depth2"
TOGETHER = ["--nh", 16, "--depth", 2, "--epochs", 8, "--batch-size", 32, "--device", "cpu"]
needs_torchrun = pytest.mark.skipif(
    sys.platform == "win32", reason="torchrun on Windows lacks libuv"
)


def test_bad_input(digits, trained, tmp_path):
    (tmp_path / "file").write_text("xyz", encoding="utf-8")
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "resnet.pth")
    checkpoint = load(trained[0] / "save_model" / f"{NAME}.pth")
    torch.save(checkpoint | {"nh": 32}, tmp_path / "wrong_nh.pth")
    torch.save(checkpoint | {"nh": 20_000}, tmp_path / "large.pth")
    (tmp_path / "text.pth").write_text("hello", encoding="utf-8")
    shutil.copytree(digits, tmp_path / "broken")
    lines = (digits / "train.txt").read_text(encoding="utf-8").splitlines()
    lines[6] = "train/00006.png 123"
    (tmp_path / "broken" / "train.txt").write_text("\n".join(lines), encoding="utf-8")
    data = ["--data", digits]
    cases = [
        (["--data", tmp_path / "nowhere"], ["nowhere", "no such folder or label file"]),
        (["--data", tmp_path / "broken", "--alphabet", "digits"], ["train.txt:7: no tab"]),
        (["--data", digits, "--alphabet", tmp_path / "file"], ["train.txt:1: ", "alphabet"]),
        # Before the data are looked at, which may take minutes.
        (["--data", "nowhere", "--out", tmp_path / "file" / "out"], ["--out", "cannot be written"]),
        ([*data, "--device", "cuda:99"], ["--device cuda:99"]),
        ([*data, "--device", "toaster"], ["--device toaster"]),
        ([*data, "--width", "30"], ["--width 30"]),
        ([*data, "--lr", "-1"], ["--lr"]),
        (["--evaluate", "--weights", "resnet.pth"], ["resnet.pth", "not a MicroOCR checkpoint"]),
        (["--evaluate", "--weights", "wrong_nh.pth"], ["wrong_nh.pth", "not a MicroOCR"]),
        (["--evaluate", "--weights", "large.pth"], ["large.pth", "too small a file for nh 20000"]),
        (["--evaluate", "--weights", "text.pth"], ["text.pth", "not a MicroOCR checkpoint"]),
        (["--evaluate", "--weights", "none.pth"], ["none.pth", "cannot be read"]),
        (["--weights", "none.pth", "--nh", "8"], ["--nh"]),
        (["--weights", "none.pth", "--no-trim"], ["--trim", "leave it out"]),
        (["--mistakes", "wrong.png"], ["--mistakes", "--evaluate"]),
        ([*data, "--fine-tune"], ["--fine-tune", "--weights"]),
        ([*data, "--ema", "1"], ["--ema"]),
        ([*data, "--val-fraction", "1"], ["--val-fraction"]),
        ([*data, "--stop-at", "90"], ["--stop-at"]),
        ([*data, "--label-regex", "(a"], ["--label-regex"]),
        ([*data, "--label-regex", "abc"], ["--label-regex", "group"]),
    ]
    processes = [run_script("train.py", *arguments, cwd=tmp_path) for arguments, _ in cases]
    for process, (_, fragments) in zip(processes, cases, strict=True):
        assert_clear_error(process, *fragments)
    assert not (tmp_path / "save_model" / f"{NAME}.pth").exists()


def test_more_images_that_are_cut_end_in_a_longer_fall():
    start = load_checkpoint(SHIPPED_WEIGHTS["general"])

    def preset(images, trim):
        size = Preprocess(40 if trim else 32, trim=trim)
        return own_preset(Checked([None] * images, [], {}, "ab", size, [], [], {}), start)

    counts = [50, 500, 4500, 50000]
    cut, whole = ([preset(n, trim) for n in counts] for trim in (True, False))
    assert len({p.fall for p in [*whole, *cut[:2]]}) == 1
    assert whole[0].fall < preset(1500, True).fall < cut[2].fall == cut[3].fall
    for p in cut:  # even while the loss still falls, the rate has reached 0 by the last epoch
        rows = [EpochResult(n, 0, 1e6 * 0.96**n, 0, 1, 0, 0) for n in range(1, p.epochs)]
        begun = next(n for n in range(1, p.epochs) if fall_of(rows[:n], p, 100, 100))
        assert begun == pytest.approx(p.epochs / (1 + p.fall), abs=1)
        assert begun + fall_of(rows[:begun], p, 100, 100) == p.epochs


def test_a_training_is_done_sooner_from_a_network_that_reads_its_script():
    general, size = load_checkpoint(SHIPPED_WEIGHTS["general"]), Preprocess(32)

    def begin_of_fall(start, alphabet, images, cer, lowest=4):
        p = own_preset(Checked([None] * images, [], {}, alphabet, size, [], [], {}), start)
        losses = [max(1, 1 + lowest - n) for n in range(1, p.epochs)]
        rows = [EpochResult(n, 0, loss, 0, cer, 0, 0) for n, loss in enumerate(losses, 1)]
        begun = next(n for n in range(1, p.epochs) if fall_of(rows[:n], p, 50, 100))
        return p.keep_statistics, p.batch_size, begun

    own = general, "0123456789京沪"
    # The loss of the fourth epoch is the lowest.
    assert begin_of_fall(*own, 800, 0.5) == (True, 8, 6)
    assert begin_of_fall(*own, 5000, 0.05) == (True, 32, 6)
    assert begin_of_fall(general, "१२३४५६७८९0", 800, 0.05) == (False, 32, 8)
    assert begin_of_fall(None, "ab", 800, 0.05) == (False, 32, 8)
    # Of many images one epoch that was no better is chance.
    assert begin_of_fall(*own, 800, 0.5, lowest=2) == (True, 8, 3)
    assert begin_of_fall(*own, 5000, 0.5, lowest=2) == (True, 32, 4)
    assert begin_of_fall(*own, 800, 0.05) == (True, 8, 4)  # few errors are left, after 200 steps


def torchrun(digits, folder, *flags):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        ROOT / "train.py", "--data", digits, *TOGETHER, *flags,
    ]  # fmt: skip
    return subprocess.Popen(
        list(map(str, command)), cwd=folder, env=ENVIRONMENT | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8",
    )  # fmt: skip


def read_until(process, pattern):
    output = ""
    while not re.search(pattern, output):
        output += process.stdout.read(1) or pytest.fail(output)
    return output


def workers_of(process):
    """Process numbers of the two trainings."""
    listed = subprocess.run(
        ["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True
    ).stdout
    pairs = [tuple(map(int, line.split())) for line in listed.splitlines()]
    return sorted(pid for pid, parent in pairs if parent == process.pid)


@needs_torchrun
def test_two_processes_learn_as_one_and_go_on_after_one_has_died(digits, trained, tmp_path):
    process = torchrun(digits, tmp_path)
    output = read_until(process, r"epoch +1/8")
    assert "2 processes" in output
    workers = workers_of(process)
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    output += process.communicate(timeout=120)[0]
    assert process.returncode != 0
    assert re.search(r"another one has died or cannot be reached .*--resume", output), output

    process = torchrun(digits, tmp_path, "--resume")
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert re.search(r"2 processes, resumed after epoch [12]", output), output
    # One writer, one line per epoch, a checkpoint that reads as well as that of one process.
    assert len(re.findall(r"epoch +8/8", output)) == 1
    best = float(re.search(r"test images: word accuracy (\S+)", output)[1])
    alone = float(re.search(r"test images: word accuracy (\S+)", trained[1].stdout)[1])
    assert best >= alone - 0.03  # 3 of 100 images
    assert load(tmp_path / "save_model" / f"{NAME}.pth")["nh"] == 16
    rows = (tmp_path / "save_model" / f"{NAME}.csv").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 9


@needs_torchrun
def test_bad_data_is_reported_once(tmp_path):
    process = torchrun(tmp_path / "nowhere", tmp_path)
    output = process.communicate(timeout=120)[0]
    assert process.returncode != 0
    assert output.count("no such folder or label file") == 1, output
    assert "train.py" not in re.findall(r"File .*(train.py).*", output)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows finds its compiler elsewhere")
def test_without_a_compiler_nothing_is_compiled(digits, tmp_path):
    process = subprocess.run(
        [sys.executable, ROOT / "train.py", "--data", digits, "--compile"], cwd=tmp_path,
        env=ENVIRONMENT | {"PATH": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert_clear_error(process, "--compile", "C++ compiler")


def test_doubtful_texts_are_read_as_the_labels_are(trained, digits, tmp_path):
    folder, labels, blurred = tmp_path / "rising", [], []
    folder.mkdir()
    for line in (digits / "train.txt").read_text(encoding="utf-8").splitlines():
        path, label = line.split("\t")
        if list(label) == sorted(label):
            shutil.copy(digits / path, folder / f"{label}_{Path(path).stem}.png")
            labels.append(label)
            blurred.append(Image.open(digits / path).filter(ImageFilter.GaussianBlur(2)))
    known = trained[0] / "save_model" / f"{NAME}.pth"
    flags = ["--label-separator", "_", "--weights", known, "--fine-tune", "--epochs", 1]
    process = run_script("train.py", "--data", folder, *flags, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    reader, right = RecInfer(tmp_path / "save_model" / "rising_nh16_depth2.pth"), []
    for ngrams in reader.converter.ngrams, None:
        reader.converter = reader.converter.replaced(ngrams=ngrams)
        readings = reader.predict(blurred)
        right.append(sum(r.text == label for r, label in zip(readings, labels, strict=True)))
    assert right[0] > 1.2 * right[1] > 0
