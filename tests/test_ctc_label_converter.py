"""Encoding, decoding and searching, against the enumeration of all alignments."""

import tracemalloc
from itertools import groupby, product

import numpy as np
import pytest

from ctc_label_converter import (
    BLANK,
    KINDS,
    CTCLabelConverter,
    Reading,
    Search,
    columns_needed,
    softmax,
    vote,
)
from keys import count_ngrams, length_range, load_alphabet, reordered

ALPHABET = "ab1"
COLUMNS = 5


@pytest.fixture(scope="module")
def logits():
    return np.random.default_rng(0).normal(0, 1.5, (25, COLUMNS, len(ALPHABET) + 1))


def texts_by_definition(probs):
    """{text: sum of the probabilities of the paths that spell it}."""
    texts = {}
    for path in product(range(len(ALPHABET) + 1), repeat=COLUMNS):
        text = "".join(ALPHABET[k - 1] for k, _ in groupby(path) if k != BLANK)
        texts[text] = texts.get(text, 0) + np.prod(probs[np.arange(COLUMNS), path])
    return texts


def test_encode_numbers_the_alphabet_from_1():
    targets, lengths = CTCLabelConverter(ALPHABET).encode(["ba1", "a"])
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
        probs = np.exp(scores[:width])
        probs /= probs.sum(1, keepdims=True)
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


def test_one_image_is_decoded_as_among_others():
    rng, converter = np.random.default_rng(1), CTCLabelConverter(ALPHABET)
    for columns in (1, 2, 3, 7, 32, 101):  # texts on both sides of what is short
        many = rng.normal(0, 3, (20, columns, 4)).astype(np.float32)
        for i, reading in enumerate(converter.decode(many)):
            [alone] = converter.decode(many[i : i + 1])
            assert alone.text == reading.text
            assert alone.confidence == pytest.approx(reading.confidence, rel=1e-6)
            assert alone.char_confidences == pytest.approx(reading.char_confidences, rel=1e-6)


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


@pytest.mark.parametrize(
    ("search", "allowed"),
    [
        (Search(beam=1000, top=4), lambda text: True),
        (Search(beam=1000, shortest=2, longest=3), lambda text: 2 <= len(text) <= 3),
        (Search(beam=1000, subset="xb1"), lambda text: "a" not in text),
        (Search(lexicon=("ab", "b1a", "zz", "1"), top=2), {"ab", "b1a", "1"}.__contains__),
        (Search(beam=1000, lexicon=("ab", "1b", "aab"), longest=2), {"ab", "1b"}.__contains__),
    ],
)
def test_the_best_text_of_those_allowed(logits, search, allowed):
    readings = CTCLabelConverter(ALPHABET).search(logits, search)
    for image, reading in zip(logits, readings, strict=True):
        texts = texts_by_definition(softmax(image))
        texts = {text: p for text, p in texts.items() if allowed(text)}
        if search.subset or search.lexicon:  # conditional on what the constraint admits
            total = sum(texts.values())
            texts = {text: p / total for text, p in texts.items()}
        best = sorted(texts.items(), key=lambda item: -item[1])[: search.top]
        found = [(reading.text, reading.confidence), *reading.alternatives]
        assert [text for text, _ in found] == [text for text, _ in best]
        assert [p for _, p in found] == pytest.approx([p for _, p in best])
        assert len(reading.char_confidences) == len(reading.text)


