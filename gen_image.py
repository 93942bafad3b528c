"""Draw captcha images with labels, for training and evaluation.

    python gen_image.py                         # 5,000 + 500 images into data/simple
    python gen_image.py --task complex          # noise, curves and warp
    python gen_image.py --task chinese          # the 3,755 characters of GB 2312 level 1
    python gen_image.py --task general          # all fonts of the machine, the look of the world
    python gen_image.py --length 3-8 --alphabet digits --out data/digits
    python gen_image.py --font A.ttf --font B.ttf --seed 7 --force
    python gen_image.py --often 0o --out data/often     # drawn more often than others

A data set is a folder:

    train.txt, test.txt      UTF-8, one line per image: train/00000.png<TAB>label
    train/, test/            the images, PNG
    preview.png              the first training images with their labels

Every image is drawn from a random stream of its own, named by seed, split and
index. So the same seed gives the same bytes whatever the number of workers, and
no training image shares its stream with a test image.
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports: an end without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import multiprocessing
import os
import random
import shutil
import string
import tempfile
import threading
import zlib
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

import captcha.image
from captcha.image import DEFAULT_FONTS, ImageCaptcha
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

from image import read_image
from keys import command, length_range, load_alphabet
from label_file import SPLITS
from line_image import LineImage
from metric import (
    FONT_FOLDERS,
    check_glyphs,
    contact_sheet,
    find_chinese_font,
    font_files,
    load_font,
    look_at_font,
)


@dataclass(frozen=True)
class Task:
    """What is drawn for a task, unless flags say otherwise.

    Attributes:
        alphabet: its name.
        width, height: pixels of a character, and of the image.
        train, test: number of images.
        often: characters that are drawn more often, see --often.
        length: characters of an image, one number or a range.
    """

    alphabet: str
    width: int
    height: int
    train: int
    test: int
    often: str = ""
    length: str = "4"


TASKS = {
    "simple": Task("alnum59", 32, 32, train=5000, test=500),
    "complex": Task("digits_upper", 40, 60, train=240000, test=2000, often="O0"),
    "chinese": Task("gb2312_level1", 32, 32, train=60000, test=2000),
    "general": Task("ascii", 20, 40, train=300000, test=2000, length="1-12"),
}
OFTEN = 8  # times as often as others are the characters of --often drawn
CHUNK = 100  # images that a worker draws at a time
PREVIEW = 48  # images on the contact sheet


ASSETS = Path(__file__).resolve().parent / "assets"
CAPITALS, SMALL, DIGITS = string.ascii_uppercase, string.ascii_lowercase, string.digits
UNITS = (
    "kg", "g", "lb", "oz", "ml", "l", "cm", "mm", "m", "km", "mi", "h", "min", "s", "kWh", "V", "A",
    "W", "Hz", "C", "F", "%", "m3", "bar", "psi", "EUR", "USD", "RM", "$",
)  # fmt: skip


class LineText:
    """Texts as they stand on labels, plates, displays, receipts and forms.

    Args:
        rng: a `random.Random`.
        low, high: the fewest and most characters.
        alphabet: those that may occur.

    Phrases, in assets/phrases.txt, have {n} for a number, {d} for a digit, {dd} for two,
    {A} for a capital, {x} for either, {w} and {W} for a word, {U} for a unit.
    """

    def __init__(self, rng, low, high, alphabet):
        self.rng, self.low, self.high, self.alphabet = rng, low, high, alphabet
        self.allowed = set(alphabet)
        self.words = (ASSETS / "words.txt").read_text(encoding="utf-8").split()
        self.phrases = (ASSETS / "phrases.txt").read_text(encoding="utf-8").splitlines()
        self.follow = {}  # of the letters of words: what follows two others
        for word in self.words:
            letters = f"  {word} "
            for i in range(len(letters) - 2):
                self.follow.setdefault(letters[i : i + 2], []).append(letters[i + 2])

    def _word(self):
        """A word, or one that could be."""
        if self.rng.random() < 0.45:
            return self.rng.choice(self.words)
        word = "  "
        while len(word) < 12:
            word += self.rng.choice(self.follow[word[-2:]])
            if word[-1] == " ":
                break
        return word.strip()

    def _field(self, kind):
        rng = self.rng
        if kind == "n":
            return str(int(10 ** rng.uniform(0, 4)))
        if kind == "U":
            return rng.choice(UNITS)
        if kind in "wW":
            return self._word().upper() if kind == "W" else self._word()
        chosen = {"d": DIGITS, "A": CAPITALS, "x": CAPITALS + DIGITS}[kind[0]]
        return "".join(rng.choices(chosen, k=len(kind)))

    def _phrase(self):
        kinds = self.rng.choice(self.phrases)
        parts = kinds.replace("}", "{").split("{")
        text = "".join(self._field(p) if i % 2 else p for i, p in enumerate(parts))
        case = self.rng.random()
        if case < 0.35:
            return text.upper()
        return text.lower() if case < 0.45 else text.title() if case < 0.75 else text

    def draw(self, can):
        """A text of characters that are allowed and in ``can``."""
        rng = self.rng
        can = [c for c in self.alphabet if c in can]
        for _ in range(20):
            kind = rng.random()
            if kind < 0.67:
                text = self._phrase()
            elif kind < 0.73:
                text = "".join(rng.choices(can, k=rng.randint(self.low, self.high)))
            else:  # codes of one case
                letters = rng.choice((CAPITALS + DIGITS, SMALL + DIGITS, DIGITS, CAPITALS, SMALL))
                text = "".join(rng.choices(letters, k=rng.randint(4, 8)))
            text = " ".join("".join(c for c in text if c in can).split())
            if len(text) > self.high:
                text = text[: self.high].strip()
            if text and len(text) >= self.low and self.allowed.issuperset(text):
                return text
        can = [c for c in can if c != " "]
        return "".join(rng.choices(can, k=rng.randint(self.low, self.high)))


class PlainCaptcha(ImageCaptcha):
    """Captcha images of plain glyphs, which keep their size and baseline.

    ImageCaptcha stretches every glyph to its line box, which makes c and C, o
    and 0 the same picture. Here a glyph is drawn as the font has it, then
    rotated and shifted.

    Args:
        width, height: size of the image in pixels.
        fonts: paths of TrueType or OpenType fonts, one is picked for each glyph.
        alphabet: the characters that will be drawn; the font size is the largest
            at which the widest of them fits its share of the image.
        length: the most characters an image will hold.
        rng: a `random.Random`, the only source of randomness.
        rotation: degrees that a glyph is turned by, at most.
    """

    def __init__(self, width, height, fonts, alphabet, length, rng, rotation=15):
        # Sizes scale with the font size, so one measurement at 100 pixels is enough.
        large = [load_font(font, 100) for font in fonts]
        boxes = [font.getbbox(alphabet, anchor="ls") for font in large]
        tallest = max(bottom - top for _, top, _, bottom in boxes)
        widest = max(font.getlength(c) for font in large for c in alphabet)
        # The rest is for rotation, shifts and the gaps between the glyphs.
        size = int(100 * min(0.78 * height / tallest, 0.8 * width / length / widest))
        super().__init__(width, height, fonts, (max(1, size),))
        self._truefonts = [load_font(font, max(1, size)) for font in fonts]
        # The alphabet as a whole stands in the middle, each glyph on the common baseline.
        self._baselines = [
            (height - (top + bottom) * size / 100) / 2 for _, top, _, bottom in boxes
        ]
        self.rng = rng
        self.character_rotate = (-rotation, rotation)

    def _draw_character(self, c):
        """Return the mask ('L') of one rotated glyph, in a box of the image's height."""
        i = self.rng.randrange(len(self._truefonts))
        font, baseline = self._truefonts[i], self._baselines[i]
        margin = self._height // 4  # a rotated corner stays inside
        box = Image.new("L", (round(font.getlength(c)) + 2 * margin, self._height))
        shift = self._height * self.rng.uniform(-0.06, 0.06)
        ImageDraw.Draw(box).text((margin, baseline + shift), c, font=font, fill=255, anchor="ls")
        return box.rotate(self.rng.uniform(*self.character_rotate), Image.Resampling.BILINEAR)

    def create_captcha_image(self, chars, color, background):
        """Draw ``chars`` with uneven spaces between them, without noise.

        Args:
            chars: the text.
            color, background: (R, G, B), each 0 to 255.

        Returns:
            an RGB image of the captcha's width and height.
        """
        image = Image.new("RGB", (self._width, self._height), background)
        margin = self._height // 4
        glyphs = [self._draw_character(c) for c in chars]
        free = self._width - sum(glyph.width - 2 * margin for glyph in glyphs)
        # At least half of an even share, so that neighbours do not run together.
        weights = [self.rng.uniform(1, 3) for _ in range(len(glyphs) + 1)]
        x = 0.0
        for glyph, weight in zip(glyphs, weights, strict=False):
            x += free * weight / sum(weights)
            image.paste(color, (round(x) - margin, 0), glyph)
            x += glyph.width - 2 * margin
        return image

    def generate_image(self, chars):
        """Draw ``chars`` in a random dark colour on a random light ground, smoothed."""
        background = tuple(self.rng.randint(200, 255) for _ in range(3))
        color = tuple(self.rng.randint(0, 110) for _ in range(3))
        return self.create_captcha_image(chars, color, background).filter(ImageFilter.SMOOTH)


