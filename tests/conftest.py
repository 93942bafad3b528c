"""What the tests share: running the real scripts, a small data set, a training on it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
# Test files run side by side: more threads than that would wait for each other.
ENVIRONMENT = os.environ | {"PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}


def run_script(script, *arguments, cwd):
    """Run a script of the repository as a user would. Returns the finished process."""
    return subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, arguments)],
        cwd=cwd,
        check=False,
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=ENVIRONMENT,
        timeout=300,
    )


def assert_clear_error(process, *fragments):
    """The process failed with a message on stderr that holds ``fragments``, not a traceback."""
    assert process.returncode not in (0, None), process.stdout
    assert "Traceback" not in process.stderr, process.stderr
    for fragment in fragments:
        assert fragment in process.stderr, process.stderr


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """A data set of digits: 1,500 training and 100 test images of 3 or 4 characters."""
    folder = tmp_path_factory.mktemp("data") / "digits"
    size = ["--train", 1500, "--test", 100]
    process = run_script(
        "gen_image.py", "--out", folder, *size, "--alphabet", "digits", "--length", "3-4",
        cwd=folder.parent,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    return folder


@pytest.fixture(scope="session")
def trained(digits, tmp_path_factory):
    """A finished training on ``digits``: (folder it ran in, the process)."""
    folder = tmp_path_factory.mktemp("training")
    process = run_script(
        "train.py", "--data", digits, "--nh", 16, "--depth", 2, "--epochs", 12, "--batch-size", 32,
        "--device", "cpu", cwd=folder,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    return folder, process
