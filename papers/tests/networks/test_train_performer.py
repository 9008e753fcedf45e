"""The verb train-performer from photos to a file that loads as a performer, and every error a user can meet."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn

from partlens.cli import main as product
from partlens.data.images import ImageSet
from partlens.errors import ImageError, InputError, LayerError, PartlensError, RunError, WeightsError
from partlens.evaluation.places import photo_numbers
from partlens.network.performer import Performer, weights_sha256
from partlens.network.preprocessing import Preprocessing
from partlens.network.zoo import load_performer
from partlens.verbs.runs import chosen_categories
from partlens_papers.cli import main
from partlens_papers.networks.paper_networks import PaperNet
from partlens_papers.networks.settings import paper_setting
from partlens_papers.networks.train_performer import held_out_scores, read_training, summary, train_performer

SIDE = 67
QUICK: dict[str, Any] = {"epochs": 2, "batch_size": 8, "learning_rate": 0.004}
CAFFE = Preprocessing(
    size_px=(SIDE, SIDE),
    resize="squash",
    channel_order="BGR",
    scale=1.0,
    mean=(104.0, 117.0, 123.0),
    std=(1.0, 1.0, 1.0),
)


def colours(kinds: tuple[str, ...] = ("red", "green", "blue"), count: int = 60) -> ImageSet:
    """Noise that is redder, greener or bluer."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 120, (count, 12, 10, 3), dtype=np.uint8)
    for channel in range(3):
        pixels[channel::3, ..., channel] += 100
    splits = ["test" if i % 4 > 1 else "train" for i in range(count)]
    return ImageSet.from_arrays(pixels, categories=[kinds[i % 3] for i in range(count)], splits=splits)


@pytest.fixture
def small() -> Performer:
    """A network whose features are colours, with a last layer for five other classes."""
    torch.manual_seed(1)
    module = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(192, 12), nn.ReLU(), nn.Linear(12, 5)).eval()
    preprocessing = Preprocessing(size_px=(32, 32), resize="squash", mean=(0.3, 0.3, 0.3), std=(0.2, 0.2, 0.2))
    return Performer(module, "own", preprocessing, weights_sha256(module))


def test_one_category_from_the_convolutions_alone(tmp_path: Path) -> None:
    """The papers' way: a file with conv1 to conv5 becomes a network with one output that any verb can load."""
    torch.manual_seed(3)
    module = PaperNet("alexnet-caffe", input_px=SIDE, hidden=4)
    convs = {n: v for n, v in module.state_dict().items() if n.startswith("conv")}
    save_file(convs, tmp_path / "convs.safetensors", metadata=CAFFE.to_metadata())
    spec = f"partlens_papers.performers:alexnet_caffe@{tmp_path / 'convs.safetensors'}"
    performer = load_performer(spec)
    assert performer.untrained_layers == ("fc6", "fc7", "fc8")
    out = tmp_path / "red.safetensors"
    before = (tmp_path / "convs.safetensors").read_bytes()
    config = {**QUICK, "train_from": "fc6", "epochs": 1, "batch_size": 32}
    assert train_performer(spec, colours(), out=out, category="red", config=config) == out
    assert (tmp_path / "convs.safetensors").read_bytes() == before
    assert not (tmp_path / "red.work").exists()
    made = load_performer(f"partlens_papers.performers:alexnet_caffe@{out}")
    assert made.class_names == ("red",)
    assert made.preprocessing == CAFFE
    assert made.untrained_layers == ()
    assert made.notes == ()
    with torch.no_grad():
        assert made.module(torch.zeros(2, 3, SIDE, SIDE)).shape == (2, 1)
    for name, value in convs.items():
        assert torch.equal(made.module.state_dict()[name], value)
    found = read_training(out)
    assert found["new_layers"] == ["fc6", "fc7", "fc8"]
    assert found["base"]["weights_sha256"] == performer.weights_sha256
    assert found["weights_sha256"] == made.weights_sha256
    assert found["data"]["train_photos"] == {"red": 10, "": 20}
    assert found["data"]["fingerprint"] == colours().fingerprint()
    assert paper_setting(made) == paper_setting("alexnet-caffe")


