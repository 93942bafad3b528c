"""Train MicroNet with CTC loss until every test image is read right.

    python train.py                                  # data/simple, drawn if it is not there
    python train.py --task complex                   # or chinese
    python train.py --data my_images                 # your own, see README.md
    python train.py --data my_images --resume        # go on after a kill
    python train.py --data my_images --weights W.pth --fine-tune
    python train.py --evaluate --weights save_model/simple_nh16_depth2.pth
    torchrun --nproc-per-node=2 train.py             # two processes, each with its GPU

Writes to save_model/, with NAME = TASK_nhNH_depthDEPTH or FOLDER_nhNH_depthDEPTH:

    NAME.pth             the checkpoint of the best epoch
    NAME.csv, NAME.png   a line an epoch, and its curves where matplotlib is installed
    NAME.mistakes.png    what the best epoch misreads
    NAME.data.png        some of the training images with their labels
    NAME.resume          all that --resume needs, after each epoch

The files of an earlier run get a number.
"""

import argparse
import io
import math
import os
import signal
import sys
import tempfile
import time
import zlib
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm import tqdm

import gen_image
from collatefn import AUGMENTATIONS, Collate, EpochOrder, OnDevice
from ctc_label_converter import CTCLabelConverter
from dataset import (
    COLUMN,
    SPLITS,
    Preprocess,
    TextImageDataset,
    add_data_flags,
    check,
    contact_sheet,
    data_sheet,
    problem_list,
    read_image,
    save_picture,
    write_atomically,
)
from infer_tool import BATCH_SIZE, SAVE_FOLDER, latest_weights, load_checkpoint
from keys import load_alphabet
from loss import CTCLoss
from metric import (
    character_error_rate,
    confusions,
    expected_calibration_error,
    wilson_interval,
    word_accuracy,
)
from model import MicroNet

# height, width: pixels that images are resized to, None keeps their ratio. power: of the
# cosine that the learning rates follow. averaging: see AveragedModel below. flat: steps
# over which a flat start gives way to CTC, see loss.py. muon: rate of Muon in
# multiples of lr, 0 for AdamW alone. amp: compute in bfloat16 where the CPU has instructions
# for it. length: characters that every text has, any number without it.
TASKS = {
    "simple": {
        "height": 32, "width": None, "nh": 16, "depth": 2, "epochs": 35, "lr": 0.04, "power": 4,
        "averaging": 0.98, "flat": 0, "muon": 0, "augment": "shift", "batch_size": 64,
        "amp": False,
    },
    "complex": {
        "height": 60, "width": 160, "nh": 128, "depth": 8, "epochs": 4, "lr": 0.01, "power": 1,
        "averaging": 0.995, "flat": 0, "muon": 2, "augment": "shift", "batch_size": 64,
        "amp": True, "length": 4,
    },
    "chinese": {
        "height": 32, "width": None, "nh": 64, "depth": 4, "epochs": 3, "lr": 0.01, "power": 1,
        "averaging": 0.995, "flat": 250, "muon": 0, "augment": "shift", "batch_size": 64,
        "amp": False, "length": 4,
    },
}  # fmt: skip
WARM_UP = 80  # steps
# CTC alone settles in its first steps on the columns where each character is
# emitted. On some seeds that is a glyph's edge, from where the network sees half of
# the glyph: U is J and b is p for good, or only blanks come out. Smoothed targets
# keep all columns in play until the features can tell which sees the most.
SMOOTHING, SMOOTHING_STEPS = 0.03, 150
CLIP = 5.0  # largest norm of the gradient
# With more classes than this, a step trains the classes of its batch and as many others,
# drawn at random: the last layer would cost far more than all the rest.
SAMPLED = 256
# Below 1 only a little: a network that read every test image right would ask for 0.
TEMPERATURES = tuple(round(0.7 * 1.1**i, 3) for i in range(15))
MAX_SKIPPED = 20  # steps in a row without a finite gradient, then the training ends
COLUMNS = ("epoch", "train_loss", "test_loss", "word_accuracy", "cer", "lr", "seconds")


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
    except RuntimeError:
        raise ValueError(f"--device {name}: use auto, cpu, cuda, cuda:1 or mps") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(
                f"--device {name}: torch {torch.__version__} finds no NVIDIA GPU, use --device cpu"
            )
        if (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"--device {name}: there are {torch.cuda.device_count()} GPUs")
        problem = missing_kernels(device)
        if problem:
            raise ValueError(f"--device {name}: {problem}")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"--device {name}: torch finds no Apple GPU, use --device cpu")
    return device


class Muon(torch.optim.Optimizer):
    """Momentum whose steps are orthogonal matrices, for weights that mix channels.

    Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024,
    https://kellerjordan.github.io/posts/muon/. PyTorch has one of its own from 2.9 on.
    """

    MOMENTUM = 0.95
    # Of the polynomial that drives all singular values of a matrix near to 1.
    A, B, C = 3.4445, -4.7750, 2.0315

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                momentum = state["momentum"].mul_(self.MOMENTUM).add_(weight.grad)
                x = (weight.grad + self.MOMENTUM * momentum).flatten(1)
                rows, columns = x.shape
                if rows > columns:
                    x = x.T
                x = x / (x.norm() + 1e-7)
                for _ in range(5):
                    square = x @ x.T
                    x = self.A * x + (self.B * square + self.C * square @ square) @ x
                if rows > columns:
                    x = x.T
                scale = max(1, rows / columns) ** 0.5
                weight.add_(x.reshape(weight.shape), alpha=-group["lr"] * scale)


