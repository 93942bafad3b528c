"""The inference tool: read images with trained weights, and export them to ONNX.

    from infer_tool import RecInfer
    reader = RecInfer()                    # or RecInfer("save_model/mine.pth"), or "mine.onnx"
    reader.predict("image.png").text
    reader.predict(["a.png", "b.jpg"])     # a list gives a list

    python infer_tool.py export --weights save_model/mine.pth --out mine.onnx
    python infer_tool.py export --weights save_model/mine.pth --out mine.html   # for browsers

A .pth file is read with PyTorch, an .onnx file with ONNX Runtime: then PyTorch need not
be installed, and nothing here imports it.
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports: an end without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import json
import math
import os
import sys
import time
import warnings
import weakref
from pathlib import Path

import numpy as np
from PIL import Image

from ctc_label_converter import SETTINGS, CTCLabelConverter, surest, vote
from image import (
    CLOSE,
    PATCH,
    WIDE,
    ImageError,
    Preprocess,
    as_they_come,
    other_looks,
    read_image,
    room_of,
    stretched,
    write_atomically,
)
from keys import command, import_or_say

ROOT = Path(__file__).resolve().parent
SHIPPED_WEIGHTS = {  # TASK_nhNH_depthDEPTH.pth, and the same as .onnx
    path.name.partition("_")[0]: path
    for path in sorted((ROOT / "assets" / "weights").glob("*_nh*_depth*.pth"))
}
SAVE_FOLDER = Path("save_model")  # where train.py writes
NETWORK = "begin(/* network */"  # what stands before it in a page
# All that an exported network consists of.
OPERATORS = {
    "Add", "BatchNormalization", "Cast", "Concat", "Constant", "Conv", "Div", "Erf", "Flatten",
    "Gather", "Identity", "MatMul", "Mul", "Reshape", "Shape", "Slice", "Transpose", "Unsqueeze",
}  # fmt: skip
QUICK = 5e-4  # seconds for an image, below which threads wait for each other
INPUT = "images"  # name of its input
DOUBT, BELIEVED = 0.5, (0.33, 0.05)  # confidence without other shapes; of theirs: 1 character, more
# Looks at what was stretched or squeezed, how likely that is, pixels that a character takes then.
SHAPES = ((0.3, 0.42, 0.6), 0.55, (CLOSE, math.inf)), ((1.25, 1.6, 2.2), 0.72, (0, WIDE))
MAX_LOGITS = 2**23  # numbers of a batch, at most
BATCH_SIZE = 64  # images per forward pass; 256 large ones leave the cache and take twice as long


def written_weights(task=None):
    """The checkpoint that train.py last wrote to save_model/. None where there is none.

    Args:
        task: only one that was trained for this task. None: the last of any.
    """
    written = sorted(SAVE_FOLDER.glob("*.pth"), key=lambda path: -path.stat().st_mtime_ns)
    if task is None:
        return written[0] if written else None
    # The name of other weights may begin as the task's, so the file has to say.
    named = [path for path in written if path.name.startswith(f"{task}_")]
    return next((path for path in named if _load_checkpoint(path).task == task), None)


def latest_weights(task=None, otherwise="general"):
    """The checkpoint that train.py last wrote to save_model/, else the shipped weights.

    Where it takes shipped ones, it says so on stderr: a training may have been meant.

    Args:
        task: only this task's. None: the last of any.
        otherwise: the task of the shipped weights where none was asked for.
    """
    if written := written_weights(task):
        return written
    kind = f"weights of the task {task}" if task else "weights of a training"
    print(f"no {kind} in {SAVE_FOLDER.absolute()}, taking those that ship", file=sys.stderr)
    return SHIPPED_WEIGHTS[task or otherwise]


def _load_checkpoint(path):
    """`model.load_checkpoint`, which needs PyTorch, and is imported only here."""
    import_or_say("torch", f"{path}: PyTorch reads it (an .onnx file needs none)")
    from model import load_checkpoint

    return load_checkpoint(path)


def varint(data, at):
    """(number, where it ends) of a protobuf message's number that begins at ``at``."""
    value = shift = 0
    while at < len(data) and shift <= 63:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at
    raise ValueError("no protobuf message")


