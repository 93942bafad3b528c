"""The labelling page in a real browser: what is typed is what is on the disk, whatever happens."""

import http.client
import json
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from helpers import ENVIRONMENT, ROOT, SAMPLES, assert_clear_error, run_script
from PIL import Image

import label
from label_file import find_samples


@contextmanager
def labelling(folder, *flags, kill=False):
    """Run label.py on a folder. Yields the address of its page."""
    command = [sys.executable, str(ROOT / "label.py"), str(folder), "--no-browser", *flags]
    process = subprocess.Popen(
        command, cwd=folder.parent, env=ENVIRONMENT, stdout=subprocess.PIPE, encoding="utf-8"
    )
    try:
        while not (line := process.stdout.readline()).startswith("http://"):
            assert line, "label.py ended"
        yield line.strip()
    finally:
        process.send_signal(signal.SIGKILL if kill else signal.SIGINT)
        process.communicate(timeout=30)


@pytest.fixture
def images(tmp_path):
    """A folder of ten sample images without labels, two of them the same picture."""
    folder = tmp_path / "images"
    folder.mkdir()
    samples = sorted((SAMPLES / "simple").glob("*.png"))[:9]
    for i, path in enumerate([*samples, samples[0]]):
        (folder / f"{i}.png").write_bytes(path.read_bytes())
    return folder


@pytest.fixture
def truth(images):
    """{name: text} of ``images``."""
    stems = [path.stem for path in sorted((SAMPLES / "simple").glob("*.png"))[:9]]
    return {f"{i}.png": text for i, text in enumerate([*stems, stems[0]])}


def lines(path):
    text = path.read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [line.split("\t") for line in text.splitlines()]


def shown(page):
    """The name of the image that the page shows."""
    page.wait_for_function("current && image.complete && image.naturalWidth > 0")
    return page.evaluate("current.name")


def press(page, key):
    """Press a key, and wait for what comes next."""
    before = page.evaluate("current.id")
    page.keyboard.press(key)
    page.wait_for_function(f"!busy && (!current || current.id !== {before})")


WEIGHTS = ROOT / "assets" / "weights" / "simple_nh16_depth2.onnx"
FLAGS = ["--weights", str(WEIGHTS)]


def test_every_accepted_label_survives_a_kill_and_equal_images_are_labelled_once(
    images, truth, browser
):
    page = browser.new_page()
    accepted = {}
    for _ in range(2):
        with labelling(images, "--train-every", "0", *FLAGS, kill=True) as address:
            page.goto(address)
            for _ in range(3):
                name = shown(page)
                assert name not in accepted
                page.fill("#text", truth[name])
                press(page, "Enter")
                accepted[name] = truth[name]
                on_disk = dict(lines(images / "labels.txt"))
                assert accepted.items() <= on_disk.items()
                assert on_disk.items() <= truth.items()
    with labelling(images, "--train-every", "0", *FLAGS) as address:
        page.goto(address)
        name = shown(page)
        press(page, "Escape")
        while page.evaluate("current !== null"):
            page.fill("#text", truth[shown(page)])
            press(page, "Enter")
    found = lines(images / "labels.txt")
    assert len(found) == len(dict(found))
    missing = (
        {n for n in truth if truth[n] == truth[name]} if truth[name] == truth["0.png"] else {name}
    )
    assert dict(found).keys() >= truth.keys() - missing
    assert (images / "unreadable.txt").read_text(encoding="utf-8").splitlines() == [name]
    samples = find_samples(images).samples["all"]
    assert {sample.path.name: sample.label for sample in samples} == dict(found)


def test_keys_go_back_take_the_second_reading_and_show_text_as_text(images, browser):
    page = browser.new_page()
    with labelling(images, "--train-every", "0", "--order", "files", *FLAGS) as address:
        page.goto(address)
        assert shown(page) == "0.png"
        page.fill("#text", "<script>alert(1)</script>")
        press(page, "Enter")
        assert shown(page) == "1.png"
        first = page.input_value("#text")
        page.keyboard.press("Tab")
        page.wait_for_function(f"text.value !== {json.dumps(first)}")
        page.keyboard.press("Tab")
        assert page.input_value("#text") == first
        press(page, "ArrowUp")
        assert shown(page) == "0.png"
        assert page.input_value("#text") == "<script>alert(1)</script>"
        page.fill("#text", "mine")
        press(page, "Enter")
        assert shown(page) == "1.png"
        page.reload()
        assert shown(page) == "1.png"
    assert lines(images / "labels.txt") == [["0.png", "mine"], ["9.png", "mine"]]


