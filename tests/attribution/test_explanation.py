"""Explanations of predictions: which features are chosen, and what their maps look like (T9, T10, T11, T15)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from partlens.attribution.backprop import backward_signals, heat_map, scaled
from partlens.attribution.explanation import (
    choose_top,
    contributions,
    explain_batch,
    smoothed,
)
from partlens.attribution.record import ExplanationConfig
from partlens.errors import InputError
from partlens.network.outputs import Outputs
from partlens.network.performer import Performer
from partlens.network.taps import forward_taps
from partlens.selection.measured_layers import feature_index
from partlens.selection.record import DescriptorConfig, FeatureIndex
from partlens.selection.responses import image_descriptors

CONFIG = DescriptorConfig()


@pytest.fixture
def index(tiny: Performer) -> FeatureIndex:
    return feature_index(tiny, CONFIG)


@pytest.fixture
def batch(generator: torch.Generator) -> Tensor:
    return torch.randn(5, 3, 32, 32, generator=generator)


@pytest.fixture
def weights(index: FeatureIndex, generator: torch.Generator) -> Tensor:
    dense = torch.rand(index.size, 4, generator=generator, dtype=torch.float64)
    return dense * (torch.rand(index.size, 4, generator=generator) < 0.3)


def test_T9_the_features_with_the_largest_contributions_are_chosen(
    tiny: Performer, index: FeatureIndex, batch: Tensor, weights: Tensor
) -> None:
    classes = torch.tensor([[0, 1]] * 5)
    found = explain_batch(tiny, batch, weights, index, classes)
    x, _ = image_descriptors(tiny, batch, index)
    for image in range(5):
        for column, name in enumerate((0, 1)):
            r = [(float(x[image, f]) * float(weights[f, name]), f) for f in range(index.size)]
            best = sorted(r, key=lambda entry: (-entry[0], entry[1]))[:3]
            assert found.features[image, column].tolist() == [f for _, f in best]
            assert found.contributions[image, column].tolist() == pytest.approx([c for c, _ in best])
            assert float(found.scores[image, column]) == pytest.approx(sum(c for c, _ in r))
            assert float(found.positive[image, column]) == pytest.approx(sum(max(c, 0.0) for c, _ in r))
            assert found.responses[image, column].tolist() == pytest.approx([float(x[image, f]) for _, f in best])
            assert (weights[found.features[image, column], name] > 0).all()
    assert not torch.equal(found.features[:, 0], found.features[:, 1])


def test_T11_each_map_starts_from_one_channel_with_its_own_activation(
    tiny: Performer, index: FeatureIndex, batch: Tensor, weights: Tensor
) -> None:
    found = explain_batch(tiny, batch, weights, index, torch.zeros(5, 1, dtype=torch.long))
    layer, channel = index.place(int(found.features[2, 0, 1]))
    _, taps = forward_taps(tiny, batch[2:3], [layer])
    start = torch.zeros(1, taps[layer].shape[1])
    start[0, channel] = 1
    alone = backward_signals(tiny, batch[2:3], [{layer: start}])
    assert torch.allclose(found.maps[2, 0, 1], heat_map(alone)[0, 0], atol=1e-5)


def test_only_positive_contributions_are_shown(tiny: Performer, index: FeatureIndex, batch: Tensor) -> None:
    weights = torch.zeros(index.size, 1, dtype=torch.float64)
    weights[index.feature("relu2", 0)], weights[index.feature("relu2", 1)] = -5.0, 1.0
    found = explain_batch(tiny, batch, weights, index, torch.zeros(5, 1, dtype=torch.long))
    x, _ = image_descriptors(tiny, batch, index)
    one, other = (x[:, index.feature("relu2", k)].double() for k in (0, 1))
    assert torch.allclose(found.positive[:, 0], other)
    assert torch.allclose(found.scores[:, 0], other - 5 * one)
    assert set(found.features[:, 0, 0].tolist()) <= {index.feature("relu2", 1), -1}
    assert (found.features[:, 0, 1:] == -1).all()
    assert (found.contributions[:, 0, 1:] == 0).all()


@pytest.mark.parametrize("changes", [{"rule": "gradient"}, {"fix_strides": False}, {"pooling": "resample"}])
def test_each_setting_of_the_backward_pass_reaches_it(
    tiny: Performer, index: FeatureIndex, batch: Tensor, changes: dict
) -> None:
    weights = torch.zeros(index.size, 1, dtype=torch.float64)
    feature = index.feature("relu4", 3)
    weights[feature] = 1.0
    config = ExplanationConfig(**changes)
    found = explain_batch(tiny, batch, weights, index, torch.zeros(5, 1, dtype=torch.long), config)
    start = torch.zeros(5, 16)
    start[:, 3] = 1
    plain, wanted = (
        heat_map(backward_signals(tiny, batch, [{"relu4": start}], **options)[0]) for options in ({}, changes)
    )
    live = found.features[:, 0, 0] == feature
    assert bool(live.any())
    assert torch.allclose(found.maps[live, 0, 0], wanted[live], atol=1e-6)
    assert not torch.allclose(plain[live], wanted[live], atol=1e-3)


def test_maps_are_smoothed_by_a_share_of_the_shorter_side(
    tiny: Performer, index: FeatureIndex, generator: torch.Generator
) -> None:
    wide = torch.randn(2, 3, 32, 48, generator=generator)
    weights = torch.ones(index.size, 1, dtype=torch.float64)
    classes = torch.zeros(2, 1, dtype=torch.long)
    sharp, soft = (
        explain_batch(tiny, wide, weights, index, classes, ExplanationConfig(features=2, smooth_frac=share))
        for share in (0.0, 0.1)
    )
    assert sharp.maps.shape == (2, 1, 2, 32, 48)
    assert torch.allclose(soft.maps, scaled(smoothed(sharp.maps, 3.2)), atol=1e-5)


def test_T15_maps_stay_in_range_and_the_combination_is_their_maximum(
    tiny: Performer, index: FeatureIndex, batch: Tensor, weights: Tensor
) -> None:
    found = explain_batch(tiny, batch, weights, index, torch.tensor([[0, 2]] * 5))
    assert float(found.maps.min()) >= 0
    assert float(found.maps.max()) <= 1
    assert torch.equal(found.combined, found.maps.amax(2))
    assert (found.combined[:, :, None] >= found.maps).all()


def test_a_class_without_relevant_features_has_an_empty_map(
    tiny: Performer, index: FeatureIndex, batch: Tensor
) -> None:
    weights = torch.zeros(index.size, 2, dtype=torch.float64)
    weights[3, 1] = 1.0
    found = explain_batch(tiny, batch, weights, index, torch.tensor([[0, 1]] * 5))
    assert (found.features[:, 0] == -1).all()
    assert float(found.combined[:, 0].abs().max()) == 0
    assert (found.features[:, 1, 0] == 3).all()
    assert (found.features[:, 1, 1:] == -1).all()
    assert bool(torch.isfinite(found.maps).all())


def test_a_batch_equals_its_images_one_by_one(
    tiny: Performer, index: FeatureIndex, batch: Tensor, weights: Tensor
) -> None:
    classes = torch.arange(5)[:, None] % 4
    whole = explain_batch(tiny, batch, weights, index, classes)
    for i in range(5):
        single = explain_batch(tiny, batch[i : i + 1], weights, index, classes[i : i + 1])
        assert torch.equal(single.features[0], whole.features[i])
        assert torch.allclose(single.combined[0], whole.combined[i], atol=1e-5)


def test_the_most_likely_classes_are_chosen_in_order() -> None:
    output = torch.tensor([[0.1, 0.9, 0.5, 0.3], [0.8, 0.1, 0.1, 0.7]])
    chosen = choose_top([3, 1, 0], 2)(output, torch.zeros(2, 3))
    assert chosen.tolist() == [[1, 0], [2, 0]]
    scores = torch.tensor([[0.0, 2.0, 1.0]])
    assert choose_top([None, None, None], 2)(output[:1], scores).tolist() == [[1, 2]]


def test_the_read_out_chooses_where_the_decision_may_be_a_class_of_another_name() -> None:
    output = torch.tensor([[0.1, 0.9, 0.5, 0.3], [0.1, 0.9, 0.95, 0.3]])  # decided: 1, no class's; 2, the last one's
    scores = torch.tensor([[0.1, 2.0, 1.0], [0.1, 2.0, 1.0]])
    assert choose_top([3, None, 2], 2)(output, scores).tolist() == [[1, 2], [2, 0]]
    assert choose_top([3, 0, 2], 3)(output, scores).tolist() == [[2, 0, 1], [2, 0, 1]], "all are outputs"
    assert choose_top([3, None, 2], 3)(output, scores).tolist()[1] == [2, 0, 1], "one that is no output comes last"
    yes_or_no = Outputs("logits", 1).decisions
    assert choose_top([0, None], 1, yes_or_no)(torch.tensor([[-1.0]]), torch.tensor([[0.1, 0.6]])).tolist() == [[1]]


def test_smoothing_keeps_flat_maps_flat_and_spreads_a_point() -> None:
    flat = torch.full((1, 9, 11), 0.7)
    assert torch.allclose(smoothed(flat, 2.0), flat, atol=1e-6)
    point = torch.zeros(1, 21, 21)
    point[0, 10, 10] = 1
    spread = smoothed(point, 2.0)[0]
    ratio = float(spread[10, 12] / spread[10, 10])
    assert ratio == pytest.approx(torch.exp(torch.tensor(-0.5)).item(), rel=1e-3)
    assert float(spread[10, 15] / spread[10, 10]) == pytest.approx(math.exp(-25 / 8), rel=5e-3)  # 2.5 sigma away
    assert float(spread[10, 17]) == 0  # beyond 3 sigma
    assert torch.equal(smoothed(point, 0.0), point)


def test_constant_maps_are_scaled_to_zero() -> None:
    maps = torch.stack([torch.full((3, 3), 5.0), torch.arange(9.0).view(3, 3)])
    assert scaled(maps)[0].abs().max() == 0
    assert float(scaled(maps)[1].max()) == 1


def test_contributions_are_elementwise() -> None:
    x = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    w = torch.tensor([[3.0, 0.0], [0.5, 1.0]], dtype=torch.float64)
    assert contributions(x, w, torch.tensor([[0, 1]])).tolist() == [[[3.0, 1.0], [0.0, 2.0]]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": 0}, "Expected features to be greater than or equal to 1, got 0"),
        ({"smooth_frac": -1.0}, "Expected smooth_frac to be greater than or equal to 0, got -1.0"),
    ],
)
def test_bad_configuration(changes: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ExplanationConfig(**changes)
    with pytest.raises(InputError, match="smooth_frac to be less than or equal to 0.5"):
        ExplanationConfig(smooth_frac=0.51)
    with pytest.raises(InputError, match="Expected preset partlens or paper, got mine"):
        ExplanationConfig.preset("mine")


def test_weights_of_another_index(tiny: Performer, index: FeatureIndex, batch: Tensor) -> None:
    with pytest.raises(InputError, match=f"Expected weights of {index.size} features, got 7"):
        explain_batch(tiny, batch, torch.zeros(7, 2), index, torch.zeros(5, 1, dtype=torch.long))
