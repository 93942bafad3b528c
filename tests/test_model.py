"""MicroNet is the network of the published table, and padding does not reach its output."""

import copy

import pytest
import torch
from helpers import run_script
from torch.utils._python_dispatch import TorchDispatchMode

from ctc_label_converter import CTCLabelConverter
from image import Preprocess
from model import (
    ConvBNACT,
    MicroNet,
    Recogniser,
    count_parameters,
    layer_table,
    load_checkpoint,
    save_checkpoint,
    supported_by,
)

SIZES = {  # MB: input, activations, parameters, total
    16: ("0.05", "0.73", "0.04", "0.82"),
    64: ("0.05", "2.89", "0.17", "3.10"),
    128: ("0.05", "5.76", "0.40", "6.21"),
}
CONVOLUTIONS = {  # parameters: patches, depthwise, pointwise, their batch norm, linear, total
    16: (784, 160, 272, 32, 7740, 9548),
    64: (3136, 640, 4160, 128, 30780, 44156),
    128: (6272, 1280, 16512, 256, 61500, 104636),
}


@pytest.mark.parametrize("nh", [16, 64, 128])
def test_every_row_of_the_table(nh):
    patches, depthwise, pointwise, bn, linear, total = CONVOLUTIONS[nh]
    shape = (nh, 8, 32)

    def conv_bn_act(parameters):
        return [
            ("ConvBNACT", shape, parameters + bn),
            ("Conv2d", shape, parameters),
            ("BatchNorm2d", shape, bn),
            ("GELU", shape, 0),
        ]

    block = [
        ("MicroBlock", shape, depthwise + pointwise + 2 * bn),
        *conv_bn_act(depthwise),
        *conv_bn_act(pointwise),
    ]
    expected = [
        *conv_bn_act(patches),
        *block,
        *block,
        ("Flatten", (8 * nh, 32), 0),
        ("Linear", (32, 60), linear),
    ]
    model = MicroNet(nh=nh)
    rows, sizes = layer_table(model)
    assert [row[1:] for row in rows] == expected
    assert count_parameters(model) == total == sum(p.numel() for p in model.parameters())
    assert tuple(f"{megabytes:.2f}" for megabytes in sizes.values()) == SIZES[nh]


def test_the_printed_table(tmp_path):
    output = run_script("model.py", "--nh", 64, cwd=tmp_path).stdout
    assert "44,156" in output
    assert output.count("ConvBNACT") == 5
    assert [line.split()[-1] for line in output.splitlines()[-4:]] == list(SIZES[64])


