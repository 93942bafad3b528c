"""The inference tool: read images with trained weights.

from infer_tool import RecInfer
reader = RecInfer()                    # or RecInfer("save_model/mine.pth")
reader.predict("image.png").text
reader.predict(["a.png", "b.jpg"])     # a list gives a list
"""

from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from PIL import Image

from ctc_label_converter import CTCLabelConverter
from dataset import ImageError, Preprocess, read_image
from keys import check_alphabet
from model import MicroNet

ROOT = Path(__file__).resolve().parent
SHIPPED_WEIGHTS = ROOT / "assets" / "weights" / "simple_nh16_depth2.pth"
SAVE_FOLDER = Path("save_model")  # where train.py writes
BATCH_SIZE = 256  # images a forward pass


def latest_weights():
    """The checkpoint that train.py last wrote to save_model/, else the shipped weights."""
    written = [(path.stat().st_mtime_ns, path) for path in SAVE_FOLDER.glob("*.pth")]
    return max(written)[1] if written else SHIPPED_WEIGHTS


def load_checkpoint(path):
    """Load what train.py saved.

    Returns:
        (model, alphabet, preprocess): a `MicroNet` in evaluation mode on the CPU,
        the characters of its classes, the `Preprocess` of its images.

    Raises ValueError if ``path`` is no checkpoint of this network. Nothing in the
    file is executed.
    """
    try:
        # Memory stays bounded by the file: the network is built without storage
        # and takes the tensors that were loaded.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        alphabet = check_alphabet(checkpoint["alphabet"])
        preprocess = Preprocess(**checkpoint["preprocess"])
        nh, depth, state = checkpoint["nh"], checkpoint["depth"], checkpoint["state_dict"]
        if len(state) != 9 + 14 * depth:
            raise ValueError(f"{len(state)} tensors are not those of depth {depth}")
        with torch.device("meta"):
            model = MicroNet(nh, depth, len(alphabet) + 1, preprocess.height)
        model.load_state_dict(state, assign=True)
    except OSError as error:
        raise ValueError(f"{path}: the weights cannot be read ({error.strerror})") from None
    except UnpicklingError:
        raise ValueError(f"{path}: is not a MicroOCR checkpoint (no file of tensors)") from None
    except Exception as error:  # whatever a foreign file may lead to
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        raise ValueError(f"{path}: is not a MicroOCR checkpoint ({reason})") from None
    return model.eval(), alphabet, preprocess


class RecInfer:
    """Reads the text in images.

    Args:
        weights: path of a checkpoint, None for `latest_weights`.
        device: a torch device, such as "cpu" or "cuda".

    Attributes:
        weights: the path that was loaded.

    Raises ValueError if the weights cannot be used.
    """

    def __init__(self, weights=None, device="cpu"):
        self.weights = Path(weights or latest_weights())
        self.device = torch.device(device)
        model, alphabet, self.preprocess = load_checkpoint(self.weights)
        self.model = model.to(self.device)
        self.converter = CTCLabelConverter(alphabet)

    def predict(self, image):
        """Read one image or a list of images.

        Args:
            image: a path, the bytes of an image file, a `PIL.Image`, an (H, W, 3)
                uint8 RGB array, or a list of these.

        Returns:
            a `ctc_label_converter.Reading` (text, confidence, char_confidences), for
            a list a list in the same order.

        Raises ValueError for an image that cannot be read, naming it.
        """
        if not isinstance(image, list):
            return self.predict([image])[0]
        # An image's neighbours must not change its reading: only images of one
        # width share a batch, so none is padded.
        by_width = {}
        for i, source in enumerate(image):
            pixels = self._pixels(source, i)
            by_width.setdefault(pixels.shape[2], []).append((i, pixels))
        readings = [None] * len(image)
        for group in by_width.values():
            for start in range(0, len(group), BATCH_SIZE):
                indices, arrays = zip(*group[start : start + BATCH_SIZE], strict=True)
                for i, reading in zip(indices, self._read(np.stack(arrays)), strict=True):
                    readings[i] = reading
        return readings

    def _pixels(self, source, index):
        """Any source -> (3, height, W) uint8."""
        name = source if isinstance(source, str | Path) else f"image {index}"
        try:
            if isinstance(source, np.ndarray):
                if source.ndim != 3 or source.shape[2] != 3 or source.dtype != np.uint8:
                    raise ImageError(
                        f"is an array of shape {source.shape} and type {source.dtype}, "
                        "(H, W, 3) and uint8 are needed"
                    )
                source = Image.fromarray(source)
            return self.preprocess(read_image(source))
        except ImageError as error:
            raise ValueError(f"{name}: {error}") from None

    @torch.inference_mode()
    def _read(self, pixels):
        """(N, 3, height, W) uint8 -> N readings."""
        images = torch.from_numpy(pixels).to(self.device)
        logits = self.model(self.preprocess.normalise(images))
        return self.converter.decode(logits.cpu().numpy())
