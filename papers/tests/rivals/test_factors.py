from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from partlens_papers.rivals import factors
from partlens_papers.rivals.cells import Rival, cells_of, sample_cells, spread_directions
from partlens_papers.rivals.factors import KMeans, fit_kmeans, fit_nmf, nonnegative_codes
from partlens_papers.rivals.sparse import fit_topk_sae

FITS: dict[str, Callable[..., Rival]] = {
    "nmf": fit_nmf,
    "kmeans": fit_kmeans,
    "sae": lambda *args, **more: fit_topk_sae(*args, steps=40, **more),
}


@pytest.fixture(params=FITS)
def fit(request: pytest.FixtureRequest) -> Callable[..., Rival]:
    return FITS[request.param]


def planted(units: int = 6, filters: int = 20, images: int = 40, side: int = 6) -> tuple[Tensor, Tensor]:
    """Maps that are sparse non-negative mixtures of parts, and the parts (unit, filter) of length 1."""
    generator = torch.Generator().manual_seed(4)
    parts = torch.rand(units, filters, generator=generator) * (torch.rand(units, filters, generator=generator) < 0.4)
    parts[torch.arange(units), torch.arange(units)] = 1
    parts /= parts.norm(dim=1, keepdim=True)
    shape = (images, units, side, side)
    codes = torch.rand(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.3) * 5
    return torch.einsum("iurc,uf->ifrc", codes, parts), parts


def matched(found: Tensor, wanted: Tensor) -> float:
    """The worst cosine of a wanted part to its nearest found one."""
    return float((wanted @ found.T).max(1).values.min())


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).square().sum() / wanted.square().sum())


def test_nmf_recovers_planted_parts_and_codes() -> None:
    maps, parts = planted()
    found = fit_nmf(maps, 6, seed=1, iterations=400, tolerance=1e-6)
    assert matched(found.parts, parts) > 0.995
    assert relative_error(found.reconstruct(maps), maps) < 1e-3


def test_kmeans_recovers_planted_directions() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = torch.rand(5, 30, generator=generator) * (torch.rand(5, 30, generator=generator) < 0.3)
    parts /= parts.norm(dim=1, keepdim=True)
    unit = torch.randint(5, (30, 4, 4), generator=generator)
    size = 1 + 4 * torch.rand(30, 4, 4, generator=generator)
    noise = 0.02 * torch.rand(30, 4, 4, 30, generator=generator)
    maps = (parts[unit] * size[..., None] + noise).permute(0, 3, 1, 2)
    found = fit_kmeans(maps, 5, seed=0)
    assert matched(found.parts, parts) > 0.99
    names = (parts @ found.parts.T).argmax(1)
    assert torch.equal(found.maps(maps).argmax(1), names[unit])
    assert relative_error(found.reconstruct(maps), maps) < 0.01


def test_losses_fall_monotonically() -> None:
    maps = torch.rand(20, 12, 5, 5) * (torch.rand(20, 12, 5, 5) < 0.5)
    for history in (
        fit_nmf(maps, 7, seed=0, iterations=60, tolerance=0.0).history,
        fit_kmeans(maps, 7, seed=0, tolerance=0.0).history,
    ):
        assert len(history) > 5
        assert all(after <= before + 1e-6 for before, after in itertools.pairwise(history))


def test_nmf_is_as_good_as_scikit_learns() -> None:
    from sklearn.decomposition import NMF

    maps, _ = planted(units=10)
    noisy = maps + 0.3 * torch.rand(maps.shape)
    cells = cells_of(noisy).numpy()
    theirs = NMF(6, init="nndsvda", max_iter=500, tol=1e-5).fit(cells).reconstruction_err_ ** 2 / (cells**2).sum()
    ours = min(fit_nmf(noisy, 6, seed=s, iterations=300, tolerance=1e-6).history[-1] for s in range(3))
    assert ours < 1.02 * theirs


