"""Measure reading: each shipped network, PyTorch and ONNX Runtime, one thread and all.

    python benchmarks/bench_infer.py
    python benchmarks/bench_infer.py --tasks simple --peer ddddocr

The images are fresh ones of each task. Everything is taken in one run, one thing after
the other.
"""

import argparse
import importlib.util
import os
import statistics
import sys
import tempfile
import time
import venv
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from common import FRESH_SEED, ROOT, draw, measured, print_machine

from ctc_label_converter import Search
from image import read_image
from infer_tool import BATCH_SIZE, SHIPPED_WEIGHTS, RecInfer
from label_file import read_label_file
from metric import expected_calibration_error, word_accuracy

SIZE = 160, 40  # pixels, of the general task's images while its network alone is measured
SEARCHED, PEER = 2000, 200  # images that are searched in all ways, and read by the peer
TORCH_FREE = ("numpy", "pillow", "tqdm", "onnxruntime")


def milliseconds(function, runs):
    """(median, 95th percentile) in ms of ``runs`` calls with the arguments 0, 1, ..."""
    for i in range(20):
        function(i)
    times = []
    for i in range(runs):
        began = time.perf_counter()
        function(i)
        times.append((time.perf_counter() - began) * 1000)
    times.sort()
    return statistics.median(times), times[int(0.95 * len(times))]


def network_alone(reader, pixels):
    """A function without arguments that runs the network of ``reader`` on normalised images."""
    images = reader.preprocess.normalise(pixels)
    if reader.weights.suffix == ".onnx":
        return lambda: reader.session.run(None, {"images": images})
    images = torch.from_numpy(images)

    def run():
        with torch.inference_mode():
            reader.recogniser.model(images)

    return run


def images_a_second(network, count, seconds=2.0):
    """Images per second through a function that takes ``count`` of them through the network."""
    network()
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        network()
        done += count
    return done / (time.perf_counter() - began)


def measure_reader(reader, samples):
    """The network alone, bytes to text: (median, 95th percentile) in ms; images/s in batches."""
    batch = samples[:BATCH_SIZE]
    if reader.task == "general":  # whose images are of any size
        batch = [read_image(data).resize(SIZE) for data in batch]
    pixels = np.stack([reader.preprocess(read_image(image)) for image in batch])
    one = network_alone(reader, pixels[:1])
    network = milliseconds(lambda i: one(), 400)
    whole = milliseconds(lambda i: reader.predict(samples[i % len(samples)]), 400)
    return network, whole, images_a_second(network_alone(reader, pixels), BATCH_SIZE)


def measure_commands(folder, python, weights):
    """Cold start and a folder of images, through demo.py. Prints a line for each."""
    images = sorted(folder.glob("*.png"))
    for what, source, runs in (("one image", images[0], 7), (f"{len(images)} images", folder, 3)):
        command = python, ROOT / "demo.py", "--weights", weights, source
        taken = [measured(*command)[1:]]
        while len(taken) < runs and sum(t for t, _ in taken) < 30:
            taken.append(measured(*command)[1:])
        seconds = [t for t, _ in taken]
        print(
            f"  demo.py, {what}, {weights.suffix}: median {statistics.median(seconds):.2f} s "
            f"({min(seconds):.2f} to {max(seconds):.2f}), {len(taken)} runs, "
            f"peak {max(peak or 0 for _, peak in taken):.0f} MB",
            flush=True,
        )


def measure_calibration(kind, readings, labels):
    """Accuracy, and the expected calibration error of whole texts and of characters."""
    right = [r.text == label for r, label in zip(readings, labels, strict=True)]
    texts = expected_calibration_error([r.confidence for r in readings], right)
    characters = [  # where the lengths differ nobody can say which character is wrong
        (confidence, read == label)
        for r, text in zip(readings, labels, strict=True)
        if len(r.text) == len(text)
        for confidence, read, label in zip(r.char_confidences, r.text, text, strict=True)
    ]
    error = expected_calibration_error(*zip(*characters, strict=True))
    print(
        f"  {kind}: word accuracy {sum(right) / len(right):.4f}, expected calibration error "
        f"{texts:.4f} of texts, {error:.4f} of characters",
        flush=True,
    )


def measure_rejection(readings, labels):
    """Accuracy against the share of images accepted, for some --min-confidence."""
    for limit in (0.0, 0.5, 0.8, 0.9, 0.95, 0.99, 0.999):
        kept = [
            (r.text, label)
            for r, label in zip(readings, labels, strict=True)
            if r.confidence >= limit
        ]
        if kept:
            print(
                f"  confidence at least {limit}: {len(kept) / len(labels):.4f} accepted, "
                f"{word_accuracy(*zip(*kept, strict=True)):.4f} of them right"
            )


