"""Train MicroNet with CTC loss until every test image is read right.

    python train.py                                  # data/simple, drawn if it is not there
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
from dataset import COLUMN, Preprocess, TextImageDataset
from infer_tool import SAVE_FOLDER, latest_weights, load_checkpoint
from keys import load_alphabet
from loss import CTCLoss
from metric import character_error_rate, word_accuracy
from model import MicroNet

TASKS = {"simple": {"nh": 16, "depth": 2, "epochs": 35}}
WARM_UP = 80  # steps
# CTC alone settles in its first steps on the columns where each character is
# emitted. On some seeds that is a glyph's edge, from where the network sees half of
# the glyph: U is J and b is p for good, or only blanks come out. Smoothed targets
# keep all columns in play until the features can tell which sees the most.
SMOOTHING, SMOOTHING_STEPS = 0.03, 150
CLIP = 5.0  # largest norm of the gradient
AVERAGING = 0.98  # of the weights, a step: the average is what is evaluated and saved
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


def learning_rate(step, steps, peak):
    """Linear warm-up to ``peak``, then a cosine to the 4th power: most of it falls early."""
    warm_up = min(WARM_UP, steps // 10 + 1)
    if step < warm_up:
        return peak * (step + 1) / warm_up
    progress = (step - warm_up) / (steps - warm_up)
    return peak * (0.5 * (1 + math.cos(math.pi * progress))) ** 4


@torch.inference_mode()
def evaluate(model, batches, converter, preprocess, device):
    """Read all batches. Returns (loss in nats an image, word accuracy, CER)."""
    model.eval()
    criterion = CTCLoss()
    texts, labels, total_loss = [], [], 0.0
    for batch in batches:
        images = preprocess.normalise(batch.images.to(device))
        logits = model(images, batch.widths)
        columns = batch.widths // COLUMN
        loss = criterion(logits, batch.targets, columns, batch.target_lengths)
        total_loss += loss.item() * len(batch.labels)
        readings = converter.decode(logits.cpu().numpy(), columns.numpy())
        texts += [reading.text for reading in readings]
        labels += batch.labels
    return (
        total_loss / len(labels),
        word_accuracy(texts, labels),
        character_error_rate(texts, labels),
    )


def write_atomically(path, content):
    """Write bytes so that ``path`` is either as before or complete."""
    scratch = path.with_name(f"{path.name}.unfinished")
    try:
        scratch.write_bytes(content)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def save_checkpoint(path, model, alphabet, preprocess):
    """Save all that `infer_tool.load_checkpoint` needs."""
    buffer = io.BytesIO()
    torch.save(
        {
            "nh": model.nh,
            "depth": model.depth,
            "alphabet": alphabet,
            "preprocess": asdict(preprocess),
            "state_dict": {name: tensor.cpu() for name, tensor in model.state_dict().items()},
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
    add("--alphabet", help="an alphabet's name or a UTF-8 text file (default: alnum59)")
    add(
        "--width",
        type=gen_image.count,
        help="resize all images to this width (default: keep the ratio)",
    )
    add("--nh", type=gen_image.count, help="channels of the network (default: 16)")
    add("--depth", type=gen_image.count, help="MicroBlocks of the network (default: 2)")
    add("--epochs", type=gen_image.count, help="times each image is trained on (default: 35)")
    add("--batch-size", type=gen_image.count, default=64, help="(default: %(default)s)")
    add("--lr", type=float, default=0.04, help="peak learning rate (default: %(default)s)")
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
    args = parser.parse_args()
    if not 0 < args.lr < math.inf:
        raise ValueError(f"--lr {args.lr}: must be greater than 0")
    if args.width and args.width % COLUMN:
        raise ValueError(f"--width {args.width}: must be a multiple of {COLUMN}")
    for flag in ("alphabet", "width", "nh", "depth"):
        if (args.weights or args.evaluate) and getattr(args, flag):
            raise ValueError(f"--{flag}: is given by the weights, leave it out")
    args.epochs = args.epochs or TASKS[args.task]["epochs"]
    return args


def find_data(args):
    """Return the data folder; draw the task's data set if none is named and none there."""
    if args.data:
        return args.data
    folder = Path("data") / args.task
    if not folder.exists():
        print(f"{folder} is not there yet, drawing it")
        gen_image.main(["--task", args.task, "--out", str(folder)])
    return folder


