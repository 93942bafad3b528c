"""Train MicroNet with CTC loss until every test image is read right.

    python train.py                                  # data/simple, drawn if it is not there
    python train.py --task complex                   # or chinese
    python train.py --data my_images                 # your own, see README.md
    python train.py --data my_images --resume        # go on after a kill
    python train.py --data my_images --weights W.pth --fine-tune
    python train.py --evaluate --weights save_model/simple_nh16_depth2.pth
    torchrun --nproc-per-node=2 train.py             # two processes, each with its GPU

Writes to save_model/, with NAME = TASK_nhNH_depthDEPTH or FOLDER_nhNH_depthDEPTH:

    NAME.pth             the checkpoint of the best epoch
    NAME.csv, NAME.png   one line per epoch, and its curves where matplotlib is installed
    NAME.mistakes.png    what the best epoch misreads
    NAME.data.png        some of the training images with their labels
    NAME.resume          all that --resume needs, after each epoch

The files of an earlier run get a number.
"""

import gc
import signal

if __name__ == "__main__":  # Ctrl-C during the imports: an end without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    gc.disable()  # imports leave nothing to collect; `command` enables it

import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import metric
import model as network
import settings
from collatefn import (
    AUGMENTATIONS,
    TextImageDataset,
    TrainingLoader,
    evaluation_loader,
    from_first,
    gather,
    lost_process,
    processes,
    random_shift,
    settle_memory,
    start_processes,
    training_loader,
)
from ctc_label_converter import vote
from dataset import DataOptions, case_folding
from image import SURE, other_looks
from infer_tool import RecInfer, latest_weights, written_weights
from keys import choose_ngrams, command
from loss import (
    PART,
    CTCLoss,
    MovingAverage,
    Optimizer,
    best_epoch,
    fall_of,
    learning_rate,
    losses_of_parts,
    precision,
    reason_to_stop,
    take_step,
)

MAX_SKIPPED = 20  # steps in a row without a finite gradient, then the training ends


@dataclass
class Progress:
    """How far a training is. It changes from step to step and is saved with the weights.

    skipped: steps whose gradient was not finite. rows: a `metric.EpochResult` for each epoch.
    order, random_states: of the generators, after the last epoch.
    fall: (step, epoch) where the rate begins to fall, and those where the training ends.
    temperature, sure: what fitted the held-out images before they were trained on too.
    """

    step: int = 0
    skipped: int = 0
    rows: list = field(default_factory=list)
    order: torch.Tensor | None = None
    random_states: list = field(default_factory=list)
    fall: tuple | None = None
    temperature: float | None = None
    sure: float | None = None


@dataclass
class Run:
    """What a training consists of. `set_up` puts it together, `train_epoch` uses it.

    recogniser: what is trained. forward: its model, as it is, compiled or distributed.
    average: of its weights. kind: of the numbers that it computes with. batches_of: makes
    training batches of samples. order: the generator of their order. plan: the data and the
    preset. identity: see `settings.Plan`.
    """

    recogniser: network.Recogniser
    forward: torch.nn.Module
    average: MovingAverage
    optimizer: Optimizer
    kind: torch.dtype
    autocast: nullcontext
    scaler: torch.amp.GradScaler
    batches_of: Callable
    train_batches: TrainingLoader
    held_out: DataLoader
    order: torch.Generator
    plan: settings.Plan
    identity: dict
    files: settings.Files
    progress: Progress
    device: torch.device

    def parts(self):
        """{name: what has a state that --resume needs}."""
        return {
            "model": self.recogniser.model, "average": self.average, "optimizer": self.optimizer,
            "scaler": self.scaler,
        }  # fmt: skip

    def best_epoch(self):
        """`loss.best_epoch` of the epochs so far."""
        return best_epoch(self.progress.rows, len(self.plan.held_out))

    def averaged(self):
        """The `model.Recogniser` with the average of the weights."""
        return replace(self.recogniser, model=self.average.module)


def losses_of(run, batch, criterion):
    """`loss.losses_of_parts` of a batch, augmented."""
    images, preset = batch.images.to(run.device, non_blocking=True), run.plan.preset
    augment, normalise = AUGMENTATIONS[preset.augment], preset.preprocess.normalise
    if augment is random_shift:  # whole pixels are moved as bytes, a quarter of what numbers take
        images = normalise(augment(images), run.kind)
    else:
        images = augment(normalise(images))
    world, nclass = processes()[1], run.recogniser.converter.nclass
    in_parts = preset.keep_statistics and run.device.type == "cpu" and world == 1
    batch = batch._replace(images=images)
    parts = batch.parts(PART) if in_parts else [batch]
    return losses_of_parts(run.forward, parts, criterion, nclass, run.autocast, world)


