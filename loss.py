"""What is minimised, how and how long: the CTC loss, the optimizer, its rate, the best epoch."""

import copy
import math
from contextlib import nullcontext

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.adamw import adamw

from ctc_label_converter import BLANK
from metric import wilson_interval

# With more classes than 4 times this, a step trains the classes of its batch and as many
# others, drawn at random: the last layer would cost far more than all the rest.
SAMPLED = 256
# CTC alone settles in its first steps on the columns where each character is
# emitted. On some seeds that is a glyph's edge, from where the network sees half of
# the glyph: U is J and b is p for good, or only blanks come out. Smoothed targets
# keep all columns in play until the features can tell which sees the most.
SMOOTHING, SMOOTHING_STEPS = 0.03, 150
CLIP = 5.0  # largest norm of the gradient
# Images of a step that go through the network together where they share no statistics, on the
# CPU: they are padded to little over their own widest, and more of a layer stays in the cache.
PART = 8
MUON = 3.4445, -4.7750, 2.0315  # of the polynomial that drives singular values near to 1
# A training that ends when it is done: share of its epochs without a lower loss before the rate
# falls; the fewest steps and epochs without it, and epochs of the fall: of a new network, of one
# that keeps its statistics, whose loss is soon as low as it gets, and of that with few images.
PATIENCE = 0.25
PATIENT_STEPS, PATIENT_EPOCHS, LEAST_FALL = (100, 50, 50), (4, 2, 1), (4, 4, 3)
# Of few images: the character error rate of those held out below which the falling rate does the
# rest, and the steps that must have been taken, for so little is learnt in the fall alone.
ENOUGH, ENOUGH_STEPS = 0.1, 200
# Nats per image by which a loss must fall to be lower, and share of it. That share is for up to
# 100 images: the loss of more changes less by chance, with the root of their number.
LEAST_GAIN, LEAST_SHARE = 0.01, 0.03
NOTHING = 0.02  # nats per image: nearly all are read, and the falling rate does the rest


class CTCLoss(nn.Module):
    """Connectionist Temporal Classification (Graves et al., ICML 2006).

    Attributes:
        smoothing: share of a uniform distribution that each column's probabilities
            are also pulled towards, 0 to 1 (label smoothing, Szegedy et al., arXiv
            1512.00567). See SMOOTHING.
        flat: weight of the flat start, 0 to 1, the rest is CTC's. A flat start (as of
            hidden Markov models of speech, Young et al., The HTK Book) shares an
            image's columns out evenly among its characters and takes the cross
            entropy. It shows each class where to look while CTC, with thousands of
            classes, still finds nothing better than blanks.
    """

    def __init__(self, smoothing=0.0, flat=0.0):
        super().__init__()
        self.smoothing = smoothing
        self.flat = flat

    def set_step(self, step, flat_steps):
        """Set smoothing and flat for a step of a training: one of them, falling to 0.

        Args:
            step: number of the step, from 0.
            flat_steps: steps that a flat start takes, 0 for smoothed targets instead, None for
                neither: a network that reads already would only unlearn.
        """
        if flat_steps is None:
            self.smoothing = self.flat = 0.0
        elif flat_steps:
            self.flat = max(0.0, 1 - step / flat_steps)
        else:
            self.smoothing = SMOOTHING * max(0.0, 1 - step / SMOOTHING_STEPS)

    def forward(self, logits, targets, columns, target_lengths):
        """Mean over the images of the loss of each, in nats.

        Args:
            logits: (N, T, nclass).
            targets: (sum of target_lengths,) int64, no blanks.
            columns: (N,) int64, columns of each image that count, at most T.
            target_lengths: (N,) int64.

        Returns:
            a scalar; infinite where a text does not fit its columns.
        """
        log_probs = logits.log_softmax(2)
        if log_probs.device.type == "mps":  # has no CTC
            log_probs = log_probs.cpu()
        # The lengths stay on the CPU, where CTC wants them.
        per_image = F.ctc_loss(
            log_probs.transpose(0, 1),
            targets.to(log_probs.device),
            columns,
            target_lengths,
            blank=BLANK,
            reduction="none",
        )
        loss = per_image.mean()
        if not self.smoothing and not self.flat:
            return loss
        place = torch.arange(log_probs.shape[1])
        inside = place < columns[:, None]  # (N, T)
        if self.flat:
            position = (place + 0.5) * target_lengths[:, None] / columns[:, None]
            position = torch.minimum(position.long(), target_lengths[:, None] - 1)
            starts = target_lengths.cumsum(0) - target_lengths
            own = targets[starts[:, None] + position]  # (N, T), the class of each column
            flat = -log_probs.gather(2, own[:, :, None].to(log_probs.device))[:, :, 0]
            flat = (flat * inside.to(log_probs.device)).sum(1)
            flat = (flat * (target_lengths / columns).to(log_probs.device)).mean()
            loss = (1 - self.flat) * loss + self.flat * flat
        if self.smoothing:
            uniform = -(log_probs.mean(2) * inside.to(log_probs.device)).sum(1).mean()
            loss = (1 - self.smoothing) * loss + self.smoothing * uniform
        return loss


