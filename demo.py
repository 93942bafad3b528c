"""Read the text in images.

    python demo.py                                  # the sample images in assets/
    python demo.py photo.png captcha.jpg
    python demo.py photo.png --weights save_model/simple_nh16_depth2.pth --json
    python demo.py --save readings.png              # a picture of what was read

Without --weights it takes what train.py last wrote to save_model/, else the shipped
weights.
"""

import argparse
import json
import sys
from pathlib import Path

from dataset import contact_sheet, read_image
from infer_tool import ROOT, RecInfer

SAMPLES = ROOT / "assets" / "samples"


def main():
    parser = argparse.ArgumentParser(description="Read the text in images.")
    parser.add_argument(
        "images",
        nargs="*",
        type=Path,
        metavar="IMAGE",
        help="image files (default: the sample images in assets/samples)",
    )
    parser.add_argument(
        "--weights",
        type=Path,
        help="checkpoint (default: the last one in save_model/, else the shipped one)",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object a line: image, text, confidence, characters",
    )
    parser.add_argument(
        "--save",
        type=Path,
        metavar="OUT.png",
        help="save a contact sheet: each image, its text and its confidence",
    )
    args = parser.parse_args()
    reader = RecInfer(args.weights)
    print(f"weights: {reader.weights}", file=sys.stderr)
    failed, images, captions = 0, [], []
    for path in args.images or sorted(SAMPLES.glob("*.png")):
        try:
            reading = reader.predict(path)
        except ValueError as error:
            print(f"demo.py: error: {error}", file=sys.stderr)
            failed += 1
            continue
        if args.save:
            images.append(read_image(path))
            captions.append(f"{reading.text}  {reading.confidence:.2f}")
        if args.json:
            characters = [
                {"char": char, "confidence": confidence}
                for char, confidence in zip(reading.text, reading.char_confidences, strict=True)
            ]
            result = {
                "image": str(path),
                "text": reading.text,
                "confidence": reading.confidence,
                "characters": characters,
            }
            print(json.dumps(result, ensure_ascii=False))
        else:
            print(f"{path}\t{reading.text}\t{reading.confidence:.4f}")
    if images:
        contact_sheet(images, captions).save(args.save)
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(f"demo.py: error: {error}")
