"""Alphabets by name and from files, and what texts are usual."""

import itertools
import math
import random
import string
import subprocess
import sys

import pytest
from helpers import ENVIRONMENT, ROOT

from keys import (
    ALPHABETS,
    NGRAMS,
    Ngrams,
    as_usual,
    check_alphabet,
    choose_ngrams,
    count_ngrams,
    load_alphabet,
    normalised,
    oddities,
    reordered,
)


def test_named_alphabets():
    sizes = {name: len(set(load_alphabet(name))) for name in ALPHABETS}
    assert sizes == {
        "digits": 10, "digits_upper": 36, "alnum59": 59, "alnum62": 62, "ascii": 95,
        "gb2312_level1": 3755,
    }  # fmt: skip
    chinese = load_alphabet("gb2312_level1")
    codes = [character.encode("gb2312") for character in chinese]
    assert codes == sorted(codes)
    assert chinese[0] + chinese[-1] == "啊座"  # the ends of level 1 in the standard's table
    assert set(load_alphabet("alnum62")) - set(load_alphabet("alnum59")) == set("IOl")


@pytest.mark.parametrize("ending", ["", "\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_alphabet_from_a_file(tmp_path, ending, encoding):
    path = tmp_path / "keys.txt"
    path.write_bytes(("äß 中7" + ending).encode(encoding))
    assert load_alphabet(str(path)) == "äß 中7"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "empty"),
        ("\n", "empty"),
        ("aba", "'a'"),
        ("ab\ncd", "line break"),
        ("a\u2028", "break"),
    ],
)
def test_refused_files(tmp_path, content, reason):
    path = tmp_path / "keys.txt"
    path.write_bytes(content.encode("utf-8"))
    with pytest.raises(ValueError, match=reason) as error:
        load_alphabet(str(path))
    assert "keys.txt" in str(error.value)


def test_unknown_names_and_other_encodings(tmp_path):
    with pytest.raises(ValueError, match="digits_upper"):
        load_alphabet("klingon")
    (tmp_path / "latin1.txt").write_bytes("ä".encode("latin-1"))
    with pytest.raises(ValueError, match="UTF-8"):
        load_alphabet(str(tmp_path / "latin1.txt"))


@pytest.mark.parametrize(
    ("text", "expected", "kinds"),
    [
        ("plain 12", "plain 12", []),
        ("e\u0301te\u0301", "été", ["decomposed characters"]),
        ("\ufeffAB\u200b12\u200d", "AB12", ["zero-width characters"]),
        ("ＡＢ１２", "AB12", ["full-width characters"]),  # noqa: RUF001
        ('"AB ""12"""', 'AB "12"', ["quotes around them"]),
        (" AB ", "AB", ["spaces at an edge"]),
        ("क्\u200dष", "क्\u200dष", []),  # which the script needs
    ],
)
def test_labels_that_look_equal_have_one_form(text, expected, kinds):
    assert normalised(text) == expected
    assert oddities(text) == kinds
    assert oddities(expected) == []


def test_no_alphabet_holds_a_control_character():
    for character in "\t\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029\0":
        with pytest.raises(ValueError, match=f"U\\+{ord(character):04X}"):
            check_alphabet("ab" + character)


@pytest.mark.parametrize(
    ("text", "looks"),
    [
        ("שלום", "םולש"),
        ("שלום 123", "123 םולש"),
        ("abc", "abc"),
        ("12-34", "12-34"),
        ("אב12ג", "ג12בא"),
    ],
)
def test_texts_from_right_to_left_are_turned_and_back(text, looks):
    assert reordered(text)[0] == looks
    turned, places = reordered(looks)
    assert turned == text
    assert [looks[place] for place in places] == list(text)


@pytest.mark.parametrize(
    ("read", "usual"),
    [
        ("1O05", "1005"),
        ("No. l4I3-o2 2O18", "No. 1413-o2 2018"),
        ("10l", "10l"),  # litres
        ("lO", "lO"),
        ("A1O", "A1O"),
        ("AMoUNT SeCret", "AMOUNT Secret"),
        ("cHURCH Church iPhone Macdonald's McDonald", "CHURCH Church iPhone Macdonald's McDonald"),
        ("sO", "sO"),
    ],
)
def test_characters_that_look_alike_go_with_their_neighbours(read, usual):
    assert as_usual(read) == usual


def test_nothing_but_look_alikes_is_changed():
    rng, looks = random.Random(0), str.maketrans("oOlI", "0011")
    for _ in range(3000):
        text = "".join(rng.choices("0011oOlIsScC" + string.ascii_letters + " .-", k=9))
        usual = as_usual(text)
        for before, after in zip(text, usual, strict=True):
            is_case = before.swapcase() == after and before.lower() in "cosuvwxz"
            assert before == after or is_case or before.translate(looks) == after
        assert as_usual(usual) == usual


def test_the_probabilities_of_all_texts_are_1_in_sum():
    """Of those of seven characters at most; "?" stands for all that no label has."""
    texts = ["".join(text) for size in range(8) for text in itertools.product("ab?", repeat=size)]
    for longest in (1, 2, 4):
        ngrams = Ngrams(count_ngrams(["a", "ab", "abb", "b", "bab"], longest))
        total = sum(math.exp(ngrams.log_probability(text)) for text in texts)
        assert 0.95 < total < 1
    usual, *others = ngrams.weights(["abb", "a?b", "bba"])
    assert usual == 1 > max(others) > min(others) > 0


def test_only_texts_that_follow_rules_are_expected_to_be_like_labels():
    rng = random.Random(0)
    drawn = ["".join(rng.choices(string.digits, k=5)) for _ in range(2000)]
    assert choose_ngrams(drawn[:1800], drawn[1800:]) is None
    rising = ["".join(sorted(text)) for text in drawn]
    ngrams = choose_ngrams(rising[:1800], rising[1800:])
    usual, other = Ngrams(ngrams).weights(["24468", "24418"])
    assert usual == 1 > 10 * other
    texts = ["".join(rng.choices(string.printable[:90], k=40)) for _ in range(2000)]
    assert len(count_ngrams(texts, 4)) == NGRAMS + len(set("".join(texts))) + 1
    as_it_looks = choose_ngrams(["שלום"] * 9, ["שלום"])
    assert "ול" in as_it_looks
    assert "לו" not in as_it_looks


@pytest.mark.parametrize("counts", [{"a": -1}, {"ab": 2}, {"": 2}, {3: 2}, {"a": "b"}, {"a": 0.5}])
def test_what_is_no_table_of_ngrams_is_refused(counts):
    with pytest.raises(ValueError, match="n-gram"):
        Ngrams(counts)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process")
def test_ctrl_c_during_an_import_comes_when_the_package_is_whole(tmp_path):
    """In the midst of it native code, such as onnx's, aborts with a traceback."""
    package = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nwhole = True\n"
    (tmp_path / "slow_package.py").write_text(package, encoding="utf-8")
    script = (
        "import signal, sys, keys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # as `command` does
        "try:\n    keys.import_or_say('slow_package', '')\n"
        "except KeyboardInterrupt:\n    print(sys.modules['slow_package'].whole)\n"
        "print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False,
        timeout=60, env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (done.stdout.split(), done.stderr) == (["True", "True"], "")
