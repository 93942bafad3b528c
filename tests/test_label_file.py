"""Labels in every form that people keep them in: what was written is what is read, or refused."""

import csv
import io
import json
from itertools import product

import pytest
from helpers import picture

from keys import find_separators
from label_file import LabelOptions, find_samples, read_label_file

TEXTS = ["8B14A", "two words", "a,b;c", 'say "x"', "ü中٣", "0012.50", "-7", "{x}"]


def folder_of(path, names):
    path.mkdir(parents=True)
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        picture().save(path / name)
    return path


def as_csv(rows, delimiter, quoting=csv.QUOTE_MINIMAL):
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter, quoting=quoting, lineterminator="\n").writerows(rows)
    return file.getvalue()


def as_icdar(rows):
    return "".join(f'{name}, "{text}"\n' for name, text in rows)


FORMS = {
    "labels.txt": lambda rows: "".join(f"{name}\t{text}\n" for name, text in rows),
    "gt.txt": lambda rows: "".join(f"{name} {text}\n" for name, text in rows),
    "icdar.txt": as_icdar,
    "comma.csv": lambda rows: as_csv(rows, ","),
    "header.csv": lambda rows: as_csv([("filename", "words"), *rows], ","),
    "quoted.csv": lambda rows: as_csv([("img", "plate_text"), *rows], ",", csv.QUOTE_ALL),
    "semicolon.csv": lambda rows: as_csv([("Image Path", "Label"), *rows], ";"),
    "two.csv": lambda rows: as_csv([("image", "stuff"), *rows], ","),
    "tab.tsv": lambda rows: as_csv([("file_name", "text"), *rows], "\t"),
    "turned.csv": lambda rows: as_csv([("text", "id"), *(row[::-1] for row in rows)], ","),
    "dict.json": lambda rows: json.dumps(dict(rows), ensure_ascii=False, indent=1),
    "list.json": lambda rows: json.dumps([{"image": n, "text": t, "w": 1} for n, t in rows]),
    "metadata.jsonl": lambda rows: "".join(
        json.dumps({"file_name": name, "text": text}) + "\n" for name, text in rows
    ),
}
PLACES = {  # how an image's name is written, and where it lies
    "beside": lambda i: (f"{i}.png", f"{i}.png"),
    "with spaces": lambda i: (f"my scan {i}.png", f"my scan {i}.png"),
    "below": lambda i: (f"images/{i:03d}.png", f"{i:03d}.png"),
    "without suffix": lambda i: (f"w{i}.png", f"w{i}"),
    "with backslashes": lambda i: (f"a b/{i}.png", f"a b\\{i}.png"),
}


@pytest.mark.parametrize(("form", "place"), list(product(FORMS, PLACES)))
def test_what_was_written_is_what_is_read(tmp_path, form, place):
    texts = [text.replace('"', "") for text in TEXTS] if form in ("icdar.txt",) else TEXTS
    names = [PLACES[place](i) for i in range(len(texts))]
    folder = folder_of(tmp_path / "a set", [name for name, _ in names])
    written = [(name, text) for (_, name), text in zip(names, texts, strict=True)]
    expected = [(folder / name, text) for (name, _), text in zip(names, texts, strict=True)]
    for mark, end in product((b"", b"\xef\xbb\xbf"), (b"\n", b"\r\n", b"\r", b"\r\r\n")):
        content = FORMS[form](written).encode("utf-8").replace(b"\n", end)
        (folder / form).write_bytes(mark + content)
        for data in (folder, folder / form):
            found = find_samples(data)
            assert not found.problems
            assert [(s.path, s.label) for s in found.samples["all"]] == expected
            assert f"{expected[0][0].name} is {texts[0]!r}" in found.notes[0]


def test_text_files_beside_the_images(tmp_path):
    images = ["a.png", "b.nrm.png", "sub/c.bin.png", "d e.jpg"]
    folder = folder_of(tmp_path / "lines", images)
    texts = {"a.gt.txt": "x", "b.gt.txt": "y z", "sub/c.gt.txt": "w", "d e.txt": "v\r\n"}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8", newline="")
    found = find_samples(folder)
    assert sorted(sample.label for sample in found.samples["all"]) == ["v", "w", "x", "y z"]
    (folder / "a.gt.txt").write_text("two\nlines\n", encoding="utf-8")
    (folder / "b.gt.txt").unlink()
    problems = sorted(map(str, find_samples(folder).problems))
    assert len(problems) == 2
    assert "a.gt.txt: has 2 lines of text" in problems[0]
    assert "b.nrm.png: has no text beside it" in problems[1]


@pytest.mark.parametrize("test", ["test.csv", "val.txt", "valid.csv", "dev.tsv"])
def test_which_files_are_the_test_set(tmp_path, test):
    folder = folder_of(tmp_path / "set", [f"{i}.png" for i in range(6)])
    for name, own in (("train.csv", range(4)), (test, range(4, 6))):
        delimiter = "," if name.endswith("csv") else "\t"
        rows = as_csv([(f"{i}.png", f"t{i}") for i in own], delimiter)
        (folder / name).write_text(rows, encoding="utf-8")
    samples = find_samples(folder).samples
    assert [s.label for s in samples["train"]] == ["t0", "t1", "t2", "t3"]
    assert [s.label for s in samples["test"]] == ["t4", "t5"]