def train_epoch(run, bar):
    """Train on each image once. Returns (mean loss, last learning rate).

    Raises ValueError where the gradients stay without finite values.
    """
    progress, criterion, preset = run.progress, CTCLoss(), run.plan.preset
    run.recogniser.model.begin_training(preset.keep_statistics)
    steps, fall = preset.epochs * len(run.train_batches), progress.fall and progress.fall[::2]
    total_loss, images, in_a_row = torch.zeros((), device=run.device), 0, 0
    for batch in run.train_batches:
        lr = run.optimizer.lr = learning_rate(preset, progress.step, steps, fall)
        criterion.set_step(progress.step, preset.flat)
        kept = run.optimizer.numbers.statistics.clone()
        loss, finite = take_step(run.optimizer, run.scaler, losses_of(run, batch, criterion))
        if finite:
            run.average.update()
            total_loss += loss * (batch.whole / processes()[1])
            images += len(batch.labels)
            in_a_row = 0
        else:  # batch normalisation has seen the numbers before the step was refused
            run.optimizer.numbers.statistics.copy_(kept)
            progress.skipped += 1
            in_a_row += 1
            if in_a_row == MAX_SKIPPED:
                raise ValueError(
                    f"the loss or its gradient was not finite in {MAX_SKIPPED} steps in a row, up "
                    f"to step {progress.step} in epoch {len(progress.rows) + 1}, at learning rate "
                    f"{lr:.3g}: choose a lower --lr, and leave out --amp"
                )
        progress.step += 1
        if progress.step % 20 == 0:  # reading a loss waits for the GPU
            accuracy = f"{progress.rows[-1].word_accuracy:.4f}" if progress.rows else "-"
            bar.set_postfix(loss=f"{loss.item():.3f}", word_accuracy=accuracy)
        bar.update()
    shares = gather((total_loss.item(), images))
    return sum(loss for loss, _ in shares) / max(1, sum(n for _, n in shares)), lr


@torch.inference_mode()
def logits_of(recogniser, batches, device):
    """(`Batch`, its logits) of all batches."""
    recogniser.model.to(device).eval()
    for batch in batches:
        yield batch, recogniser.logits(batch.images.to(device), batch.widths)


def evaluate(recogniser, batches, device):
    """(nats per image, `Reading`s in the order of the data set) of all processes' batches."""
    criterion, found, total_loss = CTCLoss(), {}, 0.0
    for batch, logits in logits_of(recogniser, batches, device):
        loss = criterion(logits, batch.targets, batch.columns, batch.target_lengths)
        total_loss += loss.item() * len(batch.labels)
        readings = recogniser.converter.decode(logits.cpu().numpy(), batch.columns.numpy())
        found.update(zip(batch.indices, readings, strict=True))
    parts = gather((total_loss, found))
    found = {index: reading for _, part in parts for index, reading in part.items()}
    return sum(loss for loss, _ in parts) / len(found), [found[i] for i in range(len(found))]


def look_again(recogniser, checked, samples, readings, device):
    """The readings of some samples, the unsure ones mended by other looks, as in `RecInfer`."""
    looks = [[reading] for reading in readings]
    unsure = [i for i, r in enumerate(readings) if r.confidence < recogniser.preprocess.sure]
    again = [samples[i] for i in unsure]
    data = TextImageDataset(again, checked.preprocess, known=checked.pixels)
    for others in other_looks({unsure[i]: [pixels] for pixels, _, i in data}, looks):
        known = {samples[i].path: pixels for i, [pixels] in others.items()}
        batches = evaluation_loader(checked._replace(pixels=known), again, recogniser.converter)
        for i, reading in zip(unsure, evaluate(recogniser, batches, device)[1], strict=True):
            looks[i].append(reading)
    return [vote(found) for found in looks]


def choose_looks(recogniser, plan, batches, device):
    """A `model.Recogniser` that looks again where unsure, if held-out images are read better so.

    Some characters, O and 0 in many fonts, differ by their width alone.
    """
    samples, preprocess = plan.held_out, recogniser.preprocess
    if plan.held_out is plan.checked.test or preprocess.width:
        return recogniser
    looks = [replace(recogniser, preprocess=replace(preprocess, sure=s)) for s in (0.0, SURE)]
    _, once = evaluate(recogniser, batches, device)
    readings = once, look_again(looks[1], plan.checked, samples, once, device)
    labels = [sample.label for sample in samples]
    errors = [metric.character_error_rate([r.text for r in found], labels) for found in readings]
    return looks[errors[1] < errors[0]]


