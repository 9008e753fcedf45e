"""Training a classifier: what it learns, what it keeps, and the file that names input and classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from partlens.data.images import ImageSet
from partlens.errors import ImageError, InputError, InputTypeError, WeightsError
from partlens.network.fitting import (
    flower_network,
    flower_preprocessing,
    frames,
    right_answers,
    save_classifier,
    train_classifier,
)
from partlens.network.performer import Performer, weights_sha256
from partlens.network.preprocessing import Preprocessing
from partlens.network.zoo import load_performer
from partlens_papers.flowers.network import benchmark_network, without_norms


def of(module: nn.Module, size: tuple[int, int]) -> Performer:
    """A performer with an input of this size."""
    return Performer(module, "x", Preprocessing(size_px=size), "")


SMALL = Preprocessing(size_px=(8, 8), resize="squash", channel_order="BGR", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


def colours(images: int = 80) -> ImageSet:
    """Noise that is redder or bluer: two categories that a linear layer tells apart."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 120, (images, 10, 12, 3), dtype=np.uint8)
    pixels[::2, ..., 0] += 100
    pixels[1::2, ..., 2] += 100
    splits = ["test" if i % 4 > 1 else "train" for i in range(images)]
    return ImageSet.from_arrays(pixels, categories=["red", "blue"] * (images // 2), splits=splits)


def linear(outputs: int) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, outputs))


def test_it_learns_and_repeats_and_leaves_the_random_state() -> None:
    state = torch.get_rng_state()
    fitted = train_classifier(linear, colours(), SMALL, epochs=30, batch_size=8, learning_rate=0.05, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert fitted.class_names == ("blue", "red")
    assert fitted.right.shape == (40,)
    assert fitted.accuracy == 1
    assert not fitted.network.training
    again = train_classifier(linear, colours(), SMALL, epochs=30, batch_size=8, learning_rate=0.05, seed=1)
    assert weights_sha256(again.network) == weights_sha256(fitted.network)
    other = train_classifier(linear, colours(), SMALL, epochs=30, batch_size=8, learning_rate=0.05, seed=2)
    assert weights_sha256(other.network) != weights_sha256(fitted.network)
    untrained = train_classifier(linear, colours(), SMALL, epochs=1, learning_rate=1e-9, seed=1)
    assert untrained.accuracy < 1


def test_bytes_give_the_batch_bit_for_bit() -> None:
    images = colours(4)
    rows = (3, 0, 2)
    for preprocessing in (SMALL, Preprocessing(size_px=(6, 9), resize_px=9, scale=1.0)):
        held = frames(images, rows, preprocessing)
        assert held.dtype == torch.uint8
        before = held.clone()
        assert torch.equal(preprocessing.of_bytes(held), preprocessing([images.read(i) for i in rows]))
        assert torch.equal(held, before)


def test_right_answers_are_those_of_the_largest_output() -> None:
    pictures = torch.zeros(3, 8, 8, 3, dtype=torch.uint8)
    constant = linear(2).requires_grad_(False)
    constant[2].weight.zero_()  # type: ignore[index,operator]
    constant[2].bias.copy_(torch.tensor([0.0, 1.0]))  # type: ignore[index,operator]
    assert right_answers(constant, pictures, torch.tensor([1, 0, 1]), SMALL).tolist() == [True, False, True]


def test_melting_norms_keeps_the_outputs() -> None:
    network = benchmark_network(5, normed=True)
    for layer in network:
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
            nn.init.normal_(layer.weight)
            nn.init.normal_(layer.bias)
    network.eval()
    before = weights_sha256(network)
    plain = without_norms(network)
    assert weights_sha256(network) == before
    assert [type(layer) for layer in plain] == [type(layer) for layer in benchmark_network(5)]
    assert [n for n, _ in plain.named_children()] == [n for n, _ in benchmark_network(5).named_children()]
    images = torch.randn(2, 3, 112, 112)
    with torch.no_grad():
        torch.testing.assert_close(plain(images), network(images), atol=1e-4, rtol=1e-4)
    with pytest.raises(InputTypeError, match="a convolution before 1, got ReLU"):
        without_norms(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(2)))


def test_the_benchmark_network_is_of_the_papers_size() -> None:
    layers = {layer.name: layer for layer in of(benchmark_network(12), (112, 112)).layers}
    assert layers["relu1"].shape == (32, 56, 56)
    assert layers["relu3"].shape == (64, 14, 14)
    network = benchmark_network(12)
    assert network.conv1.stride == (2, 2)
    kinds = {type(layer) for layer in network}
    assert kinds == {nn.Conv2d, nn.ReLU, nn.MaxPool2d, nn.Flatten, nn.Linear}
    assert len(list(network)) >= 8


@pytest.mark.parametrize("name", ["partlens:flower-demo", "partlens_papers.performers:flower_net"])
def test_a_saved_network_is_named_on_the_command_line(name: str, tmp_path: Path) -> None:
    network = (flower_network if "demo" in name else benchmark_network)(3).eval()
    save_classifier(tmp_path / "net.safetensors", network, SMALL, ("a", "b", "ü"))
    performer = load_performer(f"{name}@{tmp_path}/net.safetensors")
    assert weights_sha256(performer.module) == weights_sha256(network)
    assert performer.class_names == ("a", "b", "ü")
    assert performer.preprocessing == SMALL
    assert performer.name == f"{name}@net.safetensors"
    assert not performer.module.training
    save_classifier(tmp_path / "bare.safetensors", network, flower_preprocessing())
    assert load_performer(f"{name}@{tmp_path}/bare.safetensors").preprocessing == flower_preprocessing()
    first, second = (load_performer(f"{name}@random:{seed}") for seed in (0, 1))
    assert first.weights_sha256 != second.weights_sha256
    assert first.preprocessing.size_px == (112, 112)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="epochs >= 1, got 0"):
        train_classifier(linear, colours(), SMALL, epochs=0)
    one = ImageSet.from_arrays(np.zeros((4, 8, 8, 3), np.uint8), categories=["a"] * 4, splits=["train", "test"] * 2)
    with pytest.raises(InputError, match="at least two categories, got a"):
        train_classifier(linear, one, SMALL, epochs=1)
    with pytest.raises(ImageError, match="a split of arrays, got 'test'"):
        train_classifier(linear, colours().select(split="train"), SMALL, epochs=1)
    with pytest.raises(InputError, match="a scale of 1 or 1/255, got 0.5"):
        Preprocessing(resize_px=256, scale=0.5).to_metadata()
    with pytest.raises(
        WeightsError,
        match="a weights file for partlens_papers.performers:flower_net, got none. Write partlens_papers",
    ):
        load_performer("partlens_papers.performers:flower_net")
    save_classifier(tmp_path / "net.safetensors", flower_network(3), SMALL, ("a", "b"))
    with pytest.raises(
        WeightsError, match=r"3 class names as a JSON list in the header of net.safetensors, got \[\"a\""
    ):
        load_performer(f"partlens:flower-demo@{tmp_path}/net.safetensors")
    with pytest.raises(WeightsError, match="tensors of Sequential in net.safetensors"):
        load_performer(f"partlens_papers.performers:flower_net@{tmp_path}/net.safetensors")
