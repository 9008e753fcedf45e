from __future__ import annotations

import copy
import csv
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchvision.models import ResNet18_Weights

from partlens.errors import InputError, InputTypeError, LayerError, WeightsError
from partlens.network.performer import Performer, weights_sha256
from partlens.network.preprocessing import Preprocessing
from partlens.network.weights import with_outputs
from partlens.network.zoo import load_performer
from partlens.records import write_tensors


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(300, 260), (231, 400), (256, 256)])
def test_crop_gives_the_values_of_torchvisions_preset(size: tuple[int, int]) -> None:
    image = picture(*size)
    ours = load_performer("torchvision:resnet18@random:0").preprocessing([image])[0]
    assert torch.allclose(ours, ResNet18_Weights.DEFAULT.transforms()(image), atol=1e-5)


def test_random_weights_follow_the_seed_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = load_performer("torchvision:squeezenet1_1@random:3")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert load_performer("torchvision:squeezenet1_1@random:3").weights_sha256 == first.weights_sha256
    assert load_performer("torchvision:squeezenet1_1@random:4").weights_sha256 != first.weights_sha256
    assert first.notes == ("random weights, seed 3",)
    assert not first.module.training


def test_hash_sees_one_changed_bit_and_not_the_wrapper() -> None:
    module = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2))
    before = weights_sha256(module)
    assert weights_sha256(nn.DataParallel(module)) == before
    module[1].running_mean[0] = 1e-30
    assert weights_sha256(module) != before


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_weights_from_a_file(tmp_path, network, suffix: str) -> None:
    module = network("squeezenet1_1")
    half = {n: v.half() for n, v in module.state_dict().items()}
    path = tmp_path / f"w.{suffix}"
    if suffix == "safetensors":
        save_file(half, path)
    else:
        torch.save({"state_dict": {f"module.{n}": v for n, v in half.items()}}, path)
    performer = load_performer(f"torchvision:squeezenet1_1@{path}")
    assert performer.name == f"torchvision:squeezenet1_1@w.{suffix}"
    assert {p.dtype for p in performer.module.parameters()} == {torch.float32}
    assert performer.module.classifier[1].out_channels == 7  # the file's number of classes
    assert performer.class_names is None
    for name, value in performer.module.state_dict().items():
        assert torch.equal(value, half[name].float()), name


def test_weights_that_do_not_fit_are_named(tmp_path, network) -> None:
    weights = dict(network("squeezenet1_1").state_dict())
    weights["stranger"] = weights.pop("features.0.bias")
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"missing features\.0\.bias; unexpected stranger"):
        load_performer(f"torchvision:squeezenet1_1@{tmp_path}/w.safetensors")


def test_weights_that_are_not_numbers_are_named(tmp_path, network) -> None:
    weights = dict(network("squeezenet1_1").state_dict())
    weights["features.3.squeeze.bias"][2] = float("nan")
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"1 NaN or infinite values in features\.3\.squeeze\.bias"):
        load_performer(f"torchvision:squeezenet1_1@{tmp_path}/w.safetensors")


class Planted:
    ran = False

    def __reduce__(self):
        return (setattr, (Planted, "ran", True))


def test_pickles_with_code_are_refused(tmp_path) -> None:
    torch.save({"a": Planted()}, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=r"safetensors\.torch\.save_file"):
        load_performer(f"torchvision:squeezenet1_1@{tmp_path}/w.pt")
    assert not Planted.ran


def test_no_network_is_a_weights_error_with_the_remedy(monkeypatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no route")

    monkeypatch.setattr("torchvision.models._api.WeightsEnum.get_state_dict", fail)
    with pytest.raises(WeightsError, match=r"no route.*torchvision:squeezenet1_1@weights\.safetensors"):
        load_performer("torchvision:squeezenet1_1")


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("torchvision:resnet19", "resnet18"),
        ("torchvision:resnet18@IMAGENET1K_V9", "IMAGENET1K_V1"),
        ("torchvision:resnet18@random:x", "random:0"),
        ("timm:resnet19_nonsense", "Nearest"),
        ("partlens:flower-x@random:0", "partlens:flower-demo"),
        ("resnet18", "torchvision:resnet18"),
        ("no.such.package:thing", "PYTHONPATH"),
    ],
)
def test_unknown_names_say_what_exists(spec: str, text: str) -> None:
    with pytest.raises(InputError, match=text):
        load_performer(spec)


def test_own_networks_need_weights() -> None:
    with pytest.raises(WeightsError, match="@random:0 for random weights"):
        load_performer("partlens:flower-demo")


def test_timm_preprocessing_comes_from_its_configuration() -> None:
    performer = load_performer("timm:resnet50@random:0")
    assert performer.preprocessing.size_px == (224, 224)
    assert performer.preprocessing.resize_px == 235  # 224 / 0.95
    assert performer.preprocessing.interpolation == "bicubic"