def test_it_beats_the_baseline_on_photos_it_has_not_seen(small: Performer, tmp_path: Path) -> None:
    before = {n: v.clone() for n, v in small.module.state_dict().items()}
    settings = {"epochs": 12, "batch_size": 8, "learning_rate": 0.05, "rate_kept": 1.0}
    out = train_performer(small, colours(), out=tmp_path / "red.safetensors", category="red", config=settings)
    held = read_training(out)["held_out"]
    assert held["error"]["n"] == 30
    assert held["baseline_error"]["value"] == pytest.approx(1 / 3)
    assert held["error"]["interval"][1] < held["baseline_error"]["value"]
    assert held["balanced_error"]["value"] < 0.25
    assert {"missed", "false_alarms"} <= held.keys()
    assert all(torch.equal(v, before[n]) for n, v in small.module.state_dict().items())


def test_loading_gives_the_same_outputs(small: Performer, tmp_path: Path) -> None:
    images = colours()
    out = train_performer(small, images, out=tmp_path / "all.safetensors", categories="all", config=QUICK)
    found = read_training(out)
    made = load_performer(small.module, weights=out)
    assert made.class_names == ("blue", "green", "red")
    assert made.preprocessing == small.preprocessing
    assert made.weights_sha256 == found["weights_sha256"]
    assert small.module[4].out_features == 5
    held = images.select(split="test")
    with torch.no_grad():
        scores = made.module(made.preprocessing([held.read(i) for i in range(len(held))]))
    labels = torch.tensor([made.class_names.index(c) for c in held.categories])
    again = held_out_scores(scores, labels, made.class_names, "logistic", 0, photo_numbers(held, range(len(held))))
    assert again == found["held_out"]
    assert found["held_out"]["baseline_decision_error"] == pytest.approx(1 / 3)
    assert "single decisions" in summary(found)


