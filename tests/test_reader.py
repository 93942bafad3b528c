"""The page that reads in a browser: the same as the project's own reading, and what people do."""

import base64
import csv
import io
from dataclasses import replace

import numpy as np
import pytest
import wasmtime
from helpers import ROOT, SAMPLES, assert_clear_error, dashes, jpeg, png, run_script
from PIL import Image, ImageOps

from ctc_label_converter import CTCLabelConverter
from infer_tool import SHIPPED_WEIGHTS, RecInfer, export_page
from keys import count_ngrams
from model import load_checkpoint, save_checkpoint

TASKS = ["simple", "complex", "chinese", "general", "own"]
READ = """async (bytes) => {
  const reading = await readFile(new Blob([Uint8Array.from(atob(bytes), (c) => c.charCodeAt(0))]));
  return [reading.text, reading.confidence, reading.characters.map(([_, sure]) => sure)];
}"""


def open_page(browser, path):
    page = browser.new_page()
    page.goto(path.as_uri())
    return page


def encoded(content):
    return base64.b64encode(content).decode()


def odd_images():
    """Images of other shapes and modes than the samples': wide, high, turned, transparent, grey."""
    paths = sorted(SAMPLES.glob("*/*.png"))[::5]
    for i, path in enumerate(paths):
        image = Image.open(path).convert("RGB")
        size = [(37, 19), (400, 50), (160, 120), (31, 32), (1300, 1000)][i % 5]
        wide = Image.new("RGB", (image.width * 3, image.height * 2), "white")
        wide.paste(image, (image.width, image.height // 2))
        yield png(image.resize(size))
        yield png(ImageOps.expand(image, [(30, 9, 0, 20), 12, (0, 0, 60, 0)][i % 3], "black"))
        yield png(wide)
        yield png(wide.rotate(3 * i % 20 - 10, expand=True, fillcolor="white"))
        yield png(image.convert("L"))
        clear = image.convert("RGBA")
        clear.putalpha(Image.fromarray(np.full(image.size[::-1], 255 * (i % 2), np.uint8)))
        yield png(clear)
        yield jpeg(image)
        exif = Image.Exif()
        exif[0x0112] = 3 + i % 6
        buffer = io.BytesIO()
        image.save(buffer, "PNG", exif=exif)
        yield buffer.getvalue()
    yield png(dashes())


@pytest.mark.parametrize("task", TASKS)
def test_a_page_reads_what_the_checkpoint_reads(task, tmp_path, browser):
    path = ROOT / "assets" / "reader.html"
    if task == "own":  # which expects what its labels have
        weights, recogniser = tmp_path / "own.pth", load_checkpoint(SHIPPED_WEIGHTS["complex"])
        ngrams = count_ngrams([f"{number:04d}" for number in range(3000)] + ["7K21"] * 400, 3)
        own = replace(recogniser, converter=recogniser.converter.replaced(ngrams=ngrams))
        save_checkpoint(weights, own)
        flags = ["--weights", weights, "--out", tmp_path / "own.onnx"]
        assert run_script("infer_tool.py", "export", *flags, cwd=ROOT).returncode == 0
        assert RecInfer(tmp_path / "own.onnx").converter.ngrams == ngrams
    else:
        weights = SHIPPED_WEIGHTS[task]
    if task != "general":
        path = tmp_path / "page.html"
        process = run_script(
            "infer_tool.py", "export", "--weights", weights, "--out", path, cwd=ROOT
        )
        assert process.returncode == 0, process.stderr
    page, reader = open_page(browser, path), RecInfer(weights)
    files = [sample.read_bytes() for sample in sorted(SAMPLES.glob("*/*.png"))[::4]]
    for file in [*files, *odd_images()]:
        text, confidence, sure = page.evaluate(READ, encoded(file))
        reading = reader.predict(file)
        assert text == reading.text
        assert abs(confidence - reading.confidence) < 0.002
        # Where any text is as improbable, the last bit decides between its alignments.
        assert len(sure) == len(text)
        assert reading.confidence < 1e-9 or np.allclose(sure, reading.char_confidences, atol=0.002)


def test_the_page_that_ships_is_that_of_the_general_network(tmp_path):
    export_page(SHIPPED_WEIGHTS["general"], tmp_path / "page.html")
    shipped = (ROOT / "assets" / "reader.html").read_bytes()
    assert (tmp_path / "page.html").read_bytes() == shipped


def test_the_code_that_the_page_runs_is_what_its_source_says():
    source = (ROOT / "assets" / "reader.wat").read_text(encoding="utf-8")
    code = (ROOT / "assets" / "reader.wasm").read_bytes()
    compiled = wasmtime.wat2wasm(source)
    assert compiled.startswith(code)
    names = compiled[len(code) :]  # one section, behind its kind and its size in 7 bits a byte
    assert (names[0], bytes(names[3:8])) == (0, b"\x04name")
    assert len(names) == 3 + (names[1] & 127 | names[2] << 7)


def test_a_browser_that_is_too_old_is_told_so(browser):
    page = browser.new_page()
    page.add_init_script("delete window.WebAssembly")
    page.goto((ROOT / "assets" / "reader.html").as_uri())
    assert "needs a browser of 2023 or later" in page.text_content("body")


def test_people_choose_drop_and_paste_images_and_save_the_readings(browser):
    page = open_page(browser, ROOT / "assets" / "reader.html")
    sample = next(iter(sorted((SAMPLES / "simple").glob("*.png"))))
    page.set_input_files("#choose", [sample, ROOT / "README.md"])
    page.wait_for_function("results.length === 2 && !said.textContent")
    assert "README.md: is not an image" in page.text_content(".problem")
    for kind, data in (("paste", "clipboardData"), ("drop", "dataTransfer")):
        page.evaluate(
            """([kind, data, bytes]) => {
              const transfer = new DataTransfer();
              const content = Uint8Array.from(atob(bytes), (c) => c.charCodeAt(0));
              transfer.items.add(new File([content], 'a "b", c.png', { type: "image/png" }));
              const event = new Event(kind, { bubbles: true, cancelable: true });
              document.dispatchEvent(Object.assign(event, { [data]: transfer }));
            }""",
            [kind, data, encoded(sample.read_bytes())],
        )
    page.wait_for_function("results.length === 4 && !said.textContent")
    with page.expect_download() as download:
        page.click("#save")
    text = download.value.path().read_text(encoding="utf-8-sig")
    rows = list(csv.reader(io.StringIO(text)))
    reading = RecInfer(SHIPPED_WEIGHTS["general"]).predict(sample)
    own = [reading.text, f"{reading.confidence:.4f}"]
    names = [sample.name, "README.md", *['a "b", c.png'] * 2]
    assert [row[0] for row in rows[1:]] == names
    assert all(row[1:] == own for row in rows[1:2] + rows[3:])


def test_texts_from_right_to_left_are_refused(tmp_path):
    recogniser = load_checkpoint(SHIPPED_WEIGHTS["simple"])
    letters = "".join(chr(0x5D0 + i) for i in range(27)) + recogniser.converter.alphabet[27:]
    converter = CTCLabelConverter(letters, right_to_left=True)
    save_checkpoint(tmp_path / "hebrew.pth", replace(recogniser, converter=converter))
    process = run_script(
        "infer_tool.py", "export", "--weights", "hebrew.pth", "--out", "x.html", cwd=tmp_path
    )
    assert_clear_error(process, "right to left")
    assert not (tmp_path / "x.html").exists()
