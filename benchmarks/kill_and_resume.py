"""Kill trainings at random moments, resume them, and compare their weights bit for bit.

    python benchmarks/kill_and_resume.py
    python benchmarks/kill_and_resume.py --kills 100 --seed 1

One training runs undisturbed. Others with the same settings are killed (SIGKILL) again and
again, at moments from their start to a few epochs later, and go on with --resume. After
every kill each checkpoint on disk must load; at the end the weights and the table, apart
from its seconds, must equal those of the undisturbed training.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import ROOT, draw, print_machine


def start(folder, data, epochs, *flags):
    """Start a training that writes to ``folder``."""
    return subprocess.Popen(
        [
            sys.executable, ROOT / "train.py", "--data", data, "--nh", "16", "--depth", "2",
            "--epochs", str(epochs), "--device", "cpu", "--out", folder, *flags,
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip


def saved_tensors(folder):
    """The files of a training that have to be readable after every kill."""
    return [*folder.glob("*.pth"), *folder.glob("*.resume")]


def outcome(folder):
    """(weights of the best epoch, of the last, the table without its seconds)."""
    [checkpoint], [state] = folder.glob("*.pth"), folder.glob("*.resume")
    best = torch.load(checkpoint, weights_only=True)["state_dict"]
    last = torch.load(state, weights_only=True)["model"]
    [table] = folder.glob("*.csv")
    rows = [row.rsplit(",", 1)[0] for row in table.read_text(encoding="utf-8").splitlines()]
    return best, last, rows


def equal(one, other):
    """Whether two outcomes are the same, bit for bit."""
    return one[2] == other[2] and all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        for a, b in zip(one[:2], other[:2], strict=True)
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, help="at least (default: %(default)s)")
    parser.add_argument(
        "--epochs", type=int, default=8, help="of a training (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    args = parser.parse_args()
    moments = random.Random(args.seed)
    print_machine(torch, threads=1)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        data = folder / "digits"
        draw(data, "--alphabet", "digits", "--train", 1500, "--test", 100)
        began = time.perf_counter()
        if start(folder / "whole", data, args.epochs).wait():
            sys.exit("the undisturbed training failed")
        seconds = time.perf_counter() - began
        expected = outcome(folder / "whole")
        print(f"undisturbed: {args.epochs} epochs in {seconds:.1f} s", flush=True)

        kills, trainings = 0, 0
        while kills < args.kills:
            out = folder / f"killed{trainings}"
            in_this = 0
            while True:
                process = start(out, data, args.epochs, "--resume")
                try:
                    # Long enough for an epoch or two at times, so that it gets on.
                    code = process.wait(moments.uniform(0, 0.7 * seconds))
                    break
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                kills += 1
                in_this += 1
                for path in saved_tensors(out):
                    torch.load(path, weights_only=True)
            trainings += 1
            same = code == 0 and equal(outcome(out), expected)
            print(f"training {trainings}: {in_this} kills, exit code {code}, "
                  f"{'equal' if same else 'DIFFERENT'}", flush=True)  # fmt: skip
            if not same:
                sys.exit(1)
    print(f"{kills} kills in {trainings} trainings: every checkpoint readable, all weights equal")


if __name__ == "__main__":
    main()
