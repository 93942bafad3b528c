"""Measure a task: drawing, training over many seeds, accuracy on fresh images.

    python benchmarks/bench_train.py              # simple, 20 seeds, as in the README
    python benchmarks/bench_train.py --task chinese --seeds 3
    python benchmarks/bench_train.py --task complex --seeds 1 --train 5000 --epochs 24

Runs the real commands with their default flags, one after the other, and reads the
tables they write. The fresh images come from another generator seed than the training
and test images.
"""

import argparse
import csv
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torchvision

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from model import MicroNet  # noqa: E402

FRESH = {"simple": 5000, "complex": 5000, "chinese": 2000}  # images
FRESH_SEED = 1000
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
        env=os.environ | environment,
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


def run(script, *arguments, threads):
    """Run a script of the repository, as `measured`."""
    return measured(sys.executable, ROOT / script, *arguments, OMP_NUM_THREADS=str(threads))


def forward_milliseconds():
    """Median time of one image through the untrained network, on one thread."""
    torch.set_num_threads(1)
    model, image = MicroNet().eval(), torch.zeros(1, 3, 32, 128)
    times = []
    with torch.inference_mode():
        for _ in range(300):
            began = time.perf_counter()
            model(image)
            times.append(time.perf_counter() - began)
    return statistics.median(times) * 1000


def spread(values, digits):
    """Median, and the range, as text."""
    return (
        f"median {statistics.median(values):.{digits}f} "
        f"(from {min(values):.{digits}f} to {max(values):.{digits}f})"
    )


def main():
    parser = argparse.ArgumentParser(description="Measure the training of a task.")
    parser.add_argument(
        "--task", choices=FRESH, default="simple", help="what to train (default: %(default)s)"
    )
    parser.add_argument("--train", type=int, help="training images (default: the task's)")
    parser.add_argument("--epochs", type=int, help="epochs (default: the task's)")
    parser.add_argument(
        "--seeds", type=int, default=20, help="train seeds 0 to SEEDS-1 (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=2, help="threads (default: %(default)s)")
    args = parser.parse_args()
    print(f"machine: {platform.platform()}, {platform.machine()}, {os.cpu_count()} cores")
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"torchvision {torchvision.__version__}, {args.threads} threads"
    )
    print(f"one image through the network, 1 thread: {forward_milliseconds():.2f} ms", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        data, fresh = Path(folder, "data"), Path(folder, "fresh")
        draw = ["gen_image.py", "--task", args.task, "--out"]
        size = ["--train", args.train] if args.train else []
        drawing = [
            run(*draw, data, "--force", *size, threads=args.threads)[1]
            for _ in range(3 if args.task == "simple" else 1)
        ]
        print(f"drawing the images, {len(drawing)} runs: {spread(drawing, 1)} s")
        size = ["--train", 1, "--test", FRESH[args.task], "--seed", FRESH_SEED]
        run(*draw, fresh, *size, threads=args.threads)

        print(
            "seed  first 1.0: epoch  seconds  best  fresh accuracy  command s  peak MB", flush=True
        )
        epochs, seconds, accuracies, commands, peaks, bests = [], [], [], [], [], []
        for seed in range(args.seeds):
            out = Path(folder, f"seed{seed}")
            _, command, peak = run(
                "train.py", "--task", args.task, "--data", data, "--seed", seed, "--out", out,
                *(["--epochs", args.epochs] if args.epochs else []), threads=args.threads,
            )  # fmt: skip
            with next(out.glob("*.csv")).open(encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file))
            weights = next(out.glob("*.pth"))
            evaluation = run(
                "train.py", "--evaluate", "--weights", weights, "--data", fresh,
                threads=args.threads,
            )[0]  # fmt: skip
            accuracies.append(float(re.search(r"word accuracy ([\d.]+)", evaluation)[1]))
            bests.append(max(float(row["word_accuracy"]) for row in rows))
            first = next((row for row in rows if float(row["word_accuracy"]) == 1), None)
            epochs.append(int(first["epoch"]) if first else float("inf"))
            seconds.append(float(first["seconds"]) if first else float("inf"))
            commands.append(command)
            peaks.append(peak or 0)
            print(
                f"{seed:4d} {epochs[-1]:17} {seconds[-1]:8.1f} {bests[-1]:5.3f} "
                f"{accuracies[-1]:15.4f} {command:10.1f} {peaks[-1]:8.0f}",
                flush=True,
            )
    print(f"test word accuracy 1.0: {bests.count(1.0)} of {args.seeds} seeds")
    print(f"epoch of the first 1.0: {spread(epochs, 0)}")
    print(f"training seconds to it: {spread(seconds, 1)}")
    print(f"accuracy on {FRESH[args.task]} fresh images: {spread(accuracies, 4)}")
    print(f"whole command, seconds: {spread(commands, 1)}")
    print(f"peak memory, MB: {spread(peaks, 0)}")


if __name__ == "__main__":
    main()
