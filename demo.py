"""Read the text in images.

    python demo.py                                  # the sample images in assets/
    python demo.py photo.png scans/                 # files, and all images below a folder
    find . -name "*.png" | python demo.py - --json  # one path per line
    python demo.py --task chinese                   # or complex: its weights and samples
    python demo.py --weights mine.onnx photo.png    # without PyTorch
    python demo.py --save readings.png              # a picture of what was read
    python demo.py --beam 10 --top 3 --length 4-6 --alphabet-subset digits photo.png

Without --weights it takes what train.py last wrote to save_model/, with --task only
that task's, else the shipped weights.
"""

import gc
import signal

if __name__ == "__main__":  # Ctrl-C during the imports: an end without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    gc.disable()  # imports leave nothing to collect; `command` enables it

import argparse
import json
import math
import os
import sys
from pathlib import Path

from ctc_label_converter import Search
from image import SUFFIXES, ImageFinder, find_images, read_image
from infer_tool import ROOT, SHIPPED_WEIGHTS, RecInfer, latest_weights
from keys import command, length_range, load_alphabet

SAMPLES = ROOT / "assets" / "samples"
SHEET = 400  # images on the contact sheet, at most
MANY, SHARE = 1000, 250  # images, from which on processes share them, and of one share
READERS = {}  # of a process that reads shares


def list_images(arguments):
    """Files as they are, the images below folders, and for - the paths on standard input.

    Raises ValueError for a folder without images.
    """
    for argument in arguments:
        if argument == Path("-"):
            yield from (Path(line.rstrip("\r\n")) for line in sys.stdin if line.strip())
        elif os.path.isdir(argument):  # which takes any name
            found = find_images(argument)
            if not found:
                raise ValueError(f"{argument}: holds no images ({' '.join(SUFFIXES)})")
            yield from found
        else:
            yield argument


def read_share(paths, search):
    """[(path, `Reading` or ValueError)] of some paths, in a process of `read_all`."""
    return list(READERS["reader"].stream(paths, search))


def read_all(reader, paths, search):
    """`RecInfer.stream` of paths; many small images are read by a process for each core.

    Forked processes have all that was imported. Other systems than Linux do not fork safely,
    and PyTorch does not like to.
    """
    one = sys.platform != "linux" or reader.weights.suffix != ".onnx" or os.cpu_count() == 1
    if one or not isinstance(paths, list) or len(paths) < MANY:
        yield from reader.stream(paths, search)
        return
    from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
    from multiprocessing import get_context

    READERS["reader"], reader.threads = reader, 1
    shares = [paths[i : i + SHARE] for i in range(0, len(paths), SHARE)]
    alone = signal.SIGINT, signal.SIG_IGN  # Ctrl-C is for the first process, which ends them
    pool = ProcessPoolExecutor(os.cpu_count(), get_context("fork"), signal.signal, alone)
    try:
        for share in pool.map(read_share, shares, [search] * len(shares)):
            yield from share
    except BrokenProcessPool:
        raise ValueError("a process that read images was ended, maybe for want of memory") from None
    finally:
        pool.shutdown(cancel_futures=True)


def read_labels(path):
    """{absolute path of an image: its label} of a label file."""
    from label_file import read_label_file  # a thirtieth of a start, and seldom needed

    images = ImageFinder(path.parent)
    return {
        (images.find(name) or path.parent / name).resolve(): label
        for _, name, label in read_label_file(path)
    }


