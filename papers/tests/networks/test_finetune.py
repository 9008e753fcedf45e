"""Training for categories: what is new, what is trained, what is drawn, and that a killed run ends the same."""

from __future__ import annotations

import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from partlens.data.images import ImageSet
from partlens.errors import InputError, LayerError, RunError, StorageError, WeightsError
from partlens.network.performer import Performer, weights_sha256
from partlens.network.preprocessing import Preprocessing
from partlens.records import read_json
from partlens_papers.networks.finetune import (
    _groups,
    _learning,
    _Run,
    category_loss,
    category_scores,
    finetune,
    wrong_answers,
)
from partlens_papers.networks.finetune_config import FinetuneConfig
from partlens_papers.networks.finetune_network import fixed_before, prepare_network, upper
from partlens_papers.networks.finetune_photos import epoch_photos, reader_of_frames, reader_of_maps
from partlens_papers.networks.paper_networks import PaperNet

SIDE = 67
SMALL: dict[str, Any] = {"train_from": "fc6", "epochs": 3, "batch_size": 8}


@pytest.fixture
def alexnet() -> Performer:
    """AlexNet for small photos: convolutions whose maps have a usual size, fully connected layers of 64 units."""
    torch.manual_seed(5)
    module = PaperNet("alexnet-caffe", num_classes=7, input_px=SIDE, hidden=64).eval()
    for layer in module.children():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
    preprocessing = Preprocessing(
        size_px=(SIDE, SIDE),
        resize="squash",
        channel_order="BGR",
        scale=1.0,
        mean=(104.0, 117.0, 123.0),
        std=(1.0, 1.0, 1.0),
    )
    return Performer(module, "partlens_papers.performers:alexnet_caffe", preprocessing, weights_sha256(module))


@pytest.fixture
def small() -> Performer:
    """The same order of layers, small enough for many trainings."""
    torch.manual_seed(5)
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=nn.Conv2d(3, 8, 5, stride=2),
        relu1=nn.ReLU(inplace=True),
        conv2=nn.Conv2d(8, 16, 3, stride=2),
        relu2=nn.ReLU(inplace=True),
        pool5=nn.MaxPool2d(2),
        flatten=nn.Flatten(),
        fc6=nn.Linear(16 * 3 * 3, 64),
        relu6=nn.ReLU(),
        drop6=nn.Dropout(),
        fc7=nn.Linear(64, 64),
        relu7=nn.ReLU(),
        drop7=nn.Dropout(),
        fc8=nn.Linear(64, 5),
    )
    module = nn.Sequential(layers).eval()
    for layer in (module.conv1, module.conv2):
        nn.init.kaiming_normal_(layer.weight)
    preprocessing = Preprocessing(
        size_px=(32, 32),
        resize="squash",
        channel_order="BGR",
        scale=1.0,
        mean=(104.0, 117.0, 123.0),
        std=(1.0, 1.0, 1.0),
    )
    return Performer(module, "small", preprocessing, weights_sha256(module))