def protobuf_fields(data):
    """(number, value) of each field of a protobuf message, ints and bytes; the rest is skipped.

    Args:
        data: a memoryview of the message, as the Protocol Buffers encoding guide has it.

    Raises ValueError where it is none.
    """
    at = 0
    while at < len(data):
        tag, at = varint(data, at)
        kind = tag & 7
        if kind == 0:
            value, at = varint(data, at)
            yield tag >> 3, value
            continue
        size = {1: 8, 5: 4}.get(kind)
        if kind == 2:
            size, at = varint(data, at)
        if size is None or at + size > len(data):
            raise ValueError("no protobuf message")
        if kind == 2:
            yield tag >> 3, data[at : at + size]
        at += size


def check_network(data):
    """Raise ValueError for an ONNX file that does anything but what `export` writes.

    Loops, operators that make large tensors out of small files, functions, nested graphs
    and tensors in other files are refused before ONNX Runtime sees them. The field
    numbers are those of onnx.proto.
    """
    for number, graph in protobuf_fields(memoryview(data)):
        if number == 25:  # ModelProto.functions
            raise ValueError("it defines functions")
        if number != 7:  # ModelProto.graph
            continue
        for number, value in protobuf_fields(graph):
            if number == 5:  # GraphProto.initializer
                if any(field in (13, 14) for field, _ in protobuf_fields(value)):
                    raise ValueError("it has tensors in other files")
            elif number == 1:  # GraphProto.node
                for field, content in protobuf_fields(value):
                    if field == 4 and bytes(content).decode() not in OPERATORS:
                        raise ValueError(f"it uses the operator {bytes(content).decode()!r}")
                    if field == 7 and len(content):
                        raise ValueError(f"it uses operators of {bytes(content).decode()!r}")
                    if field == 5 and any(f in (6, 11) for f, _ in protobuf_fields(content)):
                        raise ValueError("it has nested graphs")


def load_onnx(path, threads=None):
    """Load what `export` wrote.

    Args:
        path: the .onnx file.
        threads: for ONNX Runtime, None for as many as there are cores.

    Returns:
        (session, converter, preprocess, task): an `onnxruntime.InferenceSession`, its
        `CTCLabelConverter`, the `Preprocess` of its images, the task it was trained for
        or None.

    Raises ValueError if ``path`` is no exported network of this project.
    """
    onnxruntime = import_or_say("onnxruntime", f"{path}: ONNX Runtime reads it")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 4  # what is wrong is in the exception
    try:
        data = path.read_bytes()
        check_network(data)
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        told = session.get_modelmeta().custom_metadata_map
        others = {name: json.loads(told[name]) for name in SETTINGS[2:] if name in told}
        converter = CTCLabelConverter(told["alphabet"], float(told["temperature"]), **others)
        preprocess = Preprocess(**json.loads(told["preprocess"]))
        [images], [logits] = session.get_inputs(), session.get_outputs()
        shape = [3, preprocess.height]
        if (images.name, images.type, images.shape[1:3]) != (INPUT, "tensor(float)", shape):
            raise ValueError(f"the input is {images.name} {images.type} {images.shape}")
        if logits.shape[2:] != [converter.nclass]:
            raise ValueError(f"the output is {logits.shape}, {converter.nclass} classes are needed")
    except OSError as error:
        raise ValueError(f"{path}: the network cannot be read ({error.strerror})") from None
    except Exception as error:  # whatever a foreign file may lead to
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        raise ValueError(f"{path}: is not a MicroOCR network in ONNX ({reason})") from None
    return session, converter, preprocess, told.get("task")


def end_sessions():
    """End ONNX Runtime's threads before a fork, which they would not survive.

    Both processes load the network again when they read on.
    """
    for reader in list(SESSIONS):
        reader.session = None


SESSIONS = weakref.WeakSet()  # the `RecInfer`s that have one
if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(before=end_sessions)


