"""What the tests share: running the real scripts, small pictures, and what an error must be."""

import io
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import NamedTemporaryFile

import numpy as np
import torch
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = ROOT / "assets" / "samples"
# Tests run side by side: more threads than that would wait for each other.
ENVIRONMENT = os.environ | {"PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}
torch.set_num_threads(1)


# Each command line is a process of its own, forked from one that has imported what takes long:
# most of the tests' time would go into that.
STARTER = """
import atexit, json, os, runpy, signal, sys
import matplotlib.backends.backend_agg, torch
for line in os.fdopen(os.dup(0)):  # so that sys.stdin is unread
    script, arguments, folder, *streams = json.loads(line)
    child = os.fork()
    if child:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    signal.alarm(300)
    os.chdir(folder)
    for number, path in enumerate((os.devnull, *streams)):
        os.dup2(os.open(path, os.O_RDWR), number)
    sys.argv, sys.path[0] = [script, *arguments], os.path.dirname(script)
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:  # as without runpy
        atexit.register(sys.modules["keys"].end_process, end.code)
        raise
    break
"""


@cache
def starter():
    """The process that commands are forked from; it ends with the tests."""
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", STARTER], stdin=pipe, stdout=pipe, text=True, env=ENVIRONMENT
    )


def run_script(script, *arguments, cwd):
    """Run a script of the repository as a user would. Returns the finished process."""
    command = [str(ROOT / script), *map(str, arguments)]
    if sys.platform != "linux":  # where PyTorch cannot be forked safely
        return subprocess.run(
            [sys.executable, *command], cwd=cwd, check=False, capture_output=True, text=True,
            encoding="utf-8", env=ENVIRONMENT, timeout=300,
        )  # fmt: skip
    with (
        NamedTemporaryFile("r+", encoding="utf-8") as out,
        NamedTemporaryFile("r+", encoding="utf-8") as errors,
    ):
        order = command[0], command[1:], str(cwd), out.name, errors.name
        print(json.dumps(order), file=starter().stdin, flush=True)
        code = int(starter().stdout.readline())
        return subprocess.CompletedProcess(command, code, out.read(), errors.read())


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
