"""Networks as people write them: loops, blocks of their own, several answers, odd stems."""

from __future__ import annotations

from pathlib import Path
from runpy import run_path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from partlens.attribution.backprop import guided_backprop
from partlens.attribution.grad_cam import layer_grad_cam
from partlens.errors import LayerError
from partlens.explainer.config import ExplainerConfig
from partlens.explainer.network import build_explainer, explainer_structure, performer_head
from partlens.network.outputs import class_scores
from partlens.network.performer import Performer
from partlens.network.preprocessing import Preprocessing
from partlens.network.taps import forward_taps
from partlens.network.zoo import load_performer
from partlens.selection.measured_layers import feature_index

MADE = run_path(str(Path(__file__).parent / "families.py"))
Plain, Vit, performer_of, network_of = (MADE[name] for name in ("Plain", "Vit", "performer_of", "network_of"))


def photos(count: int = 2, channels: int = 3) -> Tensor:
    return torch.randn(count, channels, 32, 32, generator=torch.Generator().manual_seed(5))


class OneByOne(nn.Module):
    """Runs its images one after another: all of it, what comes behind the stem, or without the axis of the images."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.inner = kind, network_of("silu")

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "unbatched":
            return torch.stack([self.inner.head(self.inner.stem[0](image).mean((1, 2))) for image in x])
        if self.kind == "behind the stem":
            x = self.inner.stem(x)
            maps = [self.inner.three(self.inner.two(self.inner.one(x[i : i + 1]))) for i in range(len(x))]
            return self.inner.head(torch.cat(maps).mean((2, 3)))
        return torch.stack([self.inner(image[None])[0] for image in x])


@pytest.mark.parametrize("kind", ["whole", "behind the stem"])
def test_a_network_that_runs_its_images_one_by_one_is_explained_like_any_other(kind: str) -> None:
    looped, plain = performer_of(OneByOne(kind).eval()), performer_of("silu")
    assert looped.tap == f"inner.{plain.tap}"
    shapes = {layer.name: (layer.shape, layer.reason) for layer in looped.layers}
    wanted = {layer.name: (layer.shape, layer.reason) for layer in plain.layers}
    assert all(shapes[f"inner.{name}"] == wanted[name] for name in ("stem.0", "one", "two", "two.conv1", "three"))
    output, taps = forward_taps(looped, photos(), ["inner.stem.0", "inner.one", "inner.two.act1"])
    found, of_plain = forward_taps(plain, photos(), ["stem.0", "one", "two.act1"])
    torch.testing.assert_close(output, found)
    for name, maps in of_plain.items():
        torch.testing.assert_close(taps[f"inner.{name}"], maps)
    above = looped.upper("inner.one", ["inner.two", "output"])
    torch.testing.assert_close(above(taps["inner.one"])[1], output)
    assert not torch.allclose(above(taps["inner.one"].flip(0))[1], output)
    assert "inner.one.conv1" in feature_index(looped).layers
    for call in (
        lambda on, name: guided_backprop(on, photos(), layer=name, filters=[1, 3]),
        lambda on, name: layer_grad_cam(on, photos(), name, torch.tensor([0, 1])),
    ):
        torch.testing.assert_close(call(looped, "inner.two"), call(plain, "two"))


def test_images_without_their_axis_are_refused_with_what_to_do() -> None:
    performer = performer_of(OneByOne("unbatched").eval())
    said = r"got none among .* first axis is not that of the images.*\. Write its forward for a batch of images"
    for call in (lambda: performer.tap, lambda: feature_index(performer)):
        with pytest.raises(LayerError, match=said):
            call()


class Pooled(nn.Module):
    """A block that returns tokens and what it has pooled from them; the head reads the latter."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = Vit(), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        tokens = self.inner.patches(x).flatten(2).transpose(1, 2)
        tokens = self.norm(self.inner.blocks(tokens))
        if bool(tokens.isnan().any()):
            raise ValueError
        return {"tokens": tokens, "pooled": tokens.mean(1)}


class Headed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = Pooled(), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x)["pooled"])


def test_what_a_block_pools_from_its_tokens_follows_them() -> None:
    performer = performer_of(Headed().eval())
    output, taps = forward_taps(performer, photos(), ["backbone"])
    assert taps["backbone"].shape == (2, 16, 4, 4)
    assert torch.allclose(performer.upper("backbone")(taps["backbone"])[0], output)
    assert not torch.allclose(performer.upper("backbone")(taps["backbone"] + 1)[0], output)


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


def test_an_activation_of_ones_own_hides_no_block() -> None:
    performer = performer_of(Plain(Swish).eval())
    assert performer.tap == "two"
    assert performer.targets("two") == ("three",)


class HeadFirst(nn.Module):
    """Registers its head before its stem, and standardises the weights of its own kind of convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.last = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 8, 3)
        self.stem = nn.Parameter(torch.randn(8, 3, 3, 3))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(F.conv2d(x, self.stem - self.stem.mean()))
        return self.head(self.relu(self.last(x))).mean((2, 3))


def test_channels_are_those_of_the_photos_whatever_convolution_comes_first() -> None:
    performer = performer_of(HeadFirst().eval())
    assert [layer.name for layer in performer.layers] == ["relu", "last", "relu_1", "head"]
    assert performer.field("relu").size_px == (3, 3)
    assert feature_index(performer).channels == (8, 8, 8)


@pytest.mark.parametrize("channels", [1, 4])
def test_networks_of_other_channels_say_so_in_their_preprocessing(channels: int) -> None:
    network = nn.Sequential(nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    performer = performer_of(network.eval(), channels=channels)
    assert performer.layers[0].shape == (4, 30, 30)
    assert performer.field("1").size_px == (3, 3)
    with pytest.raises(LayerError, match="got 3 channels of 32x32 px"):
        _ = performer_of(network).layers


FAMILIES: dict[str, dict[str, Any]] = {
    "ViT": {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8},
    "DeiT": {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8},
    "Swin": {
        "image_size": 32,
        "patch_size": 2,
        "embed_dim": 8,
        "depths": [2, 2],
        "num_heads": [1, 2],
        "window_size": 4,
    },
    "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2], "layer_type": "basic"},
    "ConvNext": {"num_stages": 2, "hidden_sizes": [8, 16], "depths": [2, 2], "image_size": 32},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_hugging_face_makes_of_them_is_explained_like_any_other(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{family}Config")(num_labels=4, **FAMILIES[family])
    torch.manual_seed(0)
    module = getattr(transformers, f"{family}ForImageClassification")(config).eval()
    performer = Performer(module, family, Preprocessing(size_px=(32, 32)), "")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    structure = explainer_structure(performer, photos(), performer.tap)
    explainer = build_explainer(performer, structure, ExplainerConfig.preset("partlens", standardise=False))
    output, taps = forward_taps(performer, photos(), [structure.read])
    explainer.start_norms(taps[structure.read])
    with torch.no_grad():
        explainer.share_logit.fill_(-torch.inf)
        (again,) = performer_head(performer, structure)(explainer.eval()(taps[structure.read]).reconstructions[-1])
    scores = class_scores(output, 2)
    assert torch.allclose(again, scores, atol=1e-5 * float(scores.abs().max()) + 1e-9)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_a_network_of_functions_alone_is_told_what_it_lacks() -> None:
    class Functions(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.relu().mean((2, 3))

    with pytest.raises(LayerError, match=r"got none among 0 layers \(only functions, no modules\)"):
        _ = load_performer(Functions()).tap
