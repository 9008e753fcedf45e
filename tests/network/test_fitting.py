"""A small classifier learns what can be told apart, from its seed alone, and is kept with its input and classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from partlens.data.images import ImageSet
from partlens.errors import InputError
from partlens.network.fitting import Fitted, frames, right_answers, save_classifier, train_classifier
from partlens.network.preprocessing import Preprocessing
from partlens.network.zoo import load_performer

SEEN = Preprocessing(size_px=(16, 16), resize="squash", mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


def shades(count: int = 48) -> ImageSet:
    """Dark and light pictures, every third of them for testing."""
    rng = np.random.default_rng(3)
    pixels = [rng.integers(0, 90, (16, 16, 3)) + (120 if row % 2 else 0) for row in range(count)]
    splits = ["test" if row % 3 == 0 else "train" for row in range(count)]
    names = ["light" if row % 2 else "dark" for row in range(count)]
    return ImageSet.from_arrays(np.stack(pixels).astype(np.uint8), categories=names, splits=splits)


def build(outputs: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, outputs))


def learned(**changes: object) -> Fitted:
    settings = {"epochs": 25, "batch_size": 8, "learning_rate": 2e-2, "seed": 1}
    return train_classifier(build, shades(), SEEN, **{**settings, **changes})


def weights(fitted: Fitted) -> Tensor:
    return torch.cat([value.flatten() for value in fitted.network.state_dict().values()])


def test_it_learns_what_can_be_told_apart_and_says_how_well_on_held_out_images() -> None:
    found = learned()
    assert found.class_names == ("dark", "light")
    assert not found.network.training
    assert found.accuracy == 1
    assert len(found.right) == 16
    images = shades()
    rows = images.indices(split="test")
    pictures = frames(images, rows, SEEN)
    assert pictures.shape == (16, 16, 16, 3)
    turned = torch.tensor([images.categories[row] == "dark" for row in rows]).long()
    assert not right_answers(found.network, pictures, turned, SEEN).any()


def test_the_seed_alone_decides_and_the_users_random_state_stays() -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    first = weights(learned(epochs=2))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first, weights(learned(epochs=2)))
    assert not torch.equal(first, weights(learned(epochs=2, seed=2)))


@pytest.mark.parametrize(
    "change", [{"weight_decay": 0.5}, {"mirror": False}, {"learning_rate": 1e-3}, {"batch_size": 5}, {"epochs": 3}]
)
def test_each_setting_changes_what_is_learned(change: dict[str, object]) -> None:
    assert not torch.equal(weights(learned(epochs=2)), weights(learned(**{"epochs": 2, **change})))


def test_weights_decay_towards_nothing() -> None:
    assert float(weights(learned(weight_decay=2.0)).norm()) < 0.9 * float(weights(learned(weight_decay=0.0)).norm())


def test_the_rate_rises_for_three_tenths_of_the_steps_and_falls_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rates, step = [], torch.optim.AdamW.step

    def noted(self: torch.optim.AdamW, *rest: object) -> object:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *rest)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    learned(epochs=5, batch_size=8)  # 32 images: 4 steps an epoch
    assert len(rates) == 20
    assert max(rates) == pytest.approx(2e-2)
    assert rates.index(max(rates)) == 5
    assert rates[-1] < 1e-3


def test_no_epoch_or_a_single_category_is_refused() -> None:
    with pytest.raises(InputError, match="epochs >= 1, got 0"):
        learned(epochs=0)
    with pytest.raises(InputError, match="at least two categories, got dark"):
        train_classifier(build, shades().take(range(0, 48, 2)), SEEN, epochs=1)


def test_a_saved_classifier_knows_its_input_and_its_classes(tmp_path: Path) -> None:
    found = learned(epochs=1)
    save_classifier(tmp_path / "w.safetensors", found.network, SEEN, found.class_names)
    opened = load_performer(build(2), weights=tmp_path / "w.safetensors")
    assert opened.class_names == ("dark", "light")
    assert opened.preprocessing.size_px == (16, 16)
    assert opened.preprocessing.mean == (0.5, 0.5, 0.5)
    assert torch.equal(weights(Fitted(opened.module, (), found.right)), weights(found))