def learning_rate(step, steps, peak, power):
    """Linear warm-up to ``peak``, then a cosine to a power: the higher, the earlier it falls."""
    warm_up = min(WARM_UP, steps // 10 + 1)
    if step < warm_up:
        return peak * (step + 1) / warm_up
    progress = (step - warm_up) / (steps - warm_up)
    return peak * (0.5 * (1 + math.cos(math.pi * progress))) ** power


def sample_classes(targets, nclass):
    """The classes that a step trains: the blank, those of ``targets`` and SAMPLED others.

    Sampled softmax (Jean et al., ACL 2015, arXiv 1412.2007).

    Args:
        targets: (S,) int64, classes from 1.

    Returns:
        (classes, targets, correction): (K,) int64; the targets as places in it; (K,)
        what to add to the logits, so that the others stand for all that were left out.
    """
    present, places = targets.unique(return_inverse=True)
    absent = torch.ones(nclass, dtype=torch.bool)
    absent[present] = absent[0] = False
    absent = absent.nonzero()[:, 0]
    others = absent[torch.randperm(len(absent))[:SAMPLED]]
    classes = torch.cat([torch.zeros(1, dtype=torch.int64), present, others])
    correction = torch.zeros(len(classes))
    correction[1 + len(present) :] = math.log(len(absent) / max(1, len(others)))
    return classes, places + 1, correction


def processes():
    """(rank, number) of the processes that train together."""
    if distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def gather(value):
    """The list of what each process passes here."""
    values = [value]
    if distributed.is_initialized():
        values *= processes()[1]
        distributed.all_gather_object(values, value)
    return values


def from_first(function):
    """What the first process gets from ``function()``, in all; where it fails, all end."""
    if not distributed.is_initialized():
        return function()
    result = [None, False]
    try:
        if processes()[0] == 0:
            result = [function(), True]
    finally:
        distributed.broadcast_object_list(result)
    if not result[1]:
        sys.exit(1)  # the first process says why
    return result[0]


@torch.inference_mode()
def evaluate(model, batches, converter, preprocess, device):
    """Read all batches, which the processes share. Returns (loss in nats an image, `Reading`s).

    The readings are in the order of the data set.
    """
    model.eval()
    criterion = CTCLoss()
    readings, total_loss = [], 0.0
    for batch in batches:
        images = preprocess.normalise(batch.images.to(device))
        logits = model(images, batch.widths)
        columns = batch.widths // COLUMN
        loss = criterion(logits, batch.targets, columns, batch.target_lengths)
        total_loss += loss.item() * len(batch.labels)
        readings += converter.decode(logits.cpu().numpy(), columns.numpy())
    indices = [index for batch in batches.batch_sampler for index in batch]
    parts = gather((total_loss, dict(zip(indices, readings, strict=True))))
    found = {index: reading for _, part in parts for index, reading in part.items()}
    return sum(loss for loss, _ in parts) / len(found), [found[i] for i in range(len(found))]


@torch.inference_mode()
def fit_temperature(model, batches, converter, preprocess, device):
    """The one of TEMPERATURES with which the confidences fit best how often texts are right.

    The fit is the likelihood of right and wrong, given the confidences of whole texts.
    """
    model.eval()
    loss = dict.fromkeys(TEMPERATURES, 0.0)
    for batch in batches:
        images = preprocess.normalise(batch.images.to(device))
        logits = model(images, batch.widths).cpu().numpy()
        columns = (batch.widths // COLUMN).numpy()
        for temperature in TEMPERATURES:
            scaled = CTCLabelConverter(converter.alphabet, temperature, converter.length)
            readings = scaled.decode(logits, columns)
            for reading, label in zip(readings, batch.labels, strict=True):
                right = reading.text == label
                share = reading.confidence if right else 1 - reading.confidence
                loss[temperature] -= math.log(max(share, 1e-9))
    return min(loss, key=loss.get)


def save_tensors(path, content):
    """Write what `torch.load` reads, so that ``path`` is either as before or complete."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getvalue())


def save_checkpoint(path, model, converter, preprocess, half):
    """Save all that `infer_tool.load_checkpoint` needs, with numbers of 2 bytes if ``half``."""
    kind = torch.float16 if half else torch.float32
    state = {
        name: tensor.cpu().to(kind) if tensor.is_floating_point() else tensor.cpu()
        for name, tensor in model.state_dict().items()
    }
    content = {
        "nh": model.nh,
        "depth": model.depth,
        "alphabet": converter.alphabet,
        "temperature": converter.temperature,
        "length": converter.length,
        "preprocess": asdict(preprocess),
        "state_dict": state,
    }
    save_tensors(path, content)


def load_state(path, settings):
    """Load what `train` saved after an epoch of a training with the same ``settings``.

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


def keep_previous(*paths):
    """Rename files of an earlier run: name.pth -> name.1.pth, with the first free number."""
    number = 1
    while any(path.with_suffix(f".{number}{path.suffix}").exists() for path in paths):
        number += 1
    for path in paths:
        if path.exists():
            path.rename(path.with_suffix(f".{number}{path.suffix}"))


def save_table(path, rows):
    """Save rows of values as CSV, UTF-8."""
    text = "".join(",".join(map(str, row)) + "\n" for row in [COLUMNS, *rows])
    write_atomically(path, text.encode("utf-8"))


def save_curves(path, rows):
    """Draw the table's columns over the epochs. Returns False where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    columns = dict(zip(COLUMNS, zip(*rows, strict=True), strict=True))
    figure = Figure(figsize=(9, 6), layout="constrained")
    shown = (
        ("loss, nats an image", ("train_loss", "test_loss"), "log"),
        ("word accuracy", ("word_accuracy",), "linear"),
        ("character error rate", ("cer",), "linear"),
        ("learning rate", ("lr",), "linear"),
    )
    for axes, (title, names, scale) in zip(figure.subplots(2, 2).flat, shown, strict=True):
        for name in names:
            values = [float(value) for value in columns[name]]
            axes.plot(columns["epoch"], values, marker=".", label=name)
        axes.set(title=title, xlabel="epoch", yscale=scale)
        axes.grid(alpha=0.3)
        if len(names) > 1:
            axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomically(path, buffer.getvalue())
    return True


def tensorboard_writer(folder):
    """A `SummaryWriter`. Raises ValueError where tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError(
            "--tensorboard: needs a package that is missing: pip install tensorboard"
        ) from None
    return SummaryWriter(folder)


def parse_args():
    """Parse the command line. Raises ValueError for settings that cannot be used."""
    parser = argparse.ArgumentParser(description="Train MicroNet, or evaluate its weights.")
    add = parser.add_argument
    default = partial(gen_image.defaults, tasks=TASKS)
    add("--task", choices=TASKS, help="sets the defaults (default: simple, without --data)")
    add(
        "--data",
        type=Path,
        metavar="DATA",
        help="folder or label file, see README.md; without --task the settings are chosen to fit "
        "it (default: data/TASK, drawn if it is not there)",
    )
    add_data_flags(add)
    add("--skip-bad", action="store_true", help="train without the lines that cannot be used")
    add(
        "--train",
        type=gen_image.count,
        metavar="N",
        help="train on the first N images of the list (default: all); a task's set that is not "
        "there yet is drawn with as many",
    )
    add(
        "--height",
        type=gen_image.count,
        help=f"pixels that images are resized to (default: {default('height')})",
    )
    add(
        "--width",
        type=gen_image.count,
        help=f"pixels that images are resized to, None keeps their ratio (default: "
        f"{default('width')})",
    )
    add(
        "--trim",
        action=argparse.BooleanOptionalAction,
        help="cut images to their text before they are resized (default: where that leaves less "
        "than half of them; not for a --task)",
    )
    add(
        "--length",
        type=int,
        metavar="N",
        help="characters that every text has, 0 for any number (default: what --weights have, "
        f"{default('length')}, any for others)",
    )
    add("--nh", type=gen_image.count, help=f"channels (default: {default('nh')})")
    add("--depth", type=gen_image.count, help=f"MicroBlocks (default: {default('depth')})")
    add(
        "--epochs",
        type=gen_image.count,
        help=f"times each image is trained on (default: {default('epochs')})",
    )
    add(
        "--augment",
        choices=AUGMENTATIONS,
        help=f"how training images are changed at random (default: {default('augment')})",
    )
    add("--half", action="store_true", help="save the weights in half precision")
    add(
        "--batch-size",
        type=gen_image.count,
        help=f"images a step, over all processes (default: {default('batch_size')})",
    )
    add("--lr", type=float, help=f"peak learning rate (default: {default('lr')})")
    add(
        "--ema",
        type=float,
        metavar="DECAY",
        help="of the weights' exponential average a step, which is evaluated and saved, 0 for none "
        f"(default: {default('averaging')})",
    )
    add(
        "--patience",
        type=gen_image.count,
        metavar="N",
        help="end after N epochs that were no better (default: never)",
    )
    add("--stop-at", type=float, metavar="ACC", help="end at this word accuracy (default: never)")
    add("--seed", type=int, default=0, help="same seed, same weights (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: %(default)s)")
    add(
        "--amp",
        action=argparse.BooleanOptionalAction,
        help="compute in bfloat16, or float16 on older GPUs (default: on a CPU with AVX-512 BF16, "
        "for complex and --data)",
    )
    add("--compile", action="store_true", help="compile the network with torch.compile")
    add(
        "--memory",
        type=float,
        metavar="GB",
        help="for decoded images; a larger set is read again each epoch (default: half of the "
        "machine's)",
    )
    add(
        "--out",
        type=Path,
        default=SAVE_FOLDER,
        metavar="DIR",
        help="folder for what is written (default: %(default)s)",
    )
    add(
        "--weights",
        type=Path,
        help="checkpoint to start from; with --evaluate, to evaluate (default: the last written)",
    )
    add(
        "--fine-tune",
        action="store_true",
        help="start from --weights with the alphabet of the data; what the last layer knows of "
        "common characters is kept",
    )
    add(
        "--resume",
        action="store_true",
        help="go on after the last completed epoch of the same command, if there is one",
    )
    add("--tensorboard", action="store_true", help="also write the curves for TensorBoard")
    add("--evaluate", action="store_true", help="only evaluate the weights on the test images")
    add(
        "--calibrate",
        action="store_true",
        help="only fit the weights' temperature, on which the confidences depend, to the test "
        "images",
    )
    add(
        "--mistakes",
        type=Path,
        metavar="OUT.png",
        help="with --evaluate: save a picture of images that were misread",
    )
    args = parser.parse_args()
    if args.lr is not None and not 0 < args.lr < math.inf:
        raise ValueError(f"--lr {args.lr}: must be greater than 0")
    if args.ema is not None and not 0 <= args.ema < 1:
        raise ValueError(f"--ema {args.ema}: must be at least 0 and less than 1")
    if not 0 < args.val_fraction < 1:
        raise ValueError(f"--val-fraction {args.val_fraction}: must be between 0 and 1")
    if args.stop_at is not None and not 0 < args.stop_at <= 1:
        raise ValueError(f"--stop-at {args.stop_at}: is a word accuracy, from 0 to 1")
    for flag in ("width", "height"):
        if (getattr(args, flag) or 0) % COLUMN:
            raise ValueError(f"--{flag} {getattr(args, flag)}: must be a multiple of {COLUMN}")
    if (args.length or 0) < 0:
        raise ValueError(f"--length {args.length}: must be at least 1, or 0 for any")
    if args.fine_tune and not args.weights:
        raise ValueError("--fine-tune: needs the --weights to start from")
    given = ["width", "height", "trim", "nh", "depth", *([] if args.fine_tune else ["alphabet"])]
    given += ["length"] if args.calibrate else []
    for flag in given:
        if (args.weights or args.evaluate or args.calibrate) and getattr(args, flag) is not None:
            raise ValueError(f"--{flag}: is given by the weights, leave it out")
    if args.mistakes and not args.evaluate:
        raise ValueError("--mistakes: is a part of --evaluate")
    if args.data is None and args.task is None:
        args.task = "simple"
    return args


def find_data(args):
    """Return the data set's path; draw the task's if none is named and none there."""
    if args.data:
        return args.data
    folder = Path("data") / args.task
    if not folder.exists():
        print(f"{folder} is not there yet, drawing it")
        size = ["--train", str(args.train)] if args.train else []
        gen_image.main(["--task", args.task, "--out", str(folder), *size])
    return folder


def text_length(args, converter=None):
    """Characters that every text has, None for any: as --length, the weights or the task say.

    Args:
        converter: that of the weights to read with or to go on from, None without.
    """
    if args.length is not None:
        return args.length or None
    if converter:
        return converter.length
    return TASKS[args.task].get("length") if args.task else None


def check_data(args, alphabet, length, preprocess=None, splits=SPLITS):
    """`dataset.check` as the flags ask for. Raises ValueError for problems, without --skip-bad."""
    checked = check(
        find_data(args), alphabet, preprocess, args.label_separator, args.val_fraction, args.seed,
        args.ignore_case, args.train, splits, (args.height, args.width), args.trim, length,
    )  # fmt: skip
    if checked.problems and not args.skip_bad:
        raise ValueError(
            f"{problem_list(checked.problems)}\nmend them, or train without them: --skip-bad"
        )
    for split in splits:
        if not getattr(checked, split):
            raise ValueError(f"{find_data(args)}: no {split} image is left that can be used")
    return checked


def own_settings(checked):
    """The settings of a task, as in TASKS, for a data set of one's own.

    More epochs for fewer images, but fewer steps in all; see "Your own images" in README.md.
    """
    images, size = len(checked.train), checked.preprocess
    # Much background, or much detail: what varies in size, place and font is harder to read.
    hard = size.trim or size.height > 32
    # Looks are for many fonts: where there is one, they blur what tells 0 from O.
    small_set = "looks" if hard else "affine"
    return {
        "nh": 128 if hard else 64,
        # Each block sees 4 pixels further to either side: half as much again as the height.
        "depth": max(round(size.height / 6), 8 if hard else 1),
        "epochs": min(300, max(3, round(4700 / math.sqrt(images)))),
        "lr": 0.01,
        "power": 1,
        "averaging": 0.99,
        "flat": 300,
        "muon": 2,
        "augment": "shift" if images >= 20000 else small_set,
        "batch_size": 32,
        "amp": True,
    }


def make_network(weights, fine_tune, alphabet, preprocess, nh, depth, length):
    """Return (model, converter, preprocess), of the weights to start from or new."""
    if not weights:
        model = MicroNet(nh, depth, len(alphabet) + 1, preprocess.height)
        return model, CTCLabelConverter(alphabet, length=length), preprocess
    start, converter, preprocess = load_checkpoint(weights)
    if not fine_tune:
        converter.length = length
        return start, converter, preprocess
    model = MicroNet(start.nh, start.depth, len(alphabet) + 1, preprocess.height)
    state = start.state_dict()
    known = {character: i for i, character in enumerate(converter.alphabet, 1)}
    kept = [(i, known[c]) for i, c in enumerate(alphabet, 1) if c in known]
    new_rows, old_rows = zip((0, 0), *kept, strict=True)  # the blank, and common characters
    for name in ("linear.weight", "linear.bias"):
        rows = model.state_dict()[name].clone()
        rows[list(new_rows)] = state[name][list(old_rows)]
        state[name] = rows
    model.load_state_dict(state)
    print(f"{len(kept)} of {len(alphabet)} characters are known to {weights}")
    return model, CTCLabelConverter(alphabet, length=length), preprocess


def check_writable(folder):
    """Make ``folder`` if needed. Raises ValueError, before any training, if it cannot be used."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"--out {folder}: cannot be written to ({error.strerror})") from None


def in_order(samples, checked, preprocess, converter):
    """A DataLoader over this process's share of samples, of similar width in each batch."""
    rank, world = processes()
    widths = [preprocess.width_of(*checked.sizes[sample.path]) for sample in samples]
    order = sorted(range(len(samples)), key=widths.__getitem__)[rank::world]
    batches = [order[i : i + BATCH_SIZE] for i in range(0, len(order), BATCH_SIZE)]
    return DataLoader(
        TextImageDataset(samples, preprocess),
        batch_sampler=batches,
        collate_fn=Collate(converter),
    )


def load_test_set(args, weights):
    """Returns (model, converter, preprocess, checked, batches) of weights and the test images."""
    model, converter, preprocess = load_checkpoint(weights)
    converter.length = text_length(args, converter)
    checked = check_data(args, converter.alphabet, converter.length, preprocess, ["test"])
    report_skipped(args, checked, args.out / f"{weights.stem}.skipped.txt")
    batches = in_order(checked.test, checked, preprocess, converter)
    return model, converter, preprocess, checked, batches


def report_skipped(args, checked, path):
    """Say how many lines are left out, and write their list."""
    if checked.problems:
        check_writable(args.out)
        write_atomically(path, ("\n".join(checked.problems) + "\n").encode("utf-8"))
        print(f"left out {len(checked.problems)} lines that cannot be used, see {path}")


def evaluate_weights(args, device):
    """Print how well the weights read the test images."""
    weights = args.weights or latest_weights(args.task)
    print(f"evaluating {weights}")
    model, converter, preprocess, checked, batches = load_test_set(args, weights)
    _, readings = evaluate(model.to(device), batches, converter, preprocess, device)
    labels = [sample.label for sample in checked.test]
    texts = [reading.text for reading in readings]
    print_confusions(texts, labels)
    if args.mistakes:
        save_mistakes(args.mistakes, checked.test, readings)
    right = [text == label for text, label in zip(texts, labels, strict=True)]
    error = expected_calibration_error([reading.confidence for reading in readings], right)
    print(f"expected calibration error {error:.4f}, temperature {converter.temperature}")
    accuracy = word_accuracy(texts, labels)
    low, high = wilson_interval(accuracy, len(labels))
    print(
        f"word accuracy {accuracy:.4f} (95 % interval {low:.4f} to {high:.4f}), "
        f"CER {character_error_rate(texts, labels):.4f}, {len(labels)} images"
    )
    return 0


def print_confusions(texts, labels):
    """Print the ten most frequent confusions, if there are any."""
    pairs = confusions(texts, labels).most_common(10)
    if pairs:
        print(
            "most confused: "
            + ", ".join(
                f"{right or 'nothing'} read as {read or 'nothing'} {times}x"
                for (right, read), times in pairs
            )
        )


def save_mistakes(path, samples, readings):
    """Save a picture of the worst mistakes: misread images, the most confident first."""
    wrong = [
        (reading.confidence, sample.path, f"{sample.label} read as {reading.text}")
        for sample, reading in zip(samples, readings, strict=True)
        if reading.text != sample.label
    ]
    if not wrong:
        print(f"nothing was misread, {path} is not written")
        return
    wrong.sort(key=lambda entry: -entry[0])
    shown = wrong[:40]
    captions = [f"{caption}  {confidence:.2f}" for confidence, _, caption in shown]
    save_picture(path, contact_sheet([read_image(name) for _, name, _ in shown], captions, 5))
    print(f"{path} shows {len(shown)} of {len(wrong)} misread images")


def calibrate(checkpoint, batches, device):
    """Fit the temperature of a checkpoint to its readings of ``batches``, and save it."""
    model, converter, preprocess = load_checkpoint(checkpoint)
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    half = any(tensor.dtype == torch.float16 for tensor in saved.values())
    model.to(device)
    converter.temperature = fit_temperature(model, batches, converter, preprocess, device)
    save_checkpoint(checkpoint, model, converter, preprocess, half)


def calibrate_weights(args, device):
    """Fit the temperature of given weights to the test images."""
    weights = args.weights or latest_weights(args.task)
    batches = load_test_set(args, weights)[-1]
    calibrate(weights, batches, device)
    print(f"{weights}: the temperature is now {load_checkpoint(weights)[1].temperature}")
    return 0


def prepare(args, device):
    """Look at the data and choose what the flags leave open. Prints both.

    Returns:
        (checked, preset): a `dataset.Checked`, and the settings as in TASKS.
    """
    weights = load_checkpoint(args.weights) if args.weights else None
    alphabet, preprocess = None, None
    if args.task:
        alphabet = load_alphabet(args.alphabet or gen_image.TASKS[args.task]["alphabet"])
        task = TASKS[args.task]
        preprocess = Preprocess(
            args.height or task["height"], args.width or task["width"], bool(args.trim)
        )
    elif args.alphabet:
        alphabet = load_alphabet(args.alphabet)
    if weights:
        alphabet = alphabet if args.fine_tune else weights[1].alphabet
        preprocess = weights[2]
    length = text_length(args, weights[1] if weights and not args.fine_tune else None)
    checked = check_data(args, alphabet, length, preprocess)
    preset = dict(TASKS[args.task] if args.task else own_settings(checked))
    preset.pop("height", None), preset.pop("width", None)  # those of checked.preprocess count
    flags = {"averaging": "ema"}
    for setting in preset:
        given = getattr(args, flags.get(setting, setting), None)
        preset[setting] = preset[setting] if given is None else given
    if args.amp is None:
        preset["amp"] &= fast_bfloat16(device)
    if weights:  # which know where the characters are: no flat start
        preset |= {"nh": weights[0].nh, "depth": weights[0].depth, "flat": 0}
    preset["length"] = length
    print("\n".join(checked.notes))
    if not args.task:
        print(f"images are {checked.preprocess} (--trim, --height, --width)")
        print("network: nh {nh}, depth {depth} (--nh, --depth)".format(**preset))
        print(
            "training: {epochs} epochs (--epochs), batches of {batch_size} (--batch-size), "
            "{augment} augmentation (--augment), {precision} (--amp)".format(
                precision="mixed precision" if preset["amp"] else "float32", **preset
            )
        )
    return checked, preset


def machine_memory():
    """Bytes of memory that this machine has, 8 GB where it does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return 8 * 2**30


def training_batches(args, batch_size, checked, preprocess, converter, device, order):
    """The DataLoader of a training, whose batch_sampler is an `EpochOrder`.

    The images are on the GPU where they fit into half of its free memory, else in memory
    where they fit, else they are read by worker processes.
    """
    rank, world = processes()
    widths = [preprocess.width_of(*checked.sizes[sample.path]) for sample in checked.train]
    sampler = EpochOrder(widths, batch_size, order, rank, world)
    size = 3 * preprocess.height * sum(widths)
    room = args.memory * 2**30 if args.memory is not None else machine_memory() / 2
    in_memory = size <= room / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    dataset = TextImageDataset(checked.train, preprocess, in_memory)
    if device.type == "cuda" and in_memory:
        padded = 3 * preprocess.height * max(widths) * len(widths)
        if padded <= torch.cuda.mem_get_info(device)[0] / 2:
            resident = OnDevice(dataset, converter, device)
            return DataLoader(
                resident, batch_sampler=sampler, collate_fn=resident.unchanged, generator=order
            )
    if not in_memory:
        print(f"{size / 2**30:.1f} GB of images do not fit into memory, they are read each epoch")
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=Collate(converter),
        generator=order,
        num_workers=0 if in_memory else min(8, os.cpu_count() or 1),
        persistent_workers=not in_memory,
        pin_memory=device.type == "cuda",
    )


def make_optimizers(model, lr, muon):
    """AdamW at rate ``lr``, and `Muon` at ``muon`` times that for what mixes channels, if not 0."""
    mixing = [model.patches.conv.weight, *(block.pointwise.conv.weight for block in model.blocks)]
    mixing = mixing if muon else []
    rest = [p for p in model.parameters() if all(p is not own for own in mixing)]
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in rest if p.ndim > 1], "weight_decay": 0.01},
            {"params": [p for p in rest if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=lr,
        betas=(0.9, 0.99),
        fused=next(model.parameters()).device.type != "mps",
    )
    return [adamw, Muon(mixing, muon * lr)] if muon else [adamw]


@dataclass
class Run:
    """What a training consists of. `train` puts it together, `train_epoch` uses it.

    batches: its `DataLoader`, with an `EpochOrder`. forward: the model, as it is, compiled or
    distributed. progress: what changes from step to step and is saved with the weights.
    """

    model: MicroNet
    forward: torch.nn.Module
    average: AveragedModel
    optimizers: list
    scaler: torch.amp.GradScaler
    autocast: nullcontext
    batches: DataLoader
    converter: CTCLabelConverter
    preprocess: Preprocess
    preset: dict
    progress: dict
    device: torch.device

    def parts(self):
        """{name: what has a state that --resume needs}."""
        parts = {"model": self.model, "average": self.average, "scaler": self.scaler}
        return parts | {type(optimizer).__name__: optimizer for optimizer in self.optimizers}


def take_step(model, optimizers, scaler, loss):
    """One step down the gradient of ``loss``. Returns False, and changes nothing, if not finite."""
    model.zero_grad()
    scaler.scale(loss).backward()
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    finite = math.isfinite(norm)  # of all processes: their gradients are one by now
    if finite:
        for optimizer in optimizers:
            scaler.step(optimizer)
    scaler.update()
    return finite


def fast_bfloat16(device):
    """Whether ``device`` is a CPU that has instructions for bfloat16."""
    # torch has no public name for it.
    asks = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return device.type == "cpu" and asks is not None and asks()


def precision(amp, device):
    """(context for the forward pass, `GradScaler`) of mixed precision, or of float32."""
    if not amp:
        return nullcontext(), torch.amp.GradScaler(device.type, enabled=False)
    bfloat16 = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)
    kind = torch.bfloat16 if bfloat16 else torch.float16
    scaler = torch.amp.GradScaler(device.type, enabled=kind == torch.float16)
    return torch.autocast(device.type, kind), scaler


def reason_to_stop(args, progress):
    """Why a training ends before its last epoch, None where it does not."""
    if progress["best"] is None:
        return None
    accuracy, waited = progress["best"][0], progress["epoch"] - progress["best_epoch"]
    if args.stop_at and accuracy >= args.stop_at:
        return f"stopped: the word accuracy is {accuracy:.4f} (--stop-at)"
    if args.patience and waited >= args.patience:
        return f"stopped: no better for {waited} epochs (--patience)"
    return None


def loss_of(run, batch, criterion):
    """The mean loss of a batch's images."""
    images = run.preprocess.normalise(batch.images.to(run.device, non_blocking=True))
    images = AUGMENTATIONS[run.preset["augment"]](images)
    targets = batch.targets
    with run.autocast:
        if run.converter.nclass > 4 * SAMPLED:
            classes, targets, correction = sample_classes(targets, run.converter.nclass)
            logits = run.forward(images, batch.widths, classes.to(run.device))
            logits = logits + correction.to(run.device)
        else:
            logits = run.forward(images, batch.widths)
    return criterion(logits.float(), targets, batch.widths // COLUMN, batch.target_lengths)


def train_epoch(run, bar):
    """Train on each image once. Returns (mean loss, last learning rate).

    Raises ValueError where the gradients stay without finite values.
    """
    run.model.train()
    preset, progress, criterion = run.preset, run.progress, CTCLoss()
    steps = preset["epochs"] * len(run.batches)
    total_loss, images, in_a_row = torch.zeros((), device=run.device), 0, 0
    for batch in run.batches:
        step = progress["step"]
        lr = learning_rate(step, steps, preset["lr"], preset["power"])
        for optimizer in run.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * preset["muon"] if isinstance(optimizer, Muon) else lr
        if preset["flat"]:
            criterion.flat = max(0.0, 1 - step / preset["flat"])
        else:
            criterion.smoothing = SMOOTHING * max(0.0, 1 - step / SMOOTHING_STEPS)

        kept = [buffer.clone() for buffer in run.model.buffers()]
        loss = loss_of(run, batch, criterion)
        # The processes' gradients are averaged, their shares of a batch may differ by an image.
        whole = run.batches.batch_sampler.totals[step % len(run.batches)]
        share = len(batch.labels) * processes()[1] / whole
        if take_step(run.model, run.optimizers, run.scaler, loss * share):
            run.average.update_parameters(run.model)
            total_loss += loss.detach() * len(batch.labels)
            images += len(batch.labels)
            in_a_row = 0
        else:  # batch normalisation has seen the numbers before the step was refused
            for buffer, value in zip(run.model.buffers(), kept, strict=True):
                buffer.copy_(value)
            progress["skipped"] += 1
            in_a_row += 1
            if in_a_row == MAX_SKIPPED:
                raise ValueError(
                    f"the loss or its gradient was not finite in {MAX_SKIPPED} steps in a row, up "
                    f"to step {step} in epoch {progress['epoch'] + 1}, at learning rate {lr:.3g}: "
                    "choose a lower --lr, and leave out --amp"
                )
        progress["step"] += 1
        if step % 20 == 19:  # reading a loss waits for the GPU
            accuracy = progress["rows"][-1][3] if progress["rows"] else "-"
            bar.set_postfix(loss=f"{loss.item():.3f}", word_accuracy=accuracy)
        bar.update()
    shares = gather((total_loss.item(), images))
    return sum(loss for loss, _ in shares) / max(1, sum(n for _, n in shares)), lr


def train(args, device):
    """Train, save the best epoch, and say where it is. Returns the exit status."""
    rank, world = processes()
    checked, preset = from_first(lambda: prepare(args, device))
    torch.manual_seed(args.seed)
    model, converter, preprocess = make_network(
        args.weights, args.fine_tune, checked.alphabet, checked.preprocess, preset["nh"],
        preset["depth"], preset["length"],
    )  # fmt: skip
    model.to(device)
    source = args.data.resolve() if args.data else None
    stem = args.task or (source.parent.name if source.is_file() else source.name)
    name = f"{stem}_nh{model.nh}_depth{model.depth}"
    checkpoint, table, curves, mistakes, state_file = files = [
        args.out / f"{name}{suffix}"
        for suffix in (".pth", ".csv", ".png", ".mistakes.png", ".resume")
    ]
    writer = None
    if rank == 0:
        check_writable(args.out)
        report_skipped(args, checked, args.out / f"{name}.skipped.txt")
        save_picture(args.out / f"{name}.data.png", data_sheet(checked.train, args.seed))
        if args.tensorboard:
            writer = tensorboard_writer(args.out / f"{name}.tensorboard")

    order = torch.Generator().manual_seed(args.seed)
    train_batches = training_batches(
        args, preset["batch_size"], checked, preprocess, converter, device, order
    )
    test_batches = in_order(checked.test, checked, preprocess, converter)
    labels = [sample.label for sample in checked.test]
    forward = model
    if world > 1:
        forward = DistributedDataParallel(model, [device] if device.type == "cuda" else None)
        torch.manual_seed(args.seed + rank)  # each augments in its own way
    # Exponential moving average, batch norm statistics included: at a high learning
    # rate it reads far better than the weights of any one step.
    average = AveragedModel(
        model, multi_avg_fn=get_ema_multi_avg_fn(preset["averaging"]), use_buffers=True
    )
    autocast, scaler = precision(preset["amp"], device)
    progress = {
        "epoch": 0, "step": 0, "seconds": 0.0, "skipped": 0, "rows": [], "best": None,
        "best_epoch": 0,
    }  # fmt: skip
    run = Run(
        model, torch.compile(forward) if args.compile else forward, average,
        make_optimizers(model, preset["lr"], preset["muon"]), scaler, autocast, train_batches,
        converter, preprocess, preset, progress, device,
    )  # fmt: skip

    listed = "".join(f"{s.path.name}\t{s.label}\n" for s in [*checked.train, *checked.test])
    settings = {
        **preset, "seed": args.seed, "half": args.half,
        "alphabet": converter.alphabet, "preprocess": asdict(preprocess),
        "images": zlib.crc32(listed.encode("utf-8")),
    }  # fmt: skip
    if args.resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
        state = from_first(lambda: load_state(state_file, settings))
        if state:
            for part_name, part in run.parts().items():
                part.load_state_dict(state[part_name])
            run.progress = progress = state["progress"]
            order.set_state(progress["order"])
            if len(progress["random_states"]) == world:
                torch.set_rng_state(progress["random_states"][rank])
    if rank == 0:
        print(
            f"{len(checked.train)} training and {len(labels)} test images, {name} on {device}"
            + (f", {world} processes" if world > 1 else "")
            + (f", resumed after epoch {progress['epoch']}" if progress["epoch"] else "")
        )

    epochs, ended, drawn = preset["epochs"], None, True
    bar = tqdm(
        total=epochs * len(train_batches), initial=progress["step"], desc="training", unit="step",
        disable=rank > 0,
    )  # fmt: skip
    began = time.perf_counter() - progress["seconds"]
    try:
        while progress["epoch"] < epochs and not ended:
            train_loss, lr = train_epoch(run, bar)
            if world > 1:  # each process has seen other images
                for buffer in average.buffers():
                    distributed.broadcast(buffer, 0)
            test_loss, readings = evaluate(
                average.module, test_batches, converter, preprocess, device
            )
            texts = [reading.text for reading in readings]
            accuracy = word_accuracy(texts, labels)
            cer = character_error_rate(texts, labels)
            epoch, seconds = progress["epoch"] + 1, time.perf_counter() - began
            values = f"{train_loss:.4f} {test_loss:.4f} {accuracy:.4f} {cer:.4f} {lr:.6f}"
            row = [epoch, *values.split(), f"{seconds:.2f}"]
            progress["epoch"], progress["seconds"] = epoch, seconds
            progress["rows"].append(row)
            progress["order"] = order.get_state()
            progress["random_states"] = gather(torch.get_rng_state())
            better = progress["best"] is None or [accuracy, -test_loss] > progress["best"]
            if better:
                progress["best"], progress["best_epoch"] = [accuracy, -test_loss], epoch
            if rank == 0:
                if epoch == 1:
                    keep_previous(*files)
                # The state last: with an older one the epoch is repeated, and ends the same.
                if better:
                    save_checkpoint(checkpoint, average.module, converter, preprocess, args.half)
                save_table(table, progress["rows"])
                drawn = save_curves(curves, progress["rows"])
                state = {part_name: part.state_dict() for part_name, part in run.parts().items()}
                save_tensors(state_file, {"settings": settings, "progress": progress, **state})
                if writer:
                    for column, value in zip(COLUMNS[1:], row[1:], strict=True):
                        writer.add_scalar(column, float(value), epoch)
                bar.write(
                    f"epoch {epoch:3d}/{epochs}  train loss {train_loss:7.4f}  test loss "
                    f"{test_loss:7.4f}  word accuracy {accuracy:.4f}  CER {cer:.4f}  "
                    f"{seconds:6.1f} s"
                )
            ended = reason_to_stop(args, progress)
        status = 0
    except KeyboardInterrupt:
        ended, status = "interrupted, --resume goes on", 130
    bar.close()
    if world > 1:
        distributed.destroy_process_group()
    if rank > 0:
        return status
    if writer:
        writer.close()
    if ended:
        print(ended, file=sys.stderr)
    if progress["skipped"]:
        print(f"skipped {progress['skipped']} steps whose gradient was not finite")
    if progress["best"] is None:
        print("no epoch was completed, nothing was saved")
        return status
    if world > 1:  # now all of them
        test_batches = in_order(checked.test, checked, preprocess, converter)
    calibrate(checkpoint, test_batches, device)
    best, converter, _ = load_checkpoint(checkpoint)
    _, readings = evaluate(best.to(device), test_batches, converter, preprocess, device)
    print_confusions([reading.text for reading in readings], labels)
    save_mistakes(mistakes, checked.test, readings)
    if not drawn:
        print("for curves of the training: pip install matplotlib")
    print(
        f"best word accuracy {progress['best'][0]:.4f} in epoch {progress['best_epoch']}: "
        f"{checkpoint}"
    )
    return status


def start_processes(args):
    """Join the processes that torchrun has started, if it has. Returns the device."""
    device = pick_device(args.device)
    if "WORLD_SIZE" not in os.environ:
        return device
    if device == torch.device("cuda"):
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")

    def stop(*_):
        raise ConnectionError("told to stop")

    signal.signal(signal.SIGTERM, stop)  # torchrun ends all where one has ended
    return device


def lost_process(error):
    """End this process because it cannot reach another one, and say so."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's would cut the message off
    rank, world = processes()
    reason = str(error).split("\n")[0]
    print(
        f"train.py: error: process {rank} of {world} ends, another one has died or cannot be "
        f"reached ({reason}); the same command with --resume goes on after the last completed "
        "epoch",
        file=sys.stderr,
    )
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)  # leaving in good order would wait for the other one


def main():
    args = parse_args()
    sys.stdout.reconfigure(encoding="utf-8")  # whatever the console's own is
    device = start_processes(args)
    if args.evaluate:
        return evaluate_weights(args, device)
    if args.calibrate:
        return calibrate_weights(args, device)
    try:
        return train(args, device)
    except torch.OutOfMemoryError:
        raise ValueError(f"{device} has too little memory: try a smaller --batch-size") from None
    except (RuntimeError, ConnectionError) as error:
        if not distributed.is_initialized():
            raise
        lost_process(error)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit("train.py: interrupted")