def sample_classes(targets, nclass):
    """The classes that a step trains: the blank, those of ``targets`` and SAMPLED others.

    Sampled softmax (Jean et al., ACL 2015, arXiv 1412.2007).

    Args:
        targets: (S,) int64, classes from 1.
        nclass: number of all classes.

    Returns:
        (classes, targets, correction): (K,) int64; the targets as places in it; (K,)
        what to add to the logits, so that the others stand for all that were left out.
    """
    present, places = targets.unique(return_inverse=True)
    absent = torch.ones(nclass, dtype=torch.bool)
    absent[present] = False
    absent[BLANK] = False
    absent = absent.nonzero()[:, 0]
    others = absent[torch.randperm(len(absent))[:SAMPLED]]
    classes = torch.cat([torch.zeros(1, dtype=torch.int64), present, others])
    correction = torch.zeros(len(classes))
    correction[1 + len(present) :] = math.log(len(absent) / max(1, len(others)))
    return classes, places + 1, correction


def batch_logits(network, batch, nclass):
    """What the loss of a training batch is taken of; of many classes, a sample.

    Args:
        network: a `model.MicroNet`, or what stands for it.
        batch: a `collatefn.Batch`, its images as float, normalised, on the network's device.
        nclass: number of all classes.

    Returns:
        (logits, targets) for `CTCLoss`.
    """
    if nclass <= 4 * SAMPLED:
        return network(batch.images, batch.widths), batch.targets
    classes, targets, correction = sample_classes(batch.targets, nclass)
    logits = network(batch.images, batch.widths, classes.to(batch.images.device))
    return logits + correction.to(logits.device), targets


def losses_of_parts(network, parts, criterion, nclass, autocast, world):
    """The losses of a batch's parts, one after the other; their sum is the mean of its images.

    Args:
        network, nclass: see `batch_logits`.
        parts: of a batch, as `batch_logits` takes them, or the batch alone.
        criterion: a `CTCLoss`.
        autocast: the context of the network's pass.
        world: processes, whose gradients are averaged; their shares may differ by an image.
    """
    for part in parts:
        with autocast:
            logits, targets = batch_logits(network, part, nclass)
        loss = criterion(logits.float(), targets, part.columns, part.target_lengths)
        yield loss * (len(part.labels) * world / part.whole)


def orthogonal(matrices):
    """(N, rows, columns) matrices with all their singular values near to 1, as Muon drives them."""
    turned = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if turned else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = MUON
    for _ in range(5):
        square = x @ x.mT
        mixed = torch.baddbmm(square, square, square, beta=b, alpha=c)
        x = torch.baddbmm(x, mixed, x, beta=a)
    return x.mT if turned else x


def parts_of(vector, tensors):
    """The parts of a vector that has as many numbers as some tensors, in their shapes."""
    parts = vector.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def in_one_vector(tensors):
    """A vector of the numbers of some tensors, which become its parts."""
    vector = torch.cat([tensor.detach().flatten() for tensor in tensors])
    for tensor, part in zip(tensors, parts_of(vector, tensors), strict=True):
        tensor.data = part
    return vector


class Numbers:
    """A network's weights as one vector, the statistics of its batch normalisation as another.

    What is done to all of them, some 40 tensors even of the smallest network, is one call then.

    Args:
        model: a `model.MicroNet`, on its device. Its tensors become parts of the vectors.

    Attributes:
        weights, statistics: the two vectors.
        tensors: the parts of the weights: first those that are vectors, then the others, last
            those that mix channels, of these the patches' first.
        flat, deep: where the second and the third kind of them begin.
    """

    def __init__(self, model):
        mixing = [model.patches.conv.weight, *(b.pointwise.conv.weight for b in model.blocks)]
        rest = [p for p in model.parameters() if all(p is not own for own in mixing)]
        self.tensors = [*sorted(rest, key=lambda parameter: parameter.ndim > 1), *mixing]
        self.weights = in_one_vector(self.tensors)
        self.statistics = in_one_vector([b for b in model.buffers() if b.is_floating_point()])
        self.flat = sum(parameter.numel() for parameter in rest if parameter.ndim < 2)
        self.deep = sum(parameter.numel() for parameter in rest)


