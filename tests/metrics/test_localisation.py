from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from partlens.estimate import Estimate, bootstrap
from partlens.explainer.templates import centroid_cells
from partlens.metrics.localisation import (
    Peaks,
    _silent_share,
    border_share,
    consistency_per_filter,
    distinct_parts,
    filter_correlation_of,
    instability_differences,
    instability_per_filter,
    localisation_scores,
    null_peaks,
    peaks_from_cells,
    spread_per_filter,
)
from partlens.metrics.scores import LocalisationScores
from partlens.records import plain

SIZE = (224, 224)
GRID = ((8.0, 8.0), (16.0, 16.0))


def peaks_at(cells: torch.Tensor, scores: torch.Tensor | None = None) -> Peaks:
    xy = torch.stack([8 + 16 * cells[..., 1], 8 + 16 * cells[..., 0]], -1).double()
    return Peaks(cells.double(), xy, torch.ones(cells.shape[:2]).double() if scores is None else scores, (14, 14))


def moving(images: int = 60, filters: int = 1) -> torch.Tensor:
    return torch.randint(0, 14, (images, filters, 2))


def instability_by_loops(peaks: Peaks, landmarks: torch.Tensor, top: int) -> list[float]:
    """CVPR 2018, Sec. 5.2.2, one filter and landmark at a time."""
    found = []
    for f in range(peaks.scores.shape[1]):
        per_landmark = []
        for k in range(landmarks.shape[1]):
            rows = [i for i in range(len(landmarks)) if not bool(landmarks[i, k].isnan().any())]
            rows.sort(key=lambda i: -float(peaks.scores[i, f]))
            distances = [
                float((peaks.positions_px[i, f] - landmarks[i, k]).norm()) / math.hypot(224, 224) for i in rows[:top]
            ]
            mean = sum(distances) / len(distances)
            per_landmark.append(math.sqrt(sum((d - mean) ** 2 for d in distances) / (len(distances) - 1)))
        found.append(sum(per_landmark) / len(per_landmark))
    return found


def test_instability_equals_the_loops_with_missing_landmarks_and_top_images() -> None:
    peaks = peaks_at(moving(40, 3), torch.rand(40, 3, dtype=torch.float64))
    landmarks = torch.rand(40, 2, 2, dtype=torch.float64) * 224
    landmarks[::3, 1] = math.nan
    expected = instability_by_loops(peaks, landmarks, 15)
    assert instability_per_filter(peaks, landmarks, SIZE, top=15).tolist() == pytest.approx(expected, abs=1e-12)


def test_a_constant_offset_from_the_landmark_is_perfectly_stable() -> None:
    peaks = peaks_at(moving())
    landmarks = peaks.positions_px + torch.tensor([12.0, -30.0])
    assert float(instability_per_filter(peaks, landmarks, SIZE)) < 1e-12


def test_translating_everything_changes_nothing() -> None:
    peaks = peaks_at(moving())
    landmarks = torch.rand(60, 1, 2, dtype=torch.float64) * 224
    shifted = Peaks(peaks.cells, peaks.positions_px + 5, peaks.scores, peaks.side_cells)
    first = instability_per_filter(peaks, landmarks, SIZE)
    assert torch.allclose(first, instability_per_filter(shifted, landmarks + 5, SIZE), atol=1e-12)


def test_one_annotated_image_gives_nan() -> None:
    landmarks = torch.full((60, 1, 2), math.nan)
    landmarks[0] = 3.0
    assert bool(instability_per_filter(peaks_at(moving()), landmarks, SIZE).isnan().all())


def test_spread_of_uniform_cells() -> None:
    uniform = torch.cartesian_prod(torch.arange(14), torch.arange(14))[:, None]
    assert float(spread_per_filter(peaks_at(uniform))) == pytest.approx(4.03, abs=0.02)
    assert float(spread_per_filter(peaks_at(torch.full((9, 1, 2), 4)))) == 0


