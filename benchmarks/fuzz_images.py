"""Read broken image files, and count what becomes of them.

    python benchmarks/fuzz_images.py                  # 20,000 files
    python benchmarks/fuzz_images.py --files 500 --seed 1

Sample images in six formats and several modes are mutated: bytes changed, lost or added,
numbers in the headers made huge, files cut off, two files spliced. Each must give a
reading or one ValueError, in under a second and 300 MB, without a warning, and the
process must live. Exits with 1 otherwise. The same seed makes the same files.
"""

import argparse
import collections
import io
import multiprocessing
import random
import struct
import sys
import time
import warnings
import zlib
from pathlib import Path

import PIL
from common import ROOT, print_machine
from PIL import Image
from tqdm import tqdm

from infer_tool import SHIPPED_WEIGHTS, RecInfer

CHUNK = 100  # files a process reads before it reports
MODES = {
    "PNG": ["RGB", "RGBA", "L", "P", "1", "I;16", "LA"],
    "JPEG": ["RGB", "L", "CMYK"],
    "GIF": ["P", "L"],
    "BMP": ["RGB", "L", "P", "1"],
    "WEBP": ["RGB", "RGBA"],
    "TIFF": ["RGB", "RGBA", "L", "I;16", "F", "1", "CMYK"],
}
SECONDS, MEGABYTES = 1.0, 300  # what a file may cost
READ, REFUSED = "read", "refused with a ValueError"


def originals():
    """Whole files: [(name, bytes)]."""
    files = []
    paths = sorted((ROOT / "assets" / "samples" / "simple").glob("*.png"))[:4]
    for path in paths:
        with Image.open(path) as image:
            image.load()
        for kind, modes in MODES.items():
            for mode in modes:
                grey = mode in ("I;16", "F")
                file = io.BytesIO()
                (image.convert("L") if grey else image).convert(mode).save(file, kind)
                files.append((f"{kind} {mode}", file.getvalue()))
    return files


def mutate(rng, files):
    """A broken file: (name of what it was, bytes)."""
    name, content = rng.choice(files)
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        if not data:
            break
        # Headers are short and decide the most.
        end = len(data) if rng.random() < 0.5 else min(len(data), 64)
        at = rng.randrange(end)
        kind = rng.randrange(7)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.choice([0, 1, 127, 128, 255])
        elif kind == 2:
            del data[at : at + rng.randint(1, 40)]
        elif kind == 3:
            data[at:at] = rng.randbytes(rng.randint(1, 40))
        elif kind == 4:
            number = rng.choice([0, 1, 4096, 4097, 65535, 2**24, 2**31 - 1, 2**32 - 1])
            data[at : at + 4] = struct.pack(rng.choice("<>") + "I", number)
        elif kind == 5:
            del data[rng.randrange(len(data)) :]
        else:
            other = rng.choice(files)[1]
            data[at:] = other[rng.randrange(len(other)) :]
    if name.startswith("PNG") and rng.random() < 0.5:
        repair_checksums(data)
    return name, bytes(data)


def repair_checksums(data):
    """Set the checksums of a PNG's chunks to fit, so that what is in them is looked at."""
    at = 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if end + 4 > len(data):
            break
        data[end : end + 4] = struct.pack(">I", zlib.crc32(data[at + 4 : end]))
        at = end + 4


def memory():
    """Peak memory of this process in MB, 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def read_files(connection, seed, weights):
    """Read the files whose numbers arrive on ``connection``, and send back what happened."""
    reader, files = RecInfer(weights, threads=1), originals()
    for _, content in files:
        reader.predict(content)
    baseline = memory()
    while (numbers := connection.recv()) is not None:
        for number in numbers:
            _, content = mutate(random.Random(f"{seed}/{number}"), files)
            began = time.perf_counter()
            with warnings.catch_warnings(record=True) as caught:
                try:
                    reader.predict(content)
                    outcome = READ
                except ValueError as error:
                    outcome = REFUSED if str(error).startswith("image 0: ") else f"odd: {error}"
                except BaseException as error:
                    outcome = f"{type(error).__name__}: {error}"
            seconds = time.perf_counter() - began
            warned = str(caught[0].message) if caught else None
            connection.send((number, outcome, seconds, warned, memory() - baseline))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=20000, help="to read (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="same files (default: %(default)s)")
    parser.add_argument(
        "--weights",
        type=Path,
        default=SHIPPED_WEIGHTS["simple"].with_suffix(".onnx"),
        help="network to read with (default: the shipped one of the simple task)",
    )
    args = parser.parse_args()
    print_machine(PIL)
    outcomes, problems, slowest, most = collections.Counter(), [], 0.0, 0.0
    context, process, number = multiprocessing.get_context("spawn"), None, 0
    bar = tqdm(total=args.files, unit="file", disable=None)
    while number < args.files:
        if process is None:
            connection, theirs = context.Pipe()
            process = context.Process(target=read_files, args=(theirs, args.seed, args.weights))
            process.start()
            theirs.close()
        numbers = range(number, min(number + CHUNK, args.files))
        connection.send(numbers)
        for number in numbers:
            try:
                if not connection.poll(60):
                    raise EOFError
                _, outcome, seconds, warned, megabytes = connection.recv()
            except EOFError:  # it died or hangs: count it, and go on with another process
                process.kill()
                process = None
                outcomes["died or hung"] += 1
                problems.append(f"file {number}: the process died or hung")
                break
            bar.update()
            outcomes[outcome if outcome in (READ, REFUSED) else "another exception"] += 1
            slowest, most = max(slowest, seconds), max(most, megabytes)
            if outcome not in (READ, REFUSED):
                problems.append(f"file {number}: {outcome}")
            if warned:
                problems.append(f"file {number}: warning: {warned}")
            if seconds > SECONDS:
                problems.append(f"file {number}: {seconds:.2f} s")
        number += 1
    if process:
        connection.send(None)
        process.join()
    bar.close()
    for outcome, times in outcomes.most_common():
        print(f"{outcome}: {times}")
    print(f"slowest file {slowest:.3f} s, peak memory {most:.0f} MB over the baseline")
    if most > MEGABYTES:
        problems.append(f"peak memory {most:.0f} MB over the baseline")
    for problem in problems[:20]:
        print(problem)
    print(f"problems: {len(problems)}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
