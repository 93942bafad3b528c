"""demo.py for people and for programs: folders, lists, labels, constraints, bad images."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from captcha.image import DEFAULT_FONTS
from helpers import ENVIRONMENT, ROOT, SAMPLES, assert_clear_error, load, run_script
from PIL import Image, ImageDraw, ImageFont

from demo import MANY
from infer_tool import SHIPPED_WEIGHTS, RecInfer
from label_file import read_label_file
from model import load_checkpoint, save_checkpoint

SIMPLE = SAMPLES / "simple"
NETWORK = ["--weights", SHIPPED_WEIGHTS["simple"].with_suffix(".onnx")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Samples below a folder, one of them broken, and a label file with one wrong label."""
    folder = tmp_path_factory.mktemp("demo") / "a folder"
    (folder / "deep" / "er").mkdir(parents=True)
    paths = sorted(SIMPLE.glob("*.png"))[:6]
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
    paths = [str(path) for path in sorted(SIMPLE.glob("*.png"), reverse=True)] * 40
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

    stems = [path.stem for path in sorted(SIMPLE.glob("*.png"))]
    assert texts("--beam", 5, "--top", 3) == stems
    assert {len(text) for text in texts("--length", "2-3")} <= {2, 3}
    assert all(re.fullmatch(r"\d*", text) for text in texts("--alphabet-subset", "digits"))
    assert set(texts("--lexicon", "words.txt")) <= {"0AAc", "wxyz"}
    assert texts("--lexicon", "words.txt", SIMPLE / "0AAc.png") == ["0AAc"]


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


@pytest.mark.parametrize(("task", "limit"), [("complex", 1_500_000), ("chinese", 5_000_000)])
def test_demo_picks_a_task(task, limit, tmp_path):
    assert SHIPPED_WEIGHTS[task].stat().st_size <= limit
    folder = SAMPLES / task
    samples = sorted(folder.glob("*.png"))
    labels = {path.name: path.stem for path in samples}
    if task == "chinese":  # not every system can hold their texts in file names
        labels = {name: label for _, name, label in read_label_file(folder / "labels.txt")}
    process = run_script("demo.py", "--task", task, "--save", "sheet.png", cwd=tmp_path)
    lines = [line.split("\t") for line in process.stdout.splitlines()]
    assert [line[1] for line in lines] == [labels[path.name] for path in samples]
    assert len(lines) >= 8
    assert (tmp_path / "sheet.png").exists()


def test_demo_without_arguments_reads_the_samples(tmp_path):
    process = run_script("demo.py", cwd=tmp_path)
    assert process.returncode == 0
    assert str(SHIPPED_WEIGHTS["simple"]) in process.stderr
    assert f"no weights of a training in {tmp_path / 'save_model'}" in process.stderr
    lines = [line.split("\t") for line in process.stdout.splitlines()]
    assert [line[1] for line in lines] == [path.stem for path in sorted(SIMPLE.glob("*.png"))]


def test_an_image_of_a_kind_that_nobody_trained_on_is_read_with_the_general_network(tmp_path):
    lines = {}
    for text in ("TOTAL 24.90", "HB 4821", "Garden"):
        font = ImageFont.truetype(DEFAULT_FONTS[0], 40)
        image = Image.new("RGB", (2 * round(font.getlength(text)), 150), "white")
        ImageDraw.Draw(image).text((60, 45), text, "black", font)
        image.save(tmp_path / f"{len(lines)}.png")
        lines[f"{len(lines)}.png"] = text
    labels = "".join(f"{name}\t{text.upper()}\n" for name, text in lines.items())
    (tmp_path / "labels.txt").write_text(labels, encoding="utf-8")
    process = run_script("demo.py", *lines, cwd=tmp_path)
    assert f"weights: {SHIPPED_WEIGHTS['general']}" in process.stderr
    assert [line.split("\t")[1] for line in process.stdout.splitlines()] == list(lines.values())
    for flags, right in ([], 2), (["--ignore-case"], 3):
        process = run_script("demo.py", "--labels", "labels.txt", *flags, cwd=tmp_path)
        assert f"{right} of 3 right" in process.stderr


def test_demo_reads_files_as_json_with_the_weights_last_written(trained, digits, tmp_path):
    shutil.copytree(trained[0] / "save_model", tmp_path / "save_model")
    image = digits / "test" / "00000.png"
    label = (digits / "test.txt").read_text(encoding="utf-8").splitlines()[0].split("\t")[1]
    process = run_script(
        "demo.py", image, "none.png", image, "--json", "--save", "sheet.png", cwd=tmp_path
    )
    assert_clear_error(process, "none.png", "save_model")
    results = [json.loads(line) for line in process.stdout.splitlines()]
    assert list(results.pop(1)) == ["image", "error"]
    assert len(results) == 2
    assert list(results[0]) == ["image", "text", "confidence", "characters"]
    assert results[0]["text"] == label
    assert [entry["char"] for entry in results[0]["characters"]] == list(label)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 2 * 96