def calibrate(recogniser, batches, device, fold=str):
    """A `model.Recogniser` with the temperature of `metric.fit_temperature` for ``batches``."""
    read = (
        (logits.cpu().numpy(), batch.columns.numpy(), batch.labels)
        for batch, logits in logits_of(recogniser, batches, device)
    )
    converter = recogniser.converter
    fitted = converter.replaced(temperature=metric.fit_temperature(converter, read, fold))
    return replace(recogniser, converter=fitted)


def set_up(args, plan, files, start, device):
    """Put the `Run` of a training together."""
    rank, world = processes()
    checked, preset = plan.checked, plan.preset
    torch.manual_seed(args.seed)
    recogniser = settings.first_recogniser(args, plan, start)
    model, converter = recogniser.model.to(device), recogniser.converter
    order = torch.Generator().manual_seed(args.seed)

    def batches_of(samples):
        return training_loader(
            checked._replace(train=samples), converter, device, order=order,
            batch_size=preset.batch_size, memory=args.memory, rank=rank, world=world,
        )  # fmt: skip

    held_out = evaluation_loader(checked, plan.held_out, converter, rank, world)
    optimizer, forward = Optimizer(model, preset.muon), model
    if world > 1:
        forward = DistributedDataParallel(model, [device] if device.type == "cuda" else None)
        torch.manual_seed(args.seed + rank)  # each augments in its own way
    return Run(
        recogniser, torch.compile(forward) if args.compile else forward,
        MovingAverage(model, optimizer.numbers, preset.averaging), optimizer,
        *precision(preset.amp, device), batches_of, batches_of(checked.train), held_out, order,
        plan, plan.identity(args), files, Progress(), device,
    )  # fmt: skip


def resume(run, state):
    """Set a `Run` to what `model.load_state` has loaded. Raises ValueError where that differs."""
    try:
        for name, part in run.parts().items():
            part.load_state_dict(state[name])
        known = state["progress"]
        run.progress = Progress(**{key: known[key] for key in vars(run.progress)})
    except (KeyError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"{run.files.state}: another version of this program wrote it ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}): leave out --resume to begin a new training"
        ) from None
    run.progress.rows = [metric.EpochResult(n, *map(float, rest)) for n, *rest in known["rows"]]
    run.order.set_state(run.progress.order)
    rank, world = processes()
    if run.progress.fall:
        run.train_batches = run.batches_of([*run.plan.checked.train, *run.plan.held_out])
    if len(run.progress.random_states) == world:
        torch.set_rng_state(run.progress.random_states[rank])


def last_epoch(run):
    """The number of the last epoch, as far as it is known."""
    return run.progress.fall[3] if run.progress.fall else run.plan.preset.epochs


def begin_fall(run, epochs):
    """From now on the rate falls, for some epochs, and the held-out images are trained on too."""
    progress, plan = run.progress, run.plan
    fitted = calibrate(run.averaged(), run.held_out, run.device)
    fitted = choose_looks(fitted, plan, run.held_out, run.device)
    progress.temperature, progress.sure = fitted.converter.temperature, fitted.preprocess.sure
    run.train_batches = run.batches_of([*plan.checked.train, *plan.held_out])
    now, step = len(progress.rows), progress.step
    progress.fall = step, now, step + epochs * len(run.train_batches), now + epochs


def next_epoch(run, bar, began):
    """Train and evaluate. Returns the `metric.EpochResult`, which is in the progress by then."""
    train_loss, lr = train_epoch(run, bar)
    if processes()[1] > 1:  # each process has seen other images
        for buffer in run.average.module.buffers():
            distributed.broadcast(buffer, 0)
    progress, averaged = run.progress, run.averaged()
    if not progress.rows and run.plan.preset.epochs > 1:
        # While most come out too long or too short, to search them takes as long as the epoch.
        averaged = replace(averaged, converter=averaged.converter.replaced(length=None))
    test_loss, readings = evaluate(averaged, run.held_out, run.device)
    texts = [reading.text for reading in readings]
    labels = [sample.label for sample in run.plan.held_out]
    accuracy = metric.word_accuracy(texts, labels)
    cer = metric.character_error_rate(texts, labels)
    epoch, seconds = len(progress.rows) + 1, time.perf_counter() - began
    row = metric.EpochResult(epoch, train_loss, test_loss, accuracy, cer, lr, seconds)
    progress.rows.append(row)
    preset = run.plan.preset
    if preset.until_done and not progress.fall:
        epochs = fall_of(progress.rows, preset, len(run.train_batches), len(labels))
        if epochs:
            begin_fall(run, epochs)
    # Last, for reading images draws from the generators too.
    progress.order = run.order.get_state()
    progress.random_states = gather(torch.get_rng_state())
    return row


