"""All that is decided before the first step of a training: flags, presets, data, network.

What fits a data set is decided here too, after `dataset.check` has looked at it.
"""

import argparse
import math
import os
import random
import shutil
import tempfile
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import gen_image
from collatefn import AUGMENTATIONS
from ctc_label_converter import CTCLabelConverter
from dataset import Checked, add_data_flags, check, data_options, problem_list
from gen_image import count, defaults
from image import PATCH, SURE, Preprocess
from infer_tool import SAVE_FOLDER, SHIPPED_WEIGHTS
from keys import check_alphabet, is_right_to_left, load_alphabet
from label_file import SPLITS
from metric import save_problems
from model import MicroNet, Recogniser, fast_bfloat16, fitted, load_checkpoint

# Share of the training images that choose the epoch and the temperature, and their most.
HELD_OUT, MOST_HELD_OUT = 0.1, 1000
FEW = 300  # images of which twice that share is held out


@dataclass(frozen=True)
class Preset:
    """How a network is built and trained.

    Attributes:
        preprocess: the `Preprocess` of its images.
        nh, depth: of the `model.MicroNet`.
        epochs: times that each image is trained on.
        lr: peak learning rate.
        averaging: decay per step of the weights' average, see `loss.MovingAverage`.
        augment: one of `collatefn.AUGMENTATIONS`.
        power: of the cosine that the learning rates follow.
        flat: steps over which a flat start gives way to CTC, 0 or None: see `loss.CTCLoss`.
        muon: rate of Muon in multiples of lr, 0 for AdamW alone.
        batch_size: images per step, over all processes.
        warm_up: steps over which the rates rise, a tenth of all at most.
        amp: compute in bfloat16 where the CPU has instructions for it.
        length: characters that every text has, None for any number.
        expect_kinds: see `ctc_label_converter.CTCLabelConverter`.
        until_done: end when the loss of held-out images falls no more, see `fall_of`,
            after ``epochs`` at the latest; else after all of them.
        fall: how long the rate falls then, in the epochs before that.
        keep_statistics: of batch normalisation, as a network that reads already has them.
        few: images, of a script that the network knows: it is soon done, see `fall_of`.
    """

    preprocess: Preprocess
    nh: int
    depth: int
    epochs: int
    lr: float
    averaging: float
    augment: str = "shift"
    power: float = 1
    flat: int | None = 0
    muon: float = 0
    batch_size: int = 64
    warm_up: int = 80
    amp: bool = False
    length: int | None = None
    expect_kinds: bool = False
    until_done: bool = False
    fall: float = 0.4
    keep_statistics: bool = False
    few: bool = False


PRESETS = {  # of the tasks in gen_image.py
    "simple": Preset(
        Preprocess(32), nh=16, depth=2, epochs=7, lr=0.02, averaging=0.97, flat=70, muon=3,
        warm_up=20, amp=True, length=4,
    ),
    "complex": Preset(
        Preprocess(60, 160), nh=128, depth=8, epochs=4, lr=0.01, averaging=0.995, muon=2, amp=True,
        length=4,
    ),
    "chinese": Preset(
        Preprocess(32), nh=64, depth=4, epochs=3, lr=0.01, averaging=0.995, flat=250, length=4
    ),
    "general": Preset(
        Preprocess(32, trim=None, sure=SURE), nh=160, depth=8, epochs=5, lr=0.01, averaging=0.999,
        flat=300, muon=2, amp=True, expect_kinds=True,
    ),
}  # fmt: skip


