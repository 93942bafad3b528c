"""A small data set and trainings on it, which several test files use."""

import os
import shutil

import pytest
from helpers import run_script


@pytest.fixture
def in_use(monkeypatch):
    """in_use(path): from now on the file cannot be replaced, as where Windows has it open."""
    replace = os.replace

    def refuse(path):
        def replace_others(source, target):
            if target == path:
                raise PermissionError(13, "Permission denied")
            replace(source, target)

        monkeypatch.setattr(os, "replace", replace_others)

    return refuse


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
        "train.py", "--data", digits, "--weights", "none", "--nh", 16, "--depth", 2,
        "--epochs", 8, "--batch-size", 32, "--device", "cpu", cwd=folder,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    return folder, process


@pytest.fixture(scope="session")
def browser():
    """A window of Chromium, as Debian has it, else as Playwright has installed it."""
    playwright = pytest.importorskip("playwright.sync_api")
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    with playwright.sync_playwright() as started:
        try:
            own = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"there is no Chromium ({str(error).splitlines()[0]})")
        yield own.new_context(bypass_csp=True)  # Playwright waits by what the pages forbid
        own.close()
