"""From samples to batches: loading, order, collation, augmentation, and who shares them."""

import ctypes
import os
import signal
import sys
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import distributed
from torch.nn import functional as F
from torch.utils.data import DataLoader

from dataset import for_each
from image import PATCH, ImageError, read_image
from infer_tool import BATCH_SIZE, MAX_LOGITS
from model import pick_device

CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
# Batches' worth of images that are sorted by width at a time, but no more than a quarter of all,
# or epochs would differ too little, unless those are fewer than the least.
SORTED, LEAST_SORTED = 32, 256
SHIFT_X, SHIFT_Y = 2, 1  # pixels that a training batch is moved by, at most
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
# Columns of an evaluated batch, PATCH pixels wide, times their rows, at most: of more, what a layer
# of 160 channels makes takes over 32 MB, which glibc maps anew, page by page, each time.
MAX_COLUMN_ROWS = 200_000
BEND = 1.2  # pixels, the standard deviation of how far a bend moves what it bends


class Batch(NamedTuple):
    """N images and their labels.

    images: (N, 3, H, W) uint8, W the widest image's width.
    widths: (N,) int64, pixels of each image without its padding.
    targets: (sum of target_lengths,) int64, the classes of all labels in a row.
    target_lengths: (N,) int64.
    labels: N strings.
    indices: N places in the data set.
    whole: images of the whole batch, of which each process has its share.
    """

    images: torch.Tensor
    widths: torch.Tensor
    targets: torch.Tensor
    target_lengths: torch.Tensor
    labels: list[str]
    indices: list[int]
    whole: int

    @property
    def columns(self):
        """(N,) int64, columns of each image that count."""
        return self.widths // PATCH

    def parts(self, size):
        """The batch in parts of about ``size`` images, each as wide as its images need."""
        alike = (self.widths == self.images.shape[3]).all()
        count = max(1, round(len(self.labels) / size))
        cuts = [round(i * len(self.labels) / count) for i in range(count + 1)]
        ends = [0, *self.target_lengths.cumsum(0).tolist()]
        for first, end in pairwise(cuts):
            part = slice(first, end)
            columns = self.columns[part].max().item()
            # oneDNN writes code for each shape that it does not keep, see `settle_memory`: with all
            # widths, a seventh of a training. So they are rounded up, by less than an eighth.
            step = 1 if alike else max(1, 2 ** columns.bit_length() // 16)
            width = -(-columns // step) * step * PATCH
            yield Batch(
                F.pad(self.images[part], (0, width - self.images.shape[3])),  # less than 0: cut
                self.widths[part],
                self.targets[ends[first] : ends[end]],
                self.target_lengths[part],
                self.labels[part],
                self.indices[part],
                self.whole,
            )


class TextImageDataset:
    """Images and labels, as uint8 in memory or read when they are asked for.

    Args:
        samples: a list of `Sample`.
        preprocess: a `Preprocess`.
        in_memory: decode all images now.
        known: {path: array} of images that are decoded already.

    Item i is ((3, height, W) uint8 array, label, i).

    Raises ValueError, naming file and line of everything that cannot be read.
    """

    def __init__(self, samples, preprocess, in_memory=True, known=None):
        self.samples, self.preprocess, self.known = samples, preprocess, known or {}
        self.arrays = None
        if in_memory:
            arrays = for_each(self._load, samples, "loading")
            problems = [str(array) for array in arrays if isinstance(array, ValueError)]
            if problems:
                raise ValueError("\n".join(problems))
            self.arrays = arrays

    def _load(self, sample):
        """The pixels of a sample, or a ValueError."""
        if sample.path in self.known:
            return self.known[sample.path]
        try:
            return self.preprocess(read_image(sample.path))
        except ImageError as error:
            return ValueError(sample.problem(error))

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        sample = self.samples[index]
        pixels = self.arrays[index] if self.arrays else self._load(sample)
        if isinstance(pixels, ValueError):
            raise pixels
        return pixels, sample.label, index


class Collate:
    """The ``collate_fn`` of a DataLoader over a TextImageDataset.

    Args:
        converter: a `CTCLabelConverter`.
    """

    def __init__(self, converter):
        self.converter = converter

    def __call__(self, samples):
        """[((3, H, W) uint8 array, label, index)] -> `Batch`, its whole as if it were one.

        Narrower images are padded on the right with their last column.
        """
        arrays, labels, indices = zip(*samples, strict=True)
        widths = [array.shape[2] for array in arrays]
        images = np.empty((len(arrays), *arrays[0].shape[:2], max(widths)), np.uint8)
        for image, array, width in zip(images, arrays, widths, strict=True):
            image[:, :, :width] = array
            image[:, :, width:] = array[:, :, -1:]
        targets, target_lengths = self.converter.encode(labels)
        return Batch(
            torch.from_numpy(images),
            torch.tensor(widths),
            torch.from_numpy(targets),
            torch.from_numpy(target_lengths),
            list(labels),
            list(indices),
            len(labels),
        )


class OnDevice:
    """A TextImageDataset as one tensor on a device, from which whole batches are taken.

    For a DataLoader with ``collate_fn=OnDevice.unchanged``.

    Args:
        dataset: a TextImageDataset in memory.
        converter: a `CTCLabelConverter`.
        device: where the images are kept, as uint8, padded to the widest.
    """

    def __init__(self, dataset, converter, device):
        everything = Collate(converter)(dataset)
        # The channels of a pixel side by side: so the network wants them, see `ConvBNACT`.
        self.images = everything.images.to(device).movedim(1, 3).contiguous()
        self.widths, self.labels = everything.widths, everything.labels
        self.converter = converter

    @staticmethod
    def unchanged(batch):
        """The batch is made already."""
        return batch

    def __len__(self):
        return len(self.labels)

    def __getitems__(self, indices):
        """The `Batch` of some images, the same as `Collate` makes of them."""
        chosen = torch.tensor(indices)
        widths = self.widths[chosen]
        images = self.images.index_select(0, chosen.to(self.images.device)).movedim(3, 1)
        images = images[..., : widths.max()]
        labels = [self.labels[i] for i in indices]
        targets, lengths = map(torch.from_numpy, self.converter.encode(labels))
        return Batch(images, widths, targets, lengths, labels, list(indices), len(labels))


class EpochOrder:
    """The ``batch_sampler`` of a training: each image once an epoch, in a random order.

    Images of similar width share a batch where widths differ, so that little is padding.
    Where several processes train, each gets its share of every batch.

    Args:
        widths: pixels of each image.
        batch_size: images of a batch, over all processes.
        generator: the `torch.Generator` of the order.
        rank, world: which of how many processes this is.

    Attributes:
        totals: images of each batch of the epoch that was begun last, over all processes.

    Raises ValueError for fewer images than processes.
    """

    def __init__(self, widths, batch_size, generator, rank=0, world=1):
        if len(widths) < world or batch_size < world:
            raise ValueError(
                f"{len(widths)} images in batches of {batch_size} are too few for {world} processes"
            )
        self.widths, self.batch_size, self.generator = widths, batch_size, generator
        self.rank, self.world = rank, world
        self.totals = []

    def __len__(self):
        full, rest = divmod(len(self.widths), self.batch_size)
        return full + (rest >= self.world)

    def __iter__(self):
        order = torch.randperm(len(self.widths), generator=self.generator).tolist()
        mixed = len(set(self.widths)) > 1
        if mixed:
            chunk = min(SORTED * self.batch_size, max(LEAST_SORTED, len(order) // 4))
            parts = [order[i : i + chunk] for i in range(0, len(order), chunk)]
            order = [i for part in parts for i in sorted(part, key=self.widths.__getitem__)]
        batches = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        if len(batches[-1]) < self.world:  # each process needs an image
            batches[-2:] = [batches[-2] + batches[-1]]
        if mixed:
            turns = torch.randperm(len(batches), generator=self.generator).tolist()
            batches = [batches[i] for i in turns]
        self.totals = [len(batch) for batch in batches]
        for batch in batches:
            yield batch[self.rank :: self.world]


class TrainingLoader(DataLoader):
    """A DataLoader whose batch_sampler is an `EpochOrder`: its batches know their whole."""

    def __iter__(self):
        for i, batch in enumerate(super().__iter__()):
            yield batch._replace(whole=self.batch_sampler.totals[i])


def training_loader(checked, converter, device, *, order, batch_size, memory=None, rank=0, world=1):
    """The `TrainingLoader` of a training.

    The images are on the GPU where they fit into half of its free memory, else in memory
    where they fit (as one tensor, where all are equally wide), else they are read by worker
    processes.

    Args:
        checked: a `dataset.Checked`.
        converter: a `CTCLabelConverter`.
        device: that trains.
        order: the `torch.Generator` of the order.
        batch_size: images of a batch, over all processes.
        memory: GB (2^30 bytes) for the images, None for half of the machine's.
        rank, world: which of how many processes this is.
    """
    samples, height = checked.train, checked.preprocess.height
    widths = checked.widths(samples)
    sampler = EpochOrder(widths, batch_size, order, rank, world)
    size = 3 * height * sum(widths)
    room = machine_memory() / 2 if memory is None else memory * 2**30
    in_memory = size <= room / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    dataset = TextImageDataset(samples, checked.preprocess, in_memory, checked.pixels)
    if in_memory and (device.type == "cuda" or size <= room / 2):
        padded = 3 * height * max(widths) * len(widths)
        if padded <= (torch.cuda.mem_get_info(device)[0] / 2 if device.type == "cuda" else size):
            resident = OnDevice(dataset, converter, device)
            return TrainingLoader(
                resident, batch_sampler=sampler, collate_fn=resident.unchanged, generator=order
            )
    if not in_memory:
        print(f"{size / 2**30:.1f} GB of images do not fit into memory, they are read each epoch")
    return TrainingLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=Collate(converter),
        generator=order,
        num_workers=0 if in_memory else min(8, os.cpu_count() or 1),
        persistent_workers=not in_memory,
        pin_memory=device.type == "cuda",
    )


def evaluation_loader(checked, samples, converter, rank=0, world=1):
    """A DataLoader over this process's share of some samples, similar widths in a batch."""
    widths, height = checked.widths(samples), checked.preprocess.height
    batches = [[]]
    for i in sorted(range(len(samples)), key=widths.__getitem__)[rank::world]:
        # As a reader does, for the same reason; the last one is the widest.
        columns = (len(batches[-1]) + 1) * widths[i] // PATCH
        many = columns * converter.nclass > MAX_LOGITS or columns * height > MAX_COLUMN_ROWS
        if batches[-1] and (len(batches[-1]) == BATCH_SIZE or many):
            batches.append([])
        batches[-1].append(i)
    return DataLoader(
        TextImageDataset(samples, checked.preprocess, known=checked.pixels),
        batch_sampler=batches,
        collate_fn=Collate(converter),
    )


def machine_memory():
    """Bytes of memory that this process may use, 8 GB where the machine does not tell."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return 8 * 2**30
    for limit in CGROUP_LIMITS:  # a container's
        with suppress(OSError, ValueError):  # none, or "max"
            memory = min(memory, int(Path(limit).read_text(encoding="ascii")))
    return memory


def settle_memory():
    """Say what glibc and oneDNN, by which PyTorch convolves on CPUs, keep. Before the first step.

    glibc keeps what is freed, up to 1 GB: the next step needs as much again. Given back to the
    system, it came back as hundreds of page faults a step, an eighth of a step of the smallest
    network. Other C libraries do not have that call.

    oneDNN keeps the code and buffers of the last 128 operations and shapes, of which a step has
    20, not of 1,024: where images vary in width those take gigabytes, and save little time.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    with suppress(AttributeError, OSError, TypeError):
        allocator = ctypes.CDLL(None).mallopt
        for option, value in (M_MMAP_THRESHOLD, 32 << 20), (M_TRIM_THRESHOLD, 1 << 30):
            allocator(option, value)


def random_shift(images):
    """Move a batch by some whole pixels, its edges repeated. (N, 3, H, W) -> same."""
    for dim, most in (3, SHIFT_X), (2, SHIFT_Y):
        by, size = torch.randint(-most, most + 1, ()).item(), images.shape[dim]
        # Not padding, which takes the channels apart, and whose views are copied twice later.
        edge = images.narrow(dim, 0 if by > 0 else size - 1, 1)
        rest = images.narrow(dim, max(0, -by), size - abs(by))
        edges = [edge] * abs(by)
        images = torch.cat([*edges, rest] if by > 0 else [rest, *edges], dim) if by else images
    return images


def affine_grid(images, strength):
    """Where in the image each pixel of a random affine view of it comes from.

    At strength 1: up to 10 % larger and 22 % smaller, stretched by 5 %, slanted by 0.2, turned
    by about 5 degrees. Moved by 5 pixels across and 4 down at any. More smaller than larger: what
    leaves the image is lost, and its label still names it. Stretched more, 0 would become O.

    Args:
        images: (N, 3, H, W).

    Returns:
        (N, H, W, 2), x and y from -1 to 1, for `grid_sample`.
    """
    count, _, height, width = images.shape

    def between(low, high):
        return low + (high - low) * torch.rand(count)

    turn = strength * between(-0.08, 0.08)
    matrix = torch.zeros(count, 2, 3)
    size, stretch = strength * between(-0.1, 0.2), strength * between(-0.05, 0.05)
    matrix[:, 0, 0] = torch.exp(size + stretch)
    matrix[:, 0, 1] = (turn + strength * between(-0.2, 0.2)) * height / width
    matrix[:, 0, 2] = between(-10, 10) / width
    matrix[:, 1, 0] = -turn * width / height * 0.3  # a line of text is long: less, or it leaves
    matrix[:, 1, 1] = torch.exp(size - stretch)
    matrix[:, 1, 2] = between(-8, 8) / height
    return F.affine_grid(matrix.to(images.device), images.shape, align_corners=False)


def grid_sample(images, grid):
    """The images seen through `affine_grid`'s or another grid, their edges repeated."""
    if images.device.type == "mps":  # has no such padding
        return clamped_sample(images, grid)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def clamped_sample(images, grid):
    """`grid_sample` on devices that have no border padding: no place lies beyond the edges."""
    height, width = images.shape[2:]
    edge = torch.tensor([1 - 1 / width, 1 - 1 / height], device=grid.device)
    return F.grid_sample(images, grid.clamp(-edge, edge), align_corners=False)


def random_affine(images):
    """Stretch, slant, turn and move each image of a batch a little. (N, 3, H, W) -> same."""
    return grid_sample(images, affine_grid(images, 1))


def random_warp(images):
    """As `random_affine`, half as much again, and bent as on rubber. (N, 3, H, W) -> same.

    Simard et al., "Best Practices for Convolutional Neural Networks Applied to Visual
    Document Analysis", ICDAR 2003. Here a bend has about the size of a glyph.
    """
    count, _, height, width = images.shape
    pixel = torch.tensor([2 / width, 2 / height]).reshape(2, 1, 1)  # of the grid's units
    bends = (BEND * pixel * torch.randn(count, 2, 3, max(3, width // 16))).to(images.device)
    bends = F.interpolate(bends, (height, width), mode="bicubic", align_corners=False)
    return grid_sample(images, affine_grid(images, 1.5) + bends.movedim(1, -1))


def random_colours(images):
    """Exchange a batch's colour channels, bend the brightness of each. (N, 3, H, W) -> same.

    Black and white stay what they are. Values from -1 to 1.
    """
    bend = (0.8 * torch.rand(len(images), 3, 1, 1) - 0.4).to(images.device)
    images = images[:, torch.randperm(3)]
    return torch.addcmul(images + bend, images * images, bend, value=-1)


def random_weight(images):
    """Make the strokes of half of the batches thicker or thinner by a pixel at most.

    (N, 3, H, W) -> same.
    """
    kind = torch.randint(4, ()).item()
    if kind > 1:
        return images
    # The lighter of two neighbours, or the darker.
    choose = torch.maximum if kind else torch.minimum
    changed = images.clone()
    changed[..., 1:] = choose(images[..., 1:], images[..., :-1])
    changed[:, :, 1:] = choose(changed[:, :, 1:], changed[:, :, :-1])
    return images.lerp(changed, torch.rand(len(images), 1, 1, 1).to(images.device))


def random_lines(images):
    """Draw up to two thin dark lines across each image of half of the batches.

    (N, 3, H, W) -> same, values from -1 to 1.
    """
    if torch.rand(()) < 0.5:
        return images
    count, _, height, width = images.shape
    x0, y0, angle, length = torch.rand(4, count, 2, 1, 1).to(images.device)
    angle = 1.2 * (2 * angle - 1) ** 3  # most are nearly level
    x = torch.arange(width, device=images.device) - x0 * width
    y = torch.arange(height, device=images.device)[:, None] - y0 * height
    distance = (y * angle.cos() - x * angle.sin()).abs()  # (N, 2, H, W), in pixels
    ink = (1 - distance).clamp(min=0) * (x.abs() < length * width / 2) * (length > 0.3)
    ink = 0.75 * ink.amax(1, keepdim=True)
    return images - ink * (images + 1)


def random_looks(images):
    """Another font, colour and background, as far as that can be imitated.

    Half of the batches are `random_affine` instead: nearer to what is to be read, they are
    learnt sooner, and the others keep them from being learnt by heart.
    """
    if torch.rand(()) < 0.5:
        return random_affine(images)
    return random_lines(random_weight(random_colours(random_warp(images))))


AUGMENTATIONS = {
    "none": lambda images: images,
    "shift": random_shift,
    "affine": random_affine,
    "looks": random_looks,
}


def processes():
    """(rank, number) of the processes that train together."""
    if distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def gather(value):
    """The list of what each process passes here."""
    values = [value] * processes()[1]
    if distributed.is_initialized():
        distributed.all_gather_object(values, value)
    return values


def from_first(function):
    """What the first process gets from ``function()``, in all; where it fails, all end."""
    if not distributed.is_initialized():
        return function()
    result = [None, False]
    try:
        if processes()[0] == 0:
            result = [function(), True]
    finally:
        distributed.broadcast_object_list(result)
    if not result[1]:
        sys.exit(1)  # the first process says why
    return result[0]


def start_processes(name):
    """Join the processes that torchrun has started, if it has. Returns the device.

    Args:
        name: of the device, see `pick_device`.
    """
    try:
        device = pick_device(name)
    except ValueError as error:
        raise ValueError(f"--device {name}: {error}") from None
    if "WORLD_SIZE" not in os.environ:
        return device
    if device == torch.device("cuda"):
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")

    def stop(*_):
        if sys.exc_info()[1]:  # it has noticed by itself, and is on its way to lost_process
            lost_process("told to stop")
        raise ConnectionError("told to stop")

    signal.signal(signal.SIGTERM, stop)  # torchrun ends all where one has ended
    return device


def lost_process(error):
    """End this process because it cannot reach another one, and say so."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's would cut the message off
    rank, world = processes()
    reason = str(error).split("\n")[0]
    print(
        f"train.py: error: process {rank} of {world} ends, another one has died or cannot be "
        f"reached ({reason}); the same command with --resume goes on after the last completed "
        "epoch",
        file=sys.stderr,
    )
    sys.stdout.flush()
    os._exit(1)  # leaving in good order would wait for the other one