class Optimizer:
    """Muon for the weights that mix channels, AdamW for all others.

    AdamW: Loshchilov and Hutter, arXiv 1711.05101. Muon, momentum whose steps are orthogonal
    matrices: Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks",
    2024, https://kellerjordan.github.io/posts/muon/.

    It is none of `torch.optim`'s, which load PyTorch's compiler when they are made: with what
    that takes to end, a fifteenth of a whole training of the simple task.

    Args:
        model: a `model.MicroNet`, on its device.
        muon: Muon's rate, in AdamW's. 0: AdamW for all.

    Attributes:
        lr: AdamW's rate, of the next step.
        numbers: the model's `Numbers`.
        gradient: of its weights, as one vector, to which each backward pass adds.
        param_groups: what `torch.amp.GradScaler` asks for.
    """

    MOMENTUM, BETAS, EPSILON, DECAY = 0.95, (0.9, 0.99), 1e-8, 0.01

    def __init__(self, model, muon):
        self.lr, self.muon = 0.0, muon
        self.numbers = numbers = Numbers(model)
        weights = numbers.weights
        weights.grad = self.gradient = torch.zeros_like(weights)
        for layer in model.modules():  # normalisation takes their bias away, or has its own
            if isinstance(layer, nn.Conv2d):
                layer.bias.requires_grad_(False)
        gradients = parts_of(self.gradient, numbers.tensors)
        for tensor, gradient in zip(numbers.tensors, gradients, strict=True):
            tensor.grad = gradient
        self.param_groups = [{"params": [weights]}]
        # AdamW's are the vectors, then the weights that decay; those after them are Muon's.
        plain = numbers.deep if muon else len(weights)
        self.parts = (slice(numbers.flat), 0.0), (slice(numbers.flat, plain), self.DECAY)
        self.mixing, patches = slice(plain, None), model.patches.conv.weight.numel()
        square = -1, model.nh, model.nh
        self.shapes = (slice(patches), (1, model.nh, -1)), (slice(patches, None), square)
        self.state = {
            "mean": torch.zeros_like(weights[:plain]),
            "square": torch.zeros_like(weights[:plain]),
            "momentum": torch.zeros_like(weights[plain:]),
            "steps": torch.zeros(2, device=weights.device),
        }

    @torch.no_grad()
    def step(self):
        weights, gradient, state = self.numbers.weights, self.gradient, self.state
        for (part, decay), steps in zip(self.parts, state["steps"], strict=True):
            adamw(
                [weights[part]], [gradient[part]], [state["mean"][part]], [state["square"][part]],
                [], [steps], fused=weights.device.type != "mps", amsgrad=False, maximize=False,
                lr=self.lr, beta1=self.BETAS[0], beta2=self.BETAS[1], eps=self.EPSILON,
                weight_decay=decay,
            )  # fmt: skip
        weights, gradient = weights[self.mixing], gradient[self.mixing]
        momentum = state["momentum"].mul_(self.MOMENTUM).add_(gradient)
        direction = gradient + self.MOMENTUM * momentum
        for part, shape in self.shapes if self.muon else ():
            matrices = direction[part].view(shape)
            rate = self.lr * self.muon * max(1, matrices.shape[1] / matrices.shape[2]) ** 0.5
            weights[part].view(shape).add_(orthogonal(matrices), alpha=-rate)

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        for name, own in self.state.items():
            own.copy_(state[name])


