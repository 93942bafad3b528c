"""MicroNet: images to CTC logits with about 10,000 parameters. Its file, and its device.

    python model.py                       # the layer table of the default network
    python model.py --nh 128 --nclass 37

The body is a ConvMixer (Trockman and Kolter, "Patches Are All You Need?",
arXiv 2201.09792) on patches of 4x4 pixels. Its feature map is cut into columns
and one Linear layer gives each column its logits, for CTC (Graves et al.,
"Connectionist Temporal Classification", ICML 2006).
"""

import gc
import signal

if __name__ == "__main__":  # Ctrl-C during the imports: an end without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    gc.disable()  # imports leave nothing to collect; `command` enables it

import argparse
import atexit
import base64
import io
import json
import math
import os
import pickle
import platform
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout  # which PyTorch depends on
from torch import nn
from torch.nn import functional as F

from ctc_label_converter import BLANK, SETTINGS, CTCLabelConverter
from image import PATCH, Preprocess, write_atomically
from keys import KINDS, command, letters


class ConvBNACT(nn.Module):
    """Convolution with bias, batch normalisation, GELU: (N, C_in, H, W) -> (N, C_out, H', W')."""

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, groups=1):
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride=stride, padding=padding, groups=groups
        )
        self.bn = nn.BatchNorm2d(out_channels)
        self.act = nn.GELU()

    def forward(self, x):
        if self.training and x.device.type == "cpu":
            return self._by_places(x)
        return self.act(self.bn(self.conv(x)))

    def _by_places(self, x):
        """The same with the channels of a place side by side in memory, for a step on the CPU.

        Pointwise it is a matrix product. Normalisation, activation and all their gradients
        pass over one matrix, (N * H' * W', C_out), from front to back, as tensors in different
        orders cannot. The bias, which normalisation takes away again, only goes into its running
        mean. Kept statistics are a scale and a shift, which the convolution takes over.
        """
        conv, bn = self.conv, self.bn
        weight, bias = conv.weight, None
        if not bn.training:
            scale = bn.weight * torch.rsqrt(bn.running_var + bn.eps)
            weight = weight * scale[:, None, None, None]
            bias = bn.bias + (conv.bias - bn.running_mean) * scale
        if conv.kernel_size == (1, 1):
            x = F.linear(x.movedim(1, 3), weight.flatten(1), bias)
        else:
            x = F.conv2d(x, weight, bias, conv.stride, conv.padding, groups=conv.groups)
            x = x.movedim(1, 3).contiguous()  # (N, H', W', C_out)
        if bn.training:
            # As much as makes it ``momentum`` of the bias when the step's mean comes in.
            bn.running_mean.add_(conv.bias.detach(), alpha=bn.momentum / (1 - bn.momentum))
            x = bn(x.reshape(-1, x.shape[3], 1, 1)).view(x.shape)
        return self.act(x).movedim(3, 1)


class MicroBlock(nn.Module):
    """A ConvMixer layer: mix places within a channel, then channels within a place.

    (N, nh, H, W) -> (N, nh, H, W)
    """

    def __init__(self, nh):
        super().__init__()
        self.depthwise = ConvBNACT(nh, nh, 3, padding=1, groups=nh)
        self.pointwise = ConvBNACT(nh, nh, 1)

    def forward(self, x):
        return self.pointwise(x + self.depthwise(x))


