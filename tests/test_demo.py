"""demo.py for people and for programs: folders, lists, labels, constraints, bad images."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ENVIRONMENT, ROOT, assert_clear_error, run_script
from PIL import Image

from infer_tool import SHIPPED_WEIGHTS

SAMPLES = ROOT / "assets" / "samples" / "simple"
NETWORK = ["--weights", SHIPPED_WEIGHTS["simple"].with_suffix(".onnx")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Samples below a folder, one of them broken, and a label file with one wrong label."""
    folder = tmp_path_factory.mktemp("demo") / "a folder"
    (folder / "deep" / "er").mkdir(parents=True)
    paths = sorted(SAMPLES.glob("*.png"))[:6]
    for i, path in enumerate(paths):
        shutil.copy(path, folder / ("deep/er" if i % 2 else "."))
    (folder / "broken.PNG").write_bytes(paths[0].read_bytes()[:200])
    (folder / "notes.txt").write_text("no image", encoding="utf-8")
    lines = [
        f"{'deep/er/' if i % 2 else ''}{path.name}\t{path.stem if i else 'wrong'}\n"
        for i, path in enumerate(paths)
    ]
    (folder / "labels.txt").write_text("".join(lines), encoding="utf-8")
    return folder


def test_a_folder_as_json_goes_on_after_a_broken_image(folder, tmp_path):
    process = run_script("demo.py", *NETWORK, folder, "--json", cwd=tmp_path)
    assert_clear_error(process, "broken.PNG: is a broken image file")
    entries = [json.loads(line) for line in process.stdout.splitlines()]
    assert len(entries) == 7
    [broken] = [entry for entry in entries if "error" in entry]
    assert list(broken) == ["image", "error"]
    for entry in entries:
        if entry is not broken:
            assert list(entry) == ["image", "text", "confidence", "characters"]
            assert entry["image"].endswith(f"{entry['text']}.png")
            assert [c["char"] for c in entry["characters"]] == list(entry["text"])


def test_paths_on_standard_input_in_any_number_and_order(tmp_path):
    paths = [str(path) for path in sorted(SAMPLES.glob("*.png"), reverse=True)] * 40
    process = subprocess.run(
        [sys.executable, ROOT / "demo.py", *NETWORK, "-"], input="\n".join(paths) + "\n",
        capture_output=True, text=True, encoding="utf-8", env=ENVIRONMENT, cwd=tmp_path, check=True,
    )  # fmt: skip
    lines = [line.split("\t") for line in process.stdout.splitlines()]
    assert [line[0] for line in lines] == paths
    assert all(line[0].endswith(f"{line[1]}.png") for line in lines)


def test_labels_are_compared_and_mistakes_marked(folder, tmp_path):
    flags = ["--labels", folder / "labels.txt", "--save", "sheet.png"]
    process = run_script("demo.py", *NETWORK, *flags, cwd=tmp_path)
    assert process.returncode == 0
    assert "5 of 6 right" in process.stderr
    with Image.open(tmp_path / "sheet.png") as sheet:
        colours = {colour for _, colour in sheet.getcolors(2**20)}
    assert {(255, 0, 0), (0, 128, 0)} <= colours


def test_a_low_confidence_is_marked(tmp_path):
    process = run_script("demo.py", *NETWORK, "--json", cwd=tmp_path)
    confidences = [json.loads(line)["confidence"] for line in process.stdout.splitlines()]
    limit = sorted(confidences)[8]
    flags = ["--min-confidence", repr(limit)]
    process = run_script("demo.py", *NETWORK, *flags, "--json", cwd=tmp_path)
    rejected = [json.loads(line)["rejected"] for line in process.stdout.splitlines()]
    assert rejected == [confidence < limit for confidence in confidences]
    process = run_script("demo.py", *NETWORK, *flags, cwd=tmp_path)
    assert [line.endswith("\trejected") for line in process.stdout.splitlines()] == rejected
    assert any(rejected)


def test_constraints_hold(tmp_path):
    (tmp_path / "words.txt").write_text("0AAc\nwxyz\n", encoding="utf-8")

    def texts(*flags):
        process = run_script("demo.py", *NETWORK, *flags, cwd=tmp_path)
        assert process.returncode == 0, process.stderr
        return [line.split("\t")[1] for line in process.stdout.splitlines()]

    stems = [path.stem for path in sorted(SAMPLES.glob("*.png"))]
    assert texts("--beam", 5, "--top", 3) == stems
    assert {len(text) for text in texts("--length", "2-3")} <= {2, 3}
    assert all(re.fullmatch(r"\d*", text) for text in texts("--alphabet-subset", "digits"))
    assert set(texts("--lexicon", "words.txt")) <= {"0AAc", "wxyz"}
    assert texts("--lexicon", "words.txt", SAMPLES / "0AAc.png") == ["0AAc"]


def test_bad_flags(tmp_path):
    for flags, fragment in [
        (["--min-confidence", 2], "--min-confidence"),
        (["--beam", 0], "--beam"),
        (["--length", "6-4"], "--length"),
        (["--lexicon", "none.txt"], "none.txt"),
        (["--alphabet-subset", "中"], "subset"),
        (["--weights", "none.onnx"], "none.onnx"),
        (["--labels", "none.txt"], "none.txt"),
    ]:
        assert_clear_error(run_script("demo.py", *NETWORK, *flags, cwd=tmp_path), fragment)


def test_broken_files_of_all_formats_never_hurt():
    process = run_script("benchmarks/fuzz_images.py", "--files", 1000, "--seed", 7, cwd=ROOT)
    assert process.returncode == 0, process.stdout + process.stderr
    assert "problems: 0" in process.stdout
