"""Compare two commits: whether they train the same weights, and how long `train.py` takes.

    python benchmarks/compare_commits.py HEAD~1                 # with the working copy
    python benchmarks/compare_commits.py v1 v2 --rounds 3

Both train one epoch of seed 0 on the CPU with two threads: the simple task; the complex and
the Chinese one with 2,000 images; a folder of images whose training imitates looks. Their
weights have to be equal, bit for bit. With --rounds `python train.py` is then timed in turn,
before and after, so many times each.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import ROOT, draw, measured, print_machine, spread

THREADS = "2"
SETS = {  # name: what is drawn, and how it is trained
    "simple": (["--task", "simple"], ["--task", "simple"]),
    "complex": (
        ["--task", "complex", "--train", 2000, "--test", 500],
        ["--task", "complex", "--train", 2000],
    ),
    "chinese": (
        ["--task", "chinese", "--train", 2000, "--test", 500],
        ["--task", "chinese", "--train", 2000],
    ),
    "looks": (["--task", "complex", "--train", 600, "--test", 100, "--seed", 5], []),
}


def check_out(commit, folder):
    """A folder with the files of ``commit``, the working copy for None."""
    if commit is None:
        return ROOT
    for command in (["clone", "-q", ROOT, folder], ["-C", folder, "checkout", "-q", commit]):
        subprocess.run(["git", *map(str, command)], check=True)
    return folder


def train(project, out, *flags):
    """Run a project's train.py, which writes to ``out``. Returns the seconds it took."""
    command = [sys.executable, project / "train.py", *flags, "--device", "cpu", "--out", out]
    return measured(*command, OMP_NUM_THREADS=THREADS)[1]


def differences(one, other):
    """Names of the tensors that differ between two folders' checkpoints and last states."""
    found = []
    for pattern, part in (("*.pth", "state_dict"), ("*.resume", "model"), ("*.resume", "average")):
        states = []
        for folder in (one, other):
            [path] = folder.glob(pattern)
            state = torch.load(path, weights_only=True)[part]
            states.append(state["module"] if part == "average" else state)
        if states[0].keys() != states[1].keys():
            found.append(f"{pattern}: other tensors")
            continue
        found += [
            f"{pattern}: {name}"
            for name in states[0]
            if not torch.equal(states[0][name], states[1][name])
        ]
    temperatures = [
        torch.load(path, weights_only=True)["temperature"]
        for folder in (one, other)
        for path in folder.glob("*.pth")
    ]
    return found + (["temperature"] if len(set(temperatures)) > 1 else [])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", metavar="BEFORE", help="a commit")
    parser.add_argument("after", metavar="AFTER", nargs="?", help="(default: the working copy)")
    parser.add_argument(
        "--rounds", type=int, default=0, help="of the timing (default: %(default)s)"
    )
    args = parser.parse_args()
    print_machine(torch, threads=THREADS)
    different = 0
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        projects = {
            "before": check_out(args.before, scratch / "project_before"),
            "after": check_out(args.after, scratch / "project_after"),
        }
        for name, (drawn, flags) in SETS.items():
            draw(scratch / name, *drawn)
            for side, project in projects.items():
                data = ["--data", scratch / name, "--epochs", 1, "--seed", 0]
                train(project, scratch / side / name, *flags, *data)
            found = differences(scratch / "before" / name, scratch / "after" / name)
            different += bool(found)
            print(f"{name}: {', '.join(found) if found else 'all weights equal'}", flush=True)
        seconds = {side: [] for side in projects}
        for turn in range(args.rounds):
            for side, project in projects.items():
                data = ["--task", "simple", "--data", scratch / "simple"]
                seconds[side].append(train(project, scratch / f"{side}{turn}", *data))
        for side, taken in seconds.items():
            if taken:
                print(f"python train.py, {side}: {spread(taken, 1)} s, {len(taken)} runs")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