def test_as_many_parts_as_filters_reconstruct_nearly_exactly() -> None:
    maps = torch.rand(30, 8, 5, 5) * (torch.rand(30, 8, 5, 5) < 0.6)
    assert relative_error(fit_nmf(maps, 10, iterations=500, tolerance=1e-6).reconstruct(maps), maps) < 2e-3


def test_codes_are_scipys_non_negative_least_squares() -> None:
    from scipy.optimize import nnls

    parts = torch.rand(9, 15, dtype=torch.float64)
    parts /= parts.norm(dim=1, keepdim=True)
    cells = torch.rand(25, 15, dtype=torch.float64)
    codes = nonnegative_codes(parts @ parts.T, cells @ parts.T, tolerance=torch.full((25,), 1e-10)).values
    wanted = np.stack([nnls(parts.T.numpy(), cell)[0] for cell in cells.numpy()])
    assert np.abs(codes.numpy() - wanted).max() < 1e-7


def test_codes_are_never_worse_than_their_start() -> None:
    parts = torch.rand(9, 15) + 0.5  # nearly parallel rows, where acceleration overshoots
    cells = torch.rand(60, 15)
    gram, target = parts @ parts.T, cells @ parts.T
    codes = torch.rand(60, 9) * 0.1

    def energy(z: Tensor) -> Tensor:
        return (cells - z @ parts).double().square().sum(1)

    for steps in (1, 2, 3, 5, 8, 13):
        better = nonnegative_codes(gram, target, codes, steps=steps).values
        assert bool((energy(better) <= energy(codes) + 1e-4).all())
        codes = better


def test_a_solution_is_left_as_it_is_where_rounding_would_spoil_it() -> None:
    parts, cells = torch.nn.functional.normalize(torch.rand(9, 15) + 0.5, dim=1), torch.rand(500, 15)
    gram, target = parts @ parts.T, cells @ parts.T
    gram.fill_diagonal_(1.0)  # rows of length 1 to the last bit: codes are not rescaled on the way
    solved = nonnegative_codes(gram, target, steps=20_000).values
    again = nonnegative_codes(gram, target, solved, steps=1).values
    changed = (again != solved).any(1)
    assert bool((factors._energy(again, gram, target) < factors._energy(solved, gram, target))[changed].all())


def test_a_part_without_cells_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    maps = torch.zeros(20, 5, 3, 3)
    maps[torch.arange(20), torch.arange(20) % 4] = 1.0  # the fifth filter never answers
    monkeypatch.setattr(factors, "spread_directions", lambda *_: torch.eye(5)[[0, 1, 4, 4]])
    found = fit_nmf(maps, 4, seed=0, tolerance=0.0)
    assert found.history[0] > 0.4
    assert found.history[-1] < 1e-6


def test_a_cluster_without_cells_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    maps = torch.zeros(20, 5, 3, 3)
    maps[torch.arange(20), torch.arange(20) % 4] = 1.0
    monkeypatch.setattr(factors, "spread_directions", lambda *_: torch.eye(5)[[0, 1, 4, 4]])
    assert fit_kmeans(maps, 4, seed=0).history[-1] < 1e-6


def test_the_kmeans_map_is_the_projection_where_the_centre_is_the_best() -> None:
    rival = KMeans((), torch.tensor([[1.0, 0.0], [0.6, 0.8]]))
    maps = torch.tensor([[3.0, 0.0], [0.3, 2.0]]).T.reshape(1, 2, 1, 2)  # cells (3, 0) and (0.3, 2)... in that order
    assert torch.allclose(rival.maps(maps), torch.tensor([[3.0, 0.0], [0.0, 0.6 * 0.3 + 0.8 * 2]]).reshape(1, 2, 1, 2))


def test_units_are_mapped_like_the_loops_say(fit: Callable[..., Rival]) -> None:
    maps = torch.rand(6, 9, 4, 5)
    rival = fit(maps, 3, seed=0)
    result = rival.maps(maps)
    assert result.shape == (6, 3, 4, 5)
    assert float(result.min()) >= 0
    back = rival.reconstruct(maps)
    for image, row, col in ((0, 0, 0), (5, 3, 4), (2, 1, 3)):
        code = rival.encode(maps[image, :, row, col][None])[0]
        assert torch.allclose(result[image, :, row, col], code, atol=2e-3)
        assert torch.allclose(back[image, :, row, col], rival.decode(code[None])[0], atol=2e-3)