def test_typing_goes_on_behind_a_sure_reading_and_replaces_a_doubtful_one(images, truth, browser):
    foreign = (SAMPLES / "complex" / "4QC7.png").read_bytes()  # read with a confidence of 0.2
    (images / "foreign.png").write_bytes(foreign)
    page, texts = browser.new_page(), {}
    with labelling(images, "--train-every", "0", *FLAGS) as address:
        page.goto(address)
        for _ in range(10):  # the last of ``images`` looks like the first, and gets its label
            name = shown(page)
            assert page.input_value("#text") == truth.get(name, page.input_value("#text")) != ""
            page.keyboard.type("mine")
            texts[name] = page.input_value("#text")
            press(page, "Enter")
    assert len(texts) == 10
    assert texts.pop("foreign.png") == "mine"
    assert texts == {name: f"{truth[name]}mine" for name in texts}


@pytest.mark.parametrize("form", ["train.csv", "labels.json", "labels.txt", "beside"])
def test_existing_labels_are_taken_in_and_kept(form, images, truth, browser):
    known = dict(list(truth.items())[1:5])
    if form == "train.csv":
        rows = "".join(f"{name},{text}\n" for name, text in known.items())
        (images / form).write_text(f"image,text\n{rows}", encoding="utf-8")
    elif form == "labels.json":
        (images / form).write_text(json.dumps(known), encoding="utf-8")
    elif form == "labels.txt":
        text = "".join(f"{name} {text}\n" for name, text in known.items())
        (images / form).write_text(text, encoding="utf-8")
    else:
        for name, text in known.items():
            (images / name).with_suffix(".gt.txt").write_text(text, encoding="utf-8")
    page = browser.new_page()
    with labelling(images, "--train-every", "0", *FLAGS) as address:
        page.goto(address)
        name = shown(page)
        assert name not in known
        page.fill("#text", truth[name])
        press(page, "Enter")
    found = find_samples(images).samples
    found = {sample.path.name: sample.label for part in found.values() for sample in part}
    assert (known | {name: truth[name]}).items() <= found.items() <= truth.items()
    if form != "beside":
        assert (images / f"{form}.before").exists()


def test_a_check_shows_confident_disagreements_first(images, truth, browser):
    wrong = truth | {"3.png": "8888"}
    text = "".join(f"{name}\t{text}\n" for name, text in wrong.items())
    (images / "labels.txt").write_text(text, encoding="utf-8")
    page = browser.new_page()
    with labelling(images, "--check", *FLAGS) as address:
        page.goto(address)
        page.wait_for_function("next.length === 6 || next.length === 10")
        page.reload()
        assert shown(page) == "3.png"
        assert page.input_value("#text") == "8888"
        page.keyboard.press("Tab")
        page.wait_for_function("text.value !== '8888'")
        press(page, "Enter")
    assert dict(lines(images / "labels.txt")) == truth


