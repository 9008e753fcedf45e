"""What is remembered of the papers' convolutions is what they give, and is shared by all that have them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from partlens.network.performer import Performer
from partlens.network.preprocessing import Preprocessing
from partlens.network.taps import forward_taps
from partlens_papers.networks.paper_networks import PaperNet
from partlens_papers.networks.remembered import remembering


def vgg16(seed: int) -> nn.Module:
    from torchvision.models import vgg16 as build

    torch.manual_seed(0)
    module = build(init_weights=False)
    torch.manual_seed(seed)
    narrow = [
        nn.Linear(512 * 49, 8),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(8, 8),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(8, 1),
    ]
    module.classifier = nn.Sequential(*narrow)
    return module.eval()


def alexnet(seed: int) -> nn.Module:
    torch.manual_seed(0)
    module = PaperNet("alexnet-caffe", num_classes=1, input_px=67, hidden=8)
    torch.manual_seed(seed)
    nn.init.normal_(module.fc8.weight)
    return module.eval()


def performer(module: nn.Module, side: int) -> Performer:
    return Performer(module, "of the papers", Preprocessing(size_px=(side, side), resize="squash"), "")


NETWORKS = {"vgg16": (vgg16, 32, ("features.27", "features.29", "classifier.4")), "alexnet": (alexnet, 67, ("relu4",))}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_pass_gives_what_the_network_gives_and_computes_the_fixed_layers_once(name, tmp_path):
    build, side, taps = NETWORKS[name]
    given, x = performer(build(1), side), torch.rand(3, 3, side, side)
    kept = remembering(given, tmp_path)
    assert list(kept.module.state_dict()) == list(given.module.state_dict())
    assert kept.tap == given.tap == taps[0]
    first, maps = forward_taps(kept, x, taps)
    there = set(tmp_path.rglob("*.npy"))
    again, _ = forward_taps(kept, x.flip(0), taps)
    plain, expected = forward_taps(given, x, taps)
    for tap in taps:
        assert float((maps[tap] - expected[tap]).norm() / expected[tap].norm()) < 0.02
    assert torch.equal(again.flip(0), first)
    assert float((first - plain).abs().max()) < 0.02 * float(plain.abs().max())
    assert set(tmp_path.rglob("*.npy")) == there


def test_another_performer_with_the_same_convolutions_reads_them_and_one_with_others_does_not(tmp_path):
    x = torch.rand(2, 3, 67, 67)
    first, second = (remembering(performer(alexnet(seed), 67), tmp_path) for seed in (1, 2))
    assert not torch.equal(first.module(x), second.module(x))
    assert len(list(tmp_path.rglob("*.npy"))) == 2
    other = alexnet(1)
    nn.init.zeros_(other.conv4.weight)
    remembering(performer(other, 67), tmp_path).module(x)
    assert len(list(tmp_path.rglob("*.npy"))) == 4


def test_gradients_of_the_input_and_traces_run_all_layers_and_the_given_network_stays_as_it_was(tmp_path):
    module = alexnet(1)
    kept = remembering(performer(module, 67), tmp_path)
    x = torch.rand(1, 3, 67, 67, requires_grad=True)
    kept.module(x).sum().backward()
    assert float(x.grad.abs().sum()) > 0
    assert type(module) is PaperNet
    assert "conv1" in kept.cut_points()
    assert "conv1" in dict(kept.upper("conv1", ["conv2"]).network.named_modules())
    assert not list(tmp_path.rglob("*.npy"))


def test_another_network_is_handed_back_as_it_is(tmp_path):
    given = performer(nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten()), 8)
    assert remembering(given, tmp_path) is given