def test_weights_of_a_task_are_known_by_what_they_say_not_by_their_name(trained, tmp_path):
    (tmp_path / "save_model").mkdir()
    [start] = (trained[0] / "save_model").glob("*.pth")
    photos = tmp_path / "save_model" / "simple_photos_nh16_depth2.pth"
    shutil.copy(start, photos)
    process = run_script("demo.py", "--task", "simple", cwd=tmp_path)
    assert "no weights of the task simple in" in process.stderr
    assert f"weights: {SHIPPED_WEIGHTS['simple']}" in process.stderr
    own = tmp_path / "save_model" / "simple_nh16_depth2.pth"
    save_checkpoint(own, replace(load_checkpoint(start), task="simple"))
    shutil.copy(start, photos)  # is the last that was written
    for flags, expected in ([], photos), (["--task", "simple"], own):
        process = run_script("demo.py", *flags, cwd=tmp_path)
        assert f"weights: {expected.relative_to(tmp_path)}" in process.stderr
    exported = tmp_path / "task.onnx"
    flags = ["export", "--weights", own, "--out", exported]
    assert run_script("infer_tool.py", *flags, cwd=tmp_path).returncode == 0
    assert [RecInfer(path).task for path in (own, photos, exported)] == ["simple", None, "simple"]


def test_a_co_process_is_answered_at_once(tmp_path):
    process = subprocess.Popen(
        [sys.executable, ROOT / "demo.py", *NETWORK, "-"], cwd=tmp_path, env=ENVIRONMENT,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        encoding="utf-8", bufsize=1,
    )  # fmt: skip
    for path in sorted(SIMPLE.glob("*.png"))[:5]:
        process.stdin.write(f"{path}\n")
        assert process.stdout.readline().split("\t")[1] == path.stem
    process.stdin.close()
    assert process.wait(30) == 0


def test_odd_names_are_one_failed_image_and_the_run_goes_on(tmp_path):
    good = sorted(SIMPLE.glob("*.png"))[0]
    odd = [os.fsencode(tmp_path) + b"/\xff\xfe.png", b"x" * 5000 + b".png", b"nul\0.png"]
    process = subprocess.run(
        [sys.executable, ROOT / "demo.py", *NETWORK, "-", "--json"], cwd=tmp_path,
        input=b"\n".join([*odd, os.fsencode(good)]) + b"\n", capture_output=True, check=False,
    )  # fmt: skip
    entries = [json.loads(line) for line in process.stdout.decode("utf-8").splitlines()]
    assert ["error" in entry for entry in entries] == [True, True, True, False]
    assert entries[-1]["text"] == good.stem
    assert process.returncode == 1
    assert b"Traceback" not in process.stderr


def test_a_folder_without_images_is_an_error(tmp_path):
    (tmp_path / "empty").mkdir()
    assert_clear_error(run_script("demo.py", *NETWORK, "empty", cwd=tmp_path), "holds no images")


def test_broken_numbers_are_still_json(tmp_path):
    checkpoint = load(SHIPPED_WEIGHTS["simple"])
    checkpoint["state_dict"]["linear.bias"][:] = float("nan")
    torch.save(checkpoint, tmp_path / "nan.pth")
    image = sorted(SIMPLE.glob("*.png"))[0]
    process = run_script("demo.py", "--weights", "nan.pth", "--json", image, cwd=tmp_path)

    def refuse(name):
        raise AssertionError(name)

    assert "confidence" in json.loads(process.stdout, parse_constant=refuse)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell that closes streams")
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_closed_streams_are_no_traceback(closed, tmp_path):
    command = shlex.join(map(str, [sys.executable, ROOT / "demo.py", *NETWORK]))
    process = subprocess.run(
        ["sh", "-c", f"{command} {closed}"], cwd=tmp_path, capture_output=True, check=False
    )
    assert process.returncode == 0, process.stderr
    assert b"Traceback" not in process.stderr


def test_scripts_run_in_a_notebook(tmp_path):
    """Whose streams cannot be set up anew, and which goes on after a script has ended."""
    code = f"""
import io, runpy, sys
sys.path.insert(0, {str(ROOT)!r})
import demo, train
real, sys.stdout = sys.stdout, io.StringIO()
for script, arguments in (("demo.py", {list(map(str, NETWORK))}), ("train.py", ["--lr", "-1"])):
    sys.argv = [script, *arguments]
    try:
        runpy.run_path({str(ROOT)!r} + "/" + script, run_name="__main__")
    except SystemExit as end:
        print(script, end.code, file=real)
print(sys.stdout.getvalue().count("\\n"), "lines", file=real)
"""
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert process.stdout.splitlines()[0] in ("demo.py 0", "demo.py None")
    assert process.stdout.splitlines()[1].startswith("train.py train.py: error: --lr -1.0")
    assert process.stdout.splitlines()[2] == "16 lines"


def test_many_images_are_read_alike_and_in_order(tmp_path):
    """By several processes, where one alone would take longer."""
    samples = sorted(SIMPLE.glob("*.png"))
    broken = tmp_path / "broken.png"
    broken.write_bytes(samples[0].read_bytes()[:200])
    paths = [*(samples * (1 + MANY // len(samples))), broken]
    reader = RecInfer(NETWORK[1])
    rows = [
        f"{path}\t{result.text}\t{result.confidence:.4f}"
        for path, result in reader.stream(paths)
        if not isinstance(result, ValueError)
    ]
    process = run_script("demo.py", *NETWORK, *paths, cwd=tmp_path)
    assert process.stdout.splitlines() == rows
    assert_clear_error(process, "broken.png: is a broken image file")