def test_consistency_is_one_for_an_affine_tracker_and_about_zero_for_chance() -> None:
    cells = moving(200, 300)
    peaks = peaks_at(cells)
    truth = torch.stack([3 * cells[:, 0, 1] - cells[:, 0, 0] + 40.0, 5 * cells[:, 0, 0] + 7.0], -1).double()
    other = torch.rand(200, 2, dtype=torch.float64) * 224
    score, landmark = consistency_per_filter(peaks, torch.stack([other, truth], 1))
    assert float(score[0]) == pytest.approx(1, abs=1e-6)
    assert int(landmark[0]) == 1
    assert -0.1 < float(score[1:].mean()) < 0.01


def test_a_constant_peak_is_not_consistent() -> None:
    truth = torch.rand(50, 1, 2) * 224
    score, _ = consistency_per_filter(peaks_at(torch.full((50, 1, 2), 6)), truth)
    assert abs(float(score)) < 0.12


def test_too_few_landmarks_leave_consistency_undefined() -> None:
    truth = torch.full((50, 1, 2), math.nan)
    truth[:9] = 1.0
    assert bool(consistency_per_filter(peaks_at(moving(50, 2)), truth)[0].isnan().all())


def test_folds_keep_a_photo_together() -> None:
    """Crops of one photo that repeat each other must not help: with the photo known, the fit never saw its twins."""
    photo = torch.arange(20).repeat_interleave(10)
    cells = torch.randint(0, 14, (20, 1, 2)).repeat_interleave(10, 0)
    truth = (torch.rand(20, 1, 2) * 224).repeat_interleave(10, 0)
    leaked, _ = consistency_per_filter(peaks_at(cells), truth)
    honest, _ = consistency_per_filter(peaks_at(cells), truth, photo)
    assert float(honest) < float(leaked)


def correlation_by_pairs(peaks: Peaks, live: torch.Tensor) -> float:
    """The mean over pairs of filters of the correlation of their peaks, the mean over both axes, pair by pair."""
    found = []
    of = [peaks.cells[:, k] - peaks.cells[:, k].mean(0) for k in live.nonzero()[:, 0].tolist()]
    moving_ones = [c for c in of if bool((c.norm(dim=0) > 1e-9).all())]
    for i, a in enumerate(moving_ones):
        for b in moving_ones[i + 1 :]:
            found.append(float(((a * b).sum(0) / (a.norm(dim=0) * b.norm(dim=0))).mean()))
    return sum(found) / len(found)


def test_correlation_of_copies_and_of_strangers() -> None:
    cells = moving(400, 1)
    live = torch.ones(2, dtype=torch.bool)
    same = peaks_at(torch.cat([cells, cells], 1))
    assert filter_correlation_of(same, live) == pytest.approx(1)
    assert abs(filter_correlation_of(peaks_at(moving(400, 2)), live)) < 0.15
    mirrored = peaks_at(torch.cat([cells, 13 - cells], 1))
    assert filter_correlation_of(mirrored, live) == pytest.approx(-1)


def test_mean_correlation_without_the_matrix_is_the_mean_over_pairs() -> None:
    generator = torch.Generator().manual_seed(4)
    cells = torch.randint(0, 9, (40, 30, 2), generator=generator).double()
    cells[:, 3:6] = cells[:, :1]
    cells[:, 7, 0] = 5.0  # still on one axis: undefined with every other filter
    cells[:, 8] = 0.0
    cells[:, 9] = 4.1 / 3  # its mean is not itself but for rounding, which must not count as movement
    assert float((cells[:, 9] - cells[:, 9].mean(0)).norm()) > 0
    live = torch.ones(30, dtype=torch.bool)
    live[20:] = False
    value = filter_correlation_of(peaks_at(cells), live)
    assert value == pytest.approx(correlation_by_pairs(peaks_at(cells), live), abs=1e-12)
    assert 0.01 < value < 0.2
    only = torch.arange(30) == 2
    assert math.isnan(filter_correlation_of(peaks_at(cells), only))
    assert math.isnan(filter_correlation_of(peaks_at(cells), (torch.arange(30) == 7) | only))