class MicroNet(nn.Module):
    """The whole network.

    Args:
        nh: channels.
        depth: number of MicroBlocks.
        nclass: size of the alphabet plus 1 for the CTC blank.
        img_height: height of the images in pixels, a multiple of 4.

    Raises ValueError for sizes that make no network.
    """

    def __init__(self, nh=16, depth=2, nclass=60, img_height=32):
        super().__init__()
        if min(nh, depth, img_height) < 1 or nclass < 2 or img_height % PATCH:
            raise ValueError(
                f"no MicroNet with nh={nh}, depth={depth}, nclass={nclass}, img_height={img_height}"
                f": all are at least 1, nclass at least 2, img_height is a multiple of {PATCH}"
            )
        self.nh, self.depth, self.img_height = nh, depth, img_height
        self.patches = ConvBNACT(3, nh, PATCH, stride=PATCH)
        self.blocks = nn.ModuleList(MicroBlock(nh) for _ in range(depth))
        self.flatten = nn.Flatten(1, 2)
        self.linear = nn.Linear(nh * img_height // PATCH, nclass)

    def begin_training(self, keep_statistics=False):
        """`train`, but for batch normalisation where it is to keep its statistics."""
        for layer in self.train().modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.train(not keep_statistics)

    def forward(self, images, widths=None, classes=None):
        """Logits of each column of 4 pixels.

        Args:
            images: (N, 3, img_height, W) float, normalised, W a multiple of 4.
            widths: (N,) width of each image in pixels, on the CPU, where images are
                padded on the right to a common W. Its columns come out as if it were
                alone; those of the padding mean nothing. None: nothing is padded.
            classes: (K,) int64, the classes wanted. None: all.

        Returns:
            (N, W/4, nclass) logits, or (N, W/4, K); class 0 is the blank.

        Raises ValueError for images of another shape.
        """
        if images.shape[2] != self.img_height or images.shape[3] % PATCH:
            raise ValueError(
                f"images of shape {tuple(images.shape)}: the height must be {self.img_height}, "
                f"the width a multiple of {PATCH}"
            )
        x = self.patches(images)  # (N, nh, img_height/4, W/4)
        inside = None
        if widths is not None and (widths < images.shape[3]).any():
            columns = torch.arange(x.shape[3], device=widths.device)
            inside = columns < widths[:, None] // PATCH
            inside = inside[:, None, None].to(x.device)  # (N, 1, 1, W/4)
        for block in self.blocks:
            # Beyond an image's edge the depthwise convolution must see zeros, as it
            # does beyond the batch's.
            x = block(x if inside is None else x * inside)
        if not x.is_contiguous():  # see `ConvBNACT`; in the last layer's order it is copied once
            if x.requires_grad:  # and its gradient back
                x.register_hook(partial(torch.Tensor.contiguous, memory_format=torch.channels_last))
            x = x.movedim(3, 1).contiguous().movedim(1, 3)
        x = self.flatten(x).transpose(1, 2)  # (N, W/4, nh * img_height/4)
        if classes is None:
            return self.linear(x)
        return F.linear(x, self.linear.weight[classes], self.linear.bias[classes])


@dataclass(frozen=True)
class Recogniser:
    """A network with all that it takes to read with it: what a checkpoint holds.

    Attributes:
        model: a `MicroNet`.
        converter: its `CTCLabelConverter`.
        preprocess: the `Preprocess` of its images.
        task: that it was trained for, None for images of one's own.
        half: whether the file has numbers of 2 bytes. In memory they have 4.
    """

    model: MicroNet
    converter: CTCLabelConverter
    preprocess: Preprocess
    task: str | None = None
    half: bool = False

    def logits(self, pixels, widths=None):
        """(N, 3, height, W) uint8 tensor -> (N, W/4, nclass). widths: see `MicroNet.forward`."""
        return self.model(self.preprocess.normalise(pixels), widths)


def load_checkpoint(path):
    """Load what `save_checkpoint` wrote.

    Returns:
        a `Recogniser`, its model in evaluation mode on the CPU.

    Raises ValueError if ``path`` is no checkpoint of this network. Nothing in the
    file is executed.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        told = {name: checkpoint[name] for name in SETTINGS if name in checkpoint}
        converter = CTCLabelConverter(**told)
        preprocess, task = Preprocess(**checkpoint["preprocess"]), checkpoint.get("task")
        if not isinstance(task, str | None):
            raise ValueError(f"the task {task!r} is no name")
        nh, depth, state = checkpoint["nh"], checkpoint["depth"], checkpoint["state_dict"]
        half = any(tensor.dtype == torch.float16 for tensor in state.values())
        # Half precision is for the disk, not for the processor.
        state = {k: t.float() if t.dtype == torch.float16 else t for k, t in state.items()}
        if len(state) != 9 + 14 * depth:
            raise ValueError(f"{len(state)} tensors are not those of depth {depth}")
        # Memory stays bounded by the file, and no random numbers are taken from a training.
        least = nh * (depth * nh + converter.nclass * preprocess.height // PATCH)  # numbers
        if 2 * least > os.path.getsize(path):
            raise ValueError(f"too small a file for nh {nh}, depth {depth}")
        with torch.random.fork_rng(devices=()):
            model = MicroNet(nh, depth, converter.nclass, preprocess.height)
        model.load_state_dict(state)
    except OSError as error:
        raise ValueError(f"{path}: the weights cannot be read ({error.strerror})") from None
    except pickle.UnpicklingError:
        raise ValueError(f"{path}: is not a MicroOCR checkpoint (no file of tensors)") from None
    except Exception as error:  # whatever a foreign file may lead to
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        raise ValueError(f"{path}: is not a MicroOCR checkpoint ({reason})") from None
    return Recogniser(model.eval(), converter, preprocess, task, half)


def save_checkpoint(path, recogniser):
    """Write a `Recogniser` so that `load_checkpoint` gives it back.

    Returns its path: ``path``, or another beside it where that stays in use.
    """
    model, converter = recogniser.model, recogniser.converter
    kind = torch.float16 if recogniser.half else torch.float32
    state = {  # copies, for in a training the tensors are parts of one
        name: tensor.cpu().to(kind if tensor.is_floating_point() else tensor.dtype, copy=True)
        for name, tensor in model.state_dict().items()
    }
    content = {
        "nh": model.nh,
        "depth": model.depth,
        **converter.settings(),
        "task": recogniser.task,
        "preprocess": asdict(recogniser.preprocess),
        "state_dict": state,
    }
    try:
        save_tensors(path, content)
    except PermissionError as error:  # hours of training are in it
        path = path.with_suffix(f".{os.getpid()}.pth")
        print(f"warning: {error}; the checkpoint is saved as {path}", file=sys.stderr)
        save_tensors(path, content)
    return path


def metadata(recogniser):
    """What an exported file has to say of a `Recogniser`, as strings."""
    told = recogniser.converter.settings()
    task = {"task": recogniser.task} if recogniser.task else {}
    return task | {
        "alphabet": told.pop("alphabet"),
        **{name: json.dumps(value) for name, value in told.items()},
        "preprocess": json.dumps(asdict(recogniser.preprocess)),
    }


def browser_network(recogniser):
    """What assets/reader.html reads with: its settings, the code of reader.wat and its numbers.

    Raises ValueError where texts run from right to left: the page cannot turn them.
    """
    if recogniser.converter.right_to_left:
        raise ValueError("texts from right to left cannot be read by a page, export to .onnx")
    model, converter = recogniser.model, recogniser.converter
    kernels = Path(__file__).with_name("assets").joinpath("reader.wasm").read_bytes()
    kind = "<f2" if recogniser.half else "<f4"
    state = [
        tensor.cpu().flatten().numpy().astype(kind)
        for tensor in model.state_dict().values()
        if tensor.is_floating_point()
    ]
    return {
        "nh": model.nh,
        "depth": model.depth,
        **converter.settings(),
        "weights": KINDS if converter.expect_kinds else {},
        "letters": letters().decode() if converter.expect_kinds else "",
        "preprocess": asdict(recogniser.preprocess),
        "half": recogniser.half,
        "sizes": [*map(len, state)],
        "kernels": base64.b64encode(kernels).decode(),
        "numbers": base64.b64encode(np.concatenate(state)).decode(),
    }


def save_tensors(path, content):
    """Write what `torch.load` reads, so that ``path`` is either as before or complete."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getvalue())


def claim(path):
    """Keep other processes from writing files of the same name until this one ends.

    Raises ValueError, which names the other process, where one has claimed ``path``.
    """
    lock, owner = FileLock(path.with_suffix(".lock")), path.with_suffix(".owner")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        who = owner.read_text(encoding="utf-8") if owner.exists() else "another process"
        raise ValueError(
            f"{path}: is being written by {who}: wait for its end, or choose another --out"
        ) from None
    owner.write_text(f"process {os.getpid()} of {platform.node()}", encoding="utf-8")

    def release():
        owner.unlink(missing_ok=True)
        lock.release()
        Path(lock.lock_file).unlink(missing_ok=True)

    atexit.register(release)


def keep_previous(paths):
    """Rename files of an earlier run: name.pth -> name.1.pth, with the first free number."""
    number = 1
    while any(path.with_suffix(f".{number}{path.suffix}").exists() for path in paths):
        number += 1
    for path in paths:
        if path.exists():
            path.rename(path.with_suffix(f".{number}{path.suffix}"))


def load_state(path, settings):
    """Load what `save_tensors` wrote of a training with the same ``settings``.

    Returns None where there is no such file. Raises ValueError for any other file.
    """
    if not path.exists():
        print(f"{path} is not there, a new training begins")
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        before = state["settings"]
        changed = [key for key in settings if before.get(key) != settings[key]]
    except Exception as error:  # whatever a foreign file may lead to
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        raise ValueError(f"{path}: is no state of an unfinished training ({reason})") from None
    if changed:
        differences = ", ".join(f"{key} was {before.get(key)}" for key in changed)
        raise ValueError(
            f"{path}: is the state of a training with other settings or images ({differences}): "
            "repeat its command with --resume, or leave out --resume to begin a new one"
        )
    return state


def fitted(recogniser, alphabet, height):
    """The network of a `Recogniser` for another alphabet and height of images.

    All is kept but the last layer's rows of characters that it does not know. Those begin as
    the mean of the others: no column is taken for them yet, and none is out of their reach.
    What the last layer says of a row of features is shared by those that are at its height.

    Returns:
        (MicroNet, number of characters that are known).
    """
    old = recogniser.model
    model = MicroNet(old.nh, old.depth, len(alphabet) + 1, height)
    class_of = {character: i for i, character in enumerate(recogniser.converter.alphabet, 1)}
    kept = [BLANK, *(i for i, c in enumerate(alphabet, 1) if c in class_of)]
    classes = [BLANK, *(class_of[c] for c in alphabet if c in class_of)]
    state = old.state_dict()
    weight = state["linear.weight"].unflatten(1, (old.nh, -1))  # (nclass, nh, rows)
    weight = F.interpolate(weight, height // PATCH, mode="linear") * (old.img_height / height)
    state["linear.weight"] = weight.flatten(1)
    for name in ("linear.weight", "linear.bias"):
        own = model.state_dict()[name].clone()
        own[:] = state[name][1:].mean(0)
        own[kept] = state[name][classes]
        state[name] = own
    model.load_state_dict(state)
    return model, len(classes) - 1


def supported_by(capability, built_for):
    """Whether a build of torch has kernels for a card.

    Args:
        capability: the card's (major, minor), as `torch.cuda.get_device_capability`.
        built_for: the build's list, as `torch.cuda.get_arch_list`: "sm_61" is machine
            code for 6.1 and later 6.x, "compute_90" is compiled for 9.0 and later.
    """
    for arch in built_for:
        kind, _, number = arch.partition("_")
        digits = "".join(filter(str.isdigit, number))
        major, minor = int(digits[:-1]), int(digits[-1])
        if kind == "compute" and (major, minor) <= tuple(capability):
            return True
        if kind == "sm" and major == capability[0] and minor <= capability[1]:
            return True
    return False


def missing_kernels(device):
    """None if this build of torch can use the CUDA ``device``, else what to do about it."""
    capability = torch.cuda.get_device_capability(device)
    built_for = torch.cuda.get_arch_list()
    if supported_by(capability, built_for):
        return None
    if capability < (7, 5):
        cure = "pip install torch==2.7.1 torchvision==0.22.1"
    else:
        cure = "pip install --upgrade torch torchvision"
    return (
        f"{torch.cuda.get_device_name(device)} has compute capability "
        f"{capability[0]}.{capability[1]}, torch {torch.__version__} has kernels for "
        f"{' '.join(built_for)} only. Install one that fits: {cure}"
    )


def pick_device(name):
    """The `torch.device` for ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``.

    ``auto`` is the GPU where there is one that works, else the CPU. Raises ValueError
    where a device asked for by name is not there or cannot be used.
    """
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        problem = missing_kernels("cuda")
        if problem:
            print(f"{problem}\nTraining on the CPU instead.", file=sys.stderr)
        return torch.device("cpu" if problem else "cuda")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise ValueError(
            f"the device {name!r} is none of auto, cpu, cuda, cuda:1 and mps"
        ) from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(
                f"the device {name!r}: torch {torch.__version__} finds no NVIDIA GPU, use cpu"
            )
        if (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"the device {name!r}: there are {torch.cuda.device_count()} GPUs")
        problem = missing_kernels(device)
        if problem:
            raise ValueError(f"the device {name!r}: {problem}")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"the device {name!r}: torch finds no Apple GPU, use cpu")
    return device


def fast_bfloat16(device):
    """Whether ``device`` is a CPU that has instructions for bfloat16."""
    # torch has no public name for it.
    asks = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return device.type == "cpu" and asks is not None and asks()


def count_parameters(module):
    """Number of trainable parameters in ``module`` and below."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def layer_table(model, img_height=32, img_width=128, batch_size=1):
    """Rows (name, layer, output shape without N, parameters) and sizes of a MicroNet.

    One row per layer, containers included, in the order the data passes them. Sizes
    are in MB of 2^20 bytes at 4 bytes a number: the input, the forward and
    backward activations (each row's output once in either direction), the
    parameters, and their total.

    Returns:
        (rows, {"input": MB, "activations": MB, "parameters": MB, "total": MB})
    """
    shapes = {}

    def record(name, _module, _input, output):
        shapes[name] = tuple(output.shape)

    hooks = [
        module.register_forward_hook(partial(record, name))
        for name, module in model.named_modules()
    ]
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    with torch.no_grad():
        model(torch.zeros(1, 3, img_height, img_width, device=device))
    model.train(was_training)
    for hook in hooks:
        hook.remove()

    rows = [
        (name, type(module).__name__, shapes[name][1:], count_parameters(module))
        for name, module in model.named_modules()
        if name and name in shapes  # not the network itself, nor the list of blocks
    ]
    megabyte = 2**20 / 4  # numbers of 4 bytes
    sizes = {
        "input": batch_size * 3 * img_height * img_width / megabyte,
        "activations": batch_size * 2 * sum(math.prod(shape) for _, _, shape, _ in rows) / megabyte,
        "parameters": count_parameters(model) / megabyte,
    }
    return rows, sizes | {"total": sum(sizes.values())}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nh", type=int, default=16, help="channels (default: %(default)s)")
    parser.add_argument("--depth", type=int, default=2, help="MicroBlocks (default: %(default)s)")
    parser.add_argument(
        "--nclass", type=int, default=60, help="characters and the blank (default: %(default)s)"
    )
    parser.add_argument("--height", type=int, default=32, help="pixels (default: %(default)s)")
    parser.add_argument("--width", type=int, default=128, help="pixels (default: %(default)s)")
    parser.add_argument(
        "--batch-size", type=int, default=1, help="images for the sizes (default: %(default)s)"
    )
    args = parser.parse_args()
    model = MicroNet(args.nh, args.depth, args.nclass, args.height)
    rows, sizes = layer_table(model, args.height, args.width, args.batch_size)
    print(f"{'layer':<32}{'output shape':>16}{'parameters':>14}")
    for name, layer, shape, parameters in rows:
        indent = "  " * name.removeprefix("blocks.").count(".")
        print(f"{indent + layer:<32}{list(shape)!s:>16}{parameters:>14,}")
    print(f"{'total, all trainable':<48}{count_parameters(model):>14,}")
    shape = f"{args.batch_size} x 3 x {args.height} x {args.width}"
    print(f"MB of 2^20 bytes for a training step on {shape}:")
    for name, megabytes in sizes.items():
        print(f"{name:<48}{megabytes:>14.2f}")


if __name__ == "__main__":
    command(main)