def test_equal_seeds_give_equal_rivals_and_others_do_not(fit: Callable[..., Rival]) -> None:
    maps = torch.rand(12, 9, 4, 4)
    first, second, other = (vars(fit(maps, 4, seed=seed, cells=100)) for seed in (3, 3, 4))
    assert first.pop("history") == second.pop("history") != other.pop("history")
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_memory_maps_give_what_tensors_give(fit: Callable[..., Rival], tmp_path: Path) -> None:
    maps = torch.rand(70, 5, 4, 4).half()
    np.save(tmp_path / "maps.npy", maps.numpy())
    mapped = np.load(tmp_path / "maps.npy", mmap_mode="r")
    first, second = (vars(fit(source, 3, seed=0, cells=200)) for source in (maps, mapped))
    assert first.pop("history") == second.pop("history")
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_bad_maps_are_refused(fit: Callable[..., Rival]) -> None:
    maps = torch.rand(3, 4, 2, 2)
    with pytest.raises(ValueError, match=r"at most 12 units, one per cell, got 13"):
        fit(maps, 13)
    with pytest.raises(ValueError, match="at least 1 unit, got 0"):
        fit(maps, 0)
    with pytest.raises(ValueError, match="values above 0, got zeros only"):
        fit(torch.zeros(3, 4, 2, 2), 2)
    with pytest.raises(TypeError, match=r"floating-point maps \[row, filter, row, col\]"):
        fit(torch.zeros(3, 4), 2)
    with pytest.raises(TypeError, match="int64"):
        fit(torch.ones(3, 4, 2, 2, dtype=torch.int64), 2)
    broken = maps.clone()
    broken[1, 2, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity in 1 of 3 images"):
        fit(broken, 2)
    rival = fit(maps, 2)
    with pytest.raises(ValueError, match="NaN or infinity in 1 of 3 images"):
        rival.maps(broken)
    with pytest.raises(ValueError, match="maps of 4 filters, got 5"):
        rival.maps(torch.rand(1, 5, 2, 2))
    with pytest.raises(ValueError, match="at least 1 image"):
        rival.maps(torch.rand(0, 4, 2, 2))


def test_negative_maps_are_refused_by_nmf_alone() -> None:
    maps = torch.randn(5, 4, 3, 3)
    with pytest.raises(ValueError, match="maps of at least 0, after a ReLU"):
        fit_nmf(maps, 2)
    with pytest.raises(ValueError, match="maps of at least 0, after a ReLU"):
        fit_nmf(maps.abs(), 2).maps(maps)
    assert float(fit_kmeans(maps, 2).maps(maps).min()) >= 0


def test_cells_are_drawn_without_replacement_from_all_images() -> None:
    maps = torch.arange(1.0, 1 + 130 * 4).reshape(130, 1, 2, 2)
    everything = sample_cells(maps, 1, seed=0, cells=10_000)
    assert torch.equal(everything[:, 0], torch.arange(1.0, 521.0))
    some = sample_cells(maps, 1, seed=0, cells=300)[:, 0]
    assert len(some.unique()) == 300
    assert float(some.min()) < 60
    assert float(some.max()) > 460


def test_directions_are_spread_before_they_repeat(generator: torch.Generator) -> None:
    cells = torch.eye(3)[torch.arange(30) % 3] * torch.arange(30)[:, None]
    chosen = spread_directions(cells, 5, generator)
    assert matched(chosen[:3], torch.eye(3)) > 0.999
    assert torch.allclose(chosen.norm(dim=1), torch.ones(5))


def test_more_clusters_than_cells_that_are_not_zero() -> None:
    maps = torch.zeros(2, 3, 2, 2)
    maps[0, :, 0, 0] = 1
    with pytest.raises(ValueError, match="at most 1 units, one per cell that is not zero"):
        fit_kmeans(maps, 2)
