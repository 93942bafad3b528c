"""Text to CTC targets, network output to text. Works on numpy arrays."""

from typing import NamedTuple

import numpy as np

BLANK = 0  # the class of the CTC blank


class Reading(NamedTuple):
    """What was read in one image.

    text: the characters.
    confidence: probability of the whole text, 0 to 1.
    char_confidences: one probability a character, 0 to 1.
    """

    text: str
    confidence: float
    char_confidences: list[float]


class CTCLabelConverter:
    """Converts between texts and classes: class 0 is the blank, the alphabet follows.

    Args:
        alphabet: a string of distinct characters.
    """

    def __init__(self, alphabet):
        self.alphabet = alphabet
        self.nclass = len(alphabet) + 1
        self._class_of = {character: i for i, character in enumerate(alphabet, 1)}
        self._character_of = np.array(["", *alphabet])

    def encode(self, labels):
        """Labels to CTC targets.

        Returns:
            (targets, lengths): int64 arrays, the classes of all labels in a row and
            the number of characters of each.

        Raises ValueError for a character outside the alphabet.
        """
        try:
            targets = [self._class_of[character] for label in labels for character in label]
        except KeyError as error:
            raise ValueError(f"{error.args[0]!r} is not in the alphabet") from None
        return np.array(targets, np.int64), np.array([len(label) for label in labels], np.int64)

    def decode(self, logits, columns=None):
        """Greedy decoding: the best class of each column, repeats merged, blanks removed.

        Args:
            logits: (N, T, nclass) float array.
            columns: (N,) number of columns of each image that count, None: all T.

        Returns:
            N `Reading`s. A character's confidence is the highest probability among
            the columns that were merged into it; the text's is the sum over all
            alignments of `text_probability`.
        """
        count, total, _ = logits.shape
        probs = np.exp(logits - logits.max(2, keepdims=True))
        probs /= probs.sum(2, keepdims=True)
        if columns is None:
            columns = np.full(count, total)
        inside = np.arange(total) < columns[:, None]
        classes = np.where(inside, probs.argmax(2), BLANK)
        best = probs.max(2)

        # A run of equal classes starts wherever the class differs from the one before.
        starts = np.ones_like(inside)
        starts[:, 1:] = classes[:, 1:] != classes[:, :-1]
        first = np.flatnonzero(starts)
        run_class, run_best = classes.ravel()[first], np.maximum.reduceat(best.ravel(), first)
        is_character = run_class != BLANK
        targets, char_confidences = run_class[is_character], run_best[is_character]
        lengths = np.bincount(first[is_character] // total, minlength=count)

        confidences = text_probability(probs, targets, columns, lengths)
        ends = np.cumsum(lengths)
        return [
            Reading(
                "".join(self._character_of[targets[a:b]]),
                float(confidence),
                char_confidences[a:b].tolist(),
            )
            for a, b, confidence in zip(ends - lengths, ends, confidences, strict=True)
        ]


def text_probability(probs, targets, columns, lengths):
    """Probability of texts, over all their alignments with the columns.

    The forward pass of CTC (Graves et al., ICML 2006, section 4.1): the best single
    alignment says little, since a character may as well start one column later.

    Args:
        probs: (N, T, nclass) probabilities.
        targets: (sum of lengths,) the classes of all texts in a row.
        columns: (N,) columns of each image that count.
        lengths: (N,) characters of each text.

    Returns:
        (N,) float64, 0 to 1.
    """
    count, total, _ = probs.shape
    rows = np.arange(count)
    # Each text with blanks around its characters, and blanks behind it up to the longest.
    states = np.full((count, 2 * lengths.max(initial=0) + 1), BLANK)
    row = np.repeat(rows, lengths)
    position = np.arange(len(targets)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    states[row, 2 * position + 1] = targets
    # The blank between two different characters may be left out.
    skip = np.zeros(states.shape)
    skip[:, 2:] = (states[:, 2:] != BLANK) & (states[:, 2:] != states[:, :-2])

    emission = probs[rows[:, None, None], np.arange(total)[:, None], states[:, None]]
    forward = np.zeros((count, states.shape[1] + 2))  # two zeros before the first state
    forward[:, 2] = 1  # as if a blank stood before the first column
    for t in range(total):
        step = forward[:, 2:] + forward[:, 1:-1] + skip * forward[:, :-2]
        step *= emission[:, t]
        forward[:, 2:] = np.where((t < columns)[:, None], step, forward[:, 2:])
    # A text ends in its last character or in the blank after it.
    return np.minimum(
        forward[rows, 2 * lengths + 2] + forward[rows, 2 * lengths + 1] * (lengths > 0), 1
    )