def parse_args():
    """Parse the command line. Raises ValueError for settings that cannot be used."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "images",
        nargs="*",
        type=Path,
        metavar="IMAGE",
        help="image files, folders, or - for one path per line on standard input (default: the "
        "images of --labels, else the task's samples in assets/samples)",
    )
    parser.add_argument(
        "--task",
        choices=SHIPPED_WEIGHTS,
        help="read with this task's weights (default: those of the last training, else general, "
        "for the samples simple)",
    )
    parser.add_argument(
        "--weights",
        type=Path,
        help="checkpoint, or network in ONNX (default: the last one in save_model/, else the "
        "shipped one)",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object per line: image, text, confidence, characters, or error",
    )
    parser.add_argument(
        "--save",
        type=Path,
        metavar="OUT.png",
        help=f"save a contact sheet of the first {SHEET} images with text and confidence",
    )
    parser.add_argument(
        "--labels",
        type=Path,
        metavar="FILE",
        help="label file to compare with: prints the accuracy, marks mistakes in the sheet",
    )
    parser.add_argument(
        "--ignore-case", action="store_true", help="compare with --labels without case"
    )
    parser.add_argument(
        "--min-confidence",
        type=float,
        metavar="P",
        help="mark readings with a lower confidence, 0 to 1, as rejected",
    )
    parser.add_argument(
        "--beam", type=int, metavar="N", help="search with a beam of N prefixes (default: greedy)"
    )
    parser.add_argument(
        "--top", type=int, default=1, metavar="K", help="the K best texts (default: %(default)s)"
    )
    parser.add_argument(
        "--length",
        type=length_range,
        metavar="N or N-M",
        help="characters that a text may have (default: what the weights were trained for)",
    )
    parser.add_argument(
        "--alphabet-subset", metavar="NAME", help="alphabet's name or file, or the characters"
    )
    parser.add_argument(
        "--lexicon", type=Path, metavar="FILE", help="UTF-8, one text per line: read one of these"
    )
    args = parser.parse_args()
    if args.min_confidence is not None and not 0 <= args.min_confidence <= 1:
        raise ValueError(f"--min-confidence {args.min_confidence}: is from 0 to 1")
    args.search = make_search(args)
    return args


def make_search(args):
    """The `Search` that the flags ask for, None for greedy decoding."""
    settings = {}
    for flag in ("beam", "top"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise ValueError(f"--{flag} {value}: must be at least 1")
    if args.beam:
        settings["beam"] = args.beam
    if args.top > 1:
        settings |= {"top": args.top, "beam": max(args.top, args.beam or 10)}
    if args.length:
        settings["shortest"], settings["longest"] = args.length
    if args.alphabet_subset:
        try:
            settings["subset"] = load_alphabet(args.alphabet_subset)
        except ValueError:
            settings["subset"] = args.alphabet_subset
    if args.lexicon:
        try:
            text = args.lexicon.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--lexicon {args.lexicon}: cannot be read ({error})") from None
        settings["lexicon"] = tuple(dict.fromkeys(filter(None, text.splitlines())))
    return Search(**settings) if settings else None


def finite(number):
    """A number as JSON has it: None for what weights with broken numbers lead to."""
    return number if math.isfinite(number) else None


def as_json(path, result, args):
    """The line that --json prints."""
    if isinstance(result, ValueError):
        return json.dumps({"image": str(path), "error": str(result)}, ensure_ascii=False)
    entry = {
        "image": str(path),
        "text": result.text,
        "confidence": finite(result.confidence),
        "characters": [
            {"char": char, "confidence": finite(confidence)}
            for char, confidence in zip(result.text, result.char_confidences, strict=True)
        ],
    }
    if args.top > 1:
        entry["alternatives"] = [
            {"text": text, "confidence": finite(confidence)}
            for text, confidence in result.alternatives
        ]
    if args.min_confidence is not None:
        entry["rejected"] = result.confidence < args.min_confidence
    return json.dumps(entry, ensure_ascii=False)


def as_row(path, result, args):
    """The line that is printed by default: path, text, confidence, alternatives, rejected."""
    fields = [str(path), result.text, f"{result.confidence:.4f}"]
    fields += [f"{text} {confidence:.4f}" for text, confidence in result.alternatives]
    if args.min_confidence is not None and result.confidence < args.min_confidence:
        fields.append("rejected")
    return "\t".join(fields)


def same(label, text, ignore_case):
    """Whether a text is what the label says."""
    return label == text or (ignore_case and label is not None and label.lower() == text.lower())


def save_sheet(path, shown, ignore_case):
    """Save a contact sheet of [(image's path, `Reading`, its label or None)]."""
    from metric import contact_sheet, save_picture  # which is seldom needed

    captions = [f"{reading.text}  {reading.confidence:.2f}" for _, reading, _ in shown]
    colours = [
        "black" if label is None else "green" if same(label, reading.text, ignore_case) else "red"
        for _, reading, label in shown
    ]
    images = [read_image(image) for image, _, _ in shown]
    try:
        save_picture(path, contact_sheet(images, captions, colours=colours))
    except OSError as error:
        raise ValueError(f"--save {error}") from None


def main():
    args = parse_args()
    wanted = args.images or args.labels
    weights = args.weights or latest_weights(args.task, "general" if wanted else "simple")
    reader = RecInfer(weights)
    print(f"weights: {weights}", file=sys.stderr)
    labels = read_labels(args.labels) if args.labels else {}
    samples = SAMPLES / (reader.task or "simple")
    if not samples.is_dir():  # general has none of its own
        samples = SAMPLES / "simple"
    paths = list_images(args.images or list(labels) or [samples])
    waited_for = Path("-") in args.images  # by a program that asks again when it has an answer
    paths = paths if waited_for else list(paths)
    failed, right, compared, shown = 0, 0, 0, []
    results = read_all(reader, paths, args.search)
    if sys.stderr.isatty():  # no bar where nobody watches
        from tqdm import tqdm  # which takes a third of the time of a start

        results = tqdm(results, total=None if waited_for else len(paths), unit="img")
    for path, result in results:
        if isinstance(result, ValueError):
            failed += 1
            print(f"demo.py: error: {result}", file=sys.stderr)
            if args.json:
                print(as_json(path, result, args), flush=waited_for)
            continue
        line = as_json(path, result, args) if args.json else as_row(path, result, args)
        print(line, flush=waited_for)
        label = labels.get(path.resolve()) if labels else None
        compared += label is not None
        right += same(label, result.text, args.ignore_case)
        if args.save and len(shown) < SHEET:
            shown.append((path, result, label))
    if shown:
        save_sheet(args.save, shown, args.ignore_case)
    if args.labels:
        print(f"word accuracy: {right} of {compared} right", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    command(main)