def test_distinct_parts_by_the_definition() -> None:
    generator = torch.Generator().manual_seed(5)
    cells = 20 * torch.rand(50, 1, 2, generator=generator).double() + 3 * torch.rand(50, 40, 2, generator=generator)
    flat = cells.permute(1, 0, 2).reshape(40, -1)
    similarity = torch.exp(-torch.cdist(flat, flat).square() / 50 / 2)
    wanted = float(1 / similarity.mean())
    assert 2 < wanted < 20
    assert distinct_parts(peaks_at(cells), torch.ones(40, dtype=torch.bool)) == pytest.approx(wanted, rel=1e-5)


def test_distinct_parts_counts_places() -> None:
    base = torch.randint(3, 8, (50, 1, 2))
    parts = torch.cat([base, base + torch.tensor([5, 0]), base + torch.tensor([0, 5])], 1).repeat_interleave(20, 1)
    assert distinct_parts(peaks_at(parts), torch.ones(60, dtype=torch.bool)) == pytest.approx(3, abs=0.01)
    assert distinct_parts(peaks_at(base.repeat(1, 9, 1)), torch.ones(9, dtype=torch.bool)) == pytest.approx(1)


def test_the_constant_centre_wins_instability_and_nothing_else(generator: torch.Generator) -> None:
    """Why instability never stands alone."""
    truth = 112 + torch.randn(120, 1, 2, dtype=torch.float64) * 35
    kinds = {}
    for kind in ("random", "centre", "corner"):
        peaks = null_peaks(kind, 120, (14, 14), *GRID, input_size_px=SIZE, filters=32, generator=generator)
        kinds[kind] = localisation_scores(
            peaks, truth, SIZE, landmark_names=("head",), generator=generator, rounds=10, fixed_null=kind != "random"
        )
    assert kinds["centre"].instability.value < kinds["corner"].instability.value < kinds["random"].instability.value
    assert kinds["centre"].peak_spread_cells.value == 0
    assert kinds["centre"].consistency.value < 0.05
    assert math.isnan(kinds["centre"].filter_correlation.value)
    assert kinds["random"].filter_correlation.value == pytest.approx(0, abs=0.02)


def test_instability_on_all_photos_is_not_had_by_the_choice_of_photos() -> None:
    """A filter that answers most where it keeps its distance is stable on its hundred photos only."""
    truth = torch.rand(160, 1, 2, dtype=torch.float64) * 224
    beside = (truth + 16 - 8).flip(-1) / 16  # the cell one step from the landmark, always
    astray = torch.rand(160, 1, 2) * 13
    easy = (torch.arange(160) < 100)[:, None, None]
    peaks = peaks_at(torch.where(easy, beside, astray), 1.0 + easy[..., 0].double())

    def scored(images: int) -> LocalisationScores:
        draws = torch.Generator().manual_seed(3)
        found = localisation_scores(
            peaks.rows(torch.arange(images)), truth[:images], SIZE, landmark_names=("head",), generator=draws, rounds=9
        )
        # The intervals of the other scores are those of a version without this one.
        assert torch.equal(draws.get_state(), spent.get_state())
        return found

    spent = torch.Generator().manual_seed(3)
    for _ in range(7):
        bootstrap(lambda _: 0.0, 160, generator=spent, rounds=9)
    every = scored(160)
    assert every.instability.value == pytest.approx(0, abs=1e-12)
    assert every.instability_all.value > 0.05
    assert every.instability_all.interval[0] < every.instability_all.value < every.instability_all.interval[1]
    spent = torch.Generator().manual_seed(3)
    for _ in range(7):
        bootstrap(lambda _: 0.0, 100, generator=spent, rounds=9)
    assert scored(100).instability_all.value == pytest.approx(0, abs=1e-12)


def test_scores_without_landmarks_are_undefined_and_counted(generator: torch.Generator) -> None:
    scores = localisation_scores(
        peaks_at(moving(30, 4)), torch.zeros(30, 0, 2), SIZE, landmark_names=(), generator=generator, rounds=5
    )
    assert plain(scores)["instability"] == {"value": None, "interval": [None, None], "n": 0, "unit": "photos"}
    assert scores.peak_spread_cells.n == 30


