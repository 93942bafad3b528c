"""How a training goes: what suits which data, the optimizers, their rates, and its end."""

import math
from dataclasses import dataclass

import torch

from image import Preprocess

CLIP = 5.0  # largest norm of the gradient
# A training that ends when it is done: share of its epochs without a lower loss, and the
# fewest steps, before the rate falls; how long the fall is, in the epochs before it.
PATIENCE, PATIENT_STEPS, FALL = 0.25, 100, 0.4
# Nats per image, and share of it, by which a loss must fall to be lower.
LEAST_GAIN, LEAST_SHARE = 0.01, 0.03
NOTHING = 0.01  # nats per image: there is no more to gain


@dataclass(frozen=True)
class Preset:
    """How a network is built and trained.

    Attributes:
        preprocess: the `Preprocess` of its images.
        nh, depth: of the `model.MicroNet`.
        epochs: times that each image is trained on.
        lr: peak learning rate.
        averaging: decay per step of the weights' exponential average, see train.py.
        augment: one of `collatefn.AUGMENTATIONS`.
        power: of the cosine that the learning rates follow.
        flat: steps over which a flat start gives way to CTC, 0 or None: see `loss.CTCLoss`.
        muon: rate of Muon in multiples of lr, 0 for AdamW alone.
        batch_size: images per step, over all processes.
        warm_up: steps over which the rates rise, a tenth of all at most.
        amp: compute in bfloat16 where the CPU has instructions for it.
        length: characters that every text has, None for any number.
        until_done: end when the loss of held-out images falls no more, see `fall_of`,
            after ``epochs`` at the latest; else after all of them.
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
    until_done: bool = False


PRESETS = {  # of the tasks in gen_image.py
    "simple": Preset(
        Preprocess(32), nh=16, depth=2, epochs=10, lr=0.02, averaging=0.97, flat=70, muon=3,
        warm_up=20,
    ),
    "complex": Preset(
        Preprocess(60, 160), nh=128, depth=8, epochs=4, lr=0.01, averaging=0.995, muon=2, amp=True,
        length=4,
    ),
    "chinese": Preset(
        Preprocess(32), nh=64, depth=4, epochs=3, lr=0.01, averaging=0.995, flat=250, length=4
    ),
    "general": Preset(
        Preprocess(32, trim=None), nh=160, depth=8, epochs=5, lr=0.01, averaging=0.999, flat=300,
        muon=2, amp=True,
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
    epochs = min(300, max(3, round(4700 / math.sqrt(images))))
    # Much background, or much detail: what varies in size, place and font is harder to read.
    hard = size.trim or size.height > 32
    # Looks are for many fonts: where there is one, they blur what tells 0 from O.
    small_set = "looks" if hard else "affine"
    if start:
        return Preset(
            size, start.model.nh, start.model.depth, epochs, lr=0.003, averaging=0.99,
            augment=small_set, muon=2, batch_size=32, amp=True, until_done=True,
        )  # fmt: skip
    return Preset(
        size,
        nh=128 if hard else 64,
        # Each block sees 4 pixels further to either side: half as much again as the height.
        depth=max(round(size.height / 6), 8 if hard else 1),
        epochs=epochs,
        lr=0.01,
        averaging=0.99,
        augment="shift" if images >= 20000 else small_set,
        flat=300,
        muon=2,
        batch_size=32,
        amp=True,
        until_done=True,
    )


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


def learning_rate(preset, step, steps, fall=None):
    """The rate of a step: a linear warm-up, then a cosine to a power, or level until the fall.

    Args:
        preset: a `Preset`. The higher its power, the earlier the cosine falls.
        step, steps: which of how many.
        fall: (first step of the fall, number of all steps) where the preset is ``until_done``.
    """
    warm_up = min(preset.warm_up, steps // 10 + 1)
    if step < warm_up:
        return preset.lr * (step + 1) / warm_up
    if preset.until_done:
        first, last = fall or (steps, steps + 1)
        return preset.lr * min(1, (last - step) / (last - first))
    progress = (step - warm_up) / (steps - warm_up)
    return preset.lr * (0.5 * (1 + math.cos(math.pi * progress))) ** preset.power


def fall_of(results, most, steps):
    """How long the fall of the rate takes with which a training ends that is done.

    The rate falls when the loss of the held-out images has not for a quarter of the epochs, or
    when next to nothing is left of it, and early enough that it has reached 0 after ``most``
    epochs (Hu et al., "MiniCPM", arXiv 2404.06395, call that warm-up, stable, decay).

    Args:
        results: a `metric.EpochResult` for each epoch.
        most: epochs.
        steps: of an epoch.

    Returns:
        the epochs that the fall takes, 0 where it is too early.
    """
    epochs, lowest, waited = len(results), math.inf, 0
    for result in results:  # the average's loss creeps down long after all is learnt
        better = result.test_loss < min(lowest - LEAST_GAIN, lowest * (1 - LEAST_SHARE))
        waited = 0 if better else waited + 1
        lowest = result.test_loss if better else lowest
    length = max(1, round(FALL * epochs))
    patient = max(PATIENCE * epochs, PATIENT_STEPS / steps, 2)
    if waited < patient and lowest >= NOTHING and epochs + length < most:
        return 0
    return min(most - epochs, length)


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
