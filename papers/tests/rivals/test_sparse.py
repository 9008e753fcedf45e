from __future__ import annotations

import pytest
import torch

from partlens_papers.rivals import sparse
from partlens_papers.rivals.sparse import TopKSae, fit_topk_sae


def test_planted_sparse_features_are_recovered() -> None:
    generator = torch.Generator().manual_seed(1)
    parts = torch.nn.functional.normalize(torch.randn(12, 32, generator=generator), dim=1)
    codes = 1 + torch.rand(4000, 12, generator=generator)
    codes *= torch.rand(4000, 12, generator=generator).argsort(1) < 2  # two at a time
    maps = (codes @ parts).reshape(250, 4, 4, 32).permute(0, 3, 1, 2)
    found = fit_topk_sae(maps, 16, seed=0, active=2, steps=1000, batch=256, learning_rate=4e-3)
    assert float((parts @ found.decoder.T).max(1).values.min()) > 0.97
    assert found.history[-1] < 0.1 * found.history[0]


def test_as_many_units_as_filters_reconstruct_nearly_exactly() -> None:
    maps = torch.rand(30, 8, 5, 5)
    found = fit_topk_sae(maps, 24, seed=0, active=24, steps=800, batch=256, learning_rate=5e-3)
    left = found.reconstruct(maps) - maps
    assert float(left.square().sum() / (maps - maps.mean((0, 2, 3), keepdim=True)).square().sum()) < 5e-3


def test_codes_by_hand() -> None:
    found = TopKSae(
        (),
        encoder=torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]),
        bias=torch.tensor([0.0, 0.5, -1.0]),
        decoder=torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]),
        offset=torch.tensor([1.0, 1.0]),
        active=torch.tensor(2),
        non_negative=torch.tensor(True),
        answering=torch.zeros(3),
    )
    # x - c = (2, -3): before = (2, -2.5, -2); only the first is above 0 although two may answer
    codes = found.encode(torch.tensor([[3.0, -2.0], [2.0, 3.0]]))
    assert torch.equal(codes, torch.tensor([[2.0, 0.0, 0.0], [0.0, 2.5, 2.0]]))
    # 2 d_1 + c, and 2.5 d_2 + 2 d_3 + c; nothing is below 0 here
    assert torch.allclose(found.decode(codes), torch.tensor([[3.0, 1.0], [2.2, 5.1]]))
    assert torch.equal(found.decode(torch.tensor([[0.0, 0.0, 0.0]])), torch.tensor([[1.0, 1.0]]))


def test_no_cell_has_more_active_units_than_asked() -> None:
    maps = torch.rand(20, 10, 4, 4)
    found = fit_topk_sae(maps, 12, active=3, steps=30)
    assert int((found.maps(maps) > 0).sum(1).max()) <= 3
    assert torch.allclose(found.decoder.norm(dim=1), torch.ones(12), atol=1e-5)


def test_reconstructions_are_clipped_only_where_the_sample_was_not_negative() -> None:
    maps = torch.randn(20, 6, 4, 4)
    signed, clipped = fit_topk_sae(maps, 6, steps=30), fit_topk_sae(maps.relu(), 6, steps=30)
    assert float(signed.reconstruct(maps).min()) < 0
    assert float(clipped.reconstruct(maps).min()) >= 0


def dead_units(monkeypatch: pytest.MonkeyPatch, dead_after: int) -> int:
    """Units that all start in one direction: how many never answer in the end."""
    monkeypatch.setattr(sparse, "_DEAD_AFTER", dead_after)
    generator = torch.Generator().manual_seed(0)
    parts = torch.nn.functional.normalize(torch.randn(80, 32, generator=generator).relu(), dim=1)
    codes = torch.rand(4000, 80, generator=generator) * (torch.rand(4000, 80, generator=generator) < 0.05)
    maps = (codes @ parts).reshape(250, 4, 4, 32).permute(0, 3, 1, 2)
    start = torch.nn.functional.normalize(1 + 0.05 * torch.randn(64, 32, generator=generator), dim=1)
    monkeypatch.setattr(sparse, "spread_directions", lambda *_: start)
    return int((fit_topk_sae(maps, 64, active=4, steps=1000, batch=128).answering == 0).sum())


def test_units_without_an_answer_start_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    without, revived = dead_units(monkeypatch, 10**9), dead_units(monkeypatch, 50)
    assert without > 10
    assert revived < 3


def test_answering_counts_cells() -> None:
    maps = torch.rand(20, 10, 4, 4)
    found = fit_topk_sae(maps, 8, active=2, steps=30)
    assert torch.allclose(found.answering, (found.maps(maps) > 0).float().mean((0, 2, 3)), atol=1e-6)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"active": 9}, "active between 1 and units = 8, got 9"),
        ({"active": 0}, "active between 1 and units = 8, got 0"),
        ({"steps": 0}, "at least 1 step and 1 cell per batch"),
        ({"learning_rate": 1e30}, "a finite loss"),
    ],
)
def test_bad_settings_are_refused(change: dict[str, float], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        fit_topk_sae(torch.rand(10, 6, 4, 4), 8, **{"steps": 30, **change})


def test_cells_that_do_not_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="cells that differ"):
        fit_topk_sae(torch.ones(10, 6, 4, 4), 8)
