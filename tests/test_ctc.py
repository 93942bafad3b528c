"""Encoding, decoding, the probability of a text, and the loss."""

from itertools import groupby, product

import numpy as np
import pytest
import torch

from ctc_label_converter import BLANK, CTCLabelConverter
from loss import CTCLoss

ALPHABET = "ab "


def softmax(logits):
    exponentials = np.exp(logits)
    return exponentials / exponentials.sum(-1, keepdims=True)


def test_encode_numbers_the_alphabet_from_1():
    targets, lengths = CTCLabelConverter(ALPHABET).encode(["ba ", "a"])
    assert targets.tolist() == [2, 1, 3, 1]
    assert lengths.tolist() == [3, 1]
    with pytest.raises(ValueError, match="'c'"):
        CTCLabelConverter(ALPHABET).encode(["abc"])


def test_decode_against_the_definition():
    """Text, character and text probabilities, by enumeration of all paths."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (30, 5, 4))
    columns = rng.integers(1, 6, 30)
    readings = CTCLabelConverter(ALPHABET).decode(logits, columns)
    for scores, width, reading in zip(logits, columns, readings, strict=True):
        probs = softmax(scores[:width])
        runs, start = [], 0
        for k, run in groupby(probs.argmax(1)):
            length = len(list(run))
            if k != BLANK:
                runs.append((ALPHABET[k - 1], probs[start : start + length, k].max()))
            start += length
        assert reading.text == "".join(character for character, _ in runs)
        assert reading.char_confidences == pytest.approx([best for _, best in runs])
        total = 0.0
        for path in product(range(4), repeat=int(width)):
            text = "".join(ALPHABET[k - 1] for k, _ in groupby(path) if k != BLANK)
            if text == reading.text:
                total += np.prod(probs[np.arange(width), path])
        assert reading.confidence == pytest.approx(total)


def test_decode_does_not_see_padding_or_neighbours():
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 3, (8, 12, 4)).astype(np.float32)
    columns = rng.integers(1, 13, 8)
    converter = CTCLabelConverter(ALPHABET)
    together = converter.decode(logits, columns)
    for i, width in enumerate(columns):
        [alone] = converter.decode(logits[i : i + 1, :width])
        assert alone.text == together[i].text
        assert alone.confidence == pytest.approx(together[i].confidence)


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
