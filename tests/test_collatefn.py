"""Batches: their order, on a device or not, and what augmentation does to them."""

from itertools import chain

import pytest
import torch

from collatefn import (
    AUGMENTATIONS,
    MAX_COLUMN_ROWS,
    Collate,
    EpochOrder,
    OnDevice,
    TextImageDataset,
    affine_grid,
    clamped_sample,
    evaluation_loader,
    grid_sample,
    machine_memory,
)
from ctc_label_converter import CTCLabelConverter
from dataset import DataOptions, check
from image import PATCH, Preprocess


def test_an_epoch_has_each_image_once_whatever_the_number_of_processes():
    widths = [4 * (8 + i % 5) for i in range(203)]
    for world in (1, 2, 3):
        orders = [
            EpochOrder(widths, 10, torch.Generator().manual_seed(1), rank, world)
            for rank in range(world)
        ]
        epochs = []
        for _ in range(2):
            ranks = [list(order) for order in orders]
            epochs.append(ranks)
            assert sorted(i for batches in ranks for batch in batches for i in batch) == list(
                range(203)
            )
            assert all(len(batches) == len(orders[0]) for batches in ranks)
            shares = [sum(map(len, together)) for together in zip(*ranks, strict=True)]
            assert shares == orders[0].totals
        assert epochs[0] != epochs[1]
        # The same batches, however they are shared.
        together = [sorted(chain(*shares)) for shares in zip(*epochs[0], strict=True)]
        if world == 1:
            alone = together
        elif world == 2:
            assert together == alone
    with pytest.raises(ValueError, match="too few"):
        EpochOrder([32], 10, torch.Generator(), 0, 2)


def test_images_on_the_device_make_the_same_batches(digits):
    checked = check(digits, DataOptions(), ["test"])
    dataset = TextImageDataset(checked.test, Preprocess())
    converter = CTCLabelConverter(checked.alphabet)
    indices = [5, 2, 77]
    ours = OnDevice(dataset, converter, "cpu").__getitems__(indices)
    theirs = Collate(converter)([dataset[i] for i in indices])
    for one, other in zip(ours[:4], theirs[:4], strict=True):
        assert torch.equal(one, other)
    assert ours[4:] == theirs[4:]
    assert (ours.indices, ours.whole) == (indices, 3)


def test_wide_images_are_evaluated_in_small_batches(digits):
    checked = check(digits, DataOptions(height=48, width=2048), ["test"])
    loader = evaluation_loader(checked, checked.test, CTCLabelConverter(checked.alphabet))
    sizes = [batch.images.shape for batch in loader]
    assert sum(size[0] for size in sizes) == len(checked.test)
    assert max(size[0] * size[2] * size[3] / PATCH for size in sizes) <= MAX_COLUMN_ROWS


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentation_moves_a_little(name):
    torch.manual_seed(0)
    images = -torch.ones(8, 3, 32, 128)  # a white square on black
    images[:, :, 12:20, 60:68] = 1
    for _ in range(20):
        changed = AUGMENTATIONS[name](images)
        assert changed.shape == images.shape
        assert changed.min() >= -1.001
        assert changed.max() <= 1.001
        light = changed[:, 0] + 1
        centres = (light.sum(1) * torch.arange(128.0)).sum(1) / light.sum((1, 2))
        assert (centres - 63.5).abs().max() < 14
    assert torch.equal(changed, images) == (name == "none")


def test_places_beyond_the_edges_are_the_edges_without_such_padding():
    """As on a device whose grid_sample has no border padding."""
    torch.manual_seed(0)
    images = torch.rand(4, 3, 32, 80)
    grid = affine_grid(images, 1.5)
    assert (grid.abs() > 1).any()
    torch.testing.assert_close(clamped_sample(images, grid), grid_sample(images, grid))


def test_a_container_has_the_memory_of_its_limit(tmp_path, monkeypatch):
    whole = machine_memory()
    limit = tmp_path / "memory.max"
    monkeypatch.setattr("collatefn.CGROUP_LIMITS", [str(limit), str(tmp_path / "missing")])
    for content, expected in (("max\n", whole), ("1000000\n", 1000000), (str(2**62), whole)):
        limit.write_text(content, encoding="ascii")
        assert machine_memory() == min(expected, whole)