@pytest.mark.parametrize("kind", ["centre", "corner"])
def test_a_constant_null_is_one_filter_and_counts_every_photo(kind: str, generator: torch.Generator) -> None:
    """Whatever the number of filters and their scores, which would choose the photos of other filters."""
    truth, own = torch.rand(130, 1, 2, generator=generator) * 224, peaks_at(moving(130, 2))
    found = []
    for filters in (1, 16):
        peaks = null_peaks(kind, 130, (14, 14), *GRID, input_size_px=SIZE, filters=filters, generator=generator)
        draws = torch.Generator().manual_seed(3)
        scores = localisation_scores(
            peaks, truth, SIZE, landmark_names=("head",), generator=draws, rounds=5, fixed_null=True
        )
        less = instability_differences(own, {kind: peaks}, truth, SIZE, generator=draws, rounds=5)
        found.append((scores.instability, less[kind], scores.consistency))
    for one, many in zip(*found, strict=True):
        assert (one.value, *one.interval) == pytest.approx((many.value, *many.interval), abs=1e-12)
    distance = (peaks.positions_px[:, 0] - truth[:, 0]).norm(dim=-1) / math.hypot(*SIZE)
    assert found[0][0].value == pytest.approx(float(distance.std()))


def test_landmarks_of_other_photos_are_refused() -> None:
    with pytest.raises(ValueError, match="landmarks of 60 images like the peaks, got 59"):
        instability_per_filter(peaks_at(moving()), torch.zeros(59, 1, 2), SIZE)
    with pytest.raises(ValueError, match="random, centre or corner, got middle"):
        null_peaks("middle", 3, (4, 4), *GRID, input_size_px=SIZE, generator=torch.Generator())


@pytest.mark.data
def test_published_null_models_on_the_real_photos(shared, generator: torch.Generator) -> None:
    """Random is known to be 0.158 for fox on all annotated photos; the centre is what a plain loop gives."""
    from partlens.data.images import ImageSet

    foxes = ImageSet.open(shared / "data" / "animal-part").select(category="fox")
    assert foxes.part_truth is not None
    truth = torch.from_numpy(foxes.part_truth.for_keys(foxes.keys).positions_px).double()
    values = {}
    for kind in ("random", "centre"):
        peaks = null_peaks(kind, len(foxes), (14, 14), *GRID, input_size_px=SIZE, filters=64, generator=generator)
        values[kind] = float(instability_per_filter(peaks, truth, SIZE).mean())
    assert values["random"] == pytest.approx(0.158, abs=0.002)
    assert values["centre"] == pytest.approx(0.0697, abs=0.001)


def test_null_table_over_the_six_categories(shared, generator: torch.Generator) -> None:
    """The papers' null table is of thirty categories, of which six are here; every cell is also had by plain loops."""
    from partlens.data.images import ImageSet

    animals = ImageSet.open(shared / "data" / "animal-part")
    rows: dict[str, list[float]] = {"random": [], "centre": [], "corner": [], "head": []}
    for category in ("cat", "cattle", "elephant", "fox", "giant_panda", "zebra"):
        photos = animals.select(category=category)
        truth = torch.from_numpy(photos.part_truth.for_keys(photos.keys).positions_px).double()
        for kind in ("random", "centre", "corner"):
            peaks = null_peaks(kind, len(photos), (14, 14), *GRID, input_size_px=SIZE, filters=100, generator=generator)
            rows[kind].append(float(instability_per_filter(peaks, truth, SIZE).mean()))
            if kind != "random":
                stands = (112.0, 112.0) if kind == "centre" else (8.0, 8.0)
                loops = []
                for landmark in range(truth.shape[1]):
                    scores = peaks.scores[:, 0].tolist()
                    seen = [
                        (-scores[k], k, math.dist(stands, at) / math.hypot(*SIZE))
                        for k, at in enumerate(truth[:, landmark].tolist())
                        if at[0] == at[0]
                    ]
                    far = [d for _, _, d in sorted(seen)[:100]]
                    mean = sum(far) / len(far)
                    loops.append(math.sqrt(sum((d - mean) ** 2 for d in far) / (len(far) - 1)))
                first = float(instability_per_filter(peaks.filters(torch.tensor([0])), truth, SIZE)[0])
                assert first == pytest.approx(sum(loops) / len(loops), rel=1e-9)
        head = list(photos.part_truth.landmarks).index("head")
        shown = truth[~truth[:, head].isnan().any(-1)]
        oracle = Peaks(torch.zeros(len(shown), 1, 2), shown[:, head, None], torch.rand(len(shown), 1), (14, 14))
        rows["head"].append(float(instability_per_filter(oracle, shown, SIZE)[0]))
    means = {kind: sum(values) / 6 for kind, values in rows.items()}
    # Printed in the fact sheet for all thirty: 0.152, 0.068, 0.123, 0.047.
    assert means == pytest.approx({"random": 0.149, "centre": 0.067, "corner": 0.115, "head": 0.040}, abs=0.0015)