class RecInfer:
    """Reads the text in images.

    Args:
        weights: path of a checkpoint (.pth, read with PyTorch) or of an exported
            network (.onnx, with ONNX Runtime), None for `latest_weights`.
        device: a torch device, such as "cpu" or "cuda"; for .onnx only "cpu".
        threads: for ONNX Runtime, None for as many as there are cores. PyTorch's are
            set by `torch.set_num_threads`.

    Attributes:
        weights: the path that was loaded.
        task: that they were trained for, None for images of one's own.

    It can be pickled, used after a fork and from several threads at once. A forked process
    that has ONNX Runtime in it must end by `os._exit`, as those of `multiprocessing` do.

    Raises ValueError if the weights cannot be used.
    """

    def __init__(self, weights=None, device="cpu", threads=None):
        self.weights = Path(weights or latest_weights())
        self.device, self.threads, self.process = device, threads, os.getpid()
        if self.weights.suffix == ".onnx":
            if device != "cpu":
                raise ValueError(f"{self.weights}: is read on the CPU, not on {device}")
            loaded = load_onnx(self.weights, threads)
            self.session, self.converter, self.preprocess, self.task = loaded
            SESSIONS.add(self)
            self.logits = self._logits_of_onnx_runtime
        else:
            self.recogniser = _load_checkpoint(self.weights)
            from model import pick_device

            self.recogniser.model.to(pick_device(device))
            self.converter, self.preprocess = self.recogniser.converter, self.recogniser.preprocess
            self.task = self.recogniser.task
            self.logits = self._logits_of_pytorch

    def __reduce__(self):
        return RecInfer, (self.weights, self.device, self.threads)

    def _after_fork(self):
        """Make the network usable in a forked process, which has none of the old threads."""
        if self.process == os.getpid():
            return
        self.process = os.getpid()
        if self.weights.suffix != ".onnx":
            import torch

            if self.device != "cpu":
                raise ValueError(f"{self.device} cannot be used after a fork: start it by spawn")
            torch.set_num_threads(1)

    def predict(self, image, search=None):
        """Read one image or a list of images.

        Args:
            image: a path, the bytes of an image file, a `PIL.Image`, an (H, W, 3)
                uint8 RGB array, or a list of these.
            search: a `ctc_label_converter.Search`, None for greedy decoding.

        Returns:
            a `ctc_label_converter.Reading`, for a list a list in the same order.

        Raises ValueError for an image that cannot be read, naming it.
        """
        if isinstance(image, list):
            readings = [reading for _, reading in self.stream(image, search)]
        else:
            self._after_fork()
            readings = self._results(self._views([image], 0), search)
        for reading in readings:
            if isinstance(reading, ValueError):
                raise reading
        return readings if isinstance(image, list) else readings[0]

    def stream(self, images, search=None):
        """Read any number of images, of which no more than three batches are in memory at a time.

        Args:
            images: an iterable of what `predict` takes.
            search: a `ctc_label_converter.Search`, None for greedy decoding.

        Yields:
            (image as it was given, its `Reading`), in order; for an image that cannot be
            read (image, ValueError that names it).
        """
        self._after_fork()
        # The next images are decoded while the network sees these.
        for [(batch, views)] in as_they_come(self._decoded(images), 1):
            yield from zip(batch, self._results(views, search), strict=True)

    def _decoded(self, images):
        """(batch, `_views` of it) of all images."""
        first = 0
        for batch in as_they_come(images, BATCH_SIZE):
            yield batch, self._views(batch, first)
            first += len(batch)

    def _views(self, batch, first):
        """`_pixels` of each source of a batch, which are counted from first."""
        names = [
            source if isinstance(source, str | Path) else f"image {i}"
            for i, source in enumerate(batch, first)
        ]
        views, began = [], time.perf_counter()
        # Small images are read faster than threads could share the interpreter's lock.
        while len(views) < len(batch) and time.perf_counter() - began < QUICK * len(batch):
            views.append(self._pixels(batch[len(views)], names[len(views)]))
        if len(views) < len(batch):  # Pillow decodes outside the lock, so threads help
            from concurrent.futures import ThreadPoolExecutor

            with ThreadPoolExecutor(os.cpu_count()) as pool:
                views += pool.map(self._pixels, batch[len(views) :], names[len(views) :])
        return views

    def _results(self, views, search):
        """A `Reading` for the views of each image, the ValueError for one that stands for them."""
        results = list(views)
        readable = {i: v for i, v in enumerate(views) if not isinstance(v, ValueError)}
        looks = self._looks(readable, search)
        sure = self.preprocess.sure
        unsure = {i: readable[i] for i, found in looks.items() if surest(found).confidence < sure}
        for others in other_looks(unsure, looks):
            for i, found in self._looks(others, search).items():
                looks[i] += found
        for i, found in looks.items():
            results[i] = vote(found) if i in unsure else surest(found)
        if self.preprocess.trim is None:  # of one's own images the shape is known
            for i, reading in self._other_shapes(unsure, results, search):
                results[i] = surest([results[i], reading])
        return results

    def _other_shapes(self, views, results, search):
        """(i, `Reading`) of each doubtful image, made far narrower or far wider."""
        doubtful = {i: found for i, found in views.items() if results[i].confidence < DOUBT}
        room = {i: room_of(views[i][-1], results[i]) for i in doubtful}
        for shape, share, (least, most) in SHAPES:
            made = {
                i: [stretched(view, by) for by in shape for view in found]
                for i, found in doubtful.items()
                if least <= room[i] < most
            }
            for i, looks in self._looks(made, search).items():
                reading = vote(looks)
                if share * reading.confidence >= BELIEVED[len(reading.text) > 1]:
                    yield i, reading._replace(confidence=share * reading.confidence)

    def _looks(self, views, search):
        """{i: a list of `Reading`s} of {i: the views of an image}."""
        readings = iter(self._read([view for found in views.values() for view in found], search))
        return {i: [next(readings) for _ in found] for i, found in views.items()}

    def _read(self, views, search):
        """The `Reading` of each of some (3, height, W) uint8 arrays."""
        # An image's neighbours must not change its reading: only images of one width
        # share a batch, so none is padded.
        readings, by_width = [None] * len(views), {}
        for i, pixels in enumerate(views):
            by_width.setdefault(pixels.shape[2], []).append(i)
        for width, group in by_width.items():
            # The logits of thousands of classes in wide images take gigabytes.
            size = max(1, MAX_LOGITS * PATCH // (width * self.converter.nclass))
            for part in (group[i : i + size] for i in range(0, len(group), size)):
                pixels = [views[i] for i in part]
                # A stack of one takes longer than all else here.
                logits = self.logits(np.stack(pixels) if len(part) > 1 else pixels[0][None])
                if search is None:
                    found = self.converter.decode(logits)
                else:
                    found = self.converter.search(logits, search)
                for i, reading in zip(part, found, strict=True):
                    readings[i] = reading
        return readings

    def _pixels(self, source, name):
        """The `Preprocess.views` of any source, or the ValueError that says why not."""
        try:
            if isinstance(source, np.ndarray):
                if source.ndim != 3 or source.shape[2] != 3 or source.dtype != np.uint8:
                    raise ImageError(
                        f"is an array of shape {source.shape} and type {source.dtype}, "
                        "(H, W, 3) and uint8 are needed"
                    )
                source = Image.fromarray(source)
            return self.preprocess.views(read_image(source))
        except ImageError as error:
            return ValueError(f"{name}: {error}")

    def _logits_of_pytorch(self, pixels):
        """(N, 3, height, W) uint8 -> (N, W/4, nclass) float32."""
        import torch

        with torch.inference_mode():
            images = torch.from_numpy(pixels).to(self.device)
            return self.recogniser.logits(images).cpu().numpy()

    def _logits_of_onnx_runtime(self, pixels):
        """(N, 3, height, W) uint8 -> (N, W/4, nclass) float32."""
        session = self.session = self.session or load_onnx(self.weights, self.threads)[0]
        return session.run(None, {INPUT: self.preprocess.normalise(pixels)})[0]


def export(weights, out):
    """Write the checkpoint ``weights`` as the ONNX file ``out``, and compare the two.

    Batch size and width stay free. The file's metadata hold the "alphabet", the
    "task" if it has one and, in JSON, the other settings of the `CTCLabelConverter` and the
    "preprocess".

    Returns what `compare` does.

    Raises ValueError where a package is missing, ``weights`` cannot be used, ``out``
    cannot be written, or the two files do not read the same texts.
    """
    onnx = import_or_say("onnx", "the export needs onnx")
    import_or_say("onnxruntime", "the export needs onnxruntime")
    import torch

    from metric import compare
    from model import metadata

    recogniser = _load_checkpoint(weights)
    height, width = recogniser.preprocess.height, recogniser.preprocess.width
    scratch = out.with_name(f"{out.name}.unfinished.onnx")
    try:
        with warnings.catch_warnings():
            # Of the trace, which fixes the outcome of the checks in `MicroNet.forward`.
            warnings.simplefilter("ignore")
            torch.onnx.export(
                recogniser.model,
                torch.zeros(1, 3, height, width or 4 * height),
                str(scratch),
                input_names=[INPUT],
                output_names=["logits"],
                dynamic_axes={INPUT: {0: "N", 3: "W"}, "logits": {0: "N", 1: f"W/{PATCH}"}},
                opset_version=17,
                # Weights with normalisation folded into them would be no halves any more.
                training=torch.onnx.TrainingMode.PRESERVE,
                dynamo=False,
            )
        network = onnx.load(scratch)
        onnx.helper.set_model_props(network, metadata(recogniser))
        store_halves(network)
        onnx.save(network, scratch)
        samples = sorted((ROOT / "assets" / "samples").glob("*/*.png"))
        compared = compare(RecInfer(weights), RecInfer(scratch), samples)
        os.replace(scratch, out)
    except OSError as error:
        raise ValueError(f"{out}: cannot be written ({error.strerror})") from None
    finally:
        scratch.unlink(missing_ok=True)
    return compared


def export_page(weights, out):
    """Write the checkpoint ``weights`` as one HTML file that reads in any browser.

    It is assets/reader.html with another network. Raises ValueError as `export`.
    """
    from model import browser_network

    network = json.dumps({"name": weights.stem, **browser_network(_load_checkpoint(weights))})
    page = (ROOT / "assets" / "reader.html").read_text(encoding="utf-8")
    before, _, after = page.rpartition(NETWORK)
    content = before + NETWORK + network.replace("<", "\\u003c") + after[after.index(");\n") :]
    try:
        write_atomically(out, content.encode("utf-8"))
    except OSError as error:
        raise ValueError(str(error)) from None


def store_halves(network):
    """Store tensors that half precision holds exactly as such, with a cast where they are used.

    Those are a half-precision checkpoint's; ONNX Runtime casts them once, when it loads.
    """
    import onnx

    for tensor in network.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if values.dtype != np.float32 or values.size < 1000:
            continue
        halves = values.astype(np.float16)
        if not np.array_equal(halves, values):
            continue
        name = tensor.name
        tensor.CopyFrom(onnx.numpy_helper.from_array(halves, f"{name}_half"))
        cast = onnx.helper.make_node("Cast", [tensor.name], [name], to=onnx.TensorProto.FLOAT)
        network.graph.node.insert(0, cast)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("export", help="write a checkpoint as ONNX or as a page")
    command.add_argument(
        "--weights", type=Path,
        help="checkpoint (default: the last one in save_model/, else the shipped one)",
    )  # fmt: skip
    command.add_argument(
        "--out", type=Path, metavar="OUT",
        help="W.onnx, or W.html for a page that reads in any browser (default: the checkpoint's "
        "name with .onnx)",
    )  # fmt: skip
    args = parser.parse_args()
    weights = args.weights or latest_weights()
    out = args.out or weights.with_suffix(".onnx")
    if out.suffix == ".html":
        export_page(weights, out)
        print(f"{out}: {out.stat().st_size:,} bytes, open it in a browser")
        return
    count, difference = export(weights, out)
    print(
        f"{out}: {out.stat().st_size:,} bytes, the same texts as {weights} on {count} images, "
        f"probabilities differ by at most {difference:.1e}"
    )


if __name__ == "__main__":
    command(main)
