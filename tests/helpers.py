"""What the tests share: running the real scripts, small pictures, and what an error must be."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = ROOT / "assets" / "samples"
# Tests run side by side: more threads than that would wait for each other.
ENVIRONMENT = os.environ | {"PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}
torch.set_num_threads(1)


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


# Each command line is a process of its own, but PyTorch is imported only once for all.
RUN_EACH = """
import json, os, runpy, sys
script, commands = sys.argv[1], json.loads(sys.argv[2])
sys.path.insert(0, os.path.dirname(script))
import train
for i, arguments in enumerate(commands):
    child = os.fork()
    if child:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        continue
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{i}.{name}", os.O_CREAT | os.O_WRONLY), stream)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
    break
"""


def run_each(script, commands, cwd):
    """Run a script with each of some lists of arguments. Returns the finished processes."""
    if not hasattr(os, "fork"):
        return [run_script(script, *arguments, cwd=cwd) for arguments in commands]
    commands = [[str(argument) for argument in arguments] for arguments in commands]
    command = [sys.executable, "-c", RUN_EACH, str(ROOT / script), json.dumps(commands)]
    codes = subprocess.run(
        command, cwd=cwd, check=True, capture_output=True, text=True, env=ENVIRONMENT, timeout=300
    ).stdout.split()
    finished = []
    for i, (arguments, code) in enumerate(zip(commands, codes, strict=True)):
        streams = [Path(cwd, f"{i}.{name}") for name in ("stdout", "stderr")]
        texts = [path.read_text(encoding="utf-8") for path in streams]
        finished.append(subprocess.CompletedProcess(arguments, int(code), *texts))
        for path in streams:
            path.unlink()
    return finished


def assert_clear_error(process, *fragments):
    """The process failed with a message on stderr that holds ``fragments``, not a traceback."""
    assert process.returncode not in (0, None), process.stdout
    assert "Traceback" not in process.stderr, process.stderr
    for fragment in fragments:
        assert fragment in process.stderr, process.stderr


def png(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def jpeg(image):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG")
    return buffer.getvalue()


def dashes():
    """A long dashed line, which looks like text to who seeks it."""
    image = Image.new("RGB", (2400, 60), "white")
    draw = ImageDraw.Draw(image)
    for x in range(200, 2200, 12):
        draw.rectangle((x, 28, x + 5, 34), fill="black")
    return image


def picture():
    """A grey picture of 64x32 pixels, dark to light from left to right."""
    return Image.fromarray(np.tile(np.linspace(0, 255, 64, dtype=np.uint8), (32, 1)))


def load(path):
    """The content of a checkpoint or of a state for --resume."""
    return torch.load(path, weights_only=True)
