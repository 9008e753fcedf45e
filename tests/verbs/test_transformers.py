"""A ViT and a Swin, trained on generated flowers: what partlens says of them beats what chance says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from runpy import run_path

import numpy as np
import pytest
import torch
from torch import nn

import partlens
from partlens.attribution.backprop import guided_backprop, heat_map
from partlens.data.flowers import generated_flowers
from partlens.data.images import ImageSet
from partlens.network.fitting import train_classifier
from partlens.network.performer import Performer, weights_sha256
from partlens.network.preprocessing import Preprocessing
from partlens.verbs.explained_windows import explain_windows, load_inspection

MADE = run_path(str(Path(__file__).parents[1] / "network" / "families.py"))
SIDE_PX = 32
# By family: how it is built, and epochs until it knows two of three flowers, which takes some seconds.
BUILT: dict[str, tuple[Callable[[int], nn.Module], int]] = {
    "vit": (lambda classes: MADE["Vit"](32, patch=4, classes=classes), 12),
    "swin": (lambda classes: MADE["Swin"](16, patch=2, classes=classes), 25),
}


@pytest.fixture(scope="module")
def flowers() -> ImageSet:
    return generated_flowers(1400, seed=1, size=SIDE_PX, categories=("petal-red", "petal-yellow", "petal-blue"))


@pytest.fixture(scope="module", params=list(BUILT))
def trained(request: pytest.FixtureRequest, flowers: ImageSet) -> Performer:
    build, epochs = BUILT[request.param]
    shape = Preprocessing(size_px=(SIDE_PX, SIDE_PX), resize="squash")
    fitted = train_classifier(build, flowers, shape, epochs=epochs, learning_rate=3e-3)
    assert fitted.accuracy > 0.55
    return Performer(
        fitted.network, request.param, shape, weights_sha256(fitted.network), class_names=fitted.class_names
    )


@pytest.mark.slow
def test_parts_relevant_features_and_maps_of_transformers_beat_their_nulls(
    trained: Performer, flowers: ImageSet, tmp_path: Path
) -> None:
    before = {name: value.clone() for name, value in trained.module.state_dict().items()}

    # The relevant filters tell the flowers apart; with shuffled labels they do not.
    found = partlens.select_features(trained, flowers, out=tmp_path / "selection", pictures=0).record.found
    assert found.accuracy.interval[0] > found.shuffled.interval[1]

    # Where the score of the answer comes from are the petals of this photo, more than those of other photos.
    rows = flowers.indices(split="test")
    heat = heat_map(
        guided_backprop(trained, trained.preprocessing([flowers.read(row) for row in rows]), rule="gradient")
    )
    petals = torch.stack([torch.from_numpy(flowers.part_truth.masks(flowers.keys[row])["petal"]) for row in rows])
    shares = (heat / heat.sum((1, 2), keepdim=True)).flatten(1) @ petals.float().flatten(1).T / petals.sum((1, 2))
    draws = torch.Generator().manual_seed(0)
    photos = torch.arange(len(rows))
    by_chance = torch.stack([shares[photos, torch.randperm(len(rows), generator=draws)].mean() for _ in range(200)])
    assert float(shares.diagonal().mean()) > float(by_chance.quantile(0.99))

    # Of each category the part that is most often on the flower follows it: on other photos its places are beside it.
    partlens.inspect(trained, flowers, out=tmp_path / "inspected")
    opened = load_inspection(tmp_path / "inspected", trained)
    windows = explain_windows(opened, trained.preprocessing([flowers.read(row) for row in rows]))
    masks = (flowers.part_truth.masks(flowers.keys[row]).values() for row in rows)
    on_flower = torch.stack([torch.from_numpy(np.logical_or.reduce(list(each))) for each in masks]).double()

    def followed(shuffled: bool) -> float:
        shares = []
        for name in trained.class_names or ():
            own = [photo for photo, found in enumerate(windows) if found.category and found.category.name == name]
            row, col = (torch.stack([windows[photo].places for photo in own]) * SIDE_PX).long().unbind(2)
            photos = torch.randperm(len(own), generator=draws) if shuffled else torch.arange(len(own))
            shares.append(on_flower[own][photos[:, None], row, col].mean(0).max())
        return float(torch.stack(shares).mean())

    assert followed(shuffled=False) > float(torch.tensor([followed(shuffled=True) for _ in range(200)]).quantile(0.99))
    assert all(torch.equal(value, before[name]) for name, value in trained.module.state_dict().items())
