"""The two pages in a real browser: is reader.html the same reader, how fast is label.py's page.

    python benchmarks/bench_pages.py reader my_images         # pages against their checkpoints
    python benchmarks/bench_pages.py label                    # a folder of 10,000 images
    python benchmarks/bench_pages.py person my_images         # somebody who types the truth
    python benchmarks/bench_pages.py kill                     # 50 kills at random moments
    python benchmarks/bench_pages.py pictures                 # of both pages, into assets/

`reader` draws 500 images for each shipped network, and takes 100 test images of each folder with
the general network; with --weights only the folders, with these. `person` labels 500 training
images with and without the reader's help; then the network that came out reads the test images.
"""

import argparse
import base64
import itertools
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import PIL
import torch
from common import FRESH_SEED, ROOT, draw, print_machine, spread
from PIL import Image
from playwright.sync_api import sync_playwright

from dataset import check
from infer_tool import SHIPPED_WEIGHTS, RecInfer, export_page
from keys import command

READ = """async (bytes) => {
  const image = await pixelsOf(new Blob([Uint8Array.from(atob(bytes), (c) => c.charCodeAt(0))]));
  const began = performance.now(), reading = read(image);
  return [reading.text, reading.confidence, performance.now() - began];
}"""
PRESS = """key => new Promise(done => {
  const before = current.id, began = performance.now();
  document.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  const look = async () => {
    if (busy || (current && current.id === before)) return setTimeout(look);
    if (current) { await image.decode(); await network.decode(); }
    requestAnimationFrame(() => done(performance.now() - began));
  };
  look();
})"""


@contextmanager
def browser():
    """A window of Chromium."""
    with sync_playwright() as playwright:
        found = shutil.which("chromium")
        started = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield started.new_context(bypass_csp=True, viewport={"width": 1000, "height": 640})
        started.close()


@contextmanager
def labelling(folder, *flags):
    """label.py on a folder: (address of its page, process)."""
    line = [sys.executable, str(ROOT / "label.py"), str(folder), "--no-browser", *map(str, flags)]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, encoding="utf-8", cwd=folder.parent)
    for said in process.stdout:
        if said.startswith("http://"):
            break
    yield said.strip(), process
    process.send_signal(signal.SIGINT)
    process.wait()


def compare(window, name, weights, paths, scratch):
    """Read images with a page and with its checkpoint, and print how they differ."""
    page, tab = scratch / "page.html", window.new_page()
    export_page(weights, page)
    tab.goto(page.as_uri())
    reader, same, differences, times = RecInfer(weights), 0, [], []
    for path, reading in reader.stream(paths):
        content = base64.b64encode(path.read_bytes()).decode()
        text, confidence, milliseconds = tab.evaluate(READ, content)
        times.append(milliseconds)
        same += text == reading.text
        differences += [abs(confidence - reading.confidence)] * (text == reading.text)
    tab.close()
    print(
        f"{name}: page of {page.stat().st_size / 1000:.0f} kB, {len(paths)} images, same text "
        f"{same / len(paths):.4f}, confidence within {max(differences):.1e}, ms an image "
        f"{spread(times[1:], 1)}",
        flush=True,
    )


def bench_reader(args, scratch):
    """Pages against checkpoints: the shipped networks on drawn images, --weights on folders."""
    with browser() as window:
        for task, weights in () if args.weights else SHIPPED_WEIGHTS.items():
            folder = scratch / task
            draw(folder, "--task", task, "--train", 1, "--test", 500, "--seed", FRESH_SEED)
            paths = [sample.path for sample in check(folder).test]
            compare(window, f"{task}, drawn", weights, paths, scratch)
        for folder in args.folders:
            weights = args.weights or SHIPPED_WEIGHTS["general"]
            paths = [sample.path for sample in check(folder).test][:100]
            compare(window, f"{folder.name}, {weights.name}", weights, paths, scratch)


def many(folder, count=10000):
    """A folder of drawn images without labels."""
    draw(folder, "--train", count, "--test", 1)
    shutil.rmtree(folder / "test")
    for name in ("train.txt", "test.txt", "preview.png"):
        (folder / name).unlink()


def bench_label(args, scratch):
    """From a key to the next image, and from the start to the first, in a folder of 10,000."""
    many(scratch / "images")
    with browser() as window:
        starts, keys = [], []
        for _ in range(3):
            began = time.perf_counter()
            with labelling(scratch / "images", "--train-every", 0) as (address, _):
                tab = window.new_page()
                tab.goto(address)
                tab.wait_for_function("current && image.complete && image.naturalWidth")
                starts.append(time.perf_counter() - began)
                for _ in range(100):
                    tab.fill("#text", "x")
                    keys.append(tab.evaluate(PRESS, "Enter"))
                tab.close()
    print(f"start to the first image: {spread(starts, 2)} s")
    high = statistics.quantiles(keys, n=20)[-1]
    print(f"key to the next image: {spread(keys, 1)} ms, 95 % within {high:.1f} ms")


