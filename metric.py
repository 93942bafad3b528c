"""How good readings are: word accuracy and character error rate."""


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
