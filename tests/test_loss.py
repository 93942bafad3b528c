"""The loss against what it is defined by, a sample of classes against all, the best epoch."""

import contextlib
import copy

import numpy as np
import pytest
import torch

from collatefn import Batch
from ctc_label_converter import CTCLabelConverter
from loss import (
    SAMPLED,
    CTCLoss,
    MovingAverage,
    Optimizer,
    best_epoch,
    losses_of_parts,
    orthogonal,
    sample_classes,
)
from metric import EpochResult
from model import MicroNet

ALPHABET = "ab "


def test_loss_ignores_padded_columns_and_fits_the_probability():
    torch.manual_seed(0)
    logits = torch.randn(3, 10, 4, requires_grad=True)
    columns = torch.tensor([10, 4, 6])
    converter = CTCLabelConverter(ALPHABET)
    readings = converter.decode(logits.detach().numpy(), columns.numpy())
    targets, lengths = map(torch.from_numpy, converter.encode([r.text for r in readings]))
    loss = CTCLoss()(logits, targets, columns, lengths)
    expected = -np.mean([np.log(reading.confidence) for reading in readings])
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    CTCLoss(smoothing=0.1)(logits, targets, columns, lengths).backward()
    for gradient, width in zip(logits.grad, columns, strict=True):
        assert gradient[:width].abs().min() > 0
        assert gradient[width:].abs().max() == 0 if width < 10 else True


@pytest.mark.parametrize(("size", "count"), [(1, 5), (2, 2), (3, 2), (5, 1), (9, 1)])
def test_a_batch_in_parts_has_the_loss_and_gradient_of_the_whole(size, count):
    torch.manual_seed(0)
    network, widths = MicroNet(8, 1, 4), torch.tensor([304, 188, 256, 124, 288])
    network.begin_training(keep_statistics=True)
    labels, converter = ["ab", "a", "b a", "", "bb"], CTCLabelConverter(ALPHABET)
    targets, lengths = map(torch.from_numpy, converter.encode(labels))
    batch = Batch(torch.randn(5, 3, 32, 304), widths, targets, lengths, labels, [*range(5)], 5)
    loss = CTCLoss()(network(batch.images, widths), targets, batch.columns, lengths)
    loss.backward()
    expected = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    parts = list(batch.parts(size))
    assert len(parts) == count
    assert [label for part in parts for label in part.labels] == labels
    assert [i for part in parts for i in part.indices] == batch.indices
    assert all(0 <= part.images.shape[3] / part.widths.max() - 1 < 1 / 8 for part in parts)
    whole = sum(losses_of_parts(network, parts, CTCLoss(), 4, contextlib.nullcontext(), 1))
    whole.backward()
    assert whole.item() == pytest.approx(loss.item(), rel=1e-5)
    for parameter, gradient in zip(network.parameters(), expected, strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-3, atol=1e-5)


def test_parts_have_few_widths_but_that_of_images_which_have_one():
    def parts(*widths):
        none = torch.zeros(len(widths), dtype=torch.int64)
        labels, images = [""] * len(widths), torch.zeros(len(widths), 3, 4, max(widths))
        return Batch(images, torch.tensor(widths), none[:0], none, labels, [], 1).parts(1)

    widths = range(4, 1600, 4)
    assert len({part.images.shape[3] for part in parts(*widths)}) < len(widths) / 5
    assert {part.images.shape[3] for part in parts(76, 76, 76)} == {76}


def test_a_network_that_reads_already_gets_neither_kind_of_start():
    criterion = CTCLoss()
    for flat_steps, expected in ((None, (0, 0)), (0, (0.03, 0)), (10, (0, 1))):
        criterion.smoothing = criterion.flat = 0.0
        criterion.set_step(0, flat_steps)
        assert (criterion.smoothing, criterion.flat) == expected