def person(window, folder, truth, pause):
    """Label all images of a folder. Returns (keys that it takes, readings that were right)."""
    keys = right = 0
    with labelling(folder) as (address, _):
        tab = window.new_page()
        tab.goto(address)
        tab.wait_for_function("current !== null")
        while tab.evaluate("current !== null"):
            text = truth[tab.evaluate("current.name")]
            read = tab.input_value("#text")
            right += read == text
            pairs = zip(read, text, strict=False)
            common = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
            # Delete from the end up to the mistake and type the rest, or type all anew: a
            # doubtful reading is selected, so the one takes a key more, else the other.
            selected = tab.evaluate("text.selectionStart < text.selectionEnd")
            mend = len(read) + len(text) - 2 * common + selected
            anew = len(text) + (not selected)
            keys += 1 + (0 if read == text else min(mend, anew))
            tab.fill("#text", text)
            tab.evaluate(PRESS, "Enter")
            time.sleep(pause)
        while "training in the background" in tab.text_content("#progress"):
            time.sleep(1)
        tab.close()
    return keys, right


def bench_person(args, scratch):
    """Somebody labels 500 images, typing the truth, with and without the loop."""
    with browser() as window:
        for folder in args.folders:
            checked = check(folder)
            samples = random.Random(0).sample(checked.train, min(500, len(checked.train)))
            own = scratch / folder.name
            own.mkdir()
            truth = {}
            for i, sample in enumerate(samples):
                name = f"{i:04d}{sample.path.suffix}"
                shutil.copy(sample.path, own / name)
                truth[name] = sample.label
            without = sum(len(text) + 1 for text in truth.values())
            began = time.perf_counter()
            keys, right = person(window, own, truth, args.pause)
            print(
                f"{folder.name}: {len(truth)} images, {keys} keys with the loop, {without} without "
                f"any help; {right} readings were right as they stood; "
                f"{time.perf_counter() - began:.0f} s at {args.pause} s of thought each",
                flush=True,
            )
            written = sorted((scratch / "save_model").glob(f"{folder.name}_*.pth"))
            if written:
                results = RecInfer(written[-1]).stream([s.path for s in checked.test])
                count = sum(
                    getattr(reading, "text", None) == sample.label
                    for sample, (_, reading) in zip(checked.test, results, strict=True)
                )
                print(f"  then {count} of {len(checked.test)} test images", flush=True)


def bench_kill(args, scratch):
    """Kill label.py at random moments: every label that was accepted is there, once."""
    many(scratch / "images", 2000)
    rng, accepted = random.Random(0), {}
    with browser() as window:
        for _ in range(50):
            with labelling(scratch / "images", "--train-every", 0) as (address, process):
                tab = window.new_page()
                tab.goto(address)
                tab.wait_for_function("current !== null")
                end = time.perf_counter() + rng.uniform(0.05, 1)
                while time.perf_counter() < end:
                    name = tab.evaluate("current.name")
                    tab.fill("#text", "x")
                    tab.evaluate(PRESS, "Enter")
                    accepted[name] = "x"
                tab.keyboard.press("Enter")  # and one whose end it does not see
                time.sleep(rng.uniform(0, 0.02))
                process.kill()
                tab.close()
    lines = (scratch / "images" / "labels.txt").read_text(encoding="utf-8").splitlines()
    names = [line.partition("\t")[0] for line in lines]
    print(
        f"50 kills: {len(accepted)} labels were shown as accepted, {len(set(names))} are there, "
        f"{len(accepted.keys() - set(names))} lost, {len(names) - len(set(names))} twice"
    )


def pictures(args, scratch):
    """Pictures of both pages for the README."""
    samples = [*sorted((ROOT / "assets" / "samples").glob("*/*.png"))[16:48:8]]
    with browser() as window:
        tab = window.new_page()
        tab.goto((ROOT / "assets" / "reader.html").as_uri())
        tab.set_input_files("#choose", [str(path) for path in samples])
        tab.wait_for_function(f"results.length === {len(samples)} && !said.textContent")
        tab.screenshot(path=ROOT / "assets" / "reader.png", full_page=True)
        folder = scratch / "images"
        folder.mkdir()
        for path in sorted((ROOT / "assets" / "samples" / "simple").glob("*.png")):
            shutil.copy(path, folder)
        with labelling(folder, "--train-every", 0, "--order", "sure") as (address, _):
            tab = window.new_page()
            tab.goto(address)
            tab.wait_for_function("current !== null")
            for _ in range(5):
                tab.evaluate(PRESS, "Enter")
            tab.screenshot(path=ROOT / "assets" / "label.png", full_page=True)
    for name in ("reader.png", "label.png"):
        path = ROOT / "assets" / name
        Image.open(path).convert("P", palette=Image.Palette.ADAPTIVE, colors=64).save(path)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = {
        "reader": bench_reader, "label": bench_label, "person": bench_person, "kill": bench_kill,
        "pictures": pictures,
    }  # fmt: skip
    parser.add_argument("part", choices=parts, help="what to do")
    parser.add_argument("folders", nargs="*", type=Path, help="data sets, for reader and person")
    parser.add_argument("--weights", type=Path, help="of the folders' pages (default: general)")
    parser.add_argument(
        "--pause", type=float, default=1.0, help="seconds that the person takes for an image"
    )
    args = parser.parse_args()
    print_machine(torch, PIL)
    with tempfile.TemporaryDirectory() as scratch:
        parts[args.part](args, Path(scratch))


if __name__ == "__main__":
    command(main)