def save_epoch(run):
    """Write what the last epoch came to."""
    rows, files = run.progress.rows, run.files
    if len(rows) == 1:
        network.keep_previous(files)
    if run.progress.fall or run.best_epoch() is rows[-1]:
        checkpoint = network.save_checkpoint(files.checkpoint, run.averaged())
        run.files = files._replace(checkpoint=checkpoint)
    metric.save_progress(files.table, files.curves, rows, at_end=False)
    # The state last: with an older one the epoch is repeated, and ends the same.
    state = {name: part.state_dict() for name, part in run.parts().items()}
    progress = vars(run.progress) | {"rows": [list(row) for row in rows]}
    network.save_tensors(files.state, {"settings": run.identity, "progress": progress, **state})


def begin(args, device):
    """Prepare a training, or go on with one. Returns its `Run`."""
    rank, world = processes()
    start = settings.starting_point(args)
    settings.check_writable(args.out)  # before what takes minutes: drawing, looking at the data
    plan = from_first(lambda: settings.prepare(args, start, device))
    files = settings.output_files(args, plan.preset)
    from_first(lambda: network.claim(files.checkpoint))
    if rank == 0:
        sheet = metric.data_sheet(plan.checked.train, plan.preset.preprocess, args.seed)
        metric.save_picture(files.checkpoint.with_suffix(".data.png"), sheet)
    run = set_up(args, plan, files, start, device)
    if args.resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
        state = from_first(lambda: network.load_state(files.state, run.identity))
        if state:
            resume(run, state)
    if rank == 0:
        images = f"{len(plan.checked.train)} training and {len(plan.checked.test)} test images"
        print(
            f"{images}, {files.checkpoint.stem} on {device}"
            + (f", {world} processes" if world > 1 else "")
            + (f", resumed after epoch {len(run.progress.rows)}" if run.progress.rows else "")
        )
    return run


def train(args, device):
    """Train, save the best epoch, and say where it is. Returns the exit status."""
    rank, world = processes()
    run = begin(args, device)
    progress, epochs, writer = run.progress, run.plan.preset.epochs, None
    if args.tensorboard and rank == 0:
        writer = metric.tensorboard_writer(run.files.checkpoint.with_suffix(".tensorboard"))
    bar = tqdm(
        total=epochs * len(run.train_batches), initial=progress.step, desc="training", unit="step",
        disable=rank > 0,
    )  # fmt: skip
    began = time.perf_counter() - (progress.rows[-1].seconds if progress.rows else 0)
    ended, status = None, 0
    try:
        while len(progress.rows) < last_epoch(run) and not ended:
            row = next_epoch(run, bar, began)
            if rank == 0:
                save_epoch(run)
                bar.write(f"epoch {row.epoch:3d}/{epochs}  {row}")
            if writer:
                metric.add_to_tensorboard(writer, row)
            if progress.fall and progress.fall[1] == row.epoch and rank == 0:
                bar.total = progress.fall[2]
                bar.write(
                    "the loss of the held-out images falls no more, few errors are left or epochs "
                    f"end: to epoch {last_epoch(run)} at a falling rate, with those too (--epochs)"
                )
            ended = reason_to_stop(progress.rows, run.best_epoch(), args.stop_at, args.patience)
    except KeyboardInterrupt:
        ended, status = "interrupted, --resume goes on", 130
    bar.close()
    if world > 1:
        distributed.destroy_process_group()
    if writer:
        writer.close()
    if rank == 0:
        if ended:
            print(ended, file=sys.stderr)
        finish(run, world)
    return status


