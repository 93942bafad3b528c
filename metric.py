"""How good readings are: accuracy, its interval, error rate, confusions, calibration."""

import math
from collections import Counter
from difflib import SequenceMatcher


def edit_distance(a, b):
    """Levenshtein distance: fewest insertions, deletions and substitutions from a to b."""
    if a == b:
        return 0
    previous = list(range(len(b) + 1))
    for i, character in enumerate(a, 1):
        current = [i]
        for j, other in enumerate(b, 1):
            current.append(
                min(previous[j] + 1, current[j - 1] + 1, previous[j - 1] + (character != other))
            )
        previous = current
    return previous[-1]


def word_accuracy(texts, labels):
    """Share of ``texts`` equal to their label, 0 to 1. Both are non-empty lists of strings."""
    return sum(text == label for text, label in zip(texts, labels, strict=True)) / len(labels)


def character_error_rate(texts, labels):
    """Edit distance to the labels over their length, both summed over all. 0 is perfect."""
    errors = sum(edit_distance(text, label) for text, label in zip(texts, labels, strict=True))
    return errors / sum(map(len, labels))


def wilson_interval(share, count):
    """The 95 % interval of a ``share`` seen in ``count`` trials (Wilson, JASA 1927).

    Returns (low, high), 0 to 1.
    """
    z = 1.96
    centre = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return tuple((centre + sign * half) / (1 + z * z / count) for sign in (-1, 1))


def confusions(texts, labels):
    """What was read for what, as a Counter of (right, read) pairs of strings.

    Mostly single characters; "" stands for one that was missed or made up.
    """
    pairs = Counter()
    for text, label in zip(texts, labels, strict=True):
        if text == label:
            continue
        if len(text) == len(label):
            pairs.update((a, b) for a, b in zip(label, text, strict=True) if a != b)
        else:
            for kind, a, b, c, d in SequenceMatcher(None, label, text, False).get_opcodes():
                if kind != "equal":
                    pairs[label[a:b], text[c:d]] += 1
    return pairs


def expected_calibration_error(confidences, right, bins=15):
    """How far confidences are from the share of right readings (Guo et al., ICML 2017).

    Args:
        confidences: floats, 0 to 1.
        right: for each whether the reading was right.
        bins: of equal width, whose mean confidence and share are compared.

    Returns:
        the mean difference, weighted by the readings in each bin, 0 to 1.
    """
    gaps = Counter()
    for confidence, is_right in zip(confidences, right, strict=True):
        gaps[min(int(confidence * bins), bins - 1)] += confidence - is_right
    return sum(map(abs, gaps.values())) / len(confidences)
