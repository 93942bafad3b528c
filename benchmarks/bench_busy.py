"""Measure a training alone and beside a busy process, with several settings of OpenMP.

    python benchmarks/bench_busy.py
    python benchmarks/bench_busy.py --rounds 5

OpenMP's threads wait for each other by spinning, GOMP_SPINCOUNT times or for ever: beside
another process each wait takes as long as that one is given. One setting after the other,
all of them in each round; the seconds are those of the simple task's first epochs.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import ROOT, draw, measured, print_machine, spread

SETTINGS = (
    {},
    {"OMP_NUM_THREADS": "1"},
    {"OMP_WAIT_POLICY": "passive"},
    {"GOMP_SPINCOUNT": "1000"},
    {"GOMP_SPINCOUNT": "100000"},
)


def train(data, out, epochs, setting):
    """Seconds that the epochs of a training took."""
    measured(
        sys.executable, ROOT / "train.py", "--task", "simple", "--data", data, "--out", out,
        "--epochs", epochs, "--device", "cpu", **setting,
    )  # fmt: skip
    [table] = out.glob("*.csv")
    return float(table.read_text(encoding="utf-8").splitlines()[-1].rpartition(",")[2])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="of all settings (default: %(default)s)"
    )
    parser.add_argument(
        "--epochs", type=int, default=4, help="of each training (default: %(default)s)"
    )
    args = parser.parse_args()
    print_machine(torch, threads=os.cpu_count())
    seconds = {(i, busy): [] for i in range(len(SETTINGS)) for busy in (False, True)}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data")
        draw(data)
        for turn in range(args.rounds):
            for (i, busy), taken in seconds.items():
                other = busy and subprocess.Popen([sys.executable, "-c", "while True: pass"])
                out = Path(folder, f"{turn}_{i}_{busy}")
                taken.append(train(data, out, args.epochs, SETTINGS[i]))
                if other:
                    other.kill()
                    other.wait()
    for (i, busy), taken in seconds.items():
        setting = " ".join(f"{name}={value}" for name, value in SETTINGS[i].items()) or "default"
        place = "beside a busy process" if busy else "alone"
        print(f"{setting}, {place}: {spread(taken, 1)} s, {len(taken)} runs")


if __name__ == "__main__":
    main()
