"""Trainings that are killed, run out of disk, meet bad numbers, or end early."""

import csv
import random
import re
import subprocess
import sys
from importlib.util import find_spec
from itertools import chain

import pytest
import torch
from conftest import ENVIRONMENT, ROOT, assert_clear_error, run_script
from PIL import Image

from collatefn import AUGMENTATIONS, Batch, Collate, EpochOrder, OnDevice
from ctc_label_converter import CTCLabelConverter
from dataset import Preprocess, TextImageDataset, check
from loss import CTCLoss
from metric import confusions
from model import MicroNet
from train import make_optimizers, precision, take_step

NAME = "digits_nh8_depth1"
BRIEF = ["--nh", 8, "--depth", 1, "--epochs", 4, "--train", 400, "--device", "cpu"]


def load(path):
    return torch.load(path, weights_only=True)


def outcome(folder):
    """The weights of the best and the last epoch, and the table without its seconds."""
    saved = folder / "save_model"
    rows = (saved / f"{NAME}.csv").read_text(encoding="utf-8").splitlines()
    best, last = load(saved / f"{NAME}.pth"), load(saved / f"{NAME}.resume")
    return best["state_dict"], last["model"], [row.rsplit(",", 1)[0] for row in rows]


@pytest.fixture(scope="module")
def undisturbed(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    process = run_script("train.py", "--data", digits, *BRIEF, cwd=folder)
    assert process.returncode == 0, process.stderr
    return folder


def test_killed_and_resumed_ends_as_if_nothing_had_happened(digits, undisturbed, tmp_path):
    command = [sys.executable, "-u", ROOT / "train.py", "--data", digits, *BRIEF, "--resume"]
    command = list(map(str, command))
    moments = random.Random(0)
    for epoch in (1, 2, 3):  # killed in the epoch after it
        process = subprocess.Popen(
            command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        shown = b""
        while f"epoch   {epoch}/4".encode() not in shown:
            shown += process.stdout.read(1) or pytest.fail(shown.decode())
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(moments.uniform(0, 0.1))
        process.kill()
        process.communicate()
        for path in (tmp_path / "save_model").glob("*.[pr]*[he]"):
            assert load(path)
    process = run_script("train.py", "--data", digits, *BRIEF, "--resume", cwd=tmp_path)
    assert re.search(r"resumed after epoch [34]", process.stdout), process.stderr
    ours, theirs = outcome(tmp_path), outcome(undisturbed)
    assert ours[2] == theirs[2]
    for one, other in zip(ours[:2], theirs[:2], strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    # A finished one is not trained again.
    process = run_script("train.py", "--data", digits, *BRIEF, "--resume", cwd=tmp_path)
    assert "resumed after epoch 4" in process.stdout
    assert outcome(tmp_path)[2] == theirs[2]


def test_only_the_same_training_is_resumed(digits, undisturbed, tmp_path):
    state = undisturbed / "save_model" / f"{NAME}.resume"
    (tmp_path / "save_model").mkdir()
    copy = tmp_path / "save_model" / f"{NAME}.resume"
    copy.write_bytes(state.read_bytes())
    for flags, fragment in [(["--lr", 0.5], "lr was 0.01"), (["--train", 399], "images was")]:
        process = run_script("train.py", "--data", digits, *BRIEF, *flags, "--resume", cwd=tmp_path)
        assert_clear_error(process, f"{NAME}.resume", fragment)
    copy.write_bytes(state.read_bytes()[:-1000])
    process = run_script("train.py", "--data", digits, *BRIEF, "--resume", cwd=tmp_path)
    assert_clear_error(process, f"{NAME}.resume", "no state of an unfinished training")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit of file sizes")
def test_a_full_disk_leaves_the_earlier_files(digits, undisturbed, tmp_path):
    (tmp_path / "save_model").mkdir()
    before = {}
    for path in (undisturbed / "save_model").iterdir():
        name = path.name.replace("nh8", "nh64")
        before[name] = path.read_bytes()
        (tmp_path / "save_model" / name).write_bytes(before[name])
    # No file may grow beyond 220,000 bytes, as if the disk were full by then: the picture of
    # the data and the checkpoint fit, the state for --resume does not.
    limited = (
        "import resource, runpy, sys; sys.argv.pop(0); sys.path.insert(0, sys.argv[0][:-8]);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (220000, 220000));"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", limited, ROOT / "train.py", "--data", digits, *BRIEF]
    process = subprocess.run(
        list(map(str, [*command, "--nh", 64])), cwd=tmp_path, env=ENVIRONMENT,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert_clear_error(process, "digits_nh64_depth1.resume", "cannot be written")
    after = {path.name: path.read_bytes() for path in (tmp_path / "save_model").iterdir()}
    del before["digits_nh64_depth1.data.png"]  # drawn anew each time
    kept = set(after.values())
    assert all(content in kept for content in before.values())
    assert not [name for name in after if "unfinished" in name]
    assert load(tmp_path / "save_model" / "digits_nh64_depth1.pth")["nh"] == 64


def digits_batch(labels):
    converter = CTCLabelConverter("0123456789")
    targets, lengths = map(torch.from_numpy, converter.encode(labels))
    images = torch.zeros(len(labels), 3, 32, 64, dtype=torch.uint8)
    return Batch(images, torch.full((len(labels),), 64), targets, lengths, labels)


def test_a_step_that_is_not_finite_changes_nothing():
    torch.manual_seed(0)
    model = MicroNet(4, 1, 11)
    optimizers = make_optimizers(model, 0.01, 2)
    scaler = precision(False, torch.device("cpu"))[1]
    for labels, finite in ((["12"], True), (["1" * 30], False), (["34"], True)):
        batch = digits_batch(labels)  # 30 equal characters need more columns than there are
        loss = CTCLoss()(
            model(torch.randn(1, 3, 32, 64)), batch.targets, batch.widths // 4, batch.target_lengths
        )
        before = [p.clone() for p in model.parameters()]
        assert take_step(model, optimizers, scaler, loss) == finite
        same = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert same != finite
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_training_that_stays_infinite_ends_with_the_reason(digits, undisturbed, tmp_path):
    start = undisturbed / "save_model" / f"{NAME}.pth"
    broken = load(start)
    broken["state_dict"]["linear.bias"][3] = float("nan")
    torch.save(broken, tmp_path / "nan.pth")
    flags = ["--epochs", 5, "--train", 400, "--batch-size", 8, "--weights", "nan.pth"]
    process = run_script("train.py", "--data", digits, *flags, cwd=tmp_path)
    assert_clear_error(process, "not finite in 20 steps in a row", "--lr")
    assert not (tmp_path / "save_model" / f"{NAME}.pth").exists()


def test_ending_early(digits, trained, tmp_path):
    weights = trained[0] / "save_model" / "digits_nh16_depth2.pth"
    flags = ["--data", digits, "--weights", weights, "--train", 100, "--epochs", 20]
    process = run_script("train.py", *flags, "--stop-at", 0.5, "--lr", 1e-6, cwd=tmp_path)
    assert process.returncode == 0
    assert "stopped: the word accuracy is" in process.stderr
    flags += ["--lr", 1e-9, "--ema", 0, "--augment", "none"]
    process = run_script("train.py", *flags, "--patience", 2, cwd=tmp_path)
    assert "no better for 2 epochs" in process.stderr
    with (tmp_path / "save_model" / "digits_nh16_depth2.csv").open(encoding="utf-8") as file:
        assert 3 <= len(list(csv.DictReader(file))) < 20


def test_pictures_of_a_training(undisturbed):
    saved = undisturbed / "save_model"
    for suffix in (".png", ".mistakes.png", ".data.png"):
        with Image.open(saved / f"{NAME}{suffix}") as image:
            assert min(image.size) > 100


def test_fine_tuning_keeps_what_is_known(digits, trained, tmp_path):
    """Digits with one that has become a letter: after a brief training the others are read."""
    lines = (digits / "test.txt").read_text(encoding="utf-8").splitlines()
    lines += (digits / "train.txt").read_text(encoding="utf-8").splitlines()[:400]
    for name, own in (("test", lines[:100]), ("train", lines[100:])):
        renamed = [
            f"{digits / path}\t{label.replace('7', 'A')}"
            for path, label in (line.split("\t") for line in own)
        ]
        (tmp_path / f"{name}.txt").write_text("\n".join(renamed), encoding="utf-8")
    start = trained[0] / "save_model" / "digits_nh16_depth2.pth"
    flags = ["--data", tmp_path, "--weights", start]
    assert_clear_error(run_script("train.py", *flags, cwd=tmp_path), "not in the alphabet")
    process = run_script("train.py", *flags, "--fine-tune", "--epochs", 6, cwd=tmp_path)
    assert "9 of 10 characters are known" in process.stdout, process.stderr
    assert float(re.search(r"best word accuracy (\S+)", process.stdout)[1]) >= 0.7


def test_an_epoch_has_each_image_once_whatever_the_number_of_processes():
    widths = [4 * (8 + i % 5) for i in range(203)]
    for world in (1, 2, 3):
        orders = [
            EpochOrder(widths, 10, torch.Generator().manual_seed(1), rank, world)
            for rank in range(world)
        ]
        epochs = []
        for _ in range(2):
            ranks = [list(order) for order in orders]
            epochs.append(ranks)
            assert sorted(i for batches in ranks for batch in batches for i in batch) == list(
                range(203)
            )
            assert all(len(batches) == len(orders[0]) for batches in ranks)
            shares = [sum(map(len, together)) for together in zip(*ranks, strict=True)]
            assert shares == orders[0].totals
        assert epochs[0] != epochs[1]
        # The same batches, however they are shared.
        together = [sorted(chain(*shares)) for shares in zip(*epochs[0], strict=True)]
        if world == 1:
            alone = together
        elif world == 2:
            assert together == alone
    with pytest.raises(ValueError, match="too few"):
        EpochOrder([32], 10, torch.Generator(), 0, 2)


def test_images_on_the_device_make_the_same_batches(digits):
    checked = check(digits, splits=["test"])
    dataset = TextImageDataset(checked.test, Preprocess())
    converter = CTCLabelConverter(checked.alphabet)
    indices = [5, 2, 77]
    ours = OnDevice(dataset, converter, "cpu").__getitems__(indices)
    theirs = Collate(converter)([dataset[i] for i in indices])
    for one, other in zip(ours[:4], theirs[:4], strict=True):
        assert torch.equal(one, other)
    assert ours.labels == theirs.labels


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentation_moves_a_little(name):
    torch.manual_seed(0)
    images = -torch.ones(8, 3, 32, 128)  # a white square on black
    images[:, :, 12:20, 60:68] = 1
    for _ in range(20):
        changed = AUGMENTATIONS[name](images)
        assert changed.shape == images.shape
        assert changed.min() >= -1.001
        assert changed.max() <= 1.001
        light = changed[:, 0] + 1
        centres = (light.sum(1) * torch.arange(128.0)).sum(1) / light.sum((1, 2))
        assert (centres - 63.5).abs().max() < 14
    assert torch.equal(changed, images) == (name == "none")


def test_confusions_of_texts_of_other_lengths():
    assert confusions(["abd", "ab"], ["abc", "abb"]) == {("c", "d"): 1, ("b", ""): 1}


def test_images_read_again_each_epoch_and_bfloat16_train_the_same(digits, undisturbed, tmp_path):
    one_epoch = [*BRIEF, "--epochs", 1]
    losses = []
    for flags in (["--no-amp"], ["--no-amp", "--memory", 0], ["--amp"]):
        process = run_script("train.py", "--data", digits, *one_epoch, *flags, cwd=tmp_path)
        assert ("do not fit into memory" in process.stdout) == ("--memory" in flags), process.stderr
        losses.append(float(re.search(r"test loss +(\S+)", process.stdout)[1]))
    assert losses[1] == losses[0]
    assert losses[2] == pytest.approx(losses[0], rel=0.05)


def test_tensorboard_or_what_to_install(digits, tmp_path):
    process = run_script("train.py", "--data", digits, *BRIEF, "--tensorboard", cwd=tmp_path)
    if find_spec("tensorboard"):
        assert list(tmp_path.glob("save_model/*.tensorboard/*"))
    else:
        assert_clear_error(process, "pip install tensorboard")
