"""How images of one's own are read: without any training, and after one without flags.

    python benchmarks/bench_own.py my_images more_images
    python benchmarks/bench_own.py my_images --train 50 100 200 500   # learning curves
    python benchmarks/bench_own.py my_images --zero-shot --peers      # no training

For each data set: what the general network reads of the test images as it is, then
`train.py --data FOLDER` from the general network and from nothing (--weights none), in turn.
Without training case and spaces are ignored, since labels differ in them; exact readings are
given too. --peers adds what other readers read without training, where they are installed:
ddddocr, rapidocr-onnxruntime, and the command tesseract.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import ROOT, print_machine
from tqdm import tqdm

import metric
from ctc_label_converter import Search
from dataset import check
from infer_tool import SHIPPED_WEIGHTS, RecInfer
from keys import command, load_alphabet
from model import load_checkpoint

RESULT = re.compile(
    r"word accuracy ([\d.]+) \(95 % interval ([\d.]+) to ([\d.]+)\), CER ([\d.]+), (\d+) images"
)
STARTS = {"the general network": [], "nothing": ["--weights", "none"]}


def folded(text):
    """A text without case and spaces."""
    return "".join(text.split()).lower()


def peers():
    """{name: function from an image's path to its text} of the readers that are installed."""
    found = {}
    try:
        import ddddocr

        reader = ddddocr.DdddOcr(show_ad=False)
        found["ddddocr"] = lambda path: reader.classification(path.read_bytes())
    except ImportError:
        pass
    try:
        from rapidocr_onnxruntime import RapidOCR

        rapid = RapidOCR()

        def read(path):
            result, _ = rapid(str(path), use_det=False, use_cls=False)
            return result[0][0] if result else ""

        found["rapidocr-onnxruntime"] = read
    except ImportError:
        pass
    if shutil.which("tesseract"):

        def tesseract(path):
            line = ["tesseract", str(path), "-", "--psm", "7"]
            output = subprocess.run(line, check=False, capture_output=True)
            return output.stdout.decode("utf-8", "replace").strip()

        found["tesseract"] = tesseract
    return found


def say(name, texts, labels, seconds):
    """Print what a reader made of images without training."""
    accuracy = metric.word_accuracy(list(map(folded, texts)), list(map(folded, labels)))
    low, high = metric.wilson_interval(accuracy, len(labels))
    print(
        f"  {name}: {accuracy:.3f} ({low:.3f} to {high:.3f}) without case and spaces, exactly "
        f"{metric.word_accuracy(texts, labels):.3f}, {1e3 * seconds / len(labels):.1f} ms an image",
        flush=True,
    )


def zero_shot(samples, args):
    """Print what the general network, and the peers, read of some samples."""
    labels, paths = [s.label for s in samples], [s.path for s in samples]
    reader = RecInfer(args.weights, threads=1)
    searches = {"the general network": None}
    if args.alphabet_subset:
        subset = load_alphabet(args.alphabet_subset)
        searches[f"--alphabet-subset {args.alphabet_subset}"] = Search(subset=subset)
    for name, search in searches.items():
        began = time.perf_counter()
        results = [result for _, result in reader.stream(paths, search)]
        texts = ["" if isinstance(result, ValueError) else result.text for result in results]
        say(name, texts, labels, time.perf_counter() - began)
    for name, read in peers().items() if args.peers else ():
        began = time.perf_counter()
        texts = [read(path) for path in tqdm(paths, name, leave=False, unit="img")]
        say(name, texts, labels, time.perf_counter() - began)


def train(folder, start, count, keep, flags):
    """Print what a training comes to, and copy its checkpoint to a folder."""
    size = ["--train", str(count)] if count else []
    with tempfile.TemporaryDirectory() as out:
        line = [sys.executable, ROOT / "train.py", "--data", folder, "--out", out, "--skip-bad"]
        line = [*map(str, line), *STARTS[start], *size, *flags]
        began = time.perf_counter()
        done = subprocess.run(line, check=False, capture_output=True, text=True, encoding="utf-8")
        seconds = time.perf_counter() - began
        found = RESULT.search(done.stdout)
        if not found:
            sys.exit(f"{' '.join(line)} failed:\n{done.stderr[-2000:]}")
        path = next(path for path in Path(out).glob("*.pth"))
        recogniser, rows = load_checkpoint(path), path.with_suffix(".csv").read_text("utf-8")
        if keep:
            keep.mkdir(parents=True, exist_ok=True)
            name = f"{folder.name}_{count or 'all'}_from_{start.split()[-1]}.pth"
            shutil.copy(path, keep / name)
    parameters = sum(p.numel() for p in recogniser.model.parameters())
    print(
        f"  from {start}{f', {count} images' if count else ''}: {found[1]} ({found[2]} to "
        f"{found[3]}), CER {found[4]}, {seconds:.0f} s, {rows.count(chr(10)) - 1} epochs, "
        f"{parameters:,} parameters",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="data sets")
    parser.add_argument(
        "--train", nargs="+", type=int, default=[None], metavar="N", help="training images"
    )
    parser.add_argument("--zero-shot", action="store_true", help="do not train")
    parser.add_argument("--peers", action="store_true", help="read with other readers too")
    parser.add_argument("--alphabet-subset", metavar="NAME", help="read with these only, too")
    parser.add_argument("--start", choices=STARTS, help="train only from this (default: both)")
    parser.add_argument("--keep", type=Path, metavar="OUT", help="copy the checkpoints there")
    parser.add_argument(
        "--weights", type=Path, default=SHIPPED_WEIGHTS["general"].with_suffix(".onnx"),
        help="of the general network, to read with (default: %(default)s)",
    )  # fmt: skip
    parser.epilog = "other flags are passed to train.py"
    args, flags = parser.parse_known_args()
    print_machine(torch)
    for folder in args.folders:
        checked = check(folder)
        print(
            f"{folder.name}: {len(checked.train)} training and {len(checked.test)} test images, "
            f"{len(checked.alphabet)} characters",
            flush=True,
        )
        zero_shot(checked.test, args)
        for count in [] if args.zero_shot else args.train:
            for start in [args.start] if args.start else STARTS:
                train(folder, start, count, args.keep, flags)


if __name__ == "__main__":
    command(main)