def measure_search(reader, samples, labels):
    """What beams and constraints gain, and what they cost."""
    lexicon = tuple(dict.fromkeys(labels))
    for what, search in (
        ("as demo.py reads", None),
        ("beam 10, any length", Search(shortest=1, longest=99)),
        ("beam 10, length 4", Search(shortest=4, longest=4)),
        (f"lexicon of {len(lexicon)} texts", Search(lexicon=lexicon)),
    ):
        began = time.perf_counter()
        texts = [reading.text for reading in reader.predict(samples, search)]
        cost = (time.perf_counter() - began) / len(samples) * 1000
        print(
            f"  {what}: {word_accuracy(texts, labels):.4f} right, {cost:.2f} ms per image",
            flush=True,
        )


def measure_peer(name, samples, labels):
    """The tool that people would pick instead, on the same images: accuracy, latency, size."""
    if importlib.util.find_spec(name) is None:
        sys.exit(f"bench_infer.py: error: --peer {name} is not installed: pip install {name}")
    import ddddocr

    peer = ddddocr.DdddOcr(show_ad=False)
    size = sum(path.stat().st_size for path in Path(ddddocr.__file__).parent.glob("*.onnx"))
    texts = [peer.classification(data) for data in samples]
    for what, fold in (("as it is", str), ("case ignored", str.lower)):
        accuracy = word_accuracy([fold(text) for text in texts], [fold(text) for text in labels])
        print(f"  {name}: word accuracy {accuracy:.4f}, {what}")
    median, p95 = milliseconds(lambda i: peer.classification(samples[i % len(samples)]), 100)
    print(f"  {name}: bytes to text {median:.2f} ms (p95 {p95:.2f}), networks {size / 1e6:.0f} MB")


def installed_megabytes(folder):
    """Size of a new virtual environment that holds only what reading .onnx needs, in MB."""
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    before = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    measured(python, "-m", "pip", "install", *TORCH_FREE)
    after = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return (after - before) / 1e6, python


def measure_threads(weights, samples):
    """One thread and all: a line for each. Returns the `Reading`s of all samples."""
    for threads in sorted({1, os.cpu_count()}):
        torch.set_num_threads(threads)
        reader = RecInfer(weights, threads=threads)
        network, whole, rate = measure_reader(reader, samples)
        print(
            f"  {weights.name:<26}{weights.stat().st_size:>8}{threads:>9}"
            f"{network[0]:>10.3f} ({network[1]:.3f}){whole[0]:>16.3f} ({whole[1]:.3f})"
            f"{rate:>10.0f}",
            flush=True,
        )
    return reader.predict(samples)


def measure_task(task, data, python, peer):
    """All that is measured of a task's shipped networks, on the fresh images in ``data``."""
    lines = read_label_file(data / "test.txt")
    samples = [(data / name).read_bytes() for _, name, _ in lines]
    labels = [label for _, _, label in lines]
    checkpoint, exported = SHIPPED_WEIGHTS[task], SHIPPED_WEIGHTS[task].with_suffix(".onnx")
    print(f"{task}, {len(samples)} fresh images")
    print(f"  {'file':<26}{'bytes':>8}{'threads':>9}", end="")
    print(f"{'network ms (p95)':>18}{'bytes to text ms (p95)':>24}{'images/s':>10}")
    ours = measure_threads(checkpoint, samples)
    theirs = measure_threads(exported, samples)
    same = sum(a.text == b.text for a, b in zip(ours, theirs, strict=True))
    print(f"  same text from .pth and .onnx: {same} of {len(samples)}")
    measure_calibration(checkpoint.suffix, ours, labels)
    measure_calibration(exported.suffix, theirs, labels)
    measure_rejection(theirs, labels)
    measure_search(RecInfer(exported), samples[:SEARCHED], labels[:SEARCHED])
    measure_commands(data / "test", sys.executable, checkpoint)
    measure_commands(data / "test", python, exported)
    if peer:
        measure_peer(peer, samples[:PEER], labels[:PEER])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tasks", nargs="+", choices=SHIPPED_WEIGHTS, default=list(SHIPPED_WEIGHTS),
        help="tasks to measure (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--images", type=int, default=5000, help="fresh images of each task (default: %(default)s)"
    )
    parser.add_argument(
        "--peer", choices=["ddddocr"], help="measure this tool too, on the same images"
    )
    args = parser.parse_args()
    print_machine(torch, onnxruntime, np)
    with tempfile.TemporaryDirectory() as scratch:
        megabytes, python = installed_megabytes(Path(scratch, "venv"))
        print(f"{' '.join(TORCH_FREE)}, installed: {megabytes:.0f} MB")
        for task in args.tasks:
            data = Path(scratch, task)
            size = ["--train", 1, "--test", args.images, "--seed", FRESH_SEED]
            draw(data, "--task", task, *size)
            measure_task(task, data, python, args.peer)


if __name__ == "__main__":
    main()