def test_requests_that_are_not_the_pages_are_refused(images):
    (images.parent / "outside.png").write_bytes((images / "0.png").read_bytes())
    (images / "link.png").symlink_to(images.parent / "outside.png")
    (images / "broken.png").write_bytes(b"no image")
    with labelling(images, "--train-every", "0", *FLAGS) as address:
        port, token = re.fullmatch(r"http://127.0.0.1:(\d+)/([\w-]+)/", address).groups()

        def status(method, path, headers=None, body=None):
            connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=20)
            connection.putrequest(method, path, skip_host=True)
            known = {"Host": f"127.0.0.1:{port}", "Content-Type": "application/json"}
            for name, value in (known | (headers or {})).items():
                if value is not None:
                    connection.putheader(name, value)
            connection.putheader("Content-Length", str(len(body or b"")))
            connection.endheaders(body)
            return connection.getresponse().status

        own = f"/{token}"
        assert status("GET", f"{own}/") == 200
        while status("GET", f"{own}/image/0") != 200:
            time.sleep(0.1)
        label = json.dumps({"id": 0, "text": "x"}).encode()
        paths = [
            "/", "//", "/..", "/labels.txt", "/x/", "/x/state", f"/{token[:-1]}/", f"/{token}x/",
            f"{own}", f"{own}/..", f"{own}/../../etc/passwd", f"{own}/image/../0",
            f"{own}/image/-1", f"{own}/image/10000", f"{own}/image/0/", f"{own}/image/%2e%2e",
            f"{own}/image/", f"{own}/image/0.png", f"{own}/label.html", f"{own}/network/x",
            f"{own}/item/1e1", f"{own}/item/+0", f"{own}/image/0%00", f"{own}/image/1_0",
            "/%2e%2e/", f"//127.0.0.1{own}/", f"{own}/image/0;0", f"{own}/image//0",
            f"/x{own}/state",
        ]  # fmt: skip
        assert all(status("GET", path) in (403, 404) for path in paths)
        hosts = [
            None, "", "localhost", "127.0.0.1", f"evil.example:{port}", f"127.0.0.1:{port}.a",
            f"127.0.0.1:{port}@a", f"0.0.0.0:{port}", f"[::1]:{port}", f"2130706433:{port}",
        ]  # fmt: skip
        assert all(status("GET", f"{own}/state", {"Host": host}) == 403 for host in hosts)
        origins = [
            "null", "", "http://evil.example", f"https://127.0.0.1:{port}", "file://",
            f"http://127.0.0.1:{port}.a", "http://127.0.0.1",
        ]  # fmt: skip
        for origin in origins:
            headers = {"Origin": origin}
            assert status("POST", f"{own}/accept", headers, label) == 403
            assert status("GET", f"{own}/state", headers) == 403
        bodies = [
            b"", b"{}", b"[]", b"null", b"{", b"\xff", b'{"id": "../x"}', b'{"id": -1}',
            b'{"id": 99, "text": "x"}', b'{"id": 0}', b'{"id": 0, "text": ""}', b"[" * 60000,
            b'{"id": 0, "text": 5}', b'{"id": 0, "text": "a\\nb"}', b'{"id": 1e9}',
        ]  # fmt: skip
        for body in bodies:
            assert status("POST", f"{own}/accept", body=body) in (400, 404, 422)
        assert status("POST", f"{own}/accept", {"Content-Type": "text/plain"}, label) == 415
        assert status("POST", f"{own}/accept", body=b" " * 70000) == 413
        assert status("POST", "/x/accept", body=label) == 403
        assert status("POST", f"{own}/delete", body=label) == 404
        assert not (images / "labels.txt").exists()
        assert status("POST", f"{own}/accept", body=label) == 200
        names = [name for name, _ in lines(images / "labels.txt")]
        assert sorted(names) == ["0.png", "9.png"]


def test_what_stands_in_the_way_is_said(images, tmp_path):
    assert_clear_error(run_script("label.py", tmp_path / "none", cwd=tmp_path), "no such folder")
    with labelling(images, "--train-every", "0", *FLAGS) as address:
        again = run_script("label.py", images, "--no-browser", cwd=tmp_path)
        assert_clear_error(again, "another label.py")
        other = tmp_path / "other"
        other.mkdir()
        Image.new("RGB", (60, 20)).save(other / "a.png")
        port = address.split(":")[2].split("/")[0]
        taken = run_script("label.py", other, "--no-browser", "--port", port, cwd=tmp_path)
        assert_clear_error(taken, f"--port {port}")


def test_it_ends_even_between_the_last_reading_and_the_rest(images, monkeypatch):
    """The thread that reads must not go to rest when it was told to end a moment before."""
    monkeypatch.setattr(sys, "argv", ["label.py", str(images), *FLAGS])
    built = threading.Event()

    def end_when_all_are_read(_):
        built.wait()
        if all(item.reading for item in run.items) and not end.ident:
            end.start()
            while not run.ended:
                time.sleep(0.001)

    watched = SimpleNamespace(sleep=end_when_all_are_read, monotonic=time.monotonic)
    monkeypatch.setattr(label, "time", watched)
    run = label.Labelling(label.parse_args())
    end = threading.Thread(target=run.end, daemon=True)
    built.set()
    run.readings.join(timeout=30)
    assert run.ended
    assert not run.readings.is_alive()


def test_the_loop_trains_on_what_is_labelled_and_reads_anew(digits, tmp_path, browser):
    folder = tmp_path / "images"
    folder.mkdir()
    truth = dict(lines(digits / "train.txt")[:60])
    truth = {name.rpartition("/")[2]: text for name, text in truth.items()}
    for name in truth:
        (folder / name).write_bytes((digits / "train" / name).read_bytes())
    page = browser.new_page()
    weights = str(WEIGHTS.with_suffix(".pth"))
    with labelling(folder, "--train-every", "40", "--weights", weights) as address:
        page.goto(address)
        for _ in range(40):
            page.fill("#text", truth[shown(page)])
            press(page, "Enter")
        page.wait_for_function(
            "progress.textContent.includes('word accuracy')", timeout=240000, polling=500
        )
        page.wait_for_function("next.length && next[0].version === 2", timeout=20000)
    assert list((tmp_path / "save_model").glob("images_*.pth"))
