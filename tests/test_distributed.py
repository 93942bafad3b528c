"""Two processes that train together on the CPU, as torchrun starts them."""

import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ENVIRONMENT, ROOT

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="torchrun on Windows lacks libuv")
FLAGS = ["--nh", 16, "--depth", 2, "--epochs", 12, "--batch-size", 32, "--device", "cpu"]


def torchrun(digits, folder, *flags):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        ROOT / "train.py", "--data", digits, *FLAGS, *flags,
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


def test_two_processes_learn_as_one_and_go_on_after_one_has_died(digits, trained, tmp_path):
    process = torchrun(digits, tmp_path)
    output = read_until(process, r"epoch +3/12")
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
    assert re.search(r"2 processes, resumed after epoch [34]", output), output
    # One writer, one line an epoch, a checkpoint that reads as well as that of one process.
    assert len(re.findall(r"epoch +12/12", output)) == 1
    best = float(re.search(r"best word accuracy (\S+)", output)[1])
    alone = float(re.search(r"best word accuracy (\S+)", trained[1].stdout)[1])
    assert best >= alone - 0.03  # 3 of 100 images
    name = "digits_nh16_depth2"
    assert torch.load(tmp_path / "save_model" / f"{name}.pth", weights_only=True)["nh"] == 16
    rows = (tmp_path / "save_model" / f"{name}.csv").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 13


def test_bad_data_is_reported_once(tmp_path):
    process = torchrun(tmp_path / "nowhere", tmp_path)
    output = process.communicate(timeout=120)[0]
    assert process.returncode != 0
    assert output.count("no such folder or label file") == 1, output
    assert "train.py" not in re.findall(r"File .*(train.py).*", output)