def test_names_with_commas_stay_whole(small: Performer, tmp_path: Path) -> None:
    images = colours(("red", "tench, Tinca tinca", "blue"))
    given = "tench, Tinca tinca, red"
    out = train_performer(small, images, out=tmp_path / "two.safetensors", categories=given, config=QUICK)
    assert load_performer(small.module, weights=out).class_names == ("tench, Tinca tinca", "red")
    out = train_performer(
        small, images, out=tmp_path / "one.safetensors", category="red", against="tench, Tinca tinca", config=QUICK
    )
    assert read_training(out)["data"]["train_photos"] == {"red": 10, "": 10}
    known = images.category_counts()
    assert chosen_categories("tench, Tinca tinca", known) == ("tench, Tinca tinca",)
    assert chosen_categories("tench, Tinca tinca,blue", known) == ("blue", "tench, Tinca tinca")


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1"])
def test_torchvisions_networks_load_with_their_number_of_outputs(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = torchvision.models.get_model(name, weights=None)
    start = tmp_path / "w.safetensors"
    save_file(module.state_dict(), start, metadata=Preprocessing(size_px=(40, 40), resize="squash").to_metadata())
    last = "layer4" if name == "resnet18" else "classifier"
    config = {"epochs": 1, "batch_size": 16, "train_from": last, "loss": "softmax"}
    spec = f"torchvision:{name}@{start}"
    out = train_performer(spec, colours(), out=tmp_path / "m.safetensors", categories=["blue", "red"], config=config)
    made = load_performer(f"torchvision:{name}@{out}")
    assert made.class_names == ("blue", "red")
    assert made.preprocessing.size_px == (40, 40)
    with torch.no_grad():
        assert made.module(torch.zeros(2, 3, 40, 40)).shape == (2, 2)
    early = "layer1.0.conv1.weight" if name == "resnet18" else "features.0.weight"
    assert torch.equal(made.module.state_dict()[early], module.state_dict()[early])
    assert read_training(out)["new_layers"] == ["fc" if name == "resnet18" else "classifier.1"]


def test_timms_networks_load_too(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    module = timm.create_model("mobilenetv3_small_050", pretrained=False)
    start = tmp_path / "w.safetensors"
    header = Preprocessing(size_px=(32, 32), resize="squash", interpolation="bicubic")
    save_file(module.state_dict(), start, metadata=header.to_metadata())
    spec = f"timm:mobilenetv3_small_050@{start}"
    config = {"epochs": 1, "batch_size": 32, "train_from": "classifier"}
    out = train_performer(spec, colours(), out=tmp_path / "m.safetensors", category="red", config=config)
    made = load_performer(f"timm:mobilenetv3_small_050@{out}")
    assert made.class_names == ("red",)
    assert made.preprocessing == header


def test_a_stopped_run_goes_on_and_ends_with_the_same_bits(
    small: Performer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = colours()
    settings = {**QUICK, "epochs": 3, "epochs_all": 1, "train_from": "4"}
    whole = train_performer(small, images, out=tmp_path / "a.safetensors", category="red", config=settings)
    from partlens_papers.networks import finetune

    real, calls = finetune.category_loss, []

    def stopping(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 12:  # in the middle of the second epoch
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(finetune, "category_loss", stopping)
    out = tmp_path / "b.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train_performer(small, images, out=out, category="red", config=settings)
    monkeypatch.undo()
    assert not out.exists()
    assert json.loads((tmp_path / "b.work" / "checkpoint.json").read_text())["values"]["history"]
    with pytest.raises(RunError, match="another configuration"):
        train_performer(small, images, out=out, category="blue", config=settings)
    train_performer(small, images, out=out, category="red", config=settings)
    assert not (tmp_path / "b.work").exists()
    first, second = load_file(whole), load_file(out)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert read_training(whole)["held_out"] == read_training(out)["held_out"]


def test_a_finished_file_is_left_as_it_is_and_another_is_refused(small: Performer, tmp_path: Path) -> None:
    images, out = colours(), tmp_path / "a.safetensors"
    train_performer(small, images, out=out, category="red", config=QUICK)
    before = out.read_bytes()
    train_performer(small, images, out=out, category="red", config=QUICK)
    assert out.read_bytes() == before
    with pytest.raises(RunError, match="one of another"):
        train_performer(small, images, out=out, category="red", config={**QUICK, "seed": 1})
    assert out.read_bytes() == before
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(RunError, match="another file"):
        train_performer(small, images, out=tmp_path / "other.safetensors", category="red", config=QUICK)
    (tmp_path / "c.work").mkdir()
    (tmp_path / "c.work" / "mine.txt").write_text("keep")
    with pytest.raises(RunError, match="other files"):
        train_performer(small, images, out=tmp_path / "c.safetensors", category="red", config=QUICK)
    (tmp_path / "d.safetensors").write_text("no weights")
    with pytest.raises(RunError, match="trained performer"):
        read_training(tmp_path / "d.safetensors")
    with pytest.raises(RunError, match="nothing there"):
        read_training(tmp_path / "e.safetensors")


def test_others_can_be_some_categories_only(small: Performer, tmp_path: Path) -> None:
    images = colours(("red", "green", "background"))
    out = train_performer(
        small, images, out=tmp_path / "a.safetensors", category="red", against="background", config=QUICK
    )
    assert read_training(out)["data"]["train_photos"] == {"red": 10, "": 10}
    out = train_performer(small, images, out=tmp_path / "b.safetensors", categories="all", config=QUICK)
    assert read_training(out)["data"]["categories"] == ["green", "red"]


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({}, InputError, "either a category or several"),
        ({"category": "red", "categories": "all"}, InputError, "got both"),
        ({"category": "reed"}, ImageError, "got 'reed'. Choose one of red"),
        ({"categories": ["red", "blau"]}, ImageError, "blau"),
        ({"categories": ["red"]}, InputError, "at least two categories"),
        ({"categories": ["red", "blue"], "against": ["green"]}, InputError, "single category only"),
        ({"category": "red", "against": ["red", "blue"]}, InputError, "other categories"),
        ({"category": "red", "against": ["grey"]}, ImageError, "grey"),
        ({"category": "red", "config": {"loss": "softmax"}}, InputError, "logistic loss"),
        ({"category": "red", "config": {"train_from": "layer9"}}, LayerError, "layer9"),
        ({"category": "red", "config": {"epoch": 3}}, InputError, "epochs"),
        ({"category": "red", "config": {"learning_rate": 1e30}}, InputError, "finite loss"),
        ({"category": "red", "device": "tpu"}, InputError, "device"),
        ({"category": "red", "device": "mps"}, InputError, "device that this machine has"),
        ({"category": "red", "out": "a.pt"}, InputError, r"NAME\.safetensors"),
    ],
    ids=lambda v: "",
)
def test_errors_say_what_to_do(
    small: Performer, tmp_path: Path, arguments: dict[str, Any], error: type[PartlensError], text: str
) -> None:
    out = tmp_path / arguments.pop("out", "a.safetensors")
    arguments["config"] = {**QUICK, **arguments.get("config", {})}
    with pytest.raises(error, match=text):
        train_performer(small, colours(), out=out, **arguments)
    assert not out.exists()


def test_photos_of_both_kinds_are_needed_in_both_splits(small: Performer, tmp_path: Path) -> None:
    images = colours()
    red = images.select(category="red")
    with pytest.raises(ImageError, match="photos of other categories in the split train"):
        train_performer(small, red, out=tmp_path / "a.safetensors", category="red", config=QUICK)
    kept = [i for i in range(len(images)) if (images.categories[i], images.splits[i]) != ("red", "test")]
    with pytest.raises(ImageError, match="photos of red in the split test"):
        train_performer(small, images.take(kept), out=tmp_path / "b.safetensors", category="red", config=QUICK)
    with pytest.raises(ImageError, match="photos of red in the split test"):
        train_performer(small, images.take(kept), out=tmp_path / "c.safetensors", categories="all", config=QUICK)


def test_headers_that_do_not_fit_are_refused(small: Performer, tmp_path: Path) -> None:
    out = train_performer(small, colours(), out=tmp_path / "a.safetensors", category="red", config=QUICK)
    weights = load_file(out)
    save_file(weights, tmp_path / "b.safetensors", metadata={"output_layer": "3"})
    with pytest.raises(LayerError, match="linear layer or a convolution"):
        load_performer(small.module, weights=tmp_path / "b.safetensors")
    save_file(weights, tmp_path / "c.safetensors", metadata={"output_layer": "4", "class_names": '["a", "b"]'})
    with pytest.raises(WeightsError, match="1 class names"):
        load_performer(small.module, weights=tmp_path / "c.safetensors")
    save_file(weights, tmp_path / "d.safetensors")
    with pytest.raises(WeightsError, match=r"4\.bias"):
        load_performer(small.module, weights=tmp_path / "d.safetensors")


def test_scores_by_hand() -> None:
    scores = torch.tensor([[1.0], [-1.0], [2.0], [-3.0], [-4.0]])
    found = held_out_scores(scores, torch.tensor([0, 0, -1, -1, -1]), ("a",), "logistic", 0, torch.arange(5))
    assert found["error"]["value"] == pytest.approx(2 / 5)
    assert found["baseline_error"]["value"] == pytest.approx(2 / 5)
    assert found["missed"]["a"]["value"] == pytest.approx(1 / 2)
    assert found["false_alarms"]["value"] == pytest.approx(1 / 3)
    assert found["balanced_error"]["value"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    several = torch.tensor([[3.0, 1.0], [-1.0, -2.0], [0.5, 0.7]])
    found = held_out_scores(several, torch.tensor([0, 1, 1]), ("a", "b"), "logistic", 0, torch.tensor([4, 2, 2]))
    assert found["error"]["value"] == pytest.approx(1 / 3)
    assert found["decision_error"]["value"] == pytest.approx((1 + 1 + 1) / 6)
    assert found["decision_error"]["n"] == found["error"]["n"] == 2  # two crops are one photo
    found = held_out_scores(several, torch.tensor([0, 1, 1]), ("a", "b"), "softmax", 0, torch.arange(3))
    assert "decision_error" not in found


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = colours()
    for index in range(len(images)):
        folder = tmp_path / "photos" / images.splits[index] / images.categories[index]
        folder.mkdir(parents=True, exist_ok=True)
        images.read(index).save(folder / f"{index}.png")
    torch.manual_seed(0)
    weights = torchvision.models.squeezenet1_1(weights=None).state_dict()
    save_file(
        weights, tmp_path / "w.safetensors", metadata=Preprocessing(size_px=(40, 40), resize="squash").to_metadata()
    )
    out = tmp_path / "red.safetensors"
    command = [
        "train-performer",
        f"torchvision:squeezenet1_1@{tmp_path / 'w.safetensors'}",
        str(tmp_path / "photos"),
        f"--out={out}",
        "--finetune.train_from=classifier",
        "--finetune.epochs=1",
        "--finetune.batch_size=16",
    ]
    assert main([*command, "--category=red"]) == 0
    shown = capsys.readouterr().out
    assert str(out) in shown
    assert "held-out error" in shown
    assert read_training(out)["config"]["train_from"] == "classifier"
    assert main([*command, "--category=red", "--against", "green", "blue"]) == 0  # the same photos
    assert main([*command, "--category=red", "--finetune.epochs=2"]) == 1
    shutil.rmtree(tmp_path / "red.work", ignore_errors=True)
    assert product(["layers", f"torchvision:squeezenet1_1@{out}"]) == 0
