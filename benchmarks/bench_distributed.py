"""Compare two training processes with one, at the same total batch size.

    python benchmarks/bench_distributed.py

On CPUs, by torchrun with gloo, each process with one thread. Two things: the accuracy that
the simple task ends with, and the images per second of a network with nh = 128.
"""

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import ROOT, draw, print_machine, spread


def train(processes, data, out, *flags):
    """Train with so many processes. Returns the rows of the table."""
    launch = [] if processes == 1 else [
        "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
    ]  # fmt: skip
    command = [
        sys.executable, *launch, ROOT / "train.py", "--task", "simple", "--data", data,
        "--out", out, "--device", "cpu", *flags,
    ]  # fmt: skip
    process = subprocess.run(
        list(map(str, command)), check=False, capture_output=True, text=True, encoding="utf-8",
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if process.returncode:
        sys.exit(f"training with {processes} processes failed:\n{process.stderr[-2000:]}")
    with next(out.glob("*.csv")).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=2, help="0 to SEEDS-1 (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=3, help="of the speed's measurement (default: %(default)s)"
    )
    args = parser.parse_args()
    print_machine(torch, threads=1)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        data = folder / "data"
        draw(data)
        rates = {1: [], 2: []}
        for turn in range(args.rounds):
            for processes, measured in rates.items():
                out = folder / f"speed{turn}_{processes}"
                rows = train(processes, data, out, "--nh", 128, "--epochs", 2)
                # The second epoch with its evaluation: the first one warms up.
                seconds = float(rows[1]["seconds"]) - float(rows[0]["seconds"])
                measured.append(5000 / seconds)
        for processes, measured in rates.items():
            rate = spread(measured, 0)
            print(f"nh 128, {processes} processes: {rate} images/s, {args.rounds} runs", flush=True)
        gain = statistics.median(rates[2]) / statistics.median(rates[1])
        print(f"two processes train {gain:.2f} times the images per second", flush=True)
        for seed in range(args.seeds):
            last = [
                float(
                    train(n, data, folder / f"seed{seed}_{n}", "--seed", seed)[-1]["word_accuracy"]
                )
                for n in (1, 2)
            ]
            print(f"seed {seed}: final word accuracy {last[0]:.4f} with 1 process, {last[1]:.4f} "
                  f"with 2", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
