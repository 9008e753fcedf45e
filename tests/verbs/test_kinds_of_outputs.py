"""What verbs print of networks whose outputs are no logits, and of categories that are numbers."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

import partlens
from partlens.errors import RunError
from partlens.network.performer import Performer
from partlens.progress import Progress

PX = partlens.Preprocessing(size_px=(32, 32), resize="squash")
RED, BLUE = (200, 30, 30), (30, 30, 200)


class Network(nn.Module):
    """Tells red from blue: the score of the first output is that of red."""

    def __init__(self, outputs: int, last: nn.Module | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.conv1, self.relu1 = nn.Conv2d(3, 6, 3, padding=1), nn.ReLU()
            self.conv2, self.relu2 = nn.Conv2d(6, 6, 3, padding=1), nn.ReLU()
            self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(6, outputs)
        self.last = last or nn.Identity()
        with torch.no_grad():
            self.conv1.weight[:3] = 0
            self.conv1.weight[0, 0, 1, 1] = self.conv1.weight[2, 2, 1, 1] = 1
            self.conv2.weight[:3] = 0
            self.conv2.weight[0, 0, 1, 1] = self.conv2.weight[2, 2, 1, 1] = 1
            self.fc.weight.zero_(), self.fc.bias.zero_()
            self.fc.weight[0, 0], self.fc.weight[0, 2] = 9.0, -9.0
            if outputs > 1:
                self.fc.weight[1] = -self.fc.weight[0]

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu2(self.conv2(self.relu1(self.conv1(x))))
        return self.last(self.fc(self.pool(x).flatten(1)))


def photos(root: Path, *names: str) -> Path:
    draws = np.random.default_rng(0)
    for name, colour in zip(names, (RED, BLUE, RED), strict=False):
        (root / name).mkdir(parents=True)
        for i in range(8):
            noise = draws.integers(-20, 20, (32, 32, 3))
            Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(root / name / f"{i}.png")
    return root


def selected(module: nn.Module, data: Path, out: Path) -> tuple[Performer, str]:
    said = io.StringIO()
    performer = partlens.load_performer(module, preprocessing=PX)
    console = Console(file=said, width=500)
    partlens.select_features(performer, data, out=out, pictures=0, progress=Progress(console))
    return performer, said.getvalue()


def explained(run: Path, photo: Path, performer: Performer, **how: Any) -> dict[str, Any]:
    folder = partlens.explain(run, [photo], model=performer, **how)[0]
    record: dict[str, Any] = json.loads((folder / "explanation.json").read_text())
    return record


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("last", [nn.Sigmoid(), nn.Softmax(1), nn.LogSoftmax(1), nn.Identity()], ids=str)
def test_probabilities_that_are_printed_are_those_of_the_network(tmp_path: Path, outputs: int, last: nn.Module) -> None:
    if outputs == 1 and isinstance(last, (nn.Softmax, nn.LogSoftmax)):
        pytest.skip("one output that is always 1")
    data, module = photos(tmp_path / "data", "red", "blue"), Network(outputs, last).eval()
    performer, _ = selected(module, data, tmp_path / "run")
    for name, first in (("red", True), ("blue", False)):
        photo = data / name / "0.png"
        with torch.no_grad():
            said = module(PX([Image.open(photo)]))[0]
        plain = isinstance(last, nn.Identity)
        chance = said.exp() if isinstance(last, nn.LogSoftmax) else said
        chance = (said.sigmoid() if outputs == 1 else said.softmax(0)) if plain else chance
        record = explained(tmp_path / "run", photo, performer)
        found = {one["output"]: one["probability"] for one in record["answers"]}
        assert found == pytest.approx(dict(enumerate(chance.tolist())), abs=1e-6)
        assert (found[0] > 0.5) is first
        assert any("probabilit" in note for note in record["notes"]) is not plain


@pytest.mark.parametrize(("names", "outputs"), [(("1", "2"), [0, 1]), (("0", "1"), [0, 1]), (("10", "9"), [0, 1])])
def test_categories_that_are_numbers_are_outputs_of_the_network(
    tmp_path: Path, names: tuple[str, str], outputs: list[int]
) -> None:
    data = photos(tmp_path / "data", *names)
    performer, said = selected(Network(2), data, tmp_path / "run")
    assert f"{names[0]} → {outputs[0]}, {names[1]} → {outputs[1]}" in said
    assert said.index("→") < said.index("filters in")
    assert "another order" not in said
    record = explained(tmp_path / "run", data / names[0] / "0.png", performer, classes=[names[0]])
    assert record["explained"][0]["output"] == outputs[0]
    assert record["explained"][0]["probability"] > 0.9


def test_labels_that_the_network_says_otherwise_are_told(tmp_path: Path) -> None:
    data = photos(tmp_path / "data", "1", "0")  # red photos in folder 1, and output 0 is that of red
    _, said = selected(Network(2), data, tmp_path / "run")
    assert "the network takes most photos of 0 for output 1, 1 for output 0, and 0 % of them" in said


class Masked(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (x > 0)


def test_maps_that_are_plain_gradients_are_called_so(tmp_path: Path) -> None:
    data, module = photos(tmp_path / "data", "0", "1"), Network(2)
    module.relu1, module.relu2 = Masked(), Masked()
    performer, _ = selected(module, data, tmp_path / "run")
    notes = explained(tmp_path / "run", data / "0" / "0.png", performer)["notes"]
    assert any(note.startswith("no activation was found, so that this is the plain gradient") for note in notes)


def test_a_class_past_the_last_output_is_no_output(tmp_path: Path) -> None:
    data = photos(tmp_path / "data", "0", "3", "7")
    performer, said = selected(Network(2), data, tmp_path / "run")
    assert "no output: 3, 7" in said
    explained(tmp_path / "run", data / "7" / "0.png", performer)
    record = json.loads((tmp_path / "run" / "selection.json").read_text())
    record["found"]["classes"][0]["output"] = 2
    (tmp_path / "run" / "selection.json").write_text(json.dumps(record))
    with pytest.raises(RunError, match="among 2 outputs, got 0"):
        explained(tmp_path / "run", data / "7" / "0.png", performer)
