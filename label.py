"""Label images in the browser, with the reader's help: Enter accepts what it reads.

    python label.py my_images                # the least sure readings first
    python label.py my_images --check        # labels that the network disagrees with first
    python label.py my_images --order files --train-every 0

Labels are in labels.txt beside the images, or where they already were (as image<TAB>text), for
`train.py --data my_images`; images that nobody can read are in unreadable.txt. What was there
before is kept as NAME.before. Each label is on the disk before the next image is shown.
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports: an end without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import heapq
import hmac
import io
import itertools
import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
import threading
import time
import webbrowser
from collections import defaultdict, deque
from dataclasses import dataclass
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout  # which PyTorch depends on
from PIL import Image

from ctc_label_converter import Reading, Search
from dataset import look_at
from image import ImageError, find_images, read_image, write_atomically
from infer_tool import ROOT, SAVE_FOLDER, SHIPPED_WEIGHTS, RecInfer, latest_weights
from keys import command, named, unusable
from label_file import UNREADABLE, LabelOptions, find_samples

EPOCHS = 10  # of a background training: the sooner it ends the better, the next goes on from it
FILES = {"all": "labels.txt", "train": "train.txt", "test": "test.txt"}
PAGE = ROOT / "assets" / "label.html"
AHEAD = 6  # images that the page is told of
CHUNK = 8  # images that are read at a time
QUIET = 0.1  # seconds after an answer, in which nothing is read
RECENT = 50  # accepted labels over which is counted how many were read right
SHOWN = (1600, 400)  # pixels of an image on the page, at most
MOST_BYTES = 2**16  # of a request
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src "
    "'unsafe-inline'; img-src 'self'; connect-src 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


@dataclass
class Item:
    """An image: its path, as in the label file too, the digest of its pixels, its reading and
    the version of the network that read it, or the problem why it cannot be read."""

    path: Path
    name: str
    digest: bytes | None = None
    reading: Reading | None = None
    version: int = 0
    problem: str | None = None


class LabelStore:
    """The labels of a folder's images, as they are on the disk.

    Args:
        folder: of the images.
        names: whether their names are labels, where nothing else is.

    Attributes:
        texts, unreadable: {name: text} and {name: None}, in the order of their labelling.
        notes: what was taken in.

    Raises ValueError where existing labels are not understood.
    """

    def __init__(self, folder, names=False):
        self.folder = folder
        found = find_samples(folder, LabelOptions(names=names))
        self.texts, self.unreadable, self.notes = {}, {}, found.notes
        self._split_of, self._sources = {}, set()
        self._split_for_new = "train" if found.samples["train"] else "all"
        for split, samples in found.samples.items():
            for sample in samples:
                name = self.name_of(sample.path)
                self.texts[name] = sample.label
                self._split_of[name] = split
                if sample.where != str(sample.path):
                    self._sources.add(Path(sample.where.rpartition(":")[0]))
        marked = folder / UNREADABLE
        if marked.is_file():
            self.unreadable = dict.fromkeys(marked.read_text(encoding="utf-8").splitlines())

    def name_of(self, path):
        """How an image is written in a label file."""
        return Path(os.path.relpath(path, self.folder)).as_posix()

    def _content(self, split):
        lines = (
            f"{name}\t{text}\n"
            for name, text in self.texts.items()
            if self._split_of.get(name, self._split_for_new) == split
        )
        return "".join(lines).encode("utf-8")

    def _keep_sources(self):
        """Set the label files that were taken in aside, unless they stay as they are."""
        ours = {self.folder / FILES[split]: self._content(split) for split in FILES}
        for path in self._sources:
            if (content := path.read_bytes()) == ours.get(path):
                continue
            names = (path.with_name(f"{path.name}.before{n or ''}") for n in itertools.count())
            kept = next(name for name in names if not name.exists())
            write_atomically(kept, content)
            for split in FILES:  # complete before the other goes
                self._write(split)
            if path not in ours:
                path.unlink()
        self._sources = set()

    def _write(self, split):
        if (content := self._content(split)) or (self.folder / FILES[split]).exists():
            write_atomically(self.folder / FILES[split], content)

    def accept(self, names, text):
        """Make ``text`` the label of some images, on the disk."""
        self._keep_sources()
        was_marked = [name for name in names if self.unreadable.pop(name, self) is None]
        self.texts.update(dict.fromkeys(names, text))
        for split in {self._split_of.get(name, self._split_for_new) for name in names}:
            self._write(split)
        if was_marked:
            self._write_unreadable()

    def mark(self, name):
        """Make an image one that nobody can read, on the disk."""
        self._keep_sources()
        self.unreadable[name] = None
        self._write_unreadable()
        if self.texts.pop(name, None) is not None:
            self._write(self._split_of.get(name, self._split_for_new))

    def _write_unreadable(self):
        content = "".join(f"{name}\n" for name in self.unreadable)
        write_atomically(self.folder / UNREADABLE, content.encode("utf-8"))


class Labelling:
    """What the page shows and asks for, from several threads. ``args``: the command line's."""

    def __init__(self, args):
        self.args, self.lock = args, threading.RLock()
        self.work = threading.Condition(self.lock)
        self.store = LabelStore(args.folder, args.check)
        inside = cache(lambda path: path.resolve().is_relative_to(args.folder.resolve()))
        paths = [p for p in find_images(args.folder) if inside(p if p.is_symlink() else p.parent)]
        names = [self.store.name_of(path) for path in paths]
        for name in filter(unusable, names):
            raise ValueError(f"{name!r}: no label file can hold this name, rename the image")
        self.items = [Item(*pair) for pair in zip(paths, names, strict=True)]
        self.alike = defaultdict(list)  # digest: names
        self.seen, self.right, self.history = set(), deque(maxlen=RECENT), deque(maxlen=1000)
        self.version, self.accepted, self.training, self.trained = 1, 0, None, ""
        self.checkpoint = args.weights or latest_weights()
        fast = self.checkpoint in SHIPPED_WEIGHTS.values() and find_spec("onnxruntime")
        self.reader = RecInfer(self.checkpoint.with_suffix(".onnx") if fast else self.checkpoint)
        self.asked, self.ended = 0.0, False
        self.readings = threading.Thread(target=self._read_on, daemon=True)
        self.readings.start()

    def _read_on(self):
        """Read what is not read yet by the newest network, while nobody waits for an answer."""
        while not self.ended:
            time.sleep(max(0.0, self.asked + QUIET - time.monotonic()))
            with self.lock:
                version, reader = self.version, self.reader
                old = (i for i in self.items if i.version < version and not i.problem)
                wanted = (i for i in old if self.args.check or not self._is_done(i))
                todo = list(itertools.islice(wanted, CHUNK))
                if not (todo or self.ended):  # which `end` may just have said
                    self.work.wait()
            self._read(todo, reader, version)

    def _read(self, items, reader, version):
        for item in items:
            try:
                item.digest = item.digest or look_at(item.path, find_text=False).digest
            except ImageError as error:
                item.problem = f"{item.name}: {error}"
        items = [item for item in items if not item.problem]
        results = [result for _, result in reader.stream([item.path for item in items])]
        with self.lock:
            for item, result in zip(items, results, strict=True):
                item.version = version
                if isinstance(result, ValueError):
                    item.problem = str(result)
                    continue
                item.reading = result
                names = self.alike[item.digest]
                if item.name in names:
                    continue
                names.append(item.name)
                text = next((t for t in map(self.store.texts.get, names) if t), None)
                if text and not self._is_done(item):  # it looks like one that is labelled
                    self.store.accept([item.name], text)

    def _is_done(self, item):
        return item.name in self.store.texts or item.name in self.store.unreadable

    def _queue(self):
        """The numbers of the images that come next, the first one first."""
        check, order, places = self.args.check, self.args.order, {}
        for i, item in enumerate(self.items):
            if not item.reading or i in self.seen:
                continue
            sure, label = item.reading.confidence, self.store.texts.get(item.name)
            if check and label is not None:
                places[i] = (label == item.reading.text, -sure)
            elif not check and not self._is_done(item):
                places[i] = sure if order == "unsure" else -sure if order == "sure" else i
        return heapq.nsmallest(AHEAD, places, places.get)

    def describe(self, index):
        """An image as the page needs it."""
        item = self.items[index]
        reading = item.reading or Reading("", 0.0, [])
        return {
            "id": index,
            "name": item.name,
            "text": reading.text,
            "confidence": reading.confidence,
            "characters": list(zip(reading.text, reading.char_confidences, strict=True)),
            "label": self.store.texts.get(item.name),
            "unreadable": item.name in self.store.unreadable,
            "problem": item.problem,
            "version": item.version,
        }

    def state(self):
        """What comes next, and how far it is."""
        with self.lock:
            rest = [item for item in self.items if not self._is_done(item)]
            sure = [item.reading.confidence for item in rest if item.reading]
            problems = [item.problem for item in rest if item.problem]
            self.asked = time.monotonic()
            return {
                "items": [self.describe(i) for i in self._queue()],
                "total": len(self.items),
                "labelled": len(self.items) - len(rest) - len(self.store.unreadable),
                "unreadable": len(self.store.unreadable),
                "problems": [len(problems), *problems[:1]],
                "unread": sum(not (item.reading or item.problem) for item in rest),
                "sure": sum(sure) / len(sure) if sure else None,
                "right": [sum(self.right), len(self.right)],
                "training": "training in the background" if self.training else self.trained,
                "history": list(self.history),
                "check": self.args.check,
            }

    def accept(self, index, text):
        """Take a label, write it, and maybe begin a training."""
        text = text.strip() if isinstance(text, str) else ""
        if not text:
            raise ValueError("a label needs a character; Esc marks what nobody can read")
        if unusable(text):
            raise ValueError(f"a label cannot hold {named(unusable(text)[0])}")
        with self.lock:
            item = self.items[index]
            before = self.store.texts.get(item.name)
            alike = [
                name
                for name in self.alike.get(item.digest, ())
                if self.store.texts.get(name) == before and name not in self.store.unreadable
            ]
            self.store.accept(list(dict.fromkeys([item.name, *alike])), text)
            self.skip(index)
            if item.reading and before is None:
                self.right.append(text == item.reading.text)
            self.accepted += 1
            if 0 < self.args.train_every <= self.accepted and not self.training:
                self.accepted, self.training = 0, threading.Thread(target=self._train, daemon=True)
                self.training.start()

    def mark(self, index):
        """Take an image for one that nobody can read."""
        with self.lock:
            self.store.mark(self.items[index].name)
            self.skip(index)

    def end(self):
        """End the training, and the thread: ONNX Runtime must not be at work at the end."""
        with self.lock:
            self.ended = True
            self.work.notify_all()
        self.readings.join()
        if self.training:
            self.process.kill()

    def skip(self, index):
        """Do not show an image again, unless it is asked for."""
        with self.lock:
            self.seen.add(index)
            if index not in self.history:
                self.history.append(index)

    def _train(self):
        """Train on what is labelled, from the last weights, and read the rest anew."""
        with tempfile.TemporaryDirectory() as scratch:
            new = self.checkpoint in SHIPPED_WEIGHTS.values() or self.checkpoint.suffix == ".onnx"
            start = [] if new else ["--weights", str(self.checkpoint), "--fine-tune"]
            data = ["--data", str(self.args.folder.resolve()), "--skip-bad", "--out", scratch]
            self.process = process = subprocess.Popen(
                [sys.executable, str(ROOT / "train.py"), *data, *start, "--epochs", str(EPOCHS)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                encoding="utf-8",
                # It runs beside the reader: threads that wait for each other would stop both.
                env={"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // 2)), **os.environ},
            )
            out, problems = process.communicate()
            reader, said = None, f"the training failed: {problems.strip()[-300:]}"
            try:
                for path in Path(scratch).glob("*.pth") if process.returncode == 0 else ():
                    kept = SAVE_FOLDER / f"{path.stem}.label.pth"
                    SAVE_FOLDER.mkdir(exist_ok=True)
                    write_atomically(kept, path.read_bytes())
                    accuracy = re.search(r"^test images: (word accuracy .*)$", out, re.M)
                    reader, said = RecInfer(kept), f"{kept}: {accuracy[1] if accuracy else ''}"
            except (ValueError, OSError) as error:
                said = f"the training failed: {error}"
        with self.lock:
            if reader:
                self.checkpoint, self.reader = reader.weights, reader
                self.version += 1
            print(said, flush=True)
            self.training, self.trained = None, said
            self.work.notify_all()

    def second(self, index):
        """The second best reading of an image."""
        with self.lock:
            reader, path = self.reader, self.items[index].path
        reading = reader.predict(path, Search(top=2))
        texts, first = [*dict(reading.alternatives), reading.text], self.items[index].reading
        return next((text for text in texts if first and text != first.text), "")

    def picture(self, index, as_network):
        """An image as PNG: as it is, or as the network gets it. Raises ImageError."""
        path = self.items[index].path
        if not path.resolve().is_relative_to(self.args.folder.resolve()):
            raise ImageError("is not in the folder")
        image = read_image(path)
        if as_network:
            views = [np.moveaxis(view, 0, 2) for view in self.reader.preprocess.views(image)]
            size = max(view.shape[1] for view in views), sum(view.shape[0] + 4 for view in views)
            image = Image.new("RGB", (size[0], size[1] - 4), "white")
            for i, view in enumerate(views):
                image.paste(Image.fromarray(view), (0, i * (view.shape[0] + 4)))
        image.thumbnail(SHOWN)
        buffer = io.BytesIO()
        image.save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()


class Server(ThreadingHTTPServer):
    """Listens to the browser. It has a ``labelling`` and a ``token``."""

    def handle_error(self, request, client_address):
        """Browsers break connections off when a page is left."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """Answers the page of a `Server`, and nobody else."""

    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds that an idle connection is kept
    wbufsize, disable_nagle_algorithm = -1, True  # else an answer in two parts waits for 40 ms

    def log_message(self, *_):
        """Requests are not printed."""

    def _answer(self, status, content, kind="application/json", cache="no-store"):
        if kind == "application/json":
            content = json.dumps(content).encode("utf-8")
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": len(content), "Cache-Control": cache}
        for name, value in (HEADERS | headers).items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(content)

    def _refuse(self, status, reason):
        self.close_connection = True
        self._answer(status, {"error": reason})

    def _parts(self):
        """The parts of the path behind the token, None where the request was refused."""
        port = self.server.server_port
        hosts = {f"127.0.0.1:{port}", f"localhost:{port}"}
        origin = self.headers.get("Origin")
        if self.headers.get("Host") not in hosts:
            return self._refuse(403, "this address is not the page's")
        if origin is not None and origin.removeprefix("http://") not in hosts:
            return self._refuse(403, "the request comes from another page")
        token, *parts = self.path.partition("?")[0].removeprefix("/").split("/")
        if not hmac.compare_digest(token.encode(), self.server.token.encode()):
            return self._refuse(403, "the address lacks the token that label.py printed")
        return parts

    def _index(self, text):
        if not re.fullmatch(r"[0-9]{1,9}", str(text)):
            return None
        return int(text) if int(text) < len(self.server.labelling.items) else None

    def do_GET(self):
        parts, labelling = self._parts(), self.server.labelling
        if parts is None:
            return
        index = self._index(parts[1]) if len(parts) == 2 else None
        if parts == [""]:
            self._answer(200, PAGE.read_bytes(), "text/html; charset=utf-8")
        elif parts == ["state"]:
            self._answer(200, labelling.state())
        elif index is None:
            self._refuse(404, "there is no such page")
        elif parts[0] == "item":
            self._answer(200, labelling.describe(index))
        elif parts[0] == "second":
            self._try(lambda: {"text": labelling.second(index)})
        elif parts[0] in ("image", "network"):
            try:
                content = labelling.picture(index, parts[0] == "network")
            except ImageError as error:
                return self._answer(422, {"error": f"{labelling.items[index].name}: {error}"})
            self._answer(200, content, "image/png", "private, max-age=600")
        else:
            self._refuse(404, "there is no such page")

    def do_POST(self):
        parts, labelling = self._parts(), self.server.labelling
        if parts is None:
            return
        size = self.headers.get("Content-Length", "")
        if not size.isdecimal() or int(size) > MOST_BYTES:
            return self._refuse(413, "the request is too large")
        if self.headers.get("Content-Type") != "application/json":
            return self._refuse(415, "the request is no JSON")
        try:
            told = json.loads(self.rfile.read(int(size)))
            index = self._index(told["id"])
        except (ValueError, KeyError, TypeError, RecursionError):
            return self._refuse(400, "the request is not understood")
        acts = {
            "accept": lambda: labelling.accept(index, told.get("text")),
            "unreadable": lambda: labelling.mark(index),
            "skip": lambda: labelling.skip(index),
        }
        if index is None or "/".join(parts) not in acts:
            return self._refuse(404, "there is no such page")
        self._try(lambda: acts[parts[0]]() or labelling.state())

    def _try(self, act):
        """Answer with what ``act`` returns, or with the sentence of what it raises."""
        try:
            self._answer(200, act())
        except (ValueError, OSError) as error:
            self._answer(422, {"error": str(error)})


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of the images")
    parser.add_argument(
        "--weights", type=Path, help="(default: the last in save_model/, else the general network)"
    )
    parser.add_argument("--check", action="store_true", help="look at labels, doubtful ones first")
    parser.add_argument(
        "--order",
        choices=("unsure", "sure", "files"),
        default="unsure",
        help="which images come first (default: %(default)s)",
    )
    parser.add_argument(
        "--train-every",
        type=int,
        default=50,
        metavar="N",
        help="train in the background after N labels, 0: never (default: %(default)s)",
    )
    parser.add_argument("--port", type=int, default=0, help="(default: a free one)")
    parser.add_argument("--no-browser", action="store_true", help="only print the address")
    args = parser.parse_args()
    if not args.folder.is_dir():
        raise ValueError(f"{args.folder}: there is no such folder")
    if not 0 <= args.port < 65536:
        raise ValueError(f"--port {args.port}: is a number from 0 to 65535")
    return args


def main():
    args = parse_args()
    lock = FileLock(args.folder / ".label.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"{args.folder}: is being labelled by another label.py") from None
    except OSError as error:
        raise ValueError(f"{args.folder}: cannot be written to ({error.strerror})") from None
    try:
        server = Server(("127.0.0.1", args.port), Handler)
    except OSError as error:
        raise ValueError(f"--port {args.port}: {error.strerror}, choose another") from None
    server.labelling, server.token = Labelling(args), secrets.token_urlsafe(24)
    address = f"http://127.0.0.1:{server.server_port}/{server.token}/"
    print(f"{server.labelling.store.notes[0]}\n{address}\nCtrl-C ends it", flush=True)
    if not args.no_browser and not webbrowser.open(address):
        print("no browser was found: open the address above in one", file=sys.stderr)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print("all that was accepted is on the disk", file=sys.stderr)
    finally:
        server.labelling.end()
        lock.release()
        Path(lock.lock_file).unlink(missing_ok=True)


if __name__ == "__main__":
    command(main)