def test_flat_start_shares_the_columns_out_evenly():
    torch.manual_seed(0)
    logits = torch.randn(2, 8, 4, requires_grad=True)
    targets, columns, lengths = (
        torch.tensor([1, 2, 3, 1]),
        torch.tensor([8, 6]),
        torch.tensor([1, 3]),
    )
    loss = CTCLoss(flat=1.0)(logits, targets, columns, lengths)
    log_probs = logits.detach().log_softmax(2)
    first = -log_probs[0, :, 1].mean()
    second = -log_probs[1, range(6), [2, 2, 3, 3, 1, 1]].mean() * 3
    assert loss.item() == pytest.approx(((first + second) / 2).item(), rel=1e-5)
    loss.backward()
    assert logits.grad[1, 6:].abs().max() == 0


def test_sampled_classes_are_a_fair_share_of_all():
    torch.manual_seed(0)
    model, images = MicroNet(4, 1, 2000).eval(), torch.randn(2, 3, 32, 32)
    targets = torch.tensor([5, 9, 5, 1999])
    classes, places, correction = sample_classes(targets, 2000)
    assert classes[places].tolist() == targets.tolist()
    assert classes[0] == 0
    assert len(classes.unique()) == len(classes) == 1 + 3 + SAMPLED
    with torch.no_grad():
        assert torch.allclose(model(images, classes=classes), model(images)[:, :, classes])
    # Equal logits: the sample weighs as much as all classes together.
    assert correction.exp().sum().item() == pytest.approx(2000, rel=1e-4)


def test_without_muon_the_optimizer_is_adamw():
    torch.manual_seed(0)
    model = MicroNet(nh=4, depth=1, nclass=5)
    other = copy.deepcopy(model)
    optimizer = Optimizer(model, muon=0)
    matrices = [p for p in other.parameters() if p.ndim > 1]
    vectors = [{"params": [p for p in other.parameters() if p.ndim < 2], "weight_decay": 0}]
    theirs = torch.optim.AdamW([{"params": matrices}, *vectors], betas=(0.9, 0.99))
    for lr in (0.01, 0.02, 0.005):
        optimizer.lr = lr
        for group in theirs.param_groups:
            group["lr"] = lr
        for own, their in zip(model.parameters(), other.parameters(), strict=True):
            own.grad.copy_(torch.randn_like(own))
            their.grad = own.grad.clone()
        optimizer.step()
        theirs.step()
    for own, their in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(own, their, atol=1e-6)


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (16, 16)])
def test_muon_steps_are_nearly_orthogonal(shape):
    values = torch.linalg.svdvals(
        orthogonal(torch.randn(2, *shape, generator=torch.manual_seed(0)))
    )
    assert values.median() == pytest.approx(1, abs=0.3)
    assert values.max() < 1.3


@pytest.mark.parametrize("decay", [0, 0.99])
def test_the_average_spans_few_steps_at_first_and_many_later(decay):
    model = MicroNet(nh=4, depth=1, nclass=5)
    average = MovingAverage(model, Optimizer(model, muon=0).numbers, decay)

    def after(steps, value):
        torch.nn.init.constant_(model.linear.bias, value)
        for _ in range(steps):
            average.update()
        return average.module.linear.bias[0].item()

    after(1, 0.0)
    assert after(30, 1.0) > 0.9  # with 0.99 from the first step on it would be 0.26
    after(2000, 0.0)
    assert after(100, 1.0) == pytest.approx(1 - decay**100)


def test_the_loss_chooses_among_epochs_that_accuracy_cannot_tell_apart():
    def best(*epochs):
        rows = [
            EpochResult(i, 1.0, loss, accuracy, 0.0, 0.01, 1.0)
            for i, (accuracy, loss) in enumerate(epochs, 1)
        ]
        return best_epoch(rows, images=500).epoch

    assert best((1.0, 0.010), (0.998, 0.005)) == 2  # one image of 500
    assert best((1.0, 0.005), (1.0, 0.010)) == 1
    assert best((0.9, 0.3), (0.8, 0.2)) == 1  # 50 of them
    assert best((0.8, 0.2), (0.9, 0.3)) == 2