def make_network(args):
    """Return (model, alphabet, preprocess), of the weights to start from or new."""
    if args.weights:
        return load_checkpoint(args.weights)
    task = TASKS[args.task]
    alphabet = load_alphabet(args.alphabet or gen_image.TASKS[args.task]["alphabet"])
    preprocess = Preprocess(width=args.width)
    nh, depth = args.nh or task["nh"], args.depth or task["depth"]
    model = MicroNet(nh, depth, len(alphabet) + 1, preprocess.height)
    return model, alphabet, preprocess


def check_writable(folder):
    """Make ``folder`` if needed. Raises ValueError, before any training, if it cannot be used."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"--out {folder}: cannot be written to ({error.strerror})") from None


def evaluate_weights(args, device):
    """Print how well the weights read the test list."""
    weights = args.weights or latest_weights()
    print(f"evaluating {weights}")
    model, alphabet, preprocess = load_checkpoint(weights)
    model.to(device)
    converter = CTCLabelConverter(alphabet)
    test_set = TextImageDataset(find_data(args) / "test.txt", alphabet, preprocess)
    batches = DataLoader(test_set, args.batch_size, collate_fn=Collate(converter))
    _, accuracy, cer = evaluate(model, batches, converter, preprocess, device)
    print(f"word accuracy {accuracy:.4f}, CER {cer:.4f}, {len(test_set)} images")


def train(args, device):
    """Train, save the best epoch, and say where it is. Returns the exit status."""
    check_writable(args.out)
    torch.manual_seed(args.seed)
    model, alphabet, preprocess = make_network(args)
    model.to(device)
    converter = CTCLabelConverter(alphabet)

    # Image files to uint8 in memory, then to batches.
    data = find_data(args)
    train_set = TextImageDataset(data / "train.txt", alphabet, preprocess)
    test_set = TextImageDataset(data / "test.txt", alphabet, preprocess)
    loader = partial(
        DataLoader,
        batch_size=args.batch_size,
        collate_fn=Collate(converter),
        pin_memory=device.type == "cuda",
    )
    order = torch.Generator().manual_seed(args.seed)
    train_batches = loader(train_set, shuffle=True, generator=order)
    test_batches = loader(test_set)

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
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(AVERAGING), use_buffers=True)

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
                lr = learning_rate(step, steps, args.lr)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                criterion.smoothing = SMOOTHING * max(0.0, 1 - step / SMOOTHING_STEPS)

                images = preprocess.normalise(batch.images.to(device))
                logits = model(random_shift(images), batch.widths)
                columns = batch.widths // COLUMN
                loss = criterion(logits, batch.targets, columns, batch.target_lengths)

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
            test_loss, accuracy, cer = evaluate(
                average.module, test_batches, converter, preprocess, device
            )
            seconds = time.perf_counter() - began
            if epoch == 1:
                keep_previous(checkpoint, table)
            if best is None or (accuracy, -test_loss) > best:
                best, best_epoch = (accuracy, -test_loss), epoch
                save_checkpoint(checkpoint, average.module, alphabet, preprocess)
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
        print(f"best word accuracy {best[0]:.4f} in epoch {best_epoch}: {checkpoint}")
    return 0 if step == steps else 130


def main():
    args = parse_args()
    device = pick_device(args.device)
    if args.evaluate:
        return evaluate_weights(args, device)
    return train(args, device)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit("train.py: interrupted")