def own_preset(checked, start=None):
    """The `Preset` that fits a data set of one's own.

    More epochs for fewer images, but fewer steps in all; benchmarks/RESULTS.md has what
    decided it.

    Args:
        checked: a `dataset.Checked`.
        start: the `model.Recogniser` that the training goes on from, None for a new network.
    """
    images, size = len(checked.train), checked.preprocess
    # Of another script than its own a network has all to learn, its statistics too.
    known = set(checked.alphabet) & set(start.converter.alphabet) if start else ()
    near = 2 * len(known) > len(checked.alphabet)
    epochs = min(300, max(3, round((3300 if near else 4700) / math.sqrt(images))))
    # Over some three epochs of many images, or the loss that ends the training only flickers.
    averaging = min(0.999, max(0.99, 1 - 12 / images))
    # Much background, or much detail: what varies in size, place and font is harder to read.
    # Of detail a network that reads already has seen enough.
    hard = size.trim or (size.height > 32 and not start)
    # Looks are for many fonts: where there is one, they blur what tells 0 from O.
    small_set = "looks" if hard else "affine"
    if start:
        # A high rate unlearns what is known of other fonts, of which few images show too little;
        # many are learnt by heart at a low one.
        rate = 0.003 * (images / 100) ** (1 / 3) if near and not hard else images / 450_000
        lr = min(0.01, max(0.0015 if hard else 0.003, rate))
        # By small steps few images are learnt in half of the epochs.
        few = near and images < 2000
        # What thousands of images in many fonts have to teach takes longer to settle.
        longer = min(4, images / 1000) if near and not few else min(2, images / 2000)
        fall = max(Preset.fall, longer) if hard else Preset.fall
        return Preset(
            size, start.model.nh, start.model.depth, epochs, lr, averaging=averaging,
            augment=small_set, muon=2, batch_size=8 if few else 32, amp=True, until_done=True,
            fall=fall, warm_up=20, keep_statistics=near, few=few,
        )  # fmt: skip
    # Each block sees 4 pixels further to either side: half as much again as the height.
    depth = max(round(size.height / 6), 8 if hard else 1)
    return Preset(
        size, nh=128 if hard else 64, depth=depth, epochs=epochs, lr=0.01, averaging=averaging,
        augment="shift" if images >= 20000 else small_set, flat=300, muon=2, batch_size=32,
        amp=True, until_done=True,
    )  # fmt: skip


def _default(setting):
    return f"(default: {defaults(setting, PRESETS)})"


def _add_data_group(parser):
    group = parser.add_argument_group("data")
    group.add_argument(
        "--task", choices=PRESETS, help="sets the defaults (default: simple, without --data)"
    )
    group.add_argument(
        "--data",
        type=Path,
        metavar="DATA",
        help="folder or label file, see README.md; without --task the settings are chosen to fit "
        "it (default: data/TASK, drawn if it is not there)",
    )
    add_data_flags(group)
    group.add_argument(
        "--skip-bad", action="store_true", help="train without the lines that cannot be used"
    )
    group.add_argument(
        "--train",
        type=count,
        metavar="N",
        help="train on the first N images of the list (default: all); a task's set that is not "
        "there yet is drawn with as many",
    )
    group.add_argument(
        "--height",
        type=count,
        help=f"pixels that images are resized to {_default('preprocess.height')}",
    )
    group.add_argument(
        "--width",
        type=count,
        help="pixels that images are resized to, without it their ratio is kept "
        f"{_default('preprocess.width')}",
    )
    group.add_argument(
        "--trim",
        action=argparse.BooleanOptionalAction,
        help="cut images to their text before they are resized (default: where that leaves less "
        "than half of them; not for a --task)",
    )
    group.add_argument(
        "--length",
        type=int,
        metavar="N",
        help="characters that every text has, 0 for any number (default: what --weights have, "
        f"{defaults('length', PRESETS)}, any for others)",
    )
    group.add_argument(
        "--memory",
        type=float,
        metavar="GB",
        help="for decoded images; a larger set is read again each epoch (default: half of the "
        "machine's)",
    )


def _add_network_group(parser):
    group = parser.add_argument_group("network")
    group.add_argument("--nh", type=count, help=f"channels {_default('nh')}")
    group.add_argument("--depth", type=count, help=f"MicroBlocks {_default('depth')}")
    group.add_argument(
        "--weights",
        type=Path,
        help="checkpoint to start from; with --evaluate, to evaluate (default: the last written)",
    )
    group.add_argument(
        "--fine-tune",
        action="store_true",
        help="start from --weights with the alphabet of the data; what the last layer knows of "
        "common characters is kept",
    )
    group.add_argument("--compile", action="store_true", help="compile it with torch.compile")
    group.add_argument("--half", action="store_true", help="save the weights in half precision")


