"""Word accuracy and character error rate."""

import pytest

from metric import character_error_rate, edit_distance, word_accuracy


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("", "", 0), ("abc", "", 3), ("kitten", "sitting", 3), ("abcd", "bcd", 1), ("ab", "ba", 2)],
)
def test_edit_distance(a, b, distance):
    assert edit_distance(a, b) == edit_distance(b, a) == distance


def test_one_missing_character_is_one_error():
    # Compared position by position, every character of "bcd" would be wrong.
    assert character_error_rate(["bcd", "xy"], ["abcd", "xy"]) == pytest.approx(1 / 6)
    assert word_accuracy(["bcd", "xy"], ["abcd", "xy"]) == 0.5