def colours() -> ImageSet:
    """Noise that is redder, bluer or greener."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 120, (60, 12, 10, 3), dtype=np.uint8)
    for channel in range(3):
        pixels[channel::3, ..., channel] += 100
    splits = ["test" if i % 4 > 1 else "train" for i in range(60)]
    return ImageSet.from_arrays(pixels, categories=["red", "green", "blue"] * 20, splits=splits)


@pytest.fixture
def reds() -> tuple[ImageSet, torch.Tensor]:
    """Training photos, the red ones against the others."""
    images = colours().select(split="train")
    return images, torch.tensor([0 if c == "red" else -1 for c in images.categories])


def trained(performer: Performer, data: tuple[ImageSet, torch.Tensor], folder: Path, **changes: Any):
    config = FinetuneConfig(**{**SMALL, **changes})
    prepared = prepare_network(performer, 1, config)
    return finetune(performer, prepared, *data, config, folder)


def differing(first: nn.Module, second: nn.Module) -> set[str]:
    other = second.state_dict()
    return {n for n, v in first.state_dict().items() if v.shape != other[n].shape or not torch.equal(v, other[n])}


# The network


def test_fully_connected_layers_of_the_papers_networks_are_new(alexnet: Performer) -> None:
    prepared = prepare_network(alexnet, 2, FinetuneConfig(seed=4))
    assert prepared.new_layers == ("fc6", "fc7", "fc8")
    assert prepared.output_layer == "fc8"
    assert prepared.module.num_classes == 2
    for name in prepared.new_layers:
        layer = prepared.module.get_submodule(name)
        assert float(layer.weight.detach().std()) == pytest.approx(0.01, rel=0.3)
        assert not layer.bias.any()
    assert {n.partition(".")[0] for n in differing(prepared.module, alexnet.module)} == {"fc6", "fc7", "fc8"}
    assert weights_sha256(prepared.module) == weights_sha256(prepare_network(alexnet, 2, FinetuneConfig(seed=4)).module)
    assert weights_sha256(prepared.module) != weights_sha256(prepare_network(alexnet, 2, FinetuneConfig(seed=3)).module)


@pytest.mark.parametrize(
    ("build", "choice", "new"),
    [
        (lambda: torchvision.models.resnet18(weights=None), "auto", ("fc",)),
        (lambda: torchvision.models.squeezenet1_1(weights=None), "auto", ("classifier.1",)),
        (lambda: torchvision.models.mobilenet_v3_small(weights=None), "auto", ("classifier.3",)),
        (
            lambda: torchvision.models.mobilenet_v3_small(weights=None),
            "fully-connected",
            ("classifier.0", "classifier.3"),
        ),
        (lambda: PaperNet("vgg-f", input_px=SIDE, hidden=8), "last", ("fc8",)),
    ],
    ids=["resnet18", "squeezenet", "mobilenet", "mobilenet-both", "vgg-f-last"],
)
def test_which_layers_are_new(build: Any, choice: str, new: tuple[str, ...]) -> None:
    module = build().eval()
    performer = Performer(module, "net", Preprocessing(size_px=(SIDE, SIDE), resize="squash"), "")
    before = {n: v.clone() for n, v in module.state_dict().items()}
    random = torch.get_rng_state()
    prepared = prepare_network(performer, 3, FinetuneConfig(new_layers=choice))
    assert torch.equal(torch.get_rng_state(), random)
    assert prepared.new_layers == new
    assert tuple(prepared.module(torch.zeros(2, 3, SIDE, SIDE)).shape) == (2, 3)
    assert differing(prepared.module, module) <= {f"{n}.{part}" for n in new for part in ("weight", "bias")}
    assert all(torch.equal(v, before[n]) for n, v in module.state_dict().items())


def test_networks_that_cannot_be_prepared_say_why(alexnet: Performer, tiny: Performer) -> None:
    with pytest.raises(LayerError, match=r"at or before fc6, .*got fc7"):
        prepare_network(alexnet, 1, FinetuneConfig(train_from="fc7"))
    with pytest.raises(LayerError, match="fc6"):
        prepare_network(alexnet, 1, FinetuneConfig(train_from="fc66"))
    with pytest.raises(LayerError, match="others before it"):
        prepare_network(alexnet, 1, FinetuneConfig(train_from="conv1"))
    with pytest.raises(InputError, match="side by side"):
        prepare_network(tiny, 1, FinetuneConfig(new_layers="fully-connected"))
    with pytest.raises(InputError, match="at least 1 output"):
        prepare_network(tiny, 0, FinetuneConfig())
    raw = Performer(alexnet.module, "raw", alexnet.preprocessing, "", untrained_layers=("fc6", "fc7", "fc8"))
    with pytest.raises(WeightsError, match="trained weights of fc6, fc7"):
        prepare_network(raw, 1, FinetuneConfig(new_layers="last"))
    paired = nn.Sequential(tiny.module, nn.Unflatten(1, (-1, 2)))
    with pytest.raises(LayerError, match=r"\(1, 1, 2\) with 0.classes replaced"):
        prepare_network(Performer(paired, "p", tiny.preprocessing, ""), 2, FinetuneConfig())
    bare = Performer(nn.Sequential(nn.Flatten()), "b", tiny.preprocessing, "")
    with pytest.raises(LayerError, match="a linear layer or a convolution"):
        prepare_network(bare, 2, FinetuneConfig())


def test_the_tap_before_a_layer() -> None:
    resnet = Performer(torchvision.models.resnet18(weights=None).eval(), "", Preprocessing(size_px=(64, 64)), "")
    assert fixed_before(resnet, "layer4") == "layer3.1"
    assert fixed_before(resnet, "layer4.1") == "layer4.0"
    assert fixed_before(resnet, "layer4.1.conv2") == "layer4.0"  # inside a block a shortcut goes around
    assert fixed_before(resnet, "fc") == "avgpool"
    paper = PaperNet("vgg-f", input_px=SIDE, hidden=4).eval()
    assert fixed_before(Performer(paper, "", Preprocessing(size_px=(SIDE, SIDE)), ""), "fc6") == "pool5"


# What is drawn


def test_positives_are_repeated_to_their_share() -> None:
    labels = torch.tensor([0] * 7 + [-1] * 31)
    for share, positive, negative in ((0.5, 31, 31), (0.75, 93, 31), (0.05, 7, 133)):
        photos, mirrored = epoch_photos(labels, 1, FinetuneConfig(positive_share=share), 1)
        shown = labels[photos]
        assert (int((shown == 0).sum()), int((shown == -1).sum())) == (positive, negative)
        counts = torch.bincount(photos, minlength=38)
        assert counts.min() >= 1
        for group in (counts[:7], counts[7:]):
            assert int(group.max() - group.min()) <= 1
        assert 0.2 < float(mirrored.float().mean()) < 0.8


def test_categories_are_balanced_and_epochs_differ() -> None:
    labels = torch.tensor([0] * 4 + [1] * 9 + [2] * 6)
    config = FinetuneConfig(mirror=False)
    photos, mirrored = epoch_photos(labels, 3, config, 1)
    assert torch.bincount(labels[photos]).tolist() == [9, 9, 9]
    assert not mirrored.any()
    assert torch.equal(photos, epoch_photos(labels, 3, config, 1)[0])
    assert not torch.equal(photos, epoch_photos(labels, 3, config, 2)[0])


def test_losses_by_hand() -> None:
    scores = torch.tensor([[2.0, -1.0], [0.5, 0.0]])
    labels = torch.tensor([0, -1])
    by_hand = [math.log1p(math.exp(v)) for v in (-2.0, -1.0, 0.5, 0.0)]
    assert float(category_loss(scores, labels, "logistic")) == pytest.approx(sum(by_hand) / 2, rel=1e-6)
    softmax = -(2.0 - math.log(math.exp(2.0) + math.exp(-1.0))), -(0.0 - math.log(math.exp(0.5) + 1.0))
    assert float(category_loss(scores, torch.tensor([0, 1]), "softmax")) == pytest.approx(sum(softmax) / 2, rel=1e-6)
    assert wrong_answers(scores, torch.tensor([0, 1])).tolist() == [False, True]
    assert wrong_answers(torch.tensor([[0.0], [-1.0], [1.0]]), torch.tensor([0, -1, 0])).tolist() == [
        True,
        False,
        False,
    ]
    huge = category_loss(torch.tensor([[800.0]]), torch.tensor([-1]), "logistic")
    assert float(huge) == pytest.approx(800.0)


# Training


def test_it_learns_and_leaves_the_given_network_alone(
    small: Performer, reds: tuple[ImageSet, torch.Tensor], tmp_path: Path
) -> None:
    before = {n: v.clone() for n, v in small.module.state_dict().items()}
    small.module.conv1.weight.grad = torch.ones_like(small.module.conv1.weight)
    small.module.train()
    random = torch.get_rng_state()
    result = trained(small, reds, tmp_path, epochs=10, learning_rate=0.004, rate_fall=0.3)
    assert torch.equal(torch.get_rng_state(), random)
    assert small.module.training
    assert torch.equal(small.module.conv1.weight.grad, torch.ones_like(small.module.conv1.weight))
    assert all(torch.equal(v, before[n]) for n, v in small.module.state_dict().items())
    assert not any(m._forward_hooks for m in small.module.modules())
    assert result.history[-1]["loss"] < 0.5 * result.history[0]["loss"]
    held = colours().select(split="test")
    scores = category_scores(Performer(result.module, "", small.preprocessing, ""), held)
    labels = torch.tensor([0 if c == "red" else -1 for c in held.categories])
    wrong = float(wrong_answers(scores, labels).float().mean())
    baseline = min(float((labels == 0).float().mean()), float((labels != 0).float().mean()))
    assert wrong < 0.5 * baseline
    assert not result.module.training
    assert all(p.grad is None and p.requires_grad for p in result.module.parameters())


def test_only_what_is_asked_for_changes(small: Performer, reds: tuple[ImageSet, torch.Tensor], tmp_path: Path) -> None:
    start = prepare_network(small, 1, FinetuneConfig(**SMALL)).module

    def changed(folder: str, **changes: Any) -> set[str]:
        module = trained(small, reds, tmp_path / folder, epochs=1, **changes).module
        return {n.partition(".")[0] for n in differing(module, start)}

    assert changed("a") == {"fc6", "fc7", "fc8"}
    assert changed("b", train_from="conv2") == {"conv2", "fc6", "fc7", "fc8"}
    assert changed("c", train_from="conv2", rate_kept=0.0) == {"fc6", "fc7", "fc8"}
    every = {"conv1", "conv2", "fc6", "fc7", "fc8"}
    assert changed("d", epochs_all=1) == every
    assert changed("e", train_from=None) == every


def test_cached_maps_are_the_networks_within_float16(
    small: Performer, reds: tuple[ImageSet, torch.Tensor], tmp_path: Path
) -> None:
    result = trained(small, reds, tmp_path, epochs=1, epochs_all=1)
    module = result.module
    photos, mirrored = torch.tensor([5, 0, 3, 3]), torch.tensor([False, True, True, False])
    maps = reader_of_maps(np.load(tmp_path / "maps" / "0-flatten.maps.npy", mmap_mode="r"), 2)(photos, mirrored)
    frames = reader_of_frames(np.load(tmp_path / "frames" / "frames.npy", mmap_mode="r"), small.preprocessing)(
        photos, mirrored
    )
    plain = small.preprocessing([reds[0].read(int(i)) for i in photos])
    assert torch.equal(frames[0], plain[0])
    assert torch.equal(frames[1], plain[1].flip(2))
    with torch.no_grad():
        for part, own in zip(maps, frames, strict=True):
            stored = _until_flatten(small.module, own[None])[0]
            assert torch.allclose(part, stored, rtol=2**-10, atol=1e-5)
        # The head that learns from the cache is the network's own.
        start = prepare_network(small, 1, FinetuneConfig(**SMALL))
        cached = upper(start.module, "flatten", small.preprocessing)[0](maps)[0]
        whole = start.module(frames)
    assert torch.allclose(cached, whole, rtol=5e-3, atol=1e-4)
    assert module.fc6.weight.shape == start.module.fc6.weight.shape


def _until_flatten(module: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    for name, layer in module.named_children():
        batch = layer(batch)
        if name == "flatten":
            break
    return batch


class Killed(Exception):
    """Stands for a kill at an epoch's end."""


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_killed_run_ends_with_the_same_bits(
    small: Performer, reds: tuple[ImageSet, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    settings: dict[str, Any] = {"epochs": 2, "epochs_all": 2, "learning_rate": 0.004}
    whole = trained(small, reds, tmp_path / "whole", **settings)

    save = _Run.save

    def stop(run: _Run) -> None:
        save(run)
        if len(run.history) == after:
            raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(_Run, "save", stop)
        trained(small, reds, tmp_path / "killed", **settings)
    torch.rand(17)  # the global random state is another
    again = trained(small, reds, tmp_path / "killed", **settings)
    assert weights_sha256(again.module) == weights_sha256(whole.module)
    assert [r["loss"] for r in again.history] == [r["loss"] for r in whole.history]
    assert [r["phase"] for r in whole.history] == ["upper", "upper", "all", "all"]


def test_another_configuration_in_the_same_folder_is_refused(
    small: Performer, reds: tuple[ImageSet, torch.Tensor], tmp_path: Path
) -> None:
    trained(small, reds, tmp_path, epochs=1)
    with pytest.raises(RunError, match="another"):
        trained(small, reds, tmp_path, epochs=2)


def test_one_step_by_hand(small: Performer, reds: tuple[ImageSet, torch.Tensor], tmp_path: Path) -> None:
    """One batch of all draws, dropout off: v = g + decay w, w -= rate v, by group of layers."""
    for name in ("drop6", "drop7"):
        small.module.get_submodule(name).p = 0.0
    images, labels = reds
    changes: dict[str, Any] = {"train_from": None, "epochs": 1, "batch_size": 99, "learning_rate": 0.01}
    config = FinetuneConfig(**{**changes, "weight_decay": 0.1, "rate_kept": 0.25, "mirror": False})
    start = prepare_network(small, 1, config).module
    photos, _ = epoch_photos(labels, 1, config, 1)
    scores = start(small.preprocessing([images.read(int(i)) for i in photos]))[:, 0]
    signs = torch.tensor([1.0 if int(labels[i]) == 0 else -1.0 for i in photos])
    torch.log1p(torch.exp(-signs * scores)).mean().backward()
    result = finetune(small, prepare_network(small, 1, config), images, labels, config, tmp_path).module
    for (name, old), (_, new) in zip(start.named_parameters(), result.named_parameters(), strict=True):
        fresh = name.startswith("fc")
        decay = 0.0 if fresh and name.endswith("bias") else 0.1
        wanted = old - 0.01 * (1.0 if fresh else 0.25) * (old.grad + decay * old)
        assert torch.allclose(new, wanted, rtol=1e-4, atol=1e-7), name
        assert not torch.equal(new, old), name


def test_rates_and_decay_by_group(small: Performer) -> None:
    module = prepare_network(small, 1, FinetuneConfig()).module
    names = {id(p): name for name, p in module.named_parameters()}
    groups = _groups(module, ("fc6", "fc7", "fc8"), FinetuneConfig(weight_decay=0.2, rate_kept=0.5))
    found = {names[id(p)]: (g["share"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert found.keys() == dict(module.named_parameters()).keys()
    for name, setting in found.items():
        fresh = name.startswith("fc")
        assert setting == (1.0 if fresh else 0.5, 0.0 if fresh and name.endswith("bias") else 0.2), name


def test_scores_are_the_networks_and_it_is_handed_back(small: Performer) -> None:
    images = colours()
    with torch.no_grad():
        wanted = small.module(small.preprocessing([images.read(i) for i in range(60)]))
    small.module.train()
    pointers = [p.data_ptr() for p in small.module.parameters()]
    assert torch.allclose(category_scores(small, images), wanted, atol=1e-5)
    assert small.module.training
    assert [p.data_ptr() for p in small.module.parameters()] == pointers


def test_dropout_is_on_and_norms_keep_their_statistics(tiny: Performer) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
    _learning(module)
    assert [m.training for m in module] == [False, False, True]


def test_running_statistics_stay(tiny: Performer, reds: tuple[ImageSet, torch.Tensor], tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 9)
    )
    performer = Performer(module, "normed", tiny.preprocessing, weights_sha256(module))
    result = trained(performer, reds, tmp_path, train_from=None, epochs=1).module
    changed = differing(result, module)
    assert changed == {"0.weight", "0.bias", "1.weight", "1.bias", "5.weight", "5.bias"}


def test_softmax_with_several_outputs_and_bfloat16(
    tiny: Performer, reds: tuple[ImageSet, torch.Tensor], tmp_path: Path
) -> None:
    images, labels = reds
    config = FinetuneConfig(loss="softmax", epochs=4, learning_rate=0.1, precision="bfloat16", batch_size=16)
    result = finetune(tiny, prepare_network(tiny, 2, config), images, labels + 1, config, tmp_path)
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    assert all(p.dtype == torch.float32 for p in result.module.parameters())
    with pytest.raises(InputError, match="labels"):
        finetune(tiny, prepare_network(tiny, 2, config), images, labels, config, tmp_path / "other")


def test_wrong_labels_and_losses_are_named(
    small: Performer, reds: tuple[ImageSet, torch.Tensor], tmp_path: Path
) -> None:
    images, labels = reds
    with pytest.raises(InputError, match="one per photo"):
        trained(small, (images, labels[:5]), tmp_path / "a")
    with pytest.raises(InputError, match="at least two kinds"):
        trained(small, (images, torch.zeros_like(labels)), tmp_path / "b")
    with pytest.raises(InputError, match=r"finite loss.*Lower the learning rate"):
        trained(small, reds, tmp_path / "c", learning_rate=1e9)
    assert not (tmp_path / "c" / "frames.npy").exists()


def test_a_full_disk_is_said(
    tiny: Performer, reds: tuple[ImageSet, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _path: type("Usage", (), {"free": 10})())
    with pytest.raises(StorageError, match="MB free"):
        trained(tiny, reds, tmp_path, train_from=None, epochs=1)


def test_the_checkpoint_names_its_tensors(
    small: Performer, reds: tuple[ImageSet, torch.Tensor], tmp_path: Path
) -> None:
    trained(small, reds, tmp_path, epochs=2)
    state = read_json(tmp_path / "checkpoint.json")
    assert (tmp_path / state["tensors"]).exists()
    assert [record["epoch"] for record in state["values"]["history"]] == [1, 2]
    assert [r["learning_rate"] for r in state["values"]["history"]] == pytest.approx([1e-3, 1e-4])


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"loss": "hinge"}, "loss to be 'logistic' or 'softmax'"),
        ({"epochs": 0}, "epochs to be greater than or equal to 1"),
        ({"positive_share": 1.0}, "positive_share to be less than 1"),
        ({"momentum": 1.0}, "momentum to be less than 1"),
        ({"learning_rate": math.nan}, "learning_rate to be a finite number"),
        ({"rate_fall": 0.0}, "rate_fall to be greater than 0"),
    ],
)
def test_settings_out_of_range_are_named(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        FinetuneConfig(**changes)


def test_unknown_settings_are_named() -> None:
    assert FinetuneConfig(**dict(FinetuneConfig(seed=3))) == FinetuneConfig(seed=3)
    with pytest.raises(InputError, match="epochs"):
        FinetuneConfig(epoch=3)


def test_every_setting_is_documented() -> None:
    for name in FinetuneConfig.model_fields:
        assert f"    {name}: " in (FinetuneConfig.__doc__ or ""), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_it_learns_on_a_gpu(small: Performer, reds: tuple[ImageSet, torch.Tensor], tmp_path: Path) -> None:
    config = FinetuneConfig(train_from="fc6", epochs=6, epochs_all=2, learning_rate=0.004, batch_size=16)
    prepared = prepare_network(small, 1, config)
    result = finetune(small, prepared, *reds, config, tmp_path, device="cuda")
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    assert next(result.module.parameters()).device.type == "cpu"