def test_a_difference_on_the_same_photos_is_zero_for_the_same_peaks_and_tighter_than_two_intervals() -> None:
    torch.manual_seed(3)
    landmarks = (torch.rand(60, 2, 2) * 224).double()
    landmarks[:20, 1] = math.nan
    places = ((landmarks[:, 0].flip(-1) - 8) / 16).round().clamp(0, 13)
    tracker = peaks_at(places[:, None].long())
    # A worse tracker: one cell off in either direction, at random.
    worse = peaks_at((places + torch.randint(-1, 2, places.shape)).clamp(0, 13)[:, None].long())

    def between(a: Peaks, b: Peaks) -> Estimate:
        draws = torch.Generator().manual_seed(0)
        return instability_differences(a, {"b": b}, landmarks, SIZE, generator=draws, rounds=100)["b"]

    same = between(tracker, tracker)
    assert (same.value, same.interval, same.n) == (0.0, (0.0, 0.0), 60)
    gap = between(tracker, worse)
    assert gap.value == pytest.approx(
        float(instability_per_filter(tracker, landmarks, SIZE)) - float(instability_per_filter(worse, landmarks, SIZE))
    )
    assert gap.interval[1] < 0
    assert between(worse, tracker).value == -gap.value

    def alone(peaks: Peaks) -> tuple[float, float]:
        return bootstrap(
            lambda i: float(instability_per_filter(peaks.rows(i), landmarks[i], SIZE)),
            60,
            generator=torch.Generator().manual_seed(0),
            rounds=100,
        ).interval

    apart = alone(tracker)[1] - alone(worse)[0], alone(tracker)[0] - alone(worse)[1]
    assert gap.interval[1] - gap.interval[0] < apart[0] - apart[1]


def test_a_difference_without_landmarks_is_undefined() -> None:
    peaks = peaks_at(moving())
    (found,) = instability_differences(
        peaks, {"itself": peaks}, torch.zeros(60, 0, 2), SIZE, generator=torch.Generator()
    ).values()
    assert math.isnan(found.value)
    assert found.n == 0


@pytest.mark.parametrize("crops", [2, 4])
def test_crops_of_one_photo_make_no_interval_narrower(crops: int) -> None:
    """A photo is drawn with all its crops: shown several times it says no more than once."""
    generator = torch.Generator().manual_seed(3)
    cells = torch.randint(0, 14, (40, 6, 2), generator=generator)
    strength = torch.rand(40, 6, generator=generator)
    landmarks = torch.rand(40, 2, 2, generator=generator) * 224
    landmarks[:7, 0] = torch.nan
    whole = {}
    for times in (1, crops):
        peaks = peaks_from_cells(
            cells.repeat_interleave(times, 0), strength.repeat_interleave(times, 0), (14, 14), (8.0, 8.0), (16.0, 16.0)
        )
        photos = torch.arange(40).repeat_interleave(times) + 100
        scores = localisation_scores(
            peaks,
            landmarks.repeat_interleave(times, 0),
            (224, 224),
            landmark_names=("head", "tail"),
            photos=photos,
            generator=torch.Generator().manual_seed(0),
            rounds=20,
        )
        still = peaks.positions_px[:, :1].expand_as(peaks.positions_px)
        other = replace(peaks, positions_px=0.9 * still + 0.1 * peaks.positions_px)
        difference = instability_differences(
            peaks,
            {"other": other},
            landmarks.repeat_interleave(times, 0),
            (224, 224),
            photos=photos,
            generator=torch.Generator().manual_seed(0),
            rounds=20,
        )["other"]
        whole[times] = (scores.instability_all, scores.consistency, scores.filter_correlation, difference)
    for once, more in zip(whole[1], whole[crops], strict=True):
        assert once.n == more.n == 40
        width = [e.interval[1] - e.interval[0] for e in (once, more)]
        assert width[1] > 0.8 * width[0]


