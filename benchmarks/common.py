"""What the benchmarks share: where the project is, which machine this is, measured commands."""

import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

FRESH_SEED = 1000  # of the generator, for images that nothing was trained on
# Runs a command from a small process: the peak memory that the system reports for a child
# is at least that of the process which started it.
MEASURE = """
import json, subprocess, sys, time
began = time.perf_counter()
code = subprocess.run(sys.argv[1:], stderr=subprocess.DEVNULL).returncode
seconds = time.perf_counter() - began
try:
    import resource
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
except ImportError:  # Windows
    peak = None
json.dump([code, seconds, peak], sys.stderr)
"""


def measured(*command, **environment):
    """Run a command to its end. Returns (stdout, seconds, peak memory in MB or None)."""
    process = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, command)],
        check=False,
        # As a user has it: what was compiled once is kept.
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": ""} | environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    code, seconds, peak = json.loads(process.stderr)
    if code:
        sys.exit(f"{' '.join(map(str, command))} failed with exit code {code}")
    if peak:
        peak /= 2**20 if sys.platform == "darwin" else 2**10
    return process.stdout, seconds, peak


def draw(folder, *flags):
    """Draw a data set into ``folder`` with gen_image.py."""
    command = [sys.executable, ROOT / "gen_image.py", "--out", folder, *flags]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)


def print_machine(*packages, threads=None):
    """Print the machine and the versions of Python and of imported ``packages``."""
    versions = ", ".join(f"{package.__name__} {package.__version__}" for package in packages)
    print(f"machine: {platform.platform()}, {platform.machine()}, {os.cpu_count()} cores")
    print(
        f"Python {platform.python_version()}, {versions}"
        + (f", {threads} threads" if threads else ""),
        flush=True,
    )


def spread(values, digits):
    """Median, and the range, as text."""
    return (
        f"median {statistics.median(values):.{digits}f} "
        f"(from {min(values):.{digits}f} to {max(values):.{digits}f})"
    )
