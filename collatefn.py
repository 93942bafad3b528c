"""Batch collation: samples of a TextImageDataset to the tensors of a batch."""

from typing import NamedTuple

import numpy as np
import torch


class Batch(NamedTuple):
    """N images and their labels.

    images: (N, 3, H, W) uint8, W the widest image's width.
    widths: (N,) int64, pixels of each image without its padding.
    targets: (sum of target_lengths,) int64, the classes of all labels in a row.
    target_lengths: (N,) int64.
    labels: N strings.
    """

    images: torch.Tensor
    widths: torch.Tensor
    targets: torch.Tensor
    target_lengths: torch.Tensor
    labels: list[str]


class Collate:
    """The ``collate_fn`` of a DataLoader over a TextImageDataset.

    Args:
        converter: a `CTCLabelConverter`.
    """

    def __init__(self, converter):
        self.converter = converter

    def __call__(self, samples):
        """[((3, H, W) uint8 array, label)] -> `Batch`.

        Narrower images are padded on the right with their last column.
        """
        arrays, labels = zip(*samples, strict=True)
        widths = [array.shape[2] for array in arrays]
        images = np.empty((len(arrays), *arrays[0].shape[:2], max(widths)), np.uint8)
        for image, array, width in zip(images, arrays, widths, strict=True):
            image[:, :, :width] = array
            image[:, :, width:] = array[:, :, -1:]
        targets, target_lengths = self.converter.encode(labels)
        return Batch(
            torch.from_numpy(images),
            torch.tensor(widths),
            torch.from_numpy(targets),
            torch.from_numpy(target_lengths),
            list(labels),
        )
