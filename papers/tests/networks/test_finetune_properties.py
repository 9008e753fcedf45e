"""What an epoch shows, for any mixture of categories."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from partlens_papers.networks.finetune import category_loss
from partlens_papers.networks.finetune_config import FinetuneConfig
from partlens_papers.networks.finetune_photos import epoch_photos


@given(
    st.integers(1, 40), st.integers(1, 40), st.floats(0.05, 0.95), st.integers(0, 5), st.integers(1, 9), st.booleans()
)
def test_every_photo_is_shown_and_the_share_is_met(
    positives: int, others: int, share: float, seed: int, epoch: int, mirror: bool
) -> None:
    labels = torch.tensor([0] * positives + [-1] * others)
    config = FinetuneConfig(positive_share=share, seed=seed, mirror=mirror)
    photos, mirrored = epoch_photos(labels, 1, config, epoch)
    counts = torch.bincount(photos, minlength=len(labels))
    assert int(counts.min()) >= 1
    shown = int((labels[photos] == 0).sum())
    assert abs(shown - share * len(photos)) <= 1
    assert len(mirrored) == len(photos)
    assert mirror or not bool(mirrored.any())
    again = epoch_photos(labels, 1, config, epoch)
    assert torch.equal(again[0], photos)
    assert torch.equal(again[1], mirrored)


@given(st.lists(st.integers(1, 20), min_size=2, max_size=5))
def test_categories_are_shown_equally_often(sizes: list[int]) -> None:
    labels = torch.cat([torch.full((size,), number) for number, size in enumerate(sizes)])
    photos, _ = epoch_photos(labels, len(sizes), FinetuneConfig(), 1)
    assert torch.bincount(labels[photos]).tolist() == [max(sizes)] * len(sizes)


@given(st.lists(st.floats(-900, 900), min_size=1, max_size=6), st.integers(-1, 0))
def test_the_logistic_loss_is_finite_and_falls_with_the_margin(values: list[float], label: int) -> None:
    scores = torch.tensor(values)[:, None]
    labels = torch.full((len(values),), label)
    loss = category_loss(scores, labels, "logistic")
    assert bool(torch.isfinite(loss))
    assert float(loss) >= 0
    better = category_loss(scores + (1 if label == 0 else -1), labels, "logistic")
    assert float(better) <= float(loss)
