"""The stride repair through an exchanged kernel gives what the stretched signal and the dense gradient give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from partlens.attribution.rules import rewritten
from partlens.attribution.strides import Strided, strided_gradient

CASES: dict[str, dict[str, Any]] = {
    "3 x 3": {"kernel_size": 3, "stride": 2, "padding": 1},
    "7 x 7": {"kernel_size": 7, "stride": 2, "padding": 3},
    "points with gaps": {"kernel_size": 1, "stride": 2},
    "stride 3": {"kernel_size": 5, "stride": 3, "padding": 2},
    "stride 4, wide": {"kernel_size": 11, "stride": 4, "padding": 5},
    "without padding": {"kernel_size": 3, "stride": 2},
    "one axis alone": {"kernel_size": 3, "stride": (1, 2), "padding": 1},
    "another stride on each axis": {"kernel_size": (3, 5), "stride": (2, 3), "padding": (1, 2)},
    "groups": {"kernel_size": 3, "stride": 2, "padding": 1, "groups": 2},
    "depthwise": {"kernel_size": 3, "stride": 2, "padding": 1, "groups": 4},
    "holes": {"kernel_size": 3, "stride": 2, "padding": 2, "dilation": 2},
    "more padding than kernel": {"kernel_size": 3, "stride": 2, "padding": 3},
}


@pytest.mark.parametrize("size", [23, 24, 25, 26, 6])
@pytest.mark.parametrize("strides", ["nearest", "aligned"])
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_the_repaired_gradient_is_that_of_the_stretched_signal(case: dict[str, Any], strides: Any, size: int) -> None:
    conv = nn.Conv2d(4, 8, **case)
    if size + 2 * conv.padding[0] < conv.dilation[0] * (conv.kernel_size[0] - 1) + 1:
        pytest.skip("no window fits")
    leaf = torch.randn(2, 4, size, size + 3, requires_grad=True)
    out = conv(leaf)
    signal = torch.randn_like(out)
    with rewritten([out], "gradient", strides):
        (found,) = torch.autograd.grad(out, leaf, signal, retain_graph=True)
        (again,) = torch.autograd.grad(out, leaf, signal, retain_graph=True)
    how = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation, "groups": conv.groups}
    wanted = strided_gradient(signal, conv.weight.detach(), leaf.shape[2:], strides=strides, **how)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(again, found)
    (plain,) = torch.autograd.grad(out, leaf, signal)  # the record is its own again
    fresh = leaf.detach().requires_grad_()
    assert torch.equal(plain, torch.autograd.grad(conv(fresh), fresh, signal)[0])


@pytest.mark.parametrize("strides", ["nearest", "aligned"])
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv3d])
def test_other_numbers_of_axes(kind: type[nn.Conv1d | nn.Conv3d], strides: Any) -> None:
    conv = kind(3, 4, 3, 2, 1)
    leaf = torch.randn(2, 3, *[16] * (conv.weight.ndim - 2), requires_grad=True)
    out = conv(leaf)
    signal = torch.randn_like(out)
    with rewritten([out], "gradient", strides):
        (found,) = torch.autograd.grad(out, leaf, signal)
    how = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}
    wanted = strided_gradient(signal, conv.weight.detach(), leaf.shape[2:], strides=strides, **how)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def exchanged(conv: nn.Conv2d, size: int) -> bool:
    made = Strided.of(conv(torch.rand(1, 3, size, size, requires_grad=True)).grad_fn, "ConvolutionBackward")
    return made is not None and made.kernel() is not None


def test_the_usual_networks_take_the_short_way() -> None:
    assert exchanged(nn.Conv2d(3, 4, 7, 2, 3), 224)  # ResNet
    assert exchanged(nn.Conv2d(3, 4, 3, 2, 1), 112)
    assert exchanged(nn.Conv2d(3, 4, 1, 2), 56)
    assert not exchanged(nn.Conv2d(3, 4, 11, 4, 2), 224)  # AlexNet: the last windows are cut


def test_a_second_treatment_of_one_record_is_the_same() -> None:
    conv = nn.Conv2d(3, 4, 3, 2, 1)
    leaf = torch.randn(1, 3, 16, 16, requires_grad=True)
    out: Tensor = conv(leaf)
    found = []
    for strides in ("nearest", "nearest", "aligned", "aligned"):
        with rewritten([out], "gradient", strides):  # type: ignore[arg-type]
            found.append(torch.autograd.grad(out, leaf, torch.ones_like(out), retain_graph=True)[0])
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[2], found[3])
    assert not torch.equal(found[0], found[2])