def _add_training_group(parser):
    group = parser.add_argument_group("training")
    group.add_argument(
        "--epochs", type=count, help=f"times each image is trained on {_default('epochs')}"
    )
    group.add_argument(
        "--augment",
        choices=AUGMENTATIONS,
        help=f"how training images are changed at random {_default('augment')}",
    )
    group.add_argument(
        "--batch-size",
        type=count,
        help=f"images per step, over all processes {_default('batch_size')}",
    )
    group.add_argument("--lr", type=float, help=f"peak learning rate {_default('lr')}")
    group.add_argument(
        "--ema",
        dest="averaging",
        type=float,
        metavar="DECAY",
        help="of the weights' exponential average per step, which is evaluated and saved, 0 for "
        f"none {_default('averaging')}",
    )
    group.add_argument(
        "--patience",
        type=count,
        metavar="N",
        help="end after N epochs that were no better (default: never)",
    )
    group.add_argument(
        "--stop-at", type=float, metavar="ACC", help="end at this word accuracy (default: never)"
    )
    group.add_argument(
        "--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: %(default)s)"
    )
    group.add_argument(
        "--amp",
        action=argparse.BooleanOptionalAction,
        help="compute in bfloat16, or float16 on older GPUs (default: on a CPU with AVX-512 BF16, "
        "but for chinese)",
    )
    group.add_argument(
        "--resume",
        action="store_true",
        help="go on after the last completed epoch of the same command, if there is one",
    )


def _add_output_group(parser):
    group = parser.add_argument_group("output")
    group.add_argument(
        "--out",
        type=Path,
        default=SAVE_FOLDER,
        metavar="DIR",
        help="folder for what is written (default: %(default)s)",
    )
    group.add_argument(
        "--tensorboard", action="store_true", help="also write the curves for TensorBoard"
    )
    group.add_argument(
        "--evaluate", action="store_true", help="only evaluate the weights on the test images"
    )
    group.add_argument(
        "--calibrate",
        action="store_true",
        help="only fit the weights' temperature, on which the confidences depend, to the test "
        "images",
    )
    group.add_argument(
        "--mistakes",
        type=Path,
        metavar="OUT.png",
        help="with --evaluate: save a picture of images that were misread",
    )


def parse_args(description):
    """Parse the command line of train.py. Raises ValueError for settings that cannot be used."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for add_group in (_add_data_group, _add_network_group, _add_training_group, _add_output_group):
        add_group(parser)
    args = parser.parse_args()
    if args.lr is not None and not 0 < args.lr < math.inf:
        raise ValueError(f"--lr {args.lr}: must be greater than 0")
    if args.averaging is not None and not 0 <= args.averaging < 1:
        raise ValueError(f"--ema {args.averaging}: must be at least 0 and less than 1")
    if args.stop_at is not None and not 0 < args.stop_at <= 1:
        raise ValueError(f"--stop-at {args.stop_at}: is a word accuracy, from 0 to 1")
    for flag in ("width", "height"):
        if (getattr(args, flag) or 0) % PATCH:
            raise ValueError(f"--{flag} {getattr(args, flag)}: must be a multiple of {PATCH}")
    if (args.length or 0) < 0:
        raise ValueError(f"--length {args.length}: must be at least 1, or 0 for any")
    if args.fine_tune and not args.weights:
        raise ValueError("--fine-tune: needs the --weights to start from")
    given = ["width", "trim", "nh", "depth"]
    given += [] if args.fine_tune else ["alphabet", "height"]
    given += ["length"] if args.calibrate else []
    read = args.weights != Path("none") and (args.weights or args.evaluate or args.calibrate)
    for flag in given:
        if read and getattr(args, flag) is not None:
            raise ValueError(f"--{flag}: is given by the weights, leave it out")
    compilers = (os.environ.get("CXX", "c++"), "g++", "clang++", "cl")
    if args.compile and not any(map(shutil.which, compilers)):
        raise ValueError("--compile: needs a C++ compiler, and finds none (g++, clang++ or cl)")
    if args.mistakes and not args.evaluate:
        raise ValueError("--mistakes: is a part of --evaluate")
    if args.data is None and args.task is None:
        args.task = "simple"
    data_options(args)  # whether its flags can be used
    return args


def data_path(args):
    """Where the data set is, as --data or the task say."""
    return args.data or Path("data") / args.task


class Files(NamedTuple):
    """What a training writes, and renames where an earlier one has written it."""

    checkpoint: Path
    table: Path
    curves: Path
    mistakes: Path
    state: Path


def check_writable(folder):
    """Make ``folder`` if needed. Raises ValueError, before any training, if it cannot be used."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"--out {folder}: cannot be written to ({error.strerror})") from None


