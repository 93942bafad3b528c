"""Train MicroNet with CTC loss until every test image is read right.

    python train.py                                  # data/simple, drawn if it is not there
    python train.py --task complex                   # or chinese
    python train.py --data my_images --alphabet my_keys.txt --nh 64
    python train.py --evaluate --weights save_model/simple_nh16_depth2.pth

Writes to save_model/: TASK_nhNH_depthDEPTH.pth, the checkpoint of the best epoch,
and a .csv with a line an epoch. The files of an earlier run get a number.
"""

import argparse
import io
import math
import os
import sys
import tempfile
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm import tqdm

import gen_image
from collatefn import Collate
from ctc_label_converter import CTCLabelConverter
from dataset import (
    COLUMN,
    Preprocess,
    TextImageDataset,
    contact_sheet,
    read_image,
    read_label_file,
)
from infer_tool import SAVE_FOLDER, latest_weights, load_checkpoint
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

# width: pixels that images are resized to, None keeps their ratio. power: of the
# cosine that the learning rate follows. averaging: see AveragedModel below. flat: steps
# over which a flat start gives way to CTC, see loss.py.
TASKS = {
    "simple": {
        "nh": 16, "depth": 2, "width": None, "epochs": 35, "lr": 0.04, "power": 4,
        "averaging": 0.98, "flat": 0,
    },
    "complex": {
        "nh": 128, "depth": 6, "width": 128, "epochs": 6, "lr": 0.01, "power": 1,
        "averaging": 0.995, "flat": 0,
    },
    "chinese": {
        "nh": 64, "depth": 4, "width": None, "epochs": 3, "lr": 0.01, "power": 1,
        "averaging": 0.995, "flat": 250,
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
SHIFT_X, SHIFT_Y = 2, 1  # pixels that a training batch is moved by, at most


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


def random_shift(images):
    """Move a batch by some whole pixels, its edges repeated. (N, 3, H, W) -> same."""
    x = torch.randint(2 * SHIFT_X + 1, ()).item()
    y = torch.randint(2 * SHIFT_Y + 1, ()).item()
    height, width = images.shape[2:]
    padded = F.pad(images, (SHIFT_X, SHIFT_X, SHIFT_Y, SHIFT_Y), mode="replicate")
    return padded[:, :, y : y + height, x : x + width]


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


@torch.inference_mode()
def evaluate(model, batches, converter, preprocess, device):
    """Read all batches. Returns (loss in nats an image, their `Reading`s)."""
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
    return total_loss / len(readings), readings


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
            readings = CTCLabelConverter(converter.alphabet, temperature).decode(logits, columns)
            for reading, label in zip(readings, batch.labels, strict=True):
                right = reading.text == label
                share = reading.confidence if right else 1 - reading.confidence
                loss[temperature] -= math.log(max(share, 1e-9))
    return min(loss, key=loss.get)


def write_atomically(path, content):
    """Write bytes so that ``path`` is either as before or complete."""
    scratch = path.with_name(f"{path.name}.unfinished")
    try:
        scratch.write_bytes(content)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def save_checkpoint(path, model, converter, preprocess, half):
    """Save all that `infer_tool.load_checkpoint` needs, with numbers of 2 bytes if ``half``."""
    kind = torch.float16 if half else torch.float32
    state = {
        name: tensor.cpu().to(kind) if tensor.is_floating_point() else tensor.cpu()
        for name, tensor in model.state_dict().items()
    }
    buffer = io.BytesIO()
    torch.save(
        {
            "nh": model.nh,
            "depth": model.depth,
            "alphabet": converter.alphabet,
            "temperature": converter.temperature,
            "preprocess": asdict(preprocess),
            "state_dict": state,
        },
        buffer,
    )
    write_atomically(path, buffer.getvalue())


def save_table(path, rows):
    """Save rows of values as CSV, UTF-8."""
    text = "".join(",".join(map(str, row)) + "\n" for row in rows)
    write_atomically(path, text.encode("utf-8"))


def keep_previous(*paths):
    """Rename files of an earlier run: name.pth -> name.1.pth, with the first free number."""
    number = 1
    while any(path.with_suffix(f".{number}{path.suffix}").exists() for path in paths):
        number += 1
    for path in paths:
        if path.exists():
            path.rename(path.with_suffix(f".{number}{path.suffix}"))


def parse_args():
    """Parse the command line. Raises ValueError for settings that cannot be used."""
    parser = argparse.ArgumentParser(description="Train MicroNet, or evaluate its weights.")
    add = parser.add_argument
    add("--task", choices=TASKS, default="simple", help="sets the defaults (default: %(default)s)")
    add(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder with train.txt and test.txt (default: data/TASK, drawn if it is not there)",
    )
    default = partial(gen_image.defaults, tasks=TASKS)
    add(
        "--train",
        type=gen_image.count,
        metavar="N",
        help="train on the first N images of the list (default: all); a task's set that is not "
        "there yet is drawn with as many",
    )
    add(
        "--alphabet",
        help=f"an alphabet's name or a UTF-8 text file (default: {gen_image.defaults('alphabet')})",
    )
    add(
        "--width",
        type=gen_image.count,
        help=f"pixels that images are resized to, None keeps their ratio (default: "
        f"{default('width')})",
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
        action=argparse.BooleanOptionalAction,
        default=True,
        help="move the training images by random pixels (default: %(default)s)",
    )
    add("--half", action="store_true", help="save the weights in half precision")
    add("--batch-size", type=gen_image.count, default=64, help="(default: %(default)s)")
    add("--lr", type=float, help=f"peak learning rate (default: {default('lr')})")
    add("--seed", type=int, default=0, help="same seed, same weights (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: %(default)s)")
    add(
        "--out",
        type=Path,
        default=SAVE_FOLDER,
        metavar="DIR",
        help="folder for the checkpoint and the table (default: %(default)s)",
    )
    add(
        "--weights",
        type=Path,
        help="checkpoint to start from; with --evaluate, to evaluate (default: the last written)",
    )
    add("--evaluate", action="store_true", help="only evaluate the weights on the test list")
    add(
        "--calibrate",
        action="store_true",
        help="only fit the weights' temperature, on which the confidences depend, to the test list",
    )
    add(
        "--mistakes",
        type=Path,
        metavar="OUT.png",
        help="with --evaluate: save a picture of images that were misread",
    )
    args = parser.parse_args()
    task = TASKS[args.task]
    if args.lr is None:
        args.lr = task["lr"]
    if not 0 < args.lr < math.inf:
        raise ValueError(f"--lr {args.lr}: must be greater than 0")
    if args.width and args.width % COLUMN:
        raise ValueError(f"--width {args.width}: must be a multiple of {COLUMN}")
    for flag in ("alphabet", "width", "nh", "depth"):
        if (args.weights or args.evaluate or args.calibrate) and getattr(args, flag):
            raise ValueError(f"--{flag}: is given by the weights, leave it out")
    if args.mistakes and not args.evaluate:
        raise ValueError("--mistakes: is a part of --evaluate")
    args.epochs = args.epochs or task["epochs"]
    args.width = args.width or task["width"]
    return args


def find_data(args):
    """Return the data folder; draw the task's data set if none is named and none there."""
    if args.data:
        return args.data
    folder = Path("data") / args.task
    if not folder.exists():
        print(f"{folder} is not there yet, drawing it")
        size = ["--train", str(args.train)] if args.train else []
        gen_image.main(["--task", args.task, "--out", str(folder), *size])
    return folder


def make_network(args):
    """Return (model, converter, preprocess), of the weights to start from or new."""
    if args.weights:
        return load_checkpoint(args.weights)
    task = TASKS[args.task]
    alphabet = load_alphabet(args.alphabet or gen_image.TASKS[args.task]["alphabet"])
    preprocess = Preprocess(width=args.width)
    nh, depth = args.nh or task["nh"], args.depth or task["depth"]
    model = MicroNet(nh, depth, len(alphabet) + 1, preprocess.height)
    return model, CTCLabelConverter(alphabet), preprocess


def check_writable(folder):
    """Make ``folder`` if needed. Raises ValueError, before any training, if it cannot be used."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"--out {folder}: cannot be written to ({error.strerror})") from None


def evaluate_weights(args, device):
    """Print how well the weights read the test list."""
    weights = args.weights or latest_weights(args.task)
    print(f"evaluating {weights}")
    model, converter, preprocess = load_checkpoint(weights)
    model.to(device)
    label_file = find_data(args) / "test.txt"
    test_set = TextImageDataset(label_file, converter.alphabet, preprocess)
    labels = [label for _, label in test_set]
    batches = DataLoader(test_set, args.batch_size, collate_fn=Collate(converter))
    _, readings = evaluate(model, batches, converter, preprocess, device)
    texts = [reading.text for reading in readings]
    pairs = confusions(texts, labels).most_common(10)
    if pairs:
        print(
            "most confused: "
            + ", ".join(
                f"{right or 'nothing'} read as {read or 'nothing'} {times}x"
                for (right, read), times in pairs
            )
        )
    if args.mistakes:
        save_mistakes(args.mistakes, label_file, texts, labels, pairs)
    right = [text == label for text, label in zip(texts, labels, strict=True)]
    error = expected_calibration_error([reading.confidence for reading in readings], right)
    print(f"expected calibration error {error:.4f}, temperature {converter.temperature}")
    accuracy = word_accuracy(texts, labels)
    low, high = wilson_interval(accuracy, len(labels))
    print(
        f"word accuracy {accuracy:.4f} (95 % interval {low:.4f} to {high:.4f}), "
        f"CER {character_error_rate(texts, labels):.4f}, {len(labels)} images"
    )


def save_mistakes(path, label_file, texts, labels, pairs):
    """Save a picture with misread images, those with the most frequent confusions first."""
    rank = {pair: i for i, (pair, _) in enumerate(pairs)}
    wrong = []
    for (_, name, _), text, label in zip(read_label_file(label_file), texts, labels, strict=True):
        if text != label:
            place = min(rank.get(pair, len(rank)) for pair in confusions([text], [label]))
            wrong.append((place, name, f"{label} read as {text}"))
    if not wrong:
        print(f"nothing was misread, {path} is not written")
        return
    wrong.sort()
    shown = wrong[:40]
    images = [read_image(Path(label_file).parent / name) for _, name, _ in shown]
    buffer = io.BytesIO()
    contact_sheet(images, [caption for _, _, caption in shown]).save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())
    print(f"{path} shows {len(shown)} of {len(wrong)} misread images")


def calibrate(checkpoint, batches, device):
    """Fit the temperature of a checkpoint to its readings of ``batches``, and save it."""
    model, converter, preprocess = load_checkpoint(checkpoint)
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    half = any(tensor.dtype == torch.float16 for tensor in saved.values())
    model.to(device)
    temperature = fit_temperature(model, batches, converter, preprocess, device)
    converter = CTCLabelConverter(converter.alphabet, temperature)
    save_checkpoint(checkpoint, model, converter, preprocess, half)


def calibrate_weights(args, device):
    """Fit the temperature of given weights to the images of the test list."""
    weights = args.weights or latest_weights(args.task)
    _, converter, preprocess = load_checkpoint(weights)
    test_set = TextImageDataset(find_data(args) / "test.txt", converter.alphabet, preprocess)
    calibrate(weights, DataLoader(test_set, args.batch_size, collate_fn=Collate(converter)), device)
    print(f"{weights}: the temperature is now {load_checkpoint(weights)[1].temperature}")


def train(args, device):
    """Train, save the best epoch, and say where it is. Returns the exit status."""
    check_writable(args.out)
    task = TASKS[args.task]
    torch.manual_seed(args.seed)
    model, converter, preprocess = make_network(args)
    model.to(device)

    # Image files to uint8 in memory, then to batches.
    data = find_data(args)
    train_set = TextImageDataset(data / "train.txt", converter.alphabet, preprocess, args.train)
    test_set = TextImageDataset(data / "test.txt", converter.alphabet, preprocess)
    loader = partial(
        DataLoader,
        batch_size=args.batch_size,
        collate_fn=Collate(converter),
        pin_memory=device.type == "cuda",
    )
    order = torch.Generator().manual_seed(args.seed)
    train_batches = loader(train_set, shuffle=True, generator=order)
    test_batches = loader(test_set)
    test_labels = [label for _, label in test_set]

    criterion = CTCLoss()
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.01},
            {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.99),
        fused=device.type != "mps",
    )
    # Exponential moving average, batch norm statistics included: at a high learning
    # rate it reads far better than the weights of any one step.
    average = AveragedModel(
        model, multi_avg_fn=get_ema_multi_avg_fn(task["averaging"]), use_buffers=True
    )

    name = f"{args.task}_nh{model.nh}_depth{model.depth}"
    checkpoint, table = args.out / f"{name}.pth", args.out / f"{name}.csv"
    rows = [("epoch", "train_loss", "test_loss", "word_accuracy", "cer", "lr", "seconds")]
    best, best_epoch, accuracy = None, 0, float("nan")
    step, steps = 0, args.epochs * len(train_batches)
    print(f"{len(train_set)} training and {len(test_set)} test images, {name} on {device}")
    bar = tqdm(total=steps, desc="training", unit="step")
    began = time.perf_counter()
    try:
        for epoch in range(1, args.epochs + 1):
            model.train()
            train_loss = torch.zeros((), device=device)
            for batch in train_batches:
                lr = learning_rate(step, steps, args.lr, task["power"])
                for group in optimizer.param_groups:
                    group["lr"] = lr
                if task["flat"]:
                    criterion.flat = max(0.0, 1 - step / task["flat"])
                else:
                    criterion.smoothing = SMOOTHING * max(0.0, 1 - step / SMOOTHING_STEPS)

                images = preprocess.normalise(batch.images.to(device))
                if args.augment:
                    images = random_shift(images)
                targets, columns = batch.targets, batch.widths // COLUMN
                if converter.nclass > 4 * SAMPLED:
                    classes, targets, correction = sample_classes(targets, converter.nclass)
                    logits = model(images, batch.widths, classes.to(device))
                    logits = logits + correction.to(device)
                else:
                    logits = model(images, batch.widths)
                loss = criterion(logits, targets, columns, batch.target_lengths)

                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                average.update_parameters(model)

                train_loss += loss.detach() * len(batch.labels)
                step += 1
                if step % 20 == 0:  # reading a loss waits for the GPU
                    bar.set_postfix(loss=f"{loss.item():.3f}", word_accuracy=f"{accuracy:.3f}")
                bar.update()

            train_loss = train_loss.item() / len(train_set)
            test_loss, readings = evaluate(
                average.module, test_batches, converter, preprocess, device
            )
            texts = [reading.text for reading in readings]
            accuracy = word_accuracy(texts, test_labels)
            cer = character_error_rate(texts, test_labels)
            seconds = time.perf_counter() - began
            if epoch == 1:
                keep_previous(checkpoint, table)
            if best is None or (accuracy, -test_loss) > best:
                best, best_epoch = (accuracy, -test_loss), epoch
                save_checkpoint(checkpoint, average.module, converter, preprocess, args.half)
            values = f"{train_loss:.4f} {test_loss:.4f} {accuracy:.4f} {cer:.4f} {lr:.6f}"
            rows.append((epoch, *values.split(), f"{seconds:.2f}"))
            save_table(table, rows)
            bar.write(
                f"epoch {epoch:3d}/{args.epochs}  train loss {train_loss:7.4f}  test loss "
                f"{test_loss:7.4f}  word accuracy {accuracy:.4f}  CER {cer:.4f}  {seconds:6.1f} s"
            )
    except KeyboardInterrupt:
        bar.close()
        print("interrupted", file=sys.stderr)
    bar.close()
    if best is None:
        print("no epoch was completed, nothing was saved")
    else:
        calibrate(checkpoint, test_batches, device)
        print(f"best word accuracy {best[0]:.4f} in epoch {best_epoch}: {checkpoint}")
    return 0 if step == steps else 130


def main():
    args = parse_args()
    sys.stdout.reconfigure(encoding="utf-8")  # whatever the console's own is
    device = pick_device(args.device)
    if args.evaluate:
        return evaluate_weights(args, device)
    if args.calibrate:
        return calibrate_weights(args, device)
    return train(args, device)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit("train.py: interrupted")
