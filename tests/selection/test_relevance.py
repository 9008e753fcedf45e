"""The selection of relevant features and its read-out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from partlens.selection.labels import label_matrix
from torch import Tensor

from partlens.errors import InputError
from partlens.selection.descriptors import FeatureIndex, descriptor
from partlens.selection.relevance import readout, select_relevant
from partlens.selection.responses import stream_responses


def planted(images: int, seed: int) -> tuple[Tensor, Tensor, FeatureIndex]:
    """Three classes, two features planted for each, in descriptors of 3 layers."""
    rng = np.random.default_rng(seed)
    index = FeatureIndex(("a", "b", "c"), (20, 20, 30))
    kind = rng.integers(0, 3, images)
    energy = rng.gamma(0.5, 1.0, (images, index.size))
    for j in range(3):
        for feature in (index.feature("a", j), index.feature("c", 5 + j)):
            energy[kind == j, feature] += rng.gamma(9.0, 2.0, int((kind == j).sum()))
    parts = {layer: torch.from_numpy(energy[:, index.rows(layer)]) for layer in index.layers}
    return descriptor(parts, index), torch.from_numpy(np.eye(3)[kind]), index


def test_the_selection_names_the_planted_features() -> None:
    x, labels, index = planted(400, 0)
    found = select_relevant(x, labels, 10.0, index=index, classes=("fox", "cat", "cow"))
    for j, name in enumerate(found.classes):
        relevant = found.relevant(name)
        assert {place[:2] for place in relevant[:2]} == {("a", j), ("c", 5 + j)}
        assert [w for *_, w in relevant] == sorted((w for *_, w in relevant), reverse=True)
        assert len(relevant) == int(found.solution.nonzeros[j])
        assert found.relevant(j) == relevant
        r = found.contribution(x, name)
        assert torch.allclose(r.sum(1).double(), x.double() @ found.weights[:, j], atol=1e-5)
    assert torch.equal(found.weights, found.solution.weights)
    with pytest.raises(InputError, match="Nearest: fox"):
        found.relevant("fix")
    with pytest.raises(InputError, match="from 0 to 2"):
        found.relevant(3)
    with pytest.raises(InputError, match="index="):
        select_relevant(x, labels, 10.0)
    with pytest.raises(InputError, match="70 features"):
        select_relevant(x[:, 1:], labels, 10.0, index=index)
    with pytest.raises(InputError, match="labels of 2 classes"):
        select_relevant(x, labels, 10.0, index=index, classes=("a", "b"))


def test_T8_shuffled_labels_fall_to_chance() -> None:
    x, labels, index = planted(600, 0)
    held, truth, _ = planted(600, 1)
    found = select_relevant(x, labels, 10.0, index=index)
    told = readout(found, held, truth, fitted=(x, labels), generator=torch.Generator().manual_seed(0))
    assert told.accuracy > 0.95
    assert told.chance == pytest.approx(1 / 3)
    assert told.interval[0] < told.accuracy <= told.interval[1]
    assert told.shuffled is not None
    assert len(told.correct) == len(told.shuffled) == 600
    assert abs(float(told.shuffled.double().mean()) - told.chance) < 0.08
    assert told.majority == pytest.approx(float(truth.mean(0).max()))
    truth[5] = 0
    assert len(readout(found, held, truth).correct) == 599
    with pytest.raises(InputError, match="generator"):
        readout(found, held, truth, fitted=(x, labels))
    with pytest.raises(InputError, match="image of a class"):
        readout(found, held, truth * 0)


def test_from_images_to_relevant_features(tiny, few_flowers, tmp_path) -> None:
    responses = stream_responses(tiny, few_flowers, out=tmp_path)
    labels = label_matrix(few_flowers)
    found = select_relevant(responses, labels, 10.0)
    assert found.classes == labels.classes == ("petal-blue", "petal-red")
    assert found.index == responses.index
    assert found.solution.converged.all()
    told = readout(found, responses, labels)
    assert told.accuracy > 0.8