def output_files(args, preset):
    """The `Files` of a training, named by the task or the data's folder, nh and depth."""
    source = args.task
    if not source:
        path = args.data.resolve()
        source = path.parent.name if path.is_file() else path.name
    name = f"{source}_nh{preset.nh}_depth{preset.depth}"
    suffixes = (".pth", ".csv", ".png", ".mistakes.png", ".resume")
    return Files(*(args.out / f"{name}{suffix}" for suffix in suffixes))


def draw_missing(args):
    """Draw the task's images if no data set was named and they are not there."""
    if args.data is None and not data_path(args).exists():
        print(f"{data_path(args)} is not there yet, drawing it")
        size = ["--train", str(args.train)] if args.train else []
        gen_image.main(["--task", args.task, "--out", str(data_path(args)), *size])


def text_length(args, converter=None):
    """Characters that every text has, None for any: as --length, the weights or the task say.

    Args:
        converter: that of the weights to read with or to go on from, None without.
    """
    if args.length is not None:
        return args.length or None
    if converter:
        return converter.length
    return PRESETS[args.task].length if args.task else None


def check_data(args, splits=SPLITS, **options):
    """`dataset.check` as the flags ask for. Raises ValueError for problems, without --skip-bad.

    Args:
        options: of `dataset.DataOptions`, that do not come from the flags alone.
    """
    size = {"height": args.height, "width": args.width, "trim": args.trim}
    options = data_options(args, limit=args.train, **size, **options)
    checked = check(data_path(args), options, splits)
    if checked.problems:
        check_writable(args.out)
        path = args.out / f"{data_path(args).resolve().stem}.problems.txt"
        save_problems(path, checked.problems)
        if not args.skip_bad:
            raise ValueError(
                f"{problem_list(checked.problems)}\nthe whole list is in {path}; mend them, or "
                "train without them: --skip-bad"
            )
        print(f"left out {len(checked.problems)} lines that cannot be used, see {path}")
    for split in splits:
        if not getattr(checked, split):
            raise ValueError(f"{data_path(args)}: no {split} image is left that can be used")
    return checked


class Plan(NamedTuple):
    """What a training starts from.

    checked: a `dataset.Checked`, whose training images are those that are trained on.
    preset: a `Preset`.
    held_out: `Sample`s that choose the epoch and the temperature.
    """

    checked: Checked
    preset: Preset
    held_out: list

    def identity(self, args):
        """What two trainings have in common where one can go on with the other's state."""
        samples = [*self.checked.train, *self.checked.test]
        listed = "".join(f"{sample.path.name}\t{sample.label}\n" for sample in samples)
        return asdict(self.preset) | {
            "seed": args.seed,
            "half": args.half,
            "alphabet": self.checked.alphabet,
            "images": zlib.crc32(listed.encode("utf-8")),
        }