def test_timm_absent_names_the_remedy(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match=r"partlens\[zoo\]"):
        load_performer("timm:resnet18")


def test_factories(monkeypatch) -> None:
    package = types.ModuleType("somewhere")
    package.make = lambda: nn.Conv2d(3, 2, 3)
    package.ready = lambda: Performer(nn.Conv2d(3, 2, 3), "mine", Preprocessing(), "0" * 64)
    package.wrong = lambda: 3
    monkeypatch.setitem(sys.modules, "somewhere", package)
    assert load_performer("somewhere:make").name == "somewhere:make"
    assert load_performer("somewhere:ready", Preprocessing(size_px=(9, 9))).preprocessing.size_px == (9, 9)
    with pytest.raises(InputTypeError, match="int"):
        load_performer("somewhere:wrong")


def test_modules_are_taken_as_they_are_and_wrappers_are_opened() -> None:
    module = nn.Sequential(nn.Conv2d(3, 2, 3)).train()
    performer = load_performer(nn.DataParallel(module))
    assert performer.module is module
    assert module.training


def test_weights_for_a_module_go_into_a_copy(tmp_path) -> None:
    module = nn.Sequential(nn.Conv2d(3, 2, 3))
    other = copy.deepcopy(module)
    nn.init.ones_(other[0].bias)
    save_file(other.state_dict(), tmp_path / "w.safetensors")
    performer = load_performer(module, weights=tmp_path / "w.safetensors")
    assert performer.weights_sha256 == weights_sha256(other) != weights_sha256(module)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_compiled_networks_are_refused_with_the_remedy() -> None:
    module = nn.Sequential(nn.Conv2d(3, 2, 3))
    with pytest.raises(InputTypeError, match="TorchScript"):
        load_performer(torch.jit.script(module))
    with pytest.raises(InputTypeError, match="_orig_mod"):
        load_performer(torch.compile(module))
    with pytest.raises(InputTypeError, match=r"torch\.nn\.Module"):
        load_performer(7)


def test_a_new_last_layer_keeps_type_and_shape() -> None:
    module = torchvision.models.squeezenet1_1(weights=None, num_classes=4).double()
    with_outputs(module, "classifier.1", 3)
    assert module.classifier[1].weight.shape == (3, 512, 1, 1)
    assert module.classifier[1].weight.dtype == torch.float64
    for layer, got in (("classifier.2", "ReLU"), ("classifier.9", "none of that name")):
        with pytest.raises(LayerError, match=got):
            with_outputs(module, layer, 3)


@pytest.mark.data
@pytest.mark.parametrize(("name", "least"), [("resnet18", 0.6), ("squeezenet1_1", 0.35)])
def test_real_weights_recognise_photos(shared, name: str, least: float) -> None:
    performer = load_performer(f"torchvision:{name}@{shared}/weights/{name}.safetensors")
    root = shared / "data" / "imagenet-compatible"
    with (root / "images.csv").open() as handle:
        rows = list(csv.DictReader(handle))[::25]
    with torch.inference_mode():
        scores = performer.module(performer.preprocessing([Image.open(root / r["image"]) for r in rows]))
    hits = (scores.argmax(1) == torch.tensor([int(r["class_index"]) for r in rows])).float().mean()
    assert float(hits) > least


def test_a_network_of_ones_own_is_not_drawn_from_a_seed() -> None:
    """Its factory may load trained weights, which would then be taken for random ones."""
    with pytest.raises(WeightsError, match=r"got random:0\. Leave it out"):
        load_performer("torch.nn:Identity@random:0")


def test_weights_go_into_the_performer_that_a_factory_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They were ignored once: what was explained was the network as the factory drew it."""
    (tmp_path / "given_network.py").write_text(
        """
import torch
from torch import nn

from partlens.network.preprocessing import Preprocessing
from partlens.network.performer import Performer, weights_sha256


