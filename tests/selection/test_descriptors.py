"""Descriptors: the formula, its invariances, the configuration and the index of features."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from partlens.errors import InputError, LayerError
from partlens.network.taps import forward_taps
from partlens.selection.descriptors import energy, normalised
from partlens.selection.measured_layers import feature_index
from partlens.selection.record import DescriptorConfig, FeatureIndex
from partlens.selection.responses import image_descriptors

MADE = runpy.run_path(str(Path(__file__).with_name("made_networks.py")))
as_performer, matconvnet_lenet = MADE["as_performer"], MADE["matconvnet_lenet"]


def by_hand(values: dict[str, np.ndarray]) -> np.ndarray:
    """The paper's descriptor of one image, in float64 loops."""
    blocks = []
    for maps in values.values():
        energies = []
        for channel in np.atleast_2d(maps):
            total = 0.0
            for value in np.asarray(channel, dtype=np.float64).ravel():
                total += value * value
            energies.append(total)
        whole = sum(energies)
        blocks += [e / whole if whole > 0 else 0.0 for e in energies]
    length = sum(b * b for b in blocks) ** 0.5
    return np.array([b / length if length > 0 else 0.0 for b in blocks])


def test_T1_layers_sum_to_one_and_the_whole_has_length_one() -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3, bias=False), nn.Flatten(), nn.LazyLinear(2))
    net(torch.zeros(1, 3, 16, 16))
    performer, batch = as_performer(net.eval()), torch.randn(5, 3, 16, 16)
    index = feature_index(performer)
    x, _ = image_descriptors(performer, batch, index)
    sums = torch.stack([x[:, index.rows(layer)].sum(1) for layer in index.layers])
    assert torch.allclose(sums, sums[:1].expand_as(sums), atol=1e-6)  # each layer has the same sum
    assert torch.allclose(x.norm(dim=1), torch.ones(5), atol=1e-6)
    with torch.no_grad():  # every output from here on doubles; nothing relative changes
        net[0].weight.mul_(2)
        net[0].bias.mul_(2)
    assert torch.allclose(image_descriptors(performer, batch, index)[0], x, atol=1e-6)


def test_T2_numbers_worked_by_hand() -> None:
    """Energies 25, 1 and 4, 0: layers 25/26, 1/26 and 1, 0; divided by the length of all four."""
    index = FeatureIndex(("a", "b"), (2, 2))
    maps = {"a": torch.tensor([[[[3.0, -4.0]], [[1.0, 0.0]]]]), "b": torch.tensor([[[[0.0], [2.0]], [[0.0], [0.0]]]])}
    energies = torch.cat([energy(maps["a"]), energy(maps["b"])], 1)
    assert energies.tolist() == [[25.0, 1.0, 4.0, 0.0]]
    found = normalised(energies, index)[0][0]
    length = ((25 / 26) ** 2 + (1 / 26) ** 2 + 1) ** 0.5
    assert found.tolist() == pytest.approx([25 / 26 / length, 1 / 26 / length, 1 / length, 0.0], rel=1e-6)


def test_T4_each_layer_but_one_costs_a_rank() -> None:
    index = feature_index(as_performer(matconvnet_lenet(), 28, channels=1))
    rng = np.random.default_rng(0)
    energies = {
        layer: torch.from_numpy(rng.gamma(0.5, 1.0, (1200, channels)))
        for layer, channels in zip(index.layers, index.channels, strict=True)
    }
    x = normalised(torch.cat(list(energies.values()), 1), index)[0].double().numpy()
    squares = np.linalg.eigvalsh(x.T @ x)  # of the singular values
    # float32 rounding leaves the five null directions at 1e-7 of the rest
    assert int((squares > 1e-10 * squares.max()).sum()) == 1135


def test_descriptors_equal_the_slow_formula_and_in_place_rectifiers_do_not_disturb_them() -> None:
    torch.manual_seed(2)
    layers = [nn.Conv2d(3, 5, 3), nn.ReLU(inplace=True), nn.Conv2d(5, 4, 3), nn.ReLU(inplace=True), nn.Flatten()]
    inplace = nn.Sequential(*layers, nn.Linear(576, 3)).eval()
    plain = nn.Sequential(*[nn.ReLU() if isinstance(layer, nn.ReLU) else layer for layer in inplace]).eval()
    batch = torch.randn(4, 3, 16, 16)
    _, taps = forward_taps(plain, batch, ["0", "1", "2", "3"])
    wanted = np.stack([by_hand({name: taps[name][i].numpy() for name in taps}) for i in range(4)])
    performer = as_performer(inplace)
    index = feature_index(performer)
    assert index.layers == ("0", "1", "2", "3")
    x, logits = image_descriptors(performer, batch, index)
    assert np.allclose(x, wanted, atol=1e-6)
    assert torch.allclose(logits, plain(batch), atol=1e-5)
    assert not np.allclose(x[:, index.rows("0")], x[:, index.rows("1")])


def test_configurations_are_checked_and_survive_json() -> None:
    for config in (DescriptorConfig(), DescriptorConfig(layers=("a", "b")), DescriptorConfig(layers="activations")):
        assert DescriptorConfig.model_validate_json(config.model_dump_json()) == config
    assert DescriptorConfig(layers=["a", "b"]).layers == ("a", "b")
    for changes, message in (
        ({"layer": "outputs"}, "Expected a field of DescriptorConfig, got layer. Did you mean"),
        ({"layers": ()}, "a list of at least one layer name"),
        ({"layers": "fc"}, "Expected layers to be one of outputs, activations, convolutions"),
        ({"precision": "half"}, "Expected precision to be"),
    ):
        with pytest.raises(InputError, match=message):
            DescriptorConfig(**changes)
    for make in (
        lambda: FeatureIndex(("a",), (1, 2)),
        lambda: FeatureIndex((), ()),
        lambda: FeatureIndex(("a", "a"), (1, 2)),
        lambda: FeatureIndex(("a",), (0,)),
        lambda: FeatureIndex(("a",), (2,)).feature("a", 2),
        lambda: FeatureIndex(("a",), (2,)).place(-1),
    ):
        with pytest.raises(InputError):
            make()
    with pytest.raises(LayerError, match="Nearest: conv1"):
        FeatureIndex(("conv1",), (2,)).rows("conv")
