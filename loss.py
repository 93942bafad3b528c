"""What is minimised: the CTC loss on logits, of all classes or of a sample of them."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from ctc_label_converter import BLANK

# With more classes than 4 times this, a step trains the classes of its batch and as many
# others, drawn at random: the last layer would cost far more than all the rest.
SAMPLED = 256
# CTC alone settles in its first steps on the columns where each character is
# emitted. On some seeds that is a glyph's edge, from where the network sees half of
# the glyph: U is J and b is p for good, or only blanks come out. Smoothed targets
# keep all columns in play until the features can tell which sees the most.
SMOOTHING, SMOOTHING_STEPS = 0.03, 150


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


def batch_logits(network, images, batch, nclass):
    """What the loss of a training batch is taken of; of many classes, a sample.

    Args:
        network: a `model.MicroNet`, or what stands for it.
        images: (N, 3, H, W) float, normalised, on its device.
        batch: the `collatefn.Batch` that they are of.
        nclass: number of all classes.

    Returns:
        (logits, targets) for `CTCLoss`.
    """
    if nclass <= 4 * SAMPLED:
        return network(images, batch.widths), batch.targets
    classes, targets, correction = sample_classes(batch.targets, nclass)
    logits = network(images, batch.widths, classes.to(images.device))
    return logits + correction.to(images.device), targets