def test_padding_and_neighbours_change_nothing():
    torch.manual_seed(0)
    model = MicroNet(nh=8, nclass=11)
    model(torch.randn(16, 3, 32, 64))  # batch norm statistics that are not the initial ones
    model.eval()
    widths = torch.tensor([4, 20, 64, 36])
    images = torch.randn(4, 3, 32, 64)
    together = model(images, widths)
    assert together.shape == (4, 16, 11)
    for image, width, logits in zip(images, widths, together, strict=True):
        alone = model(image[None, :, :, :width])
        torch.testing.assert_close(alone[0], logits[: width // 4], atol=1e-5, rtol=1e-5)


def test_a_training_step_is_that_of_convolution_normalisation_and_activation():
    """It computes in another order than an evaluation: the same outputs, gradients, statistics."""
    torch.manual_seed(0)
    results = []
    model = MicroNet(nh=8, nclass=11).double()
    images, start = torch.randn(3, 3, 32, 64).double(), copy.deepcopy(model.state_dict())
    for plain in (False, True):
        model.load_state_dict(start)
        model.train().zero_grad()
        if plain:
            for module in model.modules():
                if isinstance(module, ConvBNACT):
                    module.forward = torch.nn.Sequential(module.conv, module.bn, module.act).forward
        output = model(images)
        output.square().mean().backward()
        # What normalisation takes away, the convolutions' biases, has a gradient of 0, or none.
        gradients = [
            torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
            for parameter in model.parameters()
        ]
        results.append([output, *gradients, *(buffer.clone() for buffer in model.buffers())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_training_that_keeps_its_statistics_reads_as_the_network_does():
    torch.manual_seed(0)
    model = MicroNet(nh=8, nclass=11).double()
    images = torch.randn(3, 3, 32, 64).double()
    model.train()(3 * images + 1)  # its statistics are those of other images
    before, expected = copy.deepcopy(model.state_dict()), model.eval()(images)
    parameters = [p for name, p in model.named_parameters() if not name.endswith("conv.bias")]
    plain = torch.autograd.grad(expected.square().mean(), parameters)
    model.begin_training(keep_statistics=True)
    output = model(images)
    gradients = torch.autograd.grad(output.square().mean(), parameters)
    for ours, theirs in zip([output, *gradients], [expected, *plain], strict=True):
        torch.testing.assert_close(ours, theirs)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.begin_training()
    assert not torch.allclose(model(images), expected)


class DifferentOrders(TorchDispatchMode):
    """Collects what computes with a batch's maps that lie in memory in different orders."""

    def __init__(self):
        super().__init__()
        self.seen, self.found = 0, []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        maps = [a for a in args if isinstance(a, torch.Tensor) and a.ndim == 4 and len(a) == 3]
        orders = {a.stride() for a in maps if a.shape == maps[0].shape}
        if len(maps) > 1 and operation is not torch.ops.aten.copy_.default:
            self.seen += 1
            self.found += [operation] * (len(orders) > 1)
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("keep_statistics", [False, True])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_nothing_in_a_step_goes_through_two_tensors_in_different_orders(keep_statistics, order):
    """That is ten times as slow: PyTorch takes such tensors number by number."""
    model = MicroNet(nh=8, nclass=11)
    model.begin_training(keep_statistics)
    images = torch.randn(3, 3, 32, 64).contiguous(memory_format=order)
    with DifferentOrders() as orders:
        model(images, torch.tensor([64, 40, 60])).square().mean().backward()
    assert orders.seen > 10 and not orders.found


def test_shapes_that_do_not_fit_are_refused():
    model = MicroNet()
    for shape in [(1, 3, 32, 30), (1, 3, 28, 32)]:
        with pytest.raises(ValueError, match="multiple of 4"):
            model(torch.zeros(shape))
    with pytest.raises(ValueError, match="img_height"):
        MicroNet(img_height=30)


class Hostile:
    def __reduce__(self):
        return print, ("this code must not run",)


def test_a_checkpoint_cannot_run_code(tmp_path, capfd):
    torch.save({"nh": Hostile()}, tmp_path / "hostile.pth")
    with pytest.raises(ValueError, match=r"hostile.pth: is not a MicroOCR checkpoint"):
        load_checkpoint(tmp_path / "hostile.pth")
    assert "must not run" not in capfd.readouterr().out


def test_which_torch_runs_on_which_card():
    pascal_build, new_build = ["sm_50", "sm_60", "sm_70", "sm_90"], ["sm_75", "sm_90", "sm_100"]
    assert supported_by((6, 1), pascal_build)  # GTX 1060: machine code for 6.0 serves 6.1
    assert not supported_by((6, 1), new_build)
    assert not supported_by((12, 0), pascal_build)
    assert supported_by((12, 0), [*pascal_build, "compute_90"])
    assert not supported_by((8, 0), ["sm_86"])


def test_a_checkpoint_whose_file_is_in_use_is_saved_beside_it(tmp_path, in_use, capsys):
    recogniser = Recogniser(MicroNet(4, 1, 3), CTCLabelConverter("ab"), Preprocess())
    path = tmp_path / "mine.pth"
    assert save_checkpoint(path, recogniser) == path
    before = path.read_bytes()
    in_use(path)
    other = save_checkpoint(path, recogniser)
    assert other != path
    assert load_checkpoint(other).converter.alphabet == "ab"
    assert path.read_bytes() == before
    assert str(other) in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == sorted([path, other])