class SeededSecrets:
    """The functions of the module `secrets` that the captcha package calls, on ``rng``."""

    def __init__(self, rng):
        self.randbelow = rng.randrange
        self.randbits = rng.getrandbits
        self.choice = rng.choice


def make_captcha(args, rng):
    """The drawer of a task's images, an `ImageCaptcha`; see `draw_images` for its randomness."""
    length = args.length[1]
    if args.task == "complex":
        # The package's own sizes, which are made for 60 pixels.
        sizes = tuple(round(size * args.height / 60) for size in (42, 50, 56))
        return ImageCaptcha(args.width, args.height, args.font, sizes)
    # Strokes of Chinese characters are finer: a large turn at 26 pixels smears them.
    rotation = 5 if args.task == "chinese" else 15
    return PlainCaptcha(args.width, args.height, args.font, args.alphabet, length, rng, rotation)


def find_families(folder, workers):
    """The fonts for the general task, none of whose families is in both splits.

    Args:
        folder: that has them, None for those of the machine.
        workers: processes that look at them.

    Returns:
        {split: {family: [`Font`]}}, a tenth of the families in "test".

    Raises ValueError where fewer than two families can be used.
    """
    paths = font_files([folder] if folder else FONT_FOLDERS)
    with ProcessPoolExecutor(min(workers, 61), initializer=follow_parent) as pool:
        looks = pool.map(look_at_font, paths, chunksize=16)
        looks = list(tqdm(looks, "looking at fonts", len(paths), leave=False, unit="font"))
    groups, families = {}, {split: {} for split in SPLITS}
    for font in filter(None, looks):  # the variants of a family begin with the same word
        groups.setdefault(font.family.split()[0], []).append(font)
    if len(groups) < 2:
        raise ValueError(
            f"{folder or 'this machine'}: has {len(groups)} families of fonts that texts can be "
            "drawn with, the general task needs two at least: install the list in "
            "assets/fonts.txt (README.md says how), or name a folder of fonts with --fonts"
        )
    shuffled = sorted(groups, key=lambda name: (zlib.crc32(name.encode("utf-8")), name))
    for i, name in enumerate(shuffled):
        split = families["train" if i >= max(1, len(groups) // 10) else "test"]
        for font in groups[name]:
            split.setdefault(font.family, []).append(font)
    used, counts = sum(map(bool, looks)), [len(families[split]) for split in SPLITS]
    print(f"{used} of {len(paths)} font files can be used, in {counts[0]} and {counts[1]} families")
    return families


def draw_lines(folder, split, indices, args, rng):
    """Draw images of the general task with ``rng``. The rest is as of `draw_images`."""
    labels = []
    text = LineText(rng, *args.length, args.alphabet)
    drawer = LineImage(args.families[split], text, rng)
    for index in indices:
        rng.seed(f"{args.seed}/{split}/{index}")
        image, label = drawer.draw()
        image.save(folder / split / f"{index:05d}.png", compress_level=1)
        labels.append(label)
    return labels


def draw_images(folder, split, indices, args):
    """Draw the images ``indices`` of ``split`` into ``folder``. Returns their labels."""
    rng = random.Random()
    # The package draws from the operating system's randomness, which has no seed.
    captcha.image.secrets = SeededSecrets(rng)
    if args.task == "general":
        return draw_lines(folder, split, indices, args, rng)
    low, high = args.length
    drawer = make_captcha(args, rng)
    weights = None
    if args.often and split == "train":
        weights = [OFTEN if character in args.often else 1 for character in args.alphabet]
    labels = []
    for index in indices:
        rng.seed(f"{args.seed}/{split}/{index}")
        label = "".join(rng.choices(args.alphabet, weights, k=rng.randint(low, high)))
        drawer.generate_image(label).save(folder / split / f"{index:05d}.png", compress_level=1)
        labels.append(label)
    return labels


def follow_parent():
    """Make a worker ignore Ctrl-C, which its parent handles, and end when its parent does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def generate(folder, args):
    """Draw a whole data set into the existing empty ``folder``."""
    chunks = []
    for split in SPLITS:
        (folder / split).mkdir()
        total = getattr(args, split)
        chunks += [(split, range(i, min(i + CHUNK, total))) for i in range(0, total, CHUNK)]
    labels = {}
    workers = min(args.workers, len(chunks), 61)  # Windows cannot wait for more
    with (
        ProcessPoolExecutor(workers, initializer=follow_parent) as pool,
        tqdm(total=args.train + args.test, desc="drawing", unit="img") as bar,
    ):
        jobs = {pool.submit(draw_images, folder, *chunk, args): chunk for chunk in chunks}
        try:
            for job in as_completed(jobs):
                split, indices = jobs[job]
                labels.update(zip([(split, i) for i in indices], job.result(), strict=True))
                bar.update(len(indices))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    lines = {
        split: [(f"{split}/{i:05d}.png", labels[split, i]) for i in range(getattr(args, split))]
        for split in SPLITS
    }
    images = [read_image(folder / path) for path, _ in lines["train"][:PREVIEW]]
    captions = [label for _, label in lines["train"][:PREVIEW]]
    contact_sheet(images, captions).save(folder / "preview.png")
    for split in SPLITS:
        text = "".join(f"{path}\t{label}\n" for path, label in lines[split])
        (folder / f"{split}.txt").write_text(text, encoding="utf-8", newline="\n")


def holds_only_a_data_set(folder):
    """Whether every entry of ``folder`` is one that this script writes."""
    ours = {"preview.png", *SPLITS, *(f"{split}.txt" for split in SPLITS)}
    return folder.is_dir() and {entry.name for entry in folder.iterdir()} <= ours


def write_data_set(args):
    """Draw a data set and move it to ``args.out`` when it is complete."""
    out = args.out
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        if not holds_only_a_data_set(out):
            raise ValueError(f"{out}: holds other files than a data set's, choose another --out")
        if not args.force:
            raise ValueError(f"{out}: already holds a data set, --force replaces it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # A sibling, so that the last step is a rename on the same disk.
        scratch = Path(tempfile.mkdtemp(prefix=f"{out.name}.unfinished-", dir=out.parent))
    except OSError as error:
        raise ValueError(f"{out}: cannot be written ({error})") from None
    try:
        new, old = scratch / "new", scratch / "old"
        new.mkdir()
        generate(new, args)
        if out.exists():
            out.rename(old)
        new.rename(out)
    except OSError as error:
        raise ValueError(f"{out}: cannot be written ({error})") from None
    except BrokenProcessPool:
        raise ValueError(f"{out}: a worker died, try fewer --workers") from None
    finally:
        if not out.exists() and old.exists():
            old.rename(out)
        shutil.rmtree(scratch, ignore_errors=True)


def count(text):
    """Parse a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def defaults(setting, tasks=TASKS):
    """A setting of all tasks that have it, for help texts: "A for simple, B for complex"."""
    values = {name: attrgetter(setting)(task) for name, task in tasks.items()}
    return ", ".join(f"{value} for {name}" for name, value in values.items() if value)


def parse_args(argv=None):
    """Parse the command line. Raises ValueError for settings that cannot be drawn."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--task",
        choices=TASKS,
        default="simple",
        help="what to draw; sets the defaults of the flags below (default: %(default)s)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the data set (default: data/TASK)"
    )
    parser.add_argument(
        "--train", type=count, help=f"training images (default: {defaults('train')})"
    )
    parser.add_argument("--test", type=count, help=f"test images (default: {defaults('test')})")
    parser.add_argument(
        "--length",
        type=length_range,
        metavar="N or N-M",
        help=f"characters per image, fixed or a range (default: {defaults('length')})",
    )
    parser.add_argument(
        "--alphabet",
        help=f"an alphabet's name or a UTF-8 text file (default: {defaults('alphabet')})",
    )
    parser.add_argument(
        "--often",
        metavar="CHARACTERS",
        help=f"are drawn {OFTEN} times as often as others in training images: those that a "
        f"training confuses (default: {defaults('often')} with its own alphabet, else none)",
    )
    parser.add_argument(
        "--font",
        action="append",
        metavar="FILE",
        help="a font to draw with, may be repeated (default: the captcha package's, for chinese "
        "a system font)",
    )
    parser.add_argument(
        "--fonts",
        type=Path,
        metavar="FOLDER",
        help="of the fonts for general, searched in depth (default: those of the machine)",
    )
    parser.add_argument(
        "--width",
        type=count,
        help=f"pixels (default: the longest length times {defaults('width')}, in proportion "
        "to the height)",
    )
    parser.add_argument("--height", type=count, help=f"pixels (default: {defaults('height')})")
    parser.add_argument(
        "--seed", type=int, default=0, help="same seed, same images (default: %(default)s)"
    )
    parser.add_argument(
        "--workers",
        type=count,
        default=os.cpu_count() or 1,
        help="processes; the images do not depend on it (default: all cores)",
    )
    parser.add_argument(
        "--force", action="store_true", help="replace the data set that is already there"
    )
    args = parser.parse_args(argv)
    task = TASKS[args.task]
    args.out = args.out or Path("data") / args.task
    args.length = args.length or length_range(task.length)
    args.train, args.test = args.train or task.train, args.test or task.test
    if args.often is None:
        args.often = "" if args.alphabet else task.often
    args.alphabet = load_alphabet(args.alphabet or task.alphabet)
    unknown = set(args.often) - set(args.alphabet)
    if unknown:
        raise ValueError(f"--often: {' '.join(sorted(unknown))} not in the alphabet")
    args.height = args.height or task.height
    args.width = args.width or args.length[1] * task.width * args.height // task.height
    if args.task == "general":
        args.families = find_families(args.fonts, args.workers)
        return args
    if not args.font:
        args.font = [find_chinese_font()] if args.task == "chinese" else DEFAULT_FONTS
        if None in args.font:
            raise ValueError(
                "no font with Chinese characters in the usual places: install one (on Debian "
                "apt install fonts-wqy-microhei or fonts-noto-cjk) or name a file with --font"
            )
    for font in args.font:
        check_glyphs(font, args.alphabet)
    if args.height < 16 or args.width < args.length[1] * args.height / 4:
        raise ValueError(
            f"{args.width}x{args.height} pixels are too few for {args.length[1]} legible "
            "characters: --height at least 16, --width at least a quarter of it each"
        )
    return args


def main(argv=None):
    args = parse_args(argv)
    write_data_set(args)
    print(f"{args.train} training and {args.test} test images in {args.out}")
    print(f"{args.out / 'preview.png'} shows the first {min(args.train, PREVIEW)} of them")


if __name__ == "__main__":
    command(main)