class MovingAverage:
    """The exponential moving average of a model's weights and batch norm statistics.

    At a high learning rate it reads far better than the weights of any one step. A decay of
    0.99 spans 100 steps, in which a small data set is seen thirty times over, so it begins
    with fewer: (1 + n) / (10 + n) after n steps, as TensorFlow's ExponentialMovingAverage does.
    PyTorch's AveragedModel does the same; its bookkeeping takes ten times as long.

    Args:
        model: what is averaged, a `model.MicroNet` on its device.
        numbers: its `Numbers`.
        decay: per step, in the long run; 0 for the weights as they are.

    Attributes:
        module: a copy of the model with the average of its weights.
        steps: that were averaged.
    """

    def __init__(self, model, numbers, decay):
        self.module, self.decay, self.steps = copy.deepcopy(model), decay, 0
        own = Numbers(self.module)
        self.pairs = [(own.weights, numbers.weights), (own.statistics, numbers.statistics)]
        buffers = zip(self.module.buffers(), model.buffers(), strict=True)
        self.counts = [pair for pair in buffers if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self):
        """Take the weights as they are now into the average."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps)) if self.steps else 0
        for average, value in self.pairs:
            average.lerp_(value, 1 - decay)
        for average, value in self.counts:  # how many batches the statistics are of
            average.copy_(value)
        self.steps += 1

    def state_dict(self):
        return {"module": self.module.state_dict(), "steps": self.steps}

    def load_state_dict(self, state):
        self.module.load_state_dict(state["module"])
        self.steps = state["steps"]


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


def fall_of(results, preset, steps, images):
    """How long the fall of the rate takes with which a training ends that is done.

    The rate falls when the loss of the held-out images has not for a quarter of the epochs, at
    least PATIENT_EPOCHS and PATIENT_STEPS, or when next to nothing is left of it, or of few images
    ENOUGH is read, and so early that it has reached 0 after the preset's epochs (Hu et al.,
    "MiniCPM", arXiv 2404.06395, call that warm-up, stable, decay).

    Args:
        results: a `metric.EpochResult` for each epoch.
        preset: a `Preset`, whose ``fall`` says how long, and ``epochs`` how many at most.
        steps: of an epoch.
        images: that are held out.

    Returns:
        the epochs that the fall takes, 0 where it is too early.
    """
    epochs, lowest, waited = len(results), math.inf, 0
    share = LEAST_SHARE * math.sqrt(min(1, 100 / images))
    for result in results:  # the average's loss creeps down long after all is learnt
        better = result.test_loss < min(lowest - LEAST_GAIN, lowest * (1 - share))
        waited = 0 if better else waited + 1
        lowest = result.test_loss if better else lowest
    left = preset.epochs - epochs
    kind = preset.keep_statistics + preset.few
    length = max(LEAST_FALL[kind], round(preset.fall * epochs))
    patient = max(PATIENCE * epochs, PATIENT_STEPS[kind] / steps, PATIENT_EPOCHS[kind])
    read = preset.few and results[-1].cer < ENOUGH and epochs * steps >= ENOUGH_STEPS
    if waited < patient and lowest >= NOTHING and not read and length < left:
        return 0
    return min(left, length)


def best_epoch(results, images):
    """The `EpochResult` of the lowest loss; accuracy decides where it can tell epochs apart.

    Of one epoch after the other: a better one reads more than the 95 % interval of the best so
    far allows for, or no fewer than that, at a lower loss. Where one image in 500 is read or
    not, the loss sees how sure the network is of all of them.

    Args:
        results: a `metric.EpochResult` for each epoch, one at least.
        images: of which the accuracies are.
    """
    best = results[0]
    for row in results[1:]:
        low, high = wilson_interval(best.word_accuracy, images)
        level = row.word_accuracy >= low and row.test_loss < best.test_loss
        if level or row.word_accuracy > max(high, best.word_accuracy):
            best = row
    return best


def reason_to_stop(results, best, stop_at, patience):
    """Why a training ends before its last epoch, None where it does not.

    Args:
        results: a `metric.EpochResult` for each epoch.
        best: the `best_epoch` of them.
        stop_at: a word accuracy, None for any.
        patience: epochs that may be no better than the best, None for any number.
    """
    accuracy, waited = results[-1].word_accuracy, len(results) - best.epoch
    if stop_at and accuracy >= stop_at:
        return f"stopped: the word accuracy is {accuracy:.4f} (--stop-at)"
    if patience and waited >= patience:
        return f"stopped: no better for {waited} epochs (--patience)"
    return None


def precision(amp, device):
    """(dtype, context for the forward pass, `GradScaler`) of mixed precision, or of float32."""
    if not amp:
        return torch.float32, nullcontext(), torch.amp.GradScaler(device.type, enabled=False)
    bfloat16 = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)
    kind = torch.bfloat16 if bfloat16 else torch.float16
    scaler = torch.amp.GradScaler(device.type, enabled=kind == torch.float16)
    return kind, torch.autocast(device.type, kind), scaler


def take_step(optimizer, scaler, losses):
    """One step down the gradient of the sum of ``losses``, an iterable.

    Each is taken, and its gradient, when the one before it is done with.

    Returns:
        (the sum, whether its gradient is finite: else nothing is changed).
    """
    gradient, total = optimizer.gradient.zero_(), 0.0
    for loss in losses:
        scaler.scale(loss).backward()
        total += loss.detach()
    scaler.unscale_(optimizer)
    norm = gradient.norm().item()
    finite = math.isfinite(norm)  # of all processes: their gradients are one by now
    if finite and norm > CLIP:
        gradient.mul_(CLIP / norm)
    if finite:
        scaler.step(optimizer)
    scaler.update()
    return total, finite