def test_texts_of_another_length_are_searched_for_the_known_one(logits):
    columns = np.tile(np.arange(1, COLUMNS + 1), len(logits) // COLUMNS)
    greedy = CTCLabelConverter(ALPHABET).decode(logits, columns)
    known = CTCLabelConverter(ALPHABET, length=2)
    kept = 0
    for i, reading in enumerate(known.decode(logits, columns)):
        if len(greedy[i].text) == 2:
            assert reading == greedy[i]
            kept += 1
        elif columns[i] == 1:  # too narrow for two
            assert (reading.text, reading.confidence) == ("", 0.0)
        else:
            [best] = CTCLabelConverter(ALPHABET).search(
                logits[i : i + 1, : columns[i]], Search(shortest=2, longest=2)
            )
            assert reading == best
            assert len(best.text) == 2
    assert 0 < kept < len(greedy)
    [free] = CTCLabelConverter(ALPHABET).search(logits[:1], Search(shortest=1, longest=9))
    assert known.search(logits[:1], Search(shortest=1, longest=9)) == [free]
    for wrong in (0, -1, 2.5, "4"):
        with pytest.raises(ValueError, match="length"):
            CTCLabelConverter(ALPHABET, length=wrong)


def test_a_beam_finds_what_greedy_decoding_misses():
    # Graves et al. 2006, figure 2: the best path spells nothing, yet "a" is more probable.
    logits = np.log([[[0.55, 0.45 - 2e-9, 1e-9, 1e-9]] * 2])
    converter = CTCLabelConverter(ALPHABET)
    [greedy], [beam] = converter.decode(logits), converter.search(logits, Search())
    assert (greedy.text, beam.text) == ("", "a")
    assert greedy.confidence == pytest.approx(0.55**2)
    assert beam.confidence == pytest.approx(1 - 0.55**2, abs=1e-6)


def test_temperature_changes_confidences_not_texts(logits):
    sharp, flat = (CTCLabelConverter(ALPHABET, t).decode(logits) for t in (0.5, 2.0))
    assert [r.text for r in sharp] == [r.text for r in flat]
    assert sum(r.confidence for r in sharp) > sum(r.confidence for r in flat)
    assert [r.text for r in CTCLabelConverter(ALPHABET).search(logits, Search(subset="a"))]


def test_constraints_that_admit_nothing_are_refused(logits):
    converter = CTCLabelConverter(ALPHABET)
    with pytest.raises(ValueError, match="subset"):
        converter.search(logits, Search(subset="xyz"))
    with pytest.raises(ValueError, match="lexicon"):
        converter.search(logits, Search(lexicon=("xyz", "ab"), longest=1))
    [reading, *_] = converter.search(logits, Search(shortest=COLUMNS + 1))
    assert (reading.text, reading.confidence) == ("", 0.0)


def test_columns_needed():
    assert [columns_needed(label) for label in ("a", "ab", "aa", "aaa", "abba")] == [1, 2, 3, 5, 5]


def test_a_range_of_lengths():
    assert [length_range(text) for text in ("4", "3-8", "12-12")] == [(4, 4), (3, 8), (12, 12)]
    for text in ("", "0", "8-3", "-3", "a", "3-x"):
        with pytest.raises(ValueError):
            length_range(text)


def test_texts_from_right_to_left_come_back_as_they_are_written():
    """However they are read: greedily, by a beam, from a lexicon; each confidence in its place."""
    alphabet, label = "אבג12", "אב12ג"
    converter = CTCLabelConverter(alphabet, right_to_left=True)
    targets, _ = converter.encode([label])
    assert "".join(alphabet[k - 1] for k in targets) == "ג12בא"
    logits = np.full((1, 2 * len(label), len(alphabet) + 1), -4.0)
    for i, k in enumerate(targets):  # the further to the right, the surer
        logits[0, 2 * i, k] = 2.0 + i
        logits[0, 2 * i + 1, BLANK] = 9.0
    lexicon = Search(lexicon=(label, "אב"))
    [greedy], [beam], [word] = (
        converter.decode(logits),
        converter.search(logits, Search(top=2)),
        converter.search(logits, lexicon),
    )
    assert greedy.text == beam.text == word.text == label
    columns = {"ג": 0, "1": 1, "2": 2, "ב": 3, "א": 4}
    assert sorted(label, key=columns.get) == sorted(
        label, key=dict(zip(label, greedy.char_confidences, strict=True)).get
    )
    assert CTCLabelConverter(alphabet).decode(logits)[0].text == "ג12בא"


def test_where_usual_kinds_of_text_are_expected_they_weigh_more(logits):
    """By definition: each text's probability times its weight, as a share of all."""

    def weight(text):
        kinds = [weight for characters, weight in KINDS.items() if set(text) <= set(characters)]
        return kinds[-1] if text and kinds else 1

    assert [weight(text) for text in ("", "11", "ab", "b", "a1")] == [1, 600, 25, 25, 6]
    expecting = CTCLabelConverter(ALPHABET, expect_kinds=True)
    converter = CTCLabelConverter(ALPHABET)
    usual = converter.decode(logits)
    readings, best = expecting.decode(logits), 0
    for image, plain, reading in zip(logits, usual, readings, strict=True):
        weighed = {
            text: probability * weight(text)
            for text, probability in texts_by_definition(softmax(image)).items()
        }
        assert reading.text == plain.text or weighed[reading.text] > weighed[plain.text]
        best += reading.text == max(weighed, key=weighed.get)
        # The least probable texts are not compared, so its share comes out a little too large.
        assert weighed[reading.text] / sum(weighed.values()) - 1e-9 < reading.confidence <= 1
    changed = sum(a.text != b.text for a, b in zip(usual, readings, strict=True))
    assert changed > 0
    assert best > 20  # of 25: where it is too improbable in itself, nobody looks at it
    sure = 20 * logits
    for plain, reading in zip(converter.decode(sure), expecting.decode(sure), strict=True):
        assert reading.text == plain.text or plain.confidence < 0.999


def doubtful(looks, hint, share, alphabet):
    """(1, T, nclass) logits of a text whose characters look like either of two texts'."""
    looks, hint = reordered(looks)[0], reordered(hint)[0]
    probs = np.full((1, 3 * len(looks), len(alphabet) + 1), 1e-5)
    probs[:, :, BLANK] = 1
    for column, (look, other) in enumerate(zip(looks, hint, strict=True)):
        probs[0, 3 * column + 1, BLANK] = 1e-5
        probs[0, 3 * column + 1, alphabet.index(other) + 1] = 1 - share
        probs[0, 3 * column + 1, alphabet.index(look) + 1] = share if look != other else 1
    return np.log(probs)


@pytest.mark.parametrize(
    ("looks", "hint", "text"),
    [
        ("STATIQN", "STATION", "STATION"),
        ("Hofel", "Hotel", "Hotel"),
        ("TOTAI 40", "TOTAL 40", "TOTAL 40"),
        ("XK7VQ2", "XK7VO2", "XK7VQ2"),  # a code
        ("Qnfkc", "Qntkc", "Qnfkc"),  # neither is a word
        ("K1XV92", "KIXV92", "KIXV92"),  # of a code's strokes, and what looks like 9 and 2,
        ("a9h4kt", "agh4kt", "agh4kt"),  # most are letters
        ("a9h 4kt", "agh 4kt", "agh 4kt"),
        ("2B4H7K", "ZB4H7K", "ZB4H7K"),
        ("K1992X", "KI992X", "K1992X"),
        ("27.1", "27.I", "27.1"),
        ("7+4=", "7145", "7+4="),  # marks of a number, where they belong
        ("-12:30", "112130", "-12:30"),
        ("12:3:", "12131", "12131"),
    ],
)
def test_what_looks_like_other_characters_is_read_as_usual_texts_have_them(looks, hint, text):
    """Where a character looks 3 to 2 like that of ``looks`` rather than that of ``hint``."""
    alphabet = load_alphabet("ascii")
    logits = doubtful(looks, hint, 0.6, alphabet)
    assert CTCLabelConverter(alphabet).decode(logits)[0].text == looks
    expecting = CTCLabelConverter(alphabet, expect_kinds=True)
    [reading], [found] = expecting.decode(logits), expecting.search(logits, Search(top=3))
    assert reading.text == found.text == text and len(found.alternatives) == 2
    assert found.confidence == pytest.approx(reading.confidence, abs=0.01)
    allowed = set(alphabet) - set(text) | set(looks)  # what is usual is not asked for
    [found] = expecting.search(logits, Search(top=3, subset="".join(allowed)))
    assert all(set(t) <= allowed for t, _ in (found[:2], *found.alternatives))
    shares = {(True, True): 1, (True, False): 0.6, (False, True): 0.4}
    expected = [shares[c == a, c == b] for c, a, b in zip(text, looks, hint, strict=True)]
    assert reading.char_confidences == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(
    ("looks", "hint", "share", "text"),
    [
        ("K0-118", "KO-118", 0.6, "KO-118"),
        ("K0-118", "KO-118", 0.999, "K0-118"),  # which nobody doubts
        ("KO-1I8", "KO-118", 0.6, "KO-118"),
        ("אב-108", "אב-1O8", 0.4, "אב-108"),
    ],
)
def test_doubtful_texts_are_read_as_the_labels_of_a_training_are(looks, hint, share, text):
    """Where a character looks like that of ``looks`` by a share, else like that of ``hint``."""
    labels = [f"KO-{number}" for number in range(100, 200)]
    labels += [f"אב-{number}" for number in range(100, 120)]
    alphabet = "".join(sorted({*"".join(labels), "I"}))
    logits = doubtful(looks, hint, share, alphabet)
    ngrams = count_ngrams([reordered(label)[0] for label in labels], 3)
    plain = CTCLabelConverter(alphabet, right_to_left=text[0] > "Z")
    expecting = plain.replaced(ngrams=ngrams)
    [reading], [before] = expecting.decode(logits), plain.decode(logits)
    [searched] = expecting.search(logits, Search(top=2))
    assert reading.text == searched.text == text and len(searched.alternatives) == 1
    assert expecting.replaced(ngrams=None).decode(logits) == [before]
    # Those that were found share their probability: none is lost or made up.
    [best] = plain.search(logits, Search(top=10))
    found = [p for _, p in (best[:2], *best.alternatives)] if share < 0.9 else [before.confidence]
    shares = [p for _, p in (reading[:2], *reading.rivals)]
    assert sum(shares) == pytest.approx(sum(found), abs=0.01)
    assert len(reading.char_confidences) == len(text)
    [fixed] = expecting.replaced(length=len(text)).decode(logits)
    assert {len(other) for other, _ in (fixed[:2], *fixed.rivals)} == {len(text)}


def test_what_no_beam_finds_is_taken_to_be_as_unusual_as_most_of_what_it_finds():
    """So a long text in doubt, of which there are thousands, is likely where it alone is usual."""
    labels = [f"AB-{number}-CD-{number}" for number in range(100, 400)]
    alphabet = "-0123456789ABCDl"
    logits = doubtful("AB-111-CD-111", "48-lll-C0-lll", 0.55, alphabet)
    plain = CTCLabelConverter(alphabet)
    [found] = plain.search(logits, Search(top=10))
    assert sum(p for _, p in (found[:2], *found.alternatives)) < 0.05
    [reading] = plain.replaced(ngrams=count_ngrams(labels, 4)).decode(logits)
    assert reading.text == "AB-111-CD-111" and 0.4 < reading.confidence < 0.8


def test_a_large_lexicon_takes_bounded_memory(logits):
    words = tuple(f"{'ab1' * 5}"[i % 7 : i % 7 + 5] + "a" * (i % 3) for i in range(20000))
    tracemalloc.start()
    CTCLabelConverter(ALPHABET).search(logits[:1], Search(lexicon=words))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60 * 2**20


def test_several_readings_of_an_image_vote():
    one, two, three = Reading("ab", 0.6, [1, 1]), Reading("c", 0.5, [0.7]), Reading("c", 0.4, [0.9])
    assert vote([one]) is one
    text, confidence, *rest = vote([one, two, three])
    assert (text, rest) == ("c", [[0.7], (), ()])
    assert confidence == pytest.approx(0.3)
    two, nothing = two._replace(alternatives=(("ab", 0.2), ("d", 0.1))), Reading("", 1.0, [])
    [text, confidence, _, others, _] = vote([one, two, nothing])
    assert (text, [other for other, _ in others]) == ("ab", ["", "c"])
    assert confidence == pytest.approx(0.8 / 3)
    assert vote([nothing, nothing]).text == ""
    one, two = Reading("No", 0.6, [1, 1], (), (("NO", 0.3),)), Reading("NO", 0.5, [1, 1])
    text, confidence, _, others, _ = vote([one, two])
    assert (text, confidence, others) == ("NO", pytest.approx(0.4), ())


def test_a_gap_between_words_is_read_as_a_space():
    """Where nothing else expects one: a network of one's own has seen its spaces."""
    alphabet = ALPHABET + " "
    probs = np.full((1, 40, len(alphabet) + 1), 0.002)
    probs[..., alphabet.index(" ") + 1] = 0.03
    for column, k in zip((2, 5, 8, 11, 18, 21, 24, 27), (1, 2) * 4, strict=True):
        probs[0, column, k] = 9.0
    probs[..., BLANK] = 0.5
    logits = np.log(probs / probs.sum(2, keepdims=True))
    assert CTCLabelConverter(alphabet, expect_kinds=True).decode(logits)[0].text == "abab abab"
    assert CTCLabelConverter(alphabet).decode(logits)[0].text == "abababab"
    few = logits[:, 8:22]  # of four characters nobody knows which gap is usual
    assert CTCLabelConverter(alphabet, expect_kinds=True).decode(few)[0].text == "abab"
