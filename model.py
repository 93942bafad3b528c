"""MicroNet: images to CTC logits with about 10,000 parameters.

    python model.py                       # the layer table of the default network
    python model.py --nh 128 --nclass 37

The body is a ConvMixer (Trockman and Kolter, "Patches Are All You Need?",
arXiv 2201.09792) on patches of 4x4 pixels. Its feature map is cut into columns
and one Linear layer gives each column its logits, for CTC (Graves et al.,
"Connectionist Temporal Classification", ICML 2006).
"""

import argparse
import math
import sys

import torch
from torch import nn
from torch.nn import functional as F

PATCH = 4  # pixels: the width of an output column, and the height of a row


class ConvBNACT(nn.Module):
    """Convolution with bias, batch normalisation, GELU: (N, C_in, H, W) -> (N, C_out, H', W')."""

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, groups=1):
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride=stride, padding=padding, groups=groups
        )
        self.bn = nn.BatchNorm2d(out_channels)
        self.act = nn.GELU()

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


class MicroBlock(nn.Module):
    """A ConvMixer layer: mix places within a channel, then channels within a place.

    (N, nh, H, W) -> (N, nh, H, W)
    """

    def __init__(self, nh):
        super().__init__()
        self.depthwise = ConvBNACT(nh, nh, 3, padding=1, groups=nh)
        self.pointwise = ConvBNACT(nh, nh, 1)

    def forward(self, x):
        return self.pointwise(x + self.depthwise(x))


class MicroNet(nn.Module):
    """The whole network.

    Args:
        nh: channels.
        depth: number of MicroBlocks.
        nclass: size of the alphabet plus 1 for the CTC blank.
        img_height: height of the images in pixels, a multiple of 4.

    Raises ValueError for sizes that make no network.
    """

    def __init__(self, nh=16, depth=2, nclass=60, img_height=32):
        super().__init__()
        if min(nh, depth, img_height) < 1 or nclass < 2 or img_height % PATCH:
            raise ValueError(
                f"no MicroNet with nh={nh}, depth={depth}, nclass={nclass}, img_height={img_height}"
                f": all are at least 1, nclass at least 2, img_height is a multiple of {PATCH}"
            )
        self.nh, self.depth, self.img_height = nh, depth, img_height
        self.patches = ConvBNACT(3, nh, PATCH, stride=PATCH)
        self.blocks = nn.ModuleList(MicroBlock(nh) for _ in range(depth))
        self.flatten = nn.Flatten(1, 2)
        self.linear = nn.Linear(nh * img_height // PATCH, nclass)

    def forward(self, images, widths=None, classes=None):
        """Logits of each column of 4 pixels.

        Args:
            images: (N, 3, img_height, W) float, normalised, W a multiple of 4.
            widths: (N,) width of each image in pixels, on the CPU, where images are
                padded on the right to a common W. Its columns come out as if it were
                alone; those of the padding mean nothing. None: nothing is padded.
            classes: (K,) int64, the classes wanted. None: all.

        Returns:
            (N, W/4, nclass) logits, or (N, W/4, K); class 0 is the blank.

        Raises ValueError for images of another shape.
        """
        if images.shape[2] != self.img_height or images.shape[3] % PATCH:
            raise ValueError(
                f"images of shape {tuple(images.shape)}: the height must be {self.img_height}, "
                f"the width a multiple of {PATCH}"
            )
        x = self.patches(images)  # (N, nh, img_height/4, W/4)
        inside = None
        if widths is not None and (widths < images.shape[3]).any():
            columns = torch.arange(x.shape[3], device=widths.device)
            inside = columns < widths[:, None] // PATCH
            inside = inside[:, None, None].to(x.device)  # (N, 1, 1, W/4)
        for block in self.blocks:
            # Beyond an image's edge the depthwise convolution must see zeros, as it
            # does beyond the batch's.
            x = block(x if inside is None else x * inside)
        x = self.flatten(x).transpose(1, 2)  # (N, W/4, nh * img_height/4)
        if classes is None:
            return self.linear(x)
        return F.linear(x, self.linear.weight[classes], self.linear.bias[classes])


def count_parameters(module):
    """Number of trainable parameters in ``module`` and below."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def layer_table(model, img_height=32, img_width=128, batch_size=1):
    """Rows (name, layer, output shape without N, parameters) and sizes of a MicroNet.

    A row a layer, containers included, in the order the data passes them. Sizes
    are in MB of 2^20 bytes at 4 bytes a number: the input, the forward and
    backward activations (each row's output once in either direction), the
    parameters, and their total.

    Returns:
        (rows, {"input": MB, "activations": MB, "parameters": MB, "total": MB})
    """
    shapes = {}
    hooks = [
        module.register_forward_hook(
            lambda _module, _input, output, name=name: shapes.update({name: tuple(output.shape)})
        )
        for name, module in model.named_modules()
    ]
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    with torch.no_grad():
        model(torch.zeros(1, 3, img_height, img_width, device=device))
    model.train(was_training)
    for hook in hooks:
        hook.remove()

    rows = [
        (name, type(module).__name__, shapes[name][1:], count_parameters(module))
        for name, module in model.named_modules()
        if name and name in shapes  # not the network itself, nor the list of blocks
    ]
    megabyte = 2**20 / 4  # numbers of 4 bytes
    sizes = {
        "input": batch_size * 3 * img_height * img_width / megabyte,
        "activations": batch_size * 2 * sum(math.prod(shape) for _, _, shape, _ in rows) / megabyte,
        "parameters": count_parameters(model) / megabyte,
    }
    return rows, sizes | {"total": sum(sizes.values())}


def main():
    parser = argparse.ArgumentParser(description="Print the layer table of a MicroNet.")
    parser.add_argument("--nh", type=int, default=16, help="channels (default: %(default)s)")
    parser.add_argument("--depth", type=int, default=2, help="MicroBlocks (default: %(default)s)")
    parser.add_argument(
        "--nclass",
        type=int,
        default=60,
        help="characters of the alphabet plus 1 for the blank (default: %(default)s)",
    )
    parser.add_argument("--height", type=int, default=32, help="pixels (default: %(default)s)")
    parser.add_argument("--width", type=int, default=128, help="pixels (default: %(default)s)")
    parser.add_argument(
        "--batch-size", type=int, default=1, help="images for the sizes (default: %(default)s)"
    )
    args = parser.parse_args()
    model = MicroNet(args.nh, args.depth, args.nclass, args.height)
    rows, sizes = layer_table(model, args.height, args.width, args.batch_size)
    print(f"{'layer':<32}{'output shape':>16}{'parameters':>14}")
    for name, layer, shape, parameters in rows:
        indent = "  " * name.removeprefix("blocks.").count(".")
        print(f"{indent + layer:<32}{list(shape)!s:>16}{parameters:>14,}")
    print(f"{'total, all trainable':<48}{count_parameters(model):>14,}")
    shape = f"{args.batch_size} x 3 x {args.height} x {args.width}"
    print(f"MB of 2^20 bytes for a training step on {shape}:")
    for name, megabytes in sizes.items():
        print(f"{name:<48}{megabytes:>14.2f}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"model.py: error: {error}")
