from __future__ import annotations

import copy
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from partlens.data.images import ImageSet
from partlens.explainer.network import explainer_structure
from partlens.network.performer import Performer, weights_sha256
from partlens.network.preprocessing import Preprocessing
from partlens_papers.rivals.interpretable_cnn import (
    InterpretableCNN,
    build_interpretable_cnn,
    released_weights,
)
from partlens_papers.rivals.interpretable_config import InterpretableConfig
from partlens_papers.rivals.interpretable_training import LabelledMaps, labelled_maps, train_interpretable_cnn
from partlens_papers.rivals.masks import FilterCategories, PublishedMask, ReleasedMask

SMALL: dict[str, Any] = {"epochs": 3, "batch_size": 16, "weight_std": 0.0, "learning_rate": 0.02}
METHODS = ["published", "released"]


def paper_like() -> Performer:
    """A network of the papers' kind: one convolution between the tap and the fully connected layers; 8x8 cells."""
    torch.manual_seed(3)
    module = nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, 6, 3, stride=4, padding=1),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(6, 10, 3, padding=1, groups=2),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc3=nn.Linear(160, 16),
            relu3=nn.ReLU(),
            drop3=nn.Dropout(0.5),
            fc4=nn.Linear(16, 12),
            relu4=nn.ReLU(),
            drop4=nn.Dropout(0.5),
            fc5=nn.Linear(12, 4),
        )
    ).eval()
    preprocessing = Preprocessing(size_px=(32, 32), resize="squash", mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    return Performer(module, "paper-like", preprocessing, weights_sha256(module), "relu1")


@pytest.fixture
def performer() -> Performer:
    return paper_like()


def build(performer: Performer, categories: int = 1, tap: str | None = None, **changes: Any) -> InterpretableCNN:
    config = InterpretableConfig(**{**SMALL, **changes})
    structure = explainer_structure(performer, torch.zeros(1, 3, 32, 32), tap or performer.default_tap or "")
    return build_interpretable_cnn(performer, structure, config, categories)


def moving_parts(rows: int = 64, filters: int = 6, categories: int = 1) -> LabelledMaps:
    """Maps in which a category's own filter answers at a place that moves, over noise."""
    generator = torch.Generator().manual_seed(1)
    maps = 0.4 * torch.rand(rows, filters, 8, 8, generator=generator)
    shown = torch.arange(rows) % (categories + 1)
    place = torch.randint(1, 7, (rows, 2), generator=generator)
    for row, category in enumerate(shown.tolist()):
        if category < categories:
            at = place[row]
            maps[row, category, at[0] - 1 : at[0] + 2, at[1] - 1 : at[1] + 2] += 2
    labels = torch.stack([shown == c for c in range(categories)], 1)
    return LabelledMaps(maps.numpy().astype(np.float16), labels)


class Killed(Exception):
    """Stands for a kill at an epoch's end."""


def test_the_layers_are_the_performers_own(performer: Performer) -> None:
    network = build(performer, head="copied", categories=4)
    assert network.top is not None
    own = performer.module
    assert torch.equal(network.top.weight, own.get_submodule("conv2").weight)
    assert network.top.weight is not own.get_submodule("conv2").weight
    assert network.inserted.weight.shape == (10, 10, 3, 3)
    weights = dict(network.head.network.named_parameters())
    assert torch.equal(weights["fc3.weight"], own.get_submodule("fc3").weight)
    assert torch.equal(weights["fc5.weight"], own.get_submodule("fc5").weight)
    assert float(network.inserted.bias.detach().abs().max()) == 0


def test_new_layers_are_drawn_and_have_as_many_outputs_as_categories(performer: Performer) -> None:
    network = build(performer, weight_std=0.01)
    weights = dict(network.head.network.named_parameters())
    assert weights["fc5.weight"].shape == (1, 12)
    assert float(weights["fc3.weight"].detach().std()) == pytest.approx(0.01, rel=0.1)
    assert float(weights["fc3.bias"].detach().abs().max()) == 0
    copied = build(performer, head="copied")
    assert torch.equal(
        dict(copied.head.network.named_parameters())["fc3.weight"], performer.module.get_submodule("fc3").weight
    )
    assert dict(copied.head.network.named_parameters())["fc5.weight"].shape == (1, 12)


def test_the_performer_is_not_touched(performer: Performer, tmp_path: Path) -> None:
    before = weights_sha256(performer.module)
    flags = [(p.requires_grad, p.grad) for p in performer.module.parameters()]
    state = torch.get_rng_state()
    for method in METHODS:
        network = build(performer, method=method, head="copied", inserted="identity", dropout=0.1)
        train_interpretable_cnn(network, moving_parts(20), tmp_path / method)
    assert weights_sha256(performer.module) == before
    assert [(p.requires_grad, p.grad) for p in performer.module.parameters()] == flags
    assert torch.equal(torch.get_rng_state(), state)
    assert performer.module.get_submodule("drop3").p == 0.5
    assert not performer.module.training


def test_pass_by_hand(performer: Performer) -> None:
    """Published: mask, convolution, mask, pool. Released: mask, convolution, pool, mask."""
    maps = torch.rand(5, 6, 8, 8)
    for method in METHODS:
        network = build(performer, method=method, weight_std=0.2)
        assert network.top is not None
        assert list(network.masks) == ["top", "inserted"]
        below = network.masks["top"](network.top(maps).relu())
        inserted = network.inserted(below).relu()
        if method == "published":
            assert isinstance(network.masks["inserted"], PublishedMask)
            out = network.pool(network.masks["inserted"](inserted))
        else:
            assert isinstance(network.masks["inserted"], ReleasedMask)
            out = network.masks["inserted"](network.pool(inserted))
        assert torch.equal(network.maps(maps), inserted.detach())
        assert torch.equal(network.outputs(maps), network.head(out)[0].detach())
        assert network.outputs(maps).shape == (5, 1)


def test_residual_kind_of_network_gets_the_convolution_at_the_tap(tiny: Performer) -> None:
    network = build(tiny, tap="relu2", head="copied", inserted="identity", weight_std=1e-12, categories=4)
    assert network.top is None
    assert list(network.masks) == ["inserted"]
    images = torch.rand(3, 3, 32, 32)
    tap = tiny.module[:4](images).detach()
    assert torch.allclose(network.maps(tap), tap, atol=1e-6)
    network.masks["inserted"] = nn.Identity()  # without the mask it is the performer
    assert torch.allclose(network.outputs(tap), tiny.module(images).detach(), atol=1e-5)


def test_a_network_without_a_last_linear_layer_is_refused(tiny: Performer) -> None:
    module = copy.deepcopy(tiny.module)
    module.add_module("share", nn.Softmax(1))
    other = Performer(module, "other", tiny.preprocessing, weights_sha256(module), "relu2")
    with pytest.raises(ValueError, match="ends in a fully connected layer after relu2, got Softmax"):
        build(other)


def test_the_filter_loss_reaches_only_the_masked_layers(performer: Performer) -> None:
    data = moving_parts(32)
    network = build(performer, strength=2e4)
    passed = network.training_pass(data.read(np.arange(32)), data.labels, 1, data.labels.float().mean(0))
    passed.penalty.backward()
    reached = {name for name, p in network.named_parameters() if p.grad is not None and float(p.grad.abs().max()) > 0}
    assert reached == {"top.weight", "top.bias", "inserted.weight", "inserted.bias"}
    assert passed.terms["filter_top"] < 0
    assert 0 < float(passed.terms["kept_inserted"]) < 1


def test_released_terms_are_added_to_the_gradient_of_the_task(performer: Performer) -> None:
    """The added gradient of a map is 1e-6 / epoch / batch whatever the task's is, and 0 with strength 0."""
    data = moving_parts(32)
    maps = data.read(np.arange(32)).double()
    gradients = []
    for strength in (0.0, 1.0, 3.0):
        network = build(performer, method="released", strength=strength).double()
        passed = network.training_pass(maps, data.labels, 2, data.labels.float().mean(0))
        passed.outputs.mean().backward()
        assert network.top is not None
        gradients.append(network.top.weight.grad)
        assert float(passed.penalty) == 0
    one, three = gradients[1] - gradients[0], gradients[2] - gradients[0]
    assert float(one.abs().max()) > 0
    assert torch.allclose(three, 3 * one, rtol=1e-6, atol=1e-14)


@pytest.mark.parametrize("method", METHODS)
def test_training_learns_the_category_and_gathers_the_maps(performer: Performer, tmp_path: Path, method: str) -> None:
    data = moving_parts(128)
    strength = {"published": 3e4, "released": 1e3}[method]
    changes = {"epochs": 15, "dropout": 0.0, "learning_rate": 0.05, "learning_rate_end": 0.02}
    history = {}
    for used in (0.0, strength):
        network = build(performer, method=method, strength=used, **changes)
        history[used] = train_interpretable_cnn(network, data, tmp_path / str(used))
    with_loss = history[strength]
    assert with_loss[-1]["task"] < 0.2 * with_loss[0]["task"]
    assert with_loss[-1]["error"] < 0.05
    assert with_loss[-1]["kept_top"] > history[0.0][-1]["kept_top"] + 0.04
    if method == "published":
        per_epoch = [r["filter_top"] * r["epoch"] for r in with_loss]  # lambda falls with the epoch
        assert per_epoch[-1] < 1.5 * per_epoch[0] < 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("after", [1, 2])
def test_a_killed_run_continues_bit_equal(performer: Performer, tmp_path: Path, method: str, after: int) -> None:
    data = moving_parts(40, categories=2)
    whole = build(performer, method=method, categories=2)
    train_interpretable_cnn(whole, data, tmp_path / "whole")

    def stop(record: dict[str, Any]) -> None:
        if record["epoch"] == after:
            raise Killed

    with pytest.raises(Killed):
        train_interpretable_cnn(build(performer, method=method, categories=2), data, tmp_path / "killed", report=stop)
    again = build(performer, method=method, categories=2)
    with torch.no_grad():
        again.inserted.weight.add_(1)  # what the process had in memory is lost
    torch.rand(17)  # and the global random state is another
    result = train_interpretable_cnn(again, data, tmp_path / "killed")
    assert [r["epoch"] for r in result] == [1, 2, 3]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_seeds_decide(performer: Performer, tmp_path: Path) -> None:
    data = moving_parts(40)
    made: list[Tensor] = []
    for number, seed in enumerate((0, 0, 1)):
        network = build(performer, seed=seed)
        train_interpretable_cnn(network, data, tmp_path / str(number))
        made.append(network.inserted.weight.detach())
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_a_checkpoint_of_another_configuration_is_refused(performer: Performer, tmp_path: Path) -> None:
    train_interpretable_cnn(build(performer), moving_parts(20), tmp_path)
    with pytest.raises(ValueError, match="a checkpoint of this configuration"):
        train_interpretable_cnn(build(performer, momentum=0.5), moving_parts(20), tmp_path)


def test_what_does_not_fit_is_refused(performer: Performer, tmp_path: Path) -> None:
    data = moving_parts(20)
    with pytest.raises(ValueError, match="labels of 2 categories, got 1"):
        train_interpretable_cnn(build(performer, categories=2), data, tmp_path)
    with pytest.raises(ValueError, match="at least 2 rows of maps and as many labels, got 20 and 19"):
        train_interpretable_cnn(build(performer), LabelledMaps(data.tap, data.labels[:19]), tmp_path)
    with pytest.raises(ValueError, match="finite maps"):
        train_interpretable_cnn(build(performer, method="released", learning_rate=1e30), data, tmp_path)
    with pytest.raises(ValueError, match="at least 1 category, got 0"):
        build(performer, categories=0)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"learning_rate": 0.0}, "learning_rate to be greater than 0, got 0.0"),
        ({"strength": -1.0}, "strength to be greater than or equal to 0, got -1.0"),
        ({"batch_size": 1}, "batch_size to be greater than or equal to 2, got 1"),
        ({"dropout": 1.0}, "dropout to be less than 1, got 1.0"),
    ],
)
def test_bad_configurations_are_refused(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        InterpretableConfig(**change)


def test_unknown_words_are_refused() -> None:
    for name in ("method", "inserted", "head"):
        with pytest.raises(ValueError, match=f"{name} to be '.*', got 'other'"):
            InterpretableConfig(**{name: "other"})


def test_categories_follow_the_batches() -> None:
    """By hand, released: mean of peaks per category, at least 0.1 at first, then 0.9 of the past."""
    categories = FilterCategories(2, 2, "released")
    labels = torch.tensor([[True, False], [True, False], [False, True], [False, False]])
    assert torch.equal(categories.positives(labels), torch.tensor([[True] * 2, [True] * 2, [True] * 2, [False] * 2]))
    maps = torch.zeros(4, 2, 2, 2)
    maps[0, 0, 0, 0], maps[1, 0, 1, 1], maps[2, 1, 0, 1] = 4.0, 2.0, 1.0
    categories.update(maps, labels)
    assert torch.allclose(categories.magnitude, torch.tensor([[3.0, 0.1], [0.1, 1.0]]))
    assert categories.chosen().tolist() == [0, 1]
    assert torch.equal(categories.positives(labels), labels)
    categories.update(maps[:2] * 2, labels[:2])  # no image of the second category, and nothing of the second filter
    assert torch.allclose(categories.magnitude, torch.tensor([[0.9 * 3 + 0.1 * 6, 0.1], [0.1, 1.0]]))


def test_the_published_penalty_takes_the_negative_template_off_category() -> None:
    mask = PublishedMask((6, 6))
    maps = (30 * torch.rand(8, 1, 6, 6)).requires_grad_()
    positive = (torch.arange(8) % 2 == 0)[:, None]
    mask.penalty(maps, positive, 2).sum().backward()
    assert maps.grad is not None
    spread = maps.grad.flatten(2).std(2)[:, 0]
    assert float(spread[1::2].max()) < 1e-5 * float(spread[::2].min())  # that template is one value everywhere
    assert float(maps.grad[::2].abs().max()) > 0
    weaker = mask.penalty(maps.detach(), positive, 4)
    assert torch.allclose(weaker * 2, mask.penalty(maps.detach(), positive, 2))


def test_published_categories_go_by_the_sum() -> None:
    by_sum, by_peak = FilterCategories(1, 2, "published"), FilterCategories(1, 2, "released")
    labels = torch.eye(2, dtype=torch.bool)
    maps = torch.zeros(2, 1, 3, 3)
    maps[0] = 1.0  # wide and low
    maps[1, 0, 0, 0] = 5.0  # one high cell
    for categories in (by_sum, by_peak):
        categories.update(maps, labels)
    assert by_sum.chosen().tolist() == [0]
    assert by_peak.chosen().tolist() == [1]


def test_released_weights_by_hand() -> None:
    density = torch.tensor([0.25, 0.5])
    single, two = FilterCategories(3, 1, "released"), FilterCategories(3, 2, "released")
    assert released_weights(single, density[:1])[0].tolist() == [1, 1, 1]
    assert released_weights(two, density)[1].tolist() == [1, 1, 1]  # before the first batch
    maps = torch.rand(2, 3, 2, 2)
    maps[0, :2] += 3
    maps[1, 2] += 3
    two.update(maps, torch.eye(2, dtype=torch.bool))
    positive, negative = released_weights(two, density)
    assert torch.allclose(positive, torch.tensor([2.0, 2.0, 1.0]))
    assert torch.allclose(negative, torch.tensor([2 / 3, 2 / 3, 1.0]))
    many = FilterCategories(3, 12, "released")
    many.started.fill_(value=True)
    positive, negative = released_weights(many, torch.full((12,), 0.5))
    assert torch.allclose(positive, torch.full((3,), 6.0))
    assert torch.allclose(negative, torch.full((3,), 0.5 * 12 / 11))


def test_labelled_maps_of_photos_and_mirrors(tiny: Performer, few_flowers: ImageSet, tmp_path: Path) -> None:
    found = labelled_maps(tiny, few_flowers, ["petal-blue"], "relu2", tmp_path / "maps")
    assert found.tap.shape == (160, 12, 8, 8)
    blue = torch.tensor([category == "petal-blue" for category in few_flowers.categories])
    assert torch.equal(found.labels[::2, 0], blue)
    assert torch.equal(found.labels[1::2, 0], blue)
    assert not np.array_equal(found.tap[0], found.tap[1])
    with pytest.raises(ValueError, match="photos of every category, got none of fox"):
        labelled_maps(tiny, few_flowers, ["fox"], "relu2", tmp_path / "maps")