def finish(run, world):
    """Calibrate the checkpoint, show what it misreads, and say where it is.

    Of the ``world`` processes that trained only the first one is left.
    """
    progress, files, checked = run.progress, run.files, run.plan.checked
    if progress.skipped:
        print(f"skipped {progress.skipped} steps whose gradient was not finite")
    if not progress.rows:
        print("no epoch was completed, nothing was saved")
        return
    metric.save_progress(files.table, files.curves, progress.rows)
    best = network.load_checkpoint(files.checkpoint)

    def batches(samples):  # of one process there are those of the held-out images already
        kept = world == 1 and samples is run.plan.held_out
        return run.held_out if kept else evaluation_loader(checked, samples, best.converter)

    if progress.fall:
        converter = best.converter.replaced(temperature=progress.temperature)
        looks = replace(best.preprocess, sure=progress.sure)
        best = replace(best, converter=converter, preprocess=looks)
    else:
        best = calibrate(best, batches(run.plan.held_out), run.device)
        best = choose_looks(best, run.plan, batches(run.plan.held_out), run.device)
    if run.plan.held_out is not checked.test:  # of which nothing may be known
        parts = ([sample.label for sample in part] for part in (checked.train, run.plan.held_out))
        ngrams = choose_ngrams(*parts)
        best = replace(best, converter=best.converter.replaced(ngrams=ngrams))
        if ngrams:
            count = max(map(len, ngrams))
            print(f"doubtful texts are read as labels are, by {count} characters in a row")
    network.save_checkpoint(files.checkpoint, best)
    _, readings = evaluate(best, batches(checked.test), run.device)
    readings = look_again(best, checked, checked.test, readings, run.device)
    metric.show_mistakes(checked.test, readings, files.mistakes)
    if not files.curves.exists():
        print("for curves of the training: pip install matplotlib")
    row = progress.rows[-1] if progress.fall else run.best_epoch()
    if run.plan.held_out is checked.test:  # which have chosen the epoch
        print(f"best epoch {row.epoch}, word accuracy {row.word_accuracy:.4f}: {files.checkpoint}")
        return
    texts, labels = [reading.text for reading in readings], [s.label for s in checked.test]
    why = "trained on all images" if progress.fall else "the best on the held-out images"
    print(f"epoch {row.epoch} was {why}: {files.checkpoint}")
    print(f"test images: {metric.summary(texts, labels)}")


def load_test_set(args, converter, preprocess, val_fraction):
    """The `dataset.Checked` of the test images, and what is done to texts before they compare.

    Args:
        converter, preprocess: of the weights that read them.
    """
    settings.draw_missing(args)
    checked = settings.check_data(
        args, ["test"], alphabet=converter.alphabet, preprocess=preprocess,
        length=converter.length, val_fraction=val_fraction,
    )  # fmt: skip
    print(checked.notes[0])
    return checked, case_folding(converter.alphabet) if args.ignore_case else str


def evaluate_weights(args, device):
    """Print how well `RecInfer` reads the test images, all images where there is no test set."""
    weights = args.weights or latest_weights(args.task, "simple")
    print(f"evaluating {weights}")
    reader = RecInfer(weights, str(device))
    length = settings.text_length(args, reader.converter)
    reader.converter = reader.converter.replaced(length=length)
    checked, fold = load_test_set(args, reader.converter, reader.preprocess, val_fraction=1)
    paths = [sample.path for sample in checked.test]
    readings = []
    for _, reading in tqdm(reader.stream(paths), "reading", len(paths), unit="img"):
        if isinstance(reading, ValueError):
            raise reading
        readings.append(reading._replace(text=fold(reading.text)))
    metric.show_mistakes(checked.test, readings, args.mistakes)
    labels = [sample.label for sample in checked.test]
    metric.print_calibration(readings, labels, reader.converter.temperature)
    print(metric.summary([reading.text for reading in readings], labels))


def calibrate_weights(args, device):
    """Fit the temperature of weights of one's own to the test images."""
    weights = args.weights or written_weights(args.task)
    if not weights:
        raise ValueError("--calibrate: there are no weights of a training, name them: --weights")
    old = network.load_checkpoint(weights)
    checked, fold = load_test_set(args, old.converter, old.preprocess, DataOptions.val_fraction)
    new = calibrate(old, evaluation_loader(checked, checked.test, old.converter), device, fold)
    network.save_checkpoint(weights, new)
    print(f"{weights}: the temperature is now {new.converter.temperature}")


def main():
    args = settings.parse_args(__doc__)
    settle_memory()
    device = start_processes(args.device)
    if args.evaluate:
        return evaluate_weights(args, device)
    if args.calibrate:
        return calibrate_weights(args, device)
    try:
        return train(args, device)
    except torch.OutOfMemoryError:
        raise ValueError(f"{device} has too little memory: try a smaller --batch-size") from None
    except (RuntimeError, ConnectionError) as error:
        if not distributed.is_initialized():
            raise
        lost_process(error)


if __name__ == "__main__":
    command(main)
