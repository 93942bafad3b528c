"""Word accuracy and character error rate, tables and pictures."""

import numpy as np
import pytest
from helpers import picture
from PIL import ImageFont

from ctc_label_converter import CTCLabelConverter
from metric import (
    TEMPERATURES,
    EpochResult,
    caption_font,
    character_error_rate,
    confusions,
    contact_sheet,
    edit_distance,
    fit_temperature,
    save_progress,
    wilson_interval,
    word_accuracy,
)


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


def test_wilson_interval():
    # 81 of 263: the example of Newcombe, Statistics in Medicine 17 (1998), table I.
    assert wilson_interval(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(1.0, 5000) == pytest.approx((0.99923, 1.0), abs=1e-5)


def test_confusions_name_what_was_read_for_what():
    pairs = confusions(["A0C", "AC", "XABC", "ok"], ["AOC", "ABC", "ABC", "ok"])
    assert pairs == {("O", "0"): 1, ("B", ""): 1, ("", "X"): 1}


def test_confusions_of_texts_of_other_lengths():
    assert confusions(["abd", "ab"], ["abc", "abb"]) == {("c", "d"): 1, ("b", ""): 1}


def test_a_table_that_is_open_elsewhere_is_a_warning(tmp_path, in_use, capsys):
    results = [EpochResult(i, 2.0, 1.0, 0.5, 0.1, 0.01, 1.5) for i in (1, 2)]
    table, curves = tmp_path / "a.csv", tmp_path / "a.png"
    save_progress(table, curves, results[:1])
    in_use(table)
    save_progress(table, curves, results)
    assert len(table.read_text(encoding="utf-8").splitlines()) == 2
    assert "a.csv: cannot be written" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.unfinished"))


def test_captions_of_any_script_are_shown_or_escaped():
    texts = ["plain", "中文", "देव", "\u2028x", "\udcff", "שלום", "𓀀"]
    sheet = contact_sheet([picture().convert("RGB")] * len(texts), texts)
    assert sheet.width > 64
    missing = bytes(ImageFont.load_default(14).getmask("\U0010ffff"))
    for text in texts:
        font, shown = caption_font(text)
        assert all(bytes(font.getmask(character)) != missing for character in shown)


def test_the_temperature_makes_confidences_as_likely_as_texts_are_right():
    """Logits made too sure by some factor are divided by it again."""
    rng = np.random.default_rng(0)
    probs = rng.dirichlet([0.15] * 4, (3000, 1))  # one column: its best class is the text
    classes = [rng.choice(4, p=p[0]) for p in probs]
    labels = ["".join("ab1"[k - 1] for k in [k] if k) for k in classes]
    converter = CTCLabelConverter("ab1")
    for factor in (TEMPERATURES[3], TEMPERATURES[8]):
        batches = [(np.log(probs[:1000]) * factor, [1] * 1000, labels[:1000])]
        batches += [(np.log(probs[1000:]) * factor, [1] * 2000, labels[1000:])]
        batches = [(logits, np.array(columns), own) for logits, columns, own in batches]
        assert fit_temperature(converter, batches) == pytest.approx(factor, rel=0.11)
        upper = [(*rest, [label.upper() for label in own]) for *rest, own in batches]
        assert fit_temperature(converter, upper, str.upper) == fit_temperature(converter, batches)