def test_an_empty_map_stands_in_the_corner_and_is_counted() -> None:
    scores = torch.ones(10, 4)
    scores[:5, 0] = 0
    scores[:, 1] = 0
    peaks = peaks_from_cells(torch.full((10, 4, 2), 3), scores, (8, 8), (0.0, 0.0), (4.0, 4.0))
    assert _silent_share(peaks) == pytest.approx(15 / 40)
    found = localisation_scores(
        peaks, torch.rand(10, 1, 2), (32, 32), landmark_names=("a",), generator=torch.Generator().manual_seed(0)
    )
    assert found.silent_frac.value == pytest.approx(15 / 40)
    assert found.dead_frac.value == pytest.approx(1 / 4)
    maps = torch.zeros(1, 2, 6, 6)
    maps[0, 1, 4, 2] = 2.0
    assert centroid_cells(maps, 6.0).tolist() == [[[0, 0], [4, 2]]]
    assert bool(centroid_cells(maps * torch.nan, 6.0).isnan().all())


@pytest.mark.parametrize("edge", [(0, 3), (5, 3), (2, 0), (2, 8)])
def test_each_of_the_four_borders_counts(edge: tuple[int, int]) -> None:
    rows, cols = 6, 9

    def share(*places: tuple[float, float]) -> float:
        return border_share(peaks_from_cells(torch.tensor([places]), torch.ones(1, len(places)), (rows, cols), *GRID))

    assert share(edge) == 1
    assert share((2, 3)) == share((1, 1)) == share((4, 7)) == 0
    assert share(edge, (2, 3), (3, 4), (1, 7)) == 0.25
    # A place between cells belongs to the nearer one; half way is inside.
    inward = {0: 0.4, rows - 1: rows - 1.4, cols - 1: cols - 1.4}
    near = tuple(
        inward.get(v, v) if v == e and v in {0, side - 1} else v
        for v, e, side in zip(edge, edge, (rows, cols), strict=True)
    )
    assert share(tuple(map(float, near))) == 1
    assert share((0.5, 3.0)) == share((rows - 1.5, 3.0)) == share((2.0, cols - 1.5)) == 0


def test_consistency_is_bounded_below_by_minus_one() -> None:
    # Peaks that say left in four folds and right in the fifth: the fit is as wrong there as can be.
    photos = torch.arange(20)
    held = photos % 5 == 0
    place = torch.where(held, 13.0, torch.where(photos % 2 == 0, 0.0, 1.0)).double()
    cells = torch.stack([place, place], -1)[:, None]
    truth = torch.where(photos % 2 == 0, 0.0, 16.0).double()
    truth[held] = 8.0
    landmarks = torch.stack([truth, truth], -1)[:, None]
    raw = consistency_per_filter(peaks_at(cells), landmarks)[0]
    assert raw.tolist() == [-1.0]
    both = torch.cat([cells, torch.zeros(20, 1, 2).double()], 1)
    assert consistency_per_filter(peaks_at(both), landmarks)[0][1] > -1


@pytest.mark.parametrize("photos", [30, 60, 200])
def test_the_interval_of_consistency_holds_its_own_value_also_for_chance(photos: int) -> None:
    truth = moving(photos, 5) * 16.0
    chance = localisation_scores(
        peaks_at(moving(photos, 40)),
        torch.stack([truth[:, 0], truth[:, 1]], 1),
        (224, 224),
        landmark_names=("head", "legs"),
        generator=torch.Generator().manual_seed(0),
    ).consistency
    assert chance.low < chance.value < chance.high
