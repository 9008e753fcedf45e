"""A performer knows itself: watched once, loaded again by its name, its outputs by theirs."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from torch import nn

import partlens.network
from partlens.attribution.average_pictures import _crop_of
from partlens.errors import InputError
from partlens.explainer.config import ExplainerConfig
from partlens.explainer.network import build_explainer, explainer_structure, performer_head
from partlens.network.fitting import flower_network, flower_preprocessing, save_classifier
from partlens.network.performer import Performer, device_of, weights_sha256
from partlens.network.preprocessing import Preprocessing
from partlens.network.zoo import load_performer
from partlens.selection.measured_layers import feature_index


def test_the_network_is_watched_once(tiny: Performer, monkeypatch: pytest.MonkeyPatch) -> None:
    watched: list[nn.Module] = []
    watch = partlens.network.layers.watch
    monkeypatch.setattr("partlens.network.layers.watch", lambda module, _: watched.append(module) or watch(module, _))
    performer = Performer(tiny.module, "x", tiny.preprocessing, tiny.weights_sha256)
    assert not watched  # nothing is computed before it is asked for
    tap = performer.tap
    assert performer.layer(tap).is_default
    assert performer.field(tap).stride_px == performer.layer(tap).stride_px
    structure = explainer_structure(performer, torch.rand(2, 3, *tiny.preprocessing.size_px), tap)
    assert structure.targets == performer.targets(tap)
    build_explainer(performer, structure, ExplainerConfig())
    performer_head(performer, structure)
    feature_index(performer)
    _crop_of(performer, [tap])
    assert performer.on(torch.device("cpu")) is performer
    assert watched == [tiny.module]


def test_it_is_loaded_again_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_classifier(tmp_path / "w.safetensors", flower_network(3), flower_preprocessing(), ("a", "b", "c"))
    monkeypatch.chdir(tmp_path)
    performer = load_performer("partlens:flower-demo@w.safetensors")
    assert performer.spec == f"partlens:flower-demo@{tmp_path.resolve()}/w.safetensors"
    given = load_performer("partlens:flower-demo", weights=Path("w.safetensors"))
    assert given.spec == performer.spec
    assert load_performer(performer.spec).weights_sha256 == performer.weights_sha256
    assert load_performer("partlens:flower-demo@random:2").spec == "partlens:flower-demo@random:2"
    # A name that would give another input, or another network, is none.
    assert load_performer("partlens:flower-demo@w.safetensors", Preprocessing()).spec is None
    assert load_performer(performer.module).spec is None
    assert load_performer(performer) is performer
    assert load_performer(performer, flower_preprocessing()).preprocessing == flower_preprocessing()


def test_outputs_by_name() -> None:
    module = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    named = Performer(module, "net", Preprocessing(), "", class_names=("fox", "cat"))
    assert [named.output(name) for name in ("fox", "cat", "1")] == [0, 1, 1]
    plain = Performer(module, "net", Preprocessing(), "")
    assert plain.output("1") == 1
    for performer, name in ((named, "dog"), (named, "2"), (plain, "2"), (plain, "-1")):
        with pytest.raises(InputError, match=f"a class of net, got {name}. Nearest"):
            performer.output(name)
    for names in (("fox",), ("fox", "cat", "dog")):
        with pytest.raises(InputError, match=f"2 class names, one for each output of net, got {len(names)}"):
            _ = Performer(module, "net", Preprocessing(), "", class_names=names).outputs


def test_a_copy_goes_to_another_device() -> None:
    performer = Performer(nn.Linear(2, 2), "net", Preprocessing(), "")
    assert performer.device == torch.device("cpu")
    there = performer.on(torch.device("meta"))
    assert there.device == torch.device("meta")
    assert performer.device == torch.device("cpu")
    assert there.name == "net"
    assert Performer(nn.ReLU(), "net", Preprocessing(), "").device == torch.device("cpu")


def test_names_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU, and as if there were two: workers take them in turn, a named one is meant."""
    here = torch.device("meta")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert [str(device_of(name, here)) for name in (None, "auto", "cpu")] == ["meta", "cpu", "cpu"]
    for wrong in ("cuda", "cuda:1", "meta", "gpu"):
        with pytest.raises(InputError, match=f"got {wrong}. Choose auto"):
            device_of(wrong)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [str(device_of("auto", here, worker)) for worker in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert [str(device_of("cuda:1", here, worker)) for worker in range(2)] == ["cuda:1", "cuda:1"]
    with pytest.raises(InputError, match="a device that this machine has, got cuda:2"):
        device_of("cuda:2")


def test_hash_depends_on_names_types_shapes_and_bytes() -> None:
    layer = nn.Linear(2, 3)
    seen = {weights_sha256(layer), weights_sha256(nn.Sequential(layer))}
    layer.weight.data = layer.weight.data.reshape(2, 3)
    seen.add(weights_sha256(layer))
    seen.add(weights_sha256(layer.double()))
    layer.bias.data[0] += 1
    seen.add(weights_sha256(layer))
    assert len(seen) == 5
    empty = nn.Module()
    empty.register_buffer("nothing", torch.zeros(0))
    assert weights_sha256(empty) != weights_sha256(nn.Module())


def test_torchvision_and_timm_are_imported_only_for_their_networks() -> None:
    """They cost two seconds of CPU; a network of the user's own needs neither."""
    for path in Path(partlens.network.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [n for n in names if n.partition(".")[0] in {"torchvision", "timm", "sklearn", "scipy"}], path
