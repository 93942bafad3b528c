"""The CTC loss, on logits."""

import torch
from torch import nn
from torch.nn import functional as F

from ctc_label_converter import BLANK


class CTCLoss(nn.Module):
    """Connectionist Temporal Classification (Graves et al., ICML 2006).

    Attributes:
        smoothing: share of a uniform distribution that each column's probabilities
            are also pulled towards, 0 to 1 (label smoothing, Szegedy et al., arXiv
            1512.00567). In the first steps it keeps CTC from settling on columns
            at a glyph's edge: see train.py.
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
