"""The yardstick of part discovery: landmark regression, and labels of parts at landmarks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from partlens.errors import InputError
from partlens_papers.part_discovery import (
    label_agreement,
    landmark_error,
    landmark_errors,
    nearest_parts,
)


@pytest.fixture
def birds() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Places of two parts in sixty photos, three landmarks of which two follow them, and the training photos."""
    draws = torch.Generator().manual_seed(0)
    places = torch.rand(60, 2, 2, generator=draws)
    lost = torch.rand(60, 1, 2, generator=draws)
    follow = 0.1 + 0.6 * places[:, :, [1, 0]]
    return places, torch.cat([follow, lost], 1), torch.arange(60) % 3 > 0


def test_landmarks_that_follow_the_parts_are_foretold_and_others_are_not(birds) -> None:
    places, landmarks, train = birds
    errors = landmark_errors(places.flatten(1), landmarks, train)
    assert errors.shape == (20, 3)
    assert float(errors[:, :2].max()) < 1e-3
    assert float(errors[:, 2].mean()) > 20


def test_the_regression_is_the_textbook_one(birds) -> None:
    places, landmarks, train = birds
    noisy = landmarks + 0.05 * torch.randn(landmarks.shape, generator=torch.Generator().manual_seed(1))
    errors = landmark_errors(places.flatten(1), noisy, train)
    design = np.c_[places.flatten(1).double().numpy(), np.ones(60)]
    weights = np.linalg.lstsq(design[train.numpy()], noisy[train, 1].double().numpy(), rcond=None)[0]
    distance = np.linalg.norm(design[~train.numpy()] @ weights - noisy[~train, 1].double().numpy(), axis=1)
    assert np.allclose(errors[:, 1].numpy(), 100 * distance)


def test_places_that_never_move_foretell_the_mean_landmark(birds) -> None:
    _, landmarks, train = birds
    errors = landmark_errors(torch.full((60, 4), 0.5), landmarks, train)
    away = 100 * (landmarks[~train] - landmarks[train].mean(0)).norm(dim=-1)
    assert torch.allclose(errors.float(), away, atol=1e-4)


def test_hidden_landmarks_neither_teach_nor_count(birds) -> None:
    places, landmarks, train = birds
    hidden = landmarks.clone()
    hidden[::2] = math.nan
    hidden[:, 2] = math.nan
    errors = landmark_errors(places.flatten(1), hidden, train)
    assert bool(errors[:, 2].isnan().all())
    assert int((~errors[:, 0].isnan()).sum()) == int((~train[1::2]).sum())
    whole = landmark_error(places.flatten(1), hidden, train, torch.Generator().manual_seed(0))
    assert whole.value < 1e-3
    assert whole.n == 20


@pytest.mark.parametrize("numbers", [3, 300])
def test_a_ridge_is_the_same_from_either_gram_matrix(birds, numbers: int) -> None:
    _, landmarks, train = birds
    known = torch.randn(60, numbers, generator=torch.Generator().manual_seed(2))
    got = landmark_errors(known, landmarks, train, ridge=0.5)
    design, wanted = known[train].double(), landmarks[train, 0].double()
    centred = design - design.mean(0)
    gram = centred.T @ centred if numbers < 40 else centred @ centred.T
    penalty = 0.5 * gram.diagonal().mean()
    inverse = torch.linalg.inv(centred.T @ centred + penalty * torch.eye(numbers, dtype=torch.float64))
    foretold = (known[~train].double() - design.mean(0)) @ inverse @ centred.T @ (wanted - wanted.mean(0))
    away = 100 * (foretold + wanted.mean(0) - landmarks[~train, 0]).norm(dim=-1)
    assert torch.allclose(got[:, 0], away)


def test_photos_and_landmarks_must_be_the_same(birds) -> None:
    places, landmarks, train = birds
    with pytest.raises(InputError, match="landmarks of 60 photos"):
        landmark_errors(places.flatten(1), landmarks[:59], train)


def test_labels_at_landmarks_are_the_nearest_parts(birds) -> None:
    places, _, _ = birds
    landmarks = places + 0.001
    landmarks[0, 1] = math.nan
    parts, names = nearest_parts(places, landmarks)
    assert len(parts) == 119
    assert bool((parts == names).all())


def test_parts_at_the_landmarks_agree_with_their_names(birds) -> None:
    places, _, _ = birds
    assert label_agreement(places, places + 0.001) == {"nmi": 1.0, "ari": 1.0}


def test_one_part_for_all_landmarks_agrees_with_nothing(birds) -> None:
    _, landmarks, _ = birds
    found = label_agreement(torch.full((60, 1, 2), 0.5), landmarks)
    assert found == {"nmi": pytest.approx(0, abs=1e-9), "ari": pytest.approx(0, abs=1e-9)}
