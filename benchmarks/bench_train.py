"""Measure a task: drawing, training over many seeds, accuracy on fresh images.

    python benchmarks/bench_train.py              # simple, 20 seeds, as in RESULTS.md
    python benchmarks/bench_train.py --task chinese --seeds 3
    python benchmarks/bench_train.py --task complex --seeds 1 --train 5000 --epochs 24

Runs the real commands with their default flags, one after the other, and reads the
tables they write. The fresh images come from another generator seed than the training
and test images.
"""

import argparse
import contextlib
import csv
import io
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torchvision
from common import FRESH_SEED, ROOT, draw, measured, print_machine, spread

import train as script
from gen_image import TASKS
from model import MicroNet


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


def step_milliseconds(args, data, out):
    """Time of a training step in each of five epochs, evaluation left out, in this process."""
    torch.set_num_threads(args.threads)
    times, train_epoch = [], script.train_epoch

    def timed(run, bar):
        began = time.perf_counter()
        result = train_epoch(run, bar)
        times.append((time.perf_counter() - began) * 1000 / len(run.train_batches))
        return result

    script.train_epoch = timed
    flags = ["--task", args.task, "--data", data, "--out", out, "--epochs", 5]
    sys.argv = list(map(str, ["train.py", *flags]))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        script.main()
    return times


class Training(NamedTuple):
    """What a training came to.

    epoch, seconds: to the first accuracy of 1.0, infinite without. best: accuracy. fresh:
    accuracy on fresh images. command: seconds of the whole command. peak: memory in MB.
    """

    epoch: float
    seconds: float
    best: float
    fresh: float
    command: float
    peak: float


def train(args, data, fresh, out, seed):
    """Train a seed, and evaluate its best checkpoint on fresh images. Returns a `Training`."""
    epochs = ["--epochs", args.epochs] if args.epochs else []
    _, command, peak = run(
        "train.py", "--task", args.task, "--data", data, "--seed", seed, "--out", out, *epochs,
        threads=args.threads,
    )  # fmt: skip
    with next(out.glob("*.csv")).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    weights = ["--weights", next(out.glob("*.pth"))]
    evaluation = run("train.py", "--evaluate", *weights, "--data", fresh, threads=args.threads)[0]
    accuracy = float(re.search(r"word accuracy ([\d.]+)", evaluation)[1])
    first = next((row for row in rows if float(row["word_accuracy"]) == 1), None)
    epoch, seconds = (
        (int(first["epoch"]), float(first["seconds"])) if first else (float("inf"),) * 2
    )
    best = max(float(row["word_accuracy"]) for row in rows)
    return Training(epoch, seconds, best, accuracy, command, peak or 0)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--task", choices=TASKS, default="simple", help="what to train (default: %(default)s)"
    )
    parser.add_argument("--train", type=int, help="training images (default: the task's)")
    parser.add_argument("--epochs", type=int, help="epochs (default: the task's)")
    parser.add_argument(
        "--seeds", type=int, default=20, help="train seeds 0 to SEEDS-1 (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=2, help="threads (default: %(default)s)")
    parser.add_argument(
        "--fresh", type=int, default=5000, help="fresh images (default: %(default)s)"
    )
    args = parser.parse_args()
    print_machine(torch, torchvision, threads=args.threads)
    print(f"one image through the network, 1 thread: {forward_milliseconds():.2f} ms", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        data, fresh = Path(folder, "data"), Path(folder, "fresh")
        size = ["--train", args.train] if args.train else []
        drawing = [
            run("gen_image.py", "--task", args.task, "--out", data, "--force", *size,
                threads=args.threads)[1]
            for _ in range(3 if args.task == "simple" else 1)
        ]  # fmt: skip
        print(f"drawing the images, {len(drawing)} runs: {spread(drawing, 1)} s")
        if args.task == "simple":
            steps = step_milliseconds(args, data, Path(folder, "steps"))
            print(f"a training step, {len(steps)} epochs: {spread(steps, 2)} ms", flush=True)
        size = ["--train", 1, "--test", args.fresh, "--seed", FRESH_SEED]
        draw(fresh, "--task", args.task, *size)
        print(
            "seed  first 1.0: epoch  seconds  best  fresh accuracy  command s  peak MB", flush=True
        )
        trainings = []
        for seed in range(args.seeds):
            own = train(args, data, fresh, Path(folder, f"seed{seed}"), seed)
            trainings.append(own)
            print(
                f"{seed:4d} {own.epoch:17} {own.seconds:8.1f} {own.best:5.3f} "
                f"{own.fresh:15.4f} {own.command:10.1f} {own.peak:8.0f}",
                flush=True,
            )
    columns = Training(*zip(*trainings, strict=True))
    print(f"test word accuracy 1.0: {columns.best.count(1.0)} of {args.seeds} seeds")
    print(f"epoch of the first 1.0: {spread(columns.epoch, 0)}")
    print(f"training seconds to it: {spread(columns.seconds, 1)}")
    print(f"accuracy on {args.fresh} fresh images: {spread(columns.fresh, 4)}")
    print(f"whole command, seconds: {spread(columns.command, 1)}")
    print(f"peak memory, MB: {spread(columns.peak, 0)}")


if __name__ == "__main__":
    main()