def test_what_is_passed_over_is_said(tmp_path):
    folder = folder_of(tmp_path / "set", [f"{i}.png" for i in range(4)])
    (folder / "labels.csv").write_text("0.png,a\n1.png,b\n2.png,c\n", encoding="utf-8")
    (folder / "README.txt").write_text("Scans such as 0.png and its label", encoding="utf-8")
    assert find_samples(folder).notes[1:] == ["1 images of the folder are not named in it"]
    for name in ("train", "test", "val"):
        (folder / f"{name}.csv").write_text("0.png,a\n", encoding="utf-8")
    assert find_samples(folder).notes[1:] == ["not read: val.csv"]


def test_folders_with_their_own_label_files(tmp_path):
    for split, count in (("train", 3), ("validation", 2)):
        folder = folder_of(tmp_path / "set" / split, [f"{i}.png" for i in range(count)])
        lines = [json.dumps({"file_name": f"{i}.png", "text": f"{split}{i}"}) for i in range(count)]
        (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    samples = find_samples(tmp_path / "set").samples
    assert [s.label for s in samples["train"]] == ["train0", "train1", "train2"]
    assert [s.label for s in samples["test"]] == ["validation0", "validation1"]


def test_what_could_be_meant_in_two_ways_is_asked(tmp_path):
    folder = folder_of(tmp_path / "set", ["0.png", "1.png"])
    for name, content, fragments in [
        ("a.csv", "image,label,text\n0.png,3,x\n1.png,4,y\n", ["--text-column", "label, text"]),
        ("a.csv", "0.png,x,7\n1.png,y,8\n", ["3 columns", "--image-column 1 --text-column 2"]),
        ("a.txt", "0.png\tx\t7\n1.png\ty\t8\n", ["3 columns", "--text-column"]),
        ("a.txt", "0.png|x\n1.png|y\n", ["a.txt:1", "not understood"]),
        ("a.txt", "0.png\n1.png\n", ["a.txt:1", "no text behind the image"]),
        ("a.json", '[{"file": "0.png", "text": "x"', ["a.json", "no JSON"]),
    ]:
        (folder / name).write_text(content, encoding="utf-8")
        with pytest.raises(ValueError) as error:
            find_samples(folder / name)
        assert all(fragment in str(error.value) for fragment in fragments), error.value
        with pytest.raises(ValueError, match=name):
            find_samples(folder)
        (folder / name).unlink()
    (folder / "a.json").write_text('{"0.png": 12, "1.png": "x"}', encoding="utf-8")
    assert [str(p) for p in find_samples(folder).problems] == [
        f"{folder / 'a.json'}:1: holds no text in quotes for its image or its label"
    ]
    (folder / "a.json").unlink()
    (folder / "a.csv").write_text("image,label,text\n0.png,3,x\n1.png,4,y\n", encoding="utf-8")
    for column in ("text", "3"):
        samples = find_samples(folder, LabelOptions(text_column=column)).samples["all"]
        assert [sample.label for sample in samples] == ["x", "y"]
    (folder / "b.csv").write_text("0.png,x\n1.png,y\n", encoding="utf-8")
    (folder / "a.csv").write_text("image,text\n0.png,3\n1.png,4\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"which label file is meant, a.csv, b.csv"):
        find_samples(folder)


@pytest.mark.parametrize(
    ("stems", "expected"),
    [
        (["8npd5", "x7k2p"], ("", "")),
        (["8npd5-0", "x7k2p-1", "k2pd5-2"], ("-", "")),
        (["8npd5-1", "8npd5-2", "x7k2p-1", "x7k2p-2"], ("-", "")),
        (["8npd5_3f2a", "x7k2p_99bc"], ("_", "")),
        (["8npd5", "8npd5 (1)", "x7k2p"], (" ", "")),
        (["two words", "plain"], ("", "")),
        (["AB-988-JC", "AG-010-AA"], ("", "-")),
        (["AB-12", "CD-34", "EF-56"], ("", "-")),
        (["00578.5", "02535.4", "05193.3"], ("", ".")),
        (["17_word_72394", "18_other_72395"], ("", "_")),
        (["well-known", "plain"], ("", "-")),
    ],
)
def test_where_a_label_ends_in_a_file_name(stems, expected):
    assert find_separators(stems) == expected


def test_a_separator_or_a_regex_says_where_labels_end(tmp_path):
    folder = folder_of(tmp_path / "set", ["17_word_72394.png", "18_other_72395.png"])
    with pytest.raises(ValueError, match=r"17_word_72394.*--label-separator.*--label-regex"):
        find_samples(folder)

    def labels(**options):
        samples = find_samples(folder, LabelOptions(**options)).samples["all"]
        return [sample.label for sample in samples]

    assert labels(separator="") == ["17_word_72394", "18_other_72395"]
    assert labels(separator="_") == ["17", "18"]
    assert labels(regex=r"^\d+_(.*)_\d+$") == ["word", "other"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a.png\t1\nb.png 12\n", ":2: no tab"),
        (b"a.png\t1\n\t2\n", ":2: no image path"),
        (b"a.png\t1\na.png\t\n", ":2: the label is empty"),
        (b"a.png\t1\nb.png\t\xe4\n", ":2: is not UTF-8"),
        (b"\xff\xfea\0", ":1: is not UTF-8"),
        (b"\n\n", "empty"),
        (None, "cannot be read"),
    ],
)
def test_bad_label_files(tmp_path, content, message):
    path = tmp_path / "train.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_label_file(path)
    assert str(path) in str(error.value)