def made():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
    prepare = Preprocessing(size_px=(24, 24), resize="squash", mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    return Performer(module, "given", prepare, weights_sha256(module), "1", class_names=("a", "b"))
"""
    )
    monkeypatch.syspath_prepend(tmp_path)
    plain = load_performer("given_network:made")
    other = {name: value + 1 for name, value in plain.module.state_dict().items()}
    write_tensors(tmp_path / "w.safetensors", other)
    filled = load_performer(f"given_network:made@{tmp_path / 'w.safetensors'}")
    for name, value in filled.module.state_dict().items():
        assert torch.equal(value, other[name])
    assert filled.weights_sha256 != plain.weights_sha256
    assert filled.name == "given_network:made@w.safetensors"
    assert (filled.default_tap, filled.class_names) == ("1", ("a", "b"))
    assert filled.preprocessing == plain.preprocessing
    assert not filled.module.training
    # What stands in the header of a trained file comes first.
    header = {"class_names": '["x", "y"]', **plain.preprocessing.changed({"size_px": (32, 32)}).to_metadata()}
    write_tensors(tmp_path / "t.safetensors", other, header)
    trained = load_performer(f"given_network:made@{tmp_path / 't.safetensors'}")
    assert trained.class_names == ("x", "y")
    assert trained.preprocessing.size_px == (32, 32)
    with pytest.raises(WeightsError):
        load_performer("given_network:made@nowhere.safetensors")


def test_the_header_must_name_as_many_classes_as_the_network_has(tmp_path: Path) -> None:
    weights = load_performer("partlens:flower-demo@random:0").module.state_dict()  # six outputs, the usual number
    write_tensors(tmp_path / "w.safetensors", weights, {"class_names": '["a", "b"]'})
    with pytest.raises(WeightsError, match="6 class names as a JSON list in the header of w.safetensors"):
        load_performer(f"partlens:flower-demo@{tmp_path}/w.safetensors")


def test_a_replaced_last_layer_of_the_same_size_is_filled(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    for outputs in (2, 5):
        weights = {name: value.clone() for name, value in module.state_dict().items()}
        weights |= {"3.weight": torch.ones(outputs, 4), "3.bias": torch.zeros(outputs)}
        write_tensors(tmp_path / "w.safetensors", weights, {"output_layer": "3"})
        performer = load_performer(module, weights=tmp_path / "w.safetensors")
        assert performer.module[3].weight.tolist() == [[1.0] * 4] * outputs
    assert module[3].weight.shape == (2, 4)


# Files as people have them


def resnet_state() -> dict[str, torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        return torchvision.models.resnet18(weights=None, num_classes=3).state_dict()


def prefixed(prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in resnet_state().items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda: prefixed("_orig_mod."),
        lambda: prefixed("module._orig_mod."),
        lambda: {"state_dict": prefixed("model."), "epoch": 3, "lr": 0.1},
        lambda: {"state_dict": prefixed("net.backbone."), "optimizer": {"state": {}, "param_groups": []}},
        lambda: {"net": resnet_state(), "optimizer": {"state": {}}, "best": torch.tensor(1.0)},
        lambda: {"model_state": prefixed("module.")},
        lambda: {"weights": resnet_state()},
        lambda: {"n_averaged": torch.tensor(5), **prefixed("module.")},
        lambda: {"model": {"state_dict": resnet_state()}, "loss": {"weight": torch.ones(3)}},
    ],
)
def test_wrappers_and_prefixes_of_trainings_are_opened(tmp_path, wrap) -> None:
    torch.save(wrap(), tmp_path / "w.ckpt")
    assert load_performer(f"torchvision:resnet18@{tmp_path}/w.ckpt").module.fc.out_features == 3


def test_prefixes_are_opened_in_a_copy_of_ones_own_network_too(tmp_path) -> None:
    module = nn.Sequential(nn.Conv2d(3, 2, 3))
    save_file({f"model.{name}": value for name, value in module.state_dict().items()}, tmp_path / "w.safetensors")
    assert load_performer(module, weights=tmp_path / "w.safetensors").weights_sha256 == weights_sha256(module)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (lambda: {"net": resnet_state(), "ema": resnet_state()}, r"got several: net, ema\. Save the one that is meant"),
        (
            lambda: {"state_dict": resnet_state(), "state_dict_ema": resnet_state()},
            "several: state_dict, state_dict_ema",
        ),
        (lambda: {"model": {"state_dict": resnet_state()}, "model_ema": resnet_state()}, "several: model, model_ema"),
        (lambda: {"epoch": 3}, r"got the entries epoch"),
        (lambda: {**prefixed("model."), "loss.weight": torch.ones(2)}, r"Take 'model\.' from the front of the names"),
        (lambda: [1, 2], "got list"),
    ],
)
def test_files_that_leave_a_doubt_are_refused_by_name(tmp_path, content, text: str) -> None:
    torch.save(content(), tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=text):
        load_performer(f"torchvision:resnet18@{tmp_path}/w.pt")


def test_a_file_that_was_saved_in_pieces_is_read_by_its_index(tmp_path) -> None:
    state, index = resnet_state(), tmp_path / "model.safetensors.index.json"
    halves = [dict(list(state.items())[part::2]) for part in range(2)]
    for part, half in enumerate(halves):
        save_file(half, tmp_path / f"model-{part}.safetensors")
    places = {name: f"model-{part}.safetensors" for part, half in enumerate(halves) for name in half}
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    module = load_performer(f"torchvision:resnet18@{index}").module
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in state.items())


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{", "a weight_map .* in m.safetensors.index.json, got Expecting"),
        ("[]", "a weight_map"),
        ('{"weight_map": {}}', "the .* tensors of ResNet in m.safetensors.index.json, got missing"),
        ('{"weight_map": {"fc.bias": 3}}', "a weight_map"),
        ('{"weight_map": {"fc.bias": "x.safetensors"}}', "a weights file .*x.safetensors, got nothing there"),
    ],
)
def test_an_index_that_is_wrong_is_named(tmp_path, content: str, text: str) -> None:
    (tmp_path / "m.safetensors.index.json").write_text(content)
    with pytest.raises(WeightsError, match=text):
        load_performer(f"torchvision:resnet18@{tmp_path}/m.safetensors.index.json")


@pytest.mark.parametrize("name", ["model_best.pth.tar", "checkpoint", "weights.pkl", "model.v2"])
def test_any_name_of_a_file_in_the_current_folder_is_a_file(tmp_path, monkeypatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(resnet_state(), name)
    performer = load_performer(f"torchvision:resnet18@{name}")
    assert performer.name == f"torchvision:resnet18@{name}"
    assert performer.spec == f"torchvision:resnet18@{tmp_path / name}"


def test_what_is_in_a_file_counts_and_not_its_ending(tmp_path) -> None:
    save_file(resnet_state(), tmp_path / "w.pt")
    torch.save(resnet_state(), tmp_path / "w.safetensors")
    first, second = (load_performer(f"torchvision:resnet18@{tmp_path}/w.{end}") for end in ("pt", "safetensors"))
    assert first.module.fc.out_features == second.module.fc.out_features == 3


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            "pointer of git-lfs to it. Run git lfs",
        ),
        (b"\n<!DOCTYPE html><html>", "a web page"),
        (b"Entry not found", "a text"),
        (b"", "an empty file"),
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
    ],
)
@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_wrong_files_are_called_by_their_names(tmp_path, content: bytes, text: str, ending: str) -> None:
    (tmp_path / f"w.{ending}").write_bytes(content)
    with pytest.raises(WeightsError, match=text):
        load_performer(f"torchvision:resnet18@{tmp_path}/w.{ending}")


@pytest.mark.parametrize(("outputs", "aux"), [(1000, True), (5, True), (5, False)])
def test_googlenet_from_a_file_is_the_published_network(tmp_path, outputs: int, aux: bool) -> None:
    options = {"init_weights": False, "num_classes": outputs, "aux_logits": aux, "transform_input": True}
    state = torchvision.models.googlenet(weights=None, **options).state_dict()
    torch.save(state, tmp_path / "g.pt")
    performer = load_performer(f"torchvision:googlenet@{tmp_path}/g.pt")
    assert performer.module.transform_input
    assert performer.module.fc.out_features == outputs
    assert any("transform_input is on" in note for note in performer.notes)
    save_file(state, tmp_path / "g.safetensors", metadata=Preprocessing().to_metadata())
    own = load_performer(f"torchvision:googlenet@{tmp_path}/g.safetensors")
    assert not own.module.transform_input  # the header says what the input is
    assert not any("transform_input" in note for note in own.notes)


@pytest.mark.parametrize("given", [lambda image: image, "imagenet", 224, [0.5]])
def test_a_preprocessing_of_another_kind_is_refused_when_it_is_given(given: object) -> None:
    for model in (nn.Conv2d(3, 2, 3), "partlens:flower-demo@random:0"):
        with pytest.raises(InputTypeError, match=r"preprocessing as a partlens.Preprocessing"):
            load_performer(model, preprocessing=given)
    with pytest.raises(InputTypeError, match=r"preprocessing as a partlens.Preprocessing"):
        Performer(nn.Conv2d(3, 2, 3), "mine", given, "")


def test_a_preprocessing_may_be_a_dictionary() -> None:
    performer = load_performer(nn.Conv2d(3, 2, 3), preprocessing={"size_px": [9, 8], "resize": "squash"})
    assert performer.preprocessing == Preprocessing(size_px=(9, 8), resize="squash")


@pytest.mark.parametrize(("name", "shorter", "noted"), [("resnet50-0676ba61.pth", 256, 0), ("mine.pth", 232, 1)])
def test_a_published_file_has_the_preprocessing_that_it_was_published_with(
    tmp_path, name: str, shorter: int, noted: int
) -> None:
    torch.save(torchvision.models.resnet50(weights=None).state_dict(), tmp_path / name)
    performer = load_performer(f"torchvision:resnet50@{tmp_path / name}")
    assert performer.preprocessing.resize_px == shorter
    assert sum("preprocessing assumed to be that of IMAGENET1K_V2" in note for note in performer.notes) == noted