def prepare(args, start, device):
    """Look at the data and choose what the flags leave open. Prints both.

    Args:
        start: the `model.Recogniser` to start from, None for a new network.

    Returns:
        a `Plan`.
    """
    draw_missing(args)
    known = start and not args.fine_tune
    general = start and args.fine_tune and start.task == "general"
    alphabet, preprocess = None, None
    if known:
        alphabet = start.converter.alphabet
    elif args.alphabet or args.task:
        alphabet = load_alphabet(args.alphabet or gen_image.TASKS[args.task].alphabet)
    if not general and (start or args.task):  # the general one has read images cut and whole
        size = start.preprocess if start else PRESETS[args.task].preprocess
        preprocess = replace(
            size,
            height=args.height or size.height,
            width=args.width or size.width,
            trim=size.trim if args.trim is None else args.trim,
        )
    length = text_length(args, start.converter if known else None)
    checked = check_data(
        args, alphabet=alphabet, preprocess=preprocess, length=length,
        learnt=start.preprocess.height if general else None,
    )  # fmt: skip
    check_alphabet(checked.alphabet)

    preset = PRESETS[args.task] if args.task else own_preset(checked, start)
    flags = ("nh", "depth", "epochs", "lr", "averaging", "augment", "batch_size", "amp")
    given = {flag: getattr(args, flag) for flag in flags if getattr(args, flag) is not None}
    given.setdefault("amp", preset.amp and fast_bfloat16(device))
    if args.epochs:
        given["until_done"] = False
    if start:  # which knows where the characters are
        given |= {"nh": start.model.nh, "depth": start.model.depth, "flat": None}
    preset = replace(preset, preprocess=checked.preprocess, length=length, **given)
    print("\n".join(checked.notes))
    if not args.task:
        print(
            f"images are {checked.preprocess} (--trim, --height, --width)\n"
            f"network: nh {preset.nh}, depth {preset.depth} (--nh, --depth)\n"
            f"training: {'up to ' if preset.until_done else ''}{preset.epochs} epochs (--epochs), "
            f"batches of {preset.batch_size} (--batch-size), {preset.augment} augmentation "
            f"(--augment), {'mixed precision' if preset.amp else 'float32'} (--amp)"
        )
    if args.task:
        return Plan(checked, preset, checked.test)
    part, held_out = hold_out(checked.train, args.seed)
    return Plan(checked._replace(train=part), preset, held_out)


def hold_out(samples, seed):
    """(those to train on, those to choose the epoch with) of a list of `Sample`s."""
    shuffled = random.Random(seed).sample(samples, len(samples))
    share = HELD_OUT if len(samples) >= FEW else 2 * HELD_OUT
    count = min(MOST_HELD_OUT, max(1, round(share * len(samples))))
    return shuffled[count:], shuffled[:count]


def starting_point(args):
    """The `model.Recogniser` that a training goes on from, None for a new network.

    Without --weights, images of one's own are learnt by the general network.
    """
    if args.weights == Path("none"):
        args.weights = None
    elif not (args.weights or args.task or args.nh or args.depth or args.width):
        args.weights, args.fine_tune = SHIPPED_WEIGHTS["general"], True
    return load_checkpoint(args.weights) if args.weights else None


def first_recogniser(args, plan, start):
    """The `model.Recogniser` that a training begins with.

    Args:
        plan: a `Plan`.
        start: see `prepare`.
    """
    checked, preset = plan.checked, plan.preset
    if start and not args.fine_tune:
        converter = start.converter.replaced(length=preset.length, ngrams=None)
        return replace(start, converter=converter, task=args.task, half=args.half)
    turned = any(map(is_right_to_left, checked.alphabet))
    converter = CTCLabelConverter(
        checked.alphabet,
        length=preset.length,
        right_to_left=turned,
        expect_kinds=preset.expect_kinds,
    )
    if start:
        network, known = fitted(start, checked.alphabet, preset.preprocess.height)
        print(f"{known} of {len(checked.alphabet)} characters are known to {args.weights}")
    else:
        height = preset.preprocess.height
        network = MicroNet(preset.nh, preset.depth, converter.nclass, height)
    return Recogniser(network, converter, preset.preprocess, args.task, args.half)
