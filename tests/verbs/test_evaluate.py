"""Fitted explainers measured on held-out photos of generated flowers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import partlens
from partlens.data.images import ImageSet
from partlens.errors import AtWorkError
from partlens.evaluation.explainer_evaluation import EvaluationRows
from partlens.evaluation.results import Evaluation, Gallery
from partlens.explainer.config import ExplainerConfig
from partlens.network.performer import Performer
from partlens.records import plain
from partlens.run import Run
from partlens.verbs.evaluate import evaluate
from partlens.verbs.fit_explainer import fit_explainer
from partlens.verbs.parts import parts
from partlens.verbs.runs import report

SMALL: dict[str, Any] = {
    "epochs": 2,
    "warmup_epochs": 1,
    "views": 3,
    "batch_size": 8,
    "background_batch": 4,
    "precision": "float32",
}
RED = "petal-red"


def test_fit_evaluate_report(run: Path, tiny: Performer, few_flowers: ImageSet) -> None:
    manifest = json.loads((run / "run.json").read_text())
    assert manifest["status"] == "finished"
    assert len(manifest["p_by_seed"]) == 2
    assert manifest["p_by_seed"][0] != manifest["p_by_seed"][1]
    assert not (run / "cache").exists()
    assert not list(run.glob("checkpoint*"))
    scores = evaluate(run, few_flowers, model=tiny, rounds=5)
    held = len(few_flowers.select(category=RED, split="test"))
    assert scores.data.photos == held
    assert list(dict(scores.subjects())) == ["explainer", "tap", "top", "random", "centre", "corner"]
    for kind, gap in scores.instability_minus_null.items():
        own, its = scores.explainer.instability, scores.nulls[kind].instability
        assert gap.value == pytest.approx(own.value - its.value)
        assert gap.low <= gap.value <= gap.high
    # What is read alike: the explainer by its largest cells, the performer by centroids.
    same = scores.same_peak
    assert same is not None
    for layer in same.values():
        assert layer.instability.defined
    read_twice = ((same["explainer_largest"], scores.explainer), (scores.performer.tap, same["tap_centroid"]))
    for by_largest, by_centroid in read_twice:
        # A centroid lies within its map's cells, so it moves no further than the largest cell.
        assert by_centroid.peak_spread_cells.value < by_largest.peak_spread_cells.value
    assert (scores.p.n, scores.p.unit) == (2, "seeds")
    assert 0 <= scores.reconstruction.agreement_top1.value <= 1
    assert scores.reconstruction.errors_by == "logistic head"
    assert scores.reconstruction.error_increase_points.n > held
    assert scores.data.same_as_fit
    assert plain(Evaluation.read(run)) == plain(scores)
    gallery = Gallery.read(run / "gallery")
    assert all((run / "gallery" / photo.file).exists() for f in gallery.layers["explainer"] for photo in f.photos)
    page = report(run)
    assert page == run / "report.html"
    assert "data:image/jpeg" in page.read_text()


def test_without_a_category_all_photos_are_explained(tiny: Performer, few_flowers: ImageSet, tmp_path: Path) -> None:
    fit_explainer(tiny, few_flowers, out=tmp_path / "run", config=SMALL, seeds=1)
    scores = evaluate(tmp_path / "run", few_flowers, model=tiny, gallery="none", rounds=5)
    assert scores.reconstruction.errors_by is None
    assert not scores.reconstruction.error_increase_points.defined
    assert scores.p.defined
    assert not scores.p.has_interval
    assert list(scores.explainer.by_category) == [""]
    assert report(tmp_path / "run").stat().st_size > 10_000


def test_photos_without_landmarks_still_give_fidelity(tiny: Performer, tmp_path: Path) -> None:
    pictures = [np.random.default_rng(k).integers(0, 255, (40, 40, 3), dtype=np.uint8) for k in range(24)]
    images = ImageSet.from_arrays(pictures, splits=["train"] * 12 + ["test"] * 12)
    fit_explainer(tiny, images, out=tmp_path / "run", config=SMALL, seeds=1)
    scores = evaluate(tmp_path / "run", images, model=tiny, gallery="none", rounds=5)
    assert not scores.explainer.instability.defined
    assert scores.explainer.peak_spread_cells.defined
    report(tmp_path / "run")


def test_photos_of_the_fit_are_known_under_other_names(tiny: Performer, few_flowers: ImageSet, tmp_path: Path) -> None:
    """Training photos in another folder, called test photos there, are no held-out photos."""
    pixels = [np.asarray(few_flowers.read(i)) for i in range(len(few_flowers))]
    photos = ImageSet.from_arrays(pixels, few_flowers.categories, few_flowers.splits)
    run = fit_explainer(tiny, photos, out=tmp_path / "run", category=RED, config=SMALL, seeds=1).path
    train, test = (photos.indices(category=RED, split=split) for split in ("train", "test"))
    chosen = [pixels[i] for i in (*train[:3], *test[:4])]
    others = ImageSet.from_arrays(chosen, [RED] * 7, ["test"] * 7)
    found = evaluate(run, others, model=tiny, gallery="none", rounds=5)
    assert "3 of the 7 photos were used in the fit: the scores flatter" in found.warnings
    strangers = ImageSet.from_arrays(chosen[3:], [RED] * 4, ["test"] * 4)
    for held in (strangers, photos):
        found = evaluate(run, held, model=tiny, gallery="none", rounds=5)
        assert not any("used in the fit" in text for text in found.warnings)
    copied = [*pixels[: test[0]], pixels[train[0]], *pixels[test[0] + 1 :]]  # in the data of the fit itself
    twice = ImageSet.from_arrays(copied, few_flowers.categories, few_flowers.splits)
    run = fit_explainer(tiny, twice, out=tmp_path / "twice", category=RED, config=SMALL, seeds=1).path
    warnings = evaluate(run, twice, model=tiny, gallery="none", rounds=5).warnings
    assert f"1 of the {len(test)} photos were used in the fit: the scores flatter" in warnings
    (run / "photos.json").unlink()
    assert evaluate(run, others, model=tiny, gallery="none", rounds=5).data.photos == 7


def test_measuring_on_the_training_photos_warns(run: Path, tiny: Performer, few_flowers: ImageSet) -> None:
    found = evaluate(run, few_flowers, model=tiny, split="train", gallery="none", rounds=5)
    assert any("photos of the fit" in text for text in found.warnings)


def test_a_run_remembers_its_performer(run: Path, tiny: Performer, few_flowers: ImageSet) -> None:
    with pytest.raises(partlens.PartlensError, match="made with a network object"):
        evaluate(run, few_flowers)
    with pytest.raises(partlens.PartlensError, match="Give them again"):
        evaluate(run, model=tiny)
    other = tiny.module
    with torch.no_grad():
        other.get_submodule("conv1").weight.add_(1)
    with pytest.raises(partlens.PartlensError, match="the performer of the run"):
        evaluate(run, few_flowers, model=other)


def test_public_names_load_lazily() -> None:
    for name in partlens.__all__:
        assert getattr(partlens, name) is not None
    assert set(partlens.__all__) <= set(dir(partlens))
    with pytest.raises(AttributeError, match="no attribute 'explain_everything'"):
        partlens.explain_everything
    assert callable(partlens.report)
    assert partlens.ExplainerConfig is ExplainerConfig


def test_an_explainer_of_several_categories_shares_its_filters_out(
    flower_judge: Performer, few_flowers: ImageSet, tmp_path: Path
) -> None:
    path = tmp_path / "run"
    fitted = fit_explainer(flower_judge, few_flowers, out=path, category="petal-red,petal-blue", config=SMALL, seeds=1)
    assert fitted.record.data.categories == ("petal-blue", "petal-red")
    result = evaluate(path, few_flowers, model=flower_judge, gallery="none", rounds=5)
    each = result.explainer.by_category.values()
    assert sum(one.filters for one in each) == 12
    assert {r.category for r in result.filters["explainer"]} == set(result.explainer.by_category)
    mean = sum(one.instability.value * one.filters for one in each) / sum(one.filters for one in each)
    assert result.explainer.instability.value == pytest.approx(mean)
    gap = result.instability_minus_null["corner"]
    assert gap.value == pytest.approx(mean - result.nulls["corner"].instability.value)
    # Two categories that are outputs of the performer: the errors are its own, on the photos of both.
    assert result.reconstruction.errors_by == "performer"
    held = len(few_flowers.indices(split="test"))
    assert result.reconstruction.performer_error_percent.n == held
    found = parts(path, few_flowers, model=flower_judge, config={"photos_max": 12, "rounds": 2, "null_filters": 20})
    assert found.photos == min(12, held)
    assert found.categories == ("petal-blue", "petal-red")
    # Every filter has a part of the category that the evaluation gives it.
    evaluated = {row.filter: row.category for row in result.filters["explainer"]}
    assert {row.filter: row.part.partition(": ")[0] for row in found.filters} == evaluated
    assert all(part.id.startswith(f"{part.category}: ") for part in found.parts)
    assert {k: part.category for part in found.parts for k in part.filters} == evaluated
    page = report(path).read_text()
    assert "petal-blue, petal-red" in page
    assert "a filter belongs to the one whose photos activate it most" in page


def test_errors_of_a_single_logistic_output_are_of_its_sign(
    tiny: Performer, few_flowers: ImageSet, tmp_path: Path
) -> None:
    tiny.module.classes = nn.Linear(16, 1)
    judge = Performer(tiny.module, "judge", tiny.preprocessing, "judge-weights", "relu2", class_names=(RED,))
    fit_explainer(judge, few_flowers, out=tmp_path / "run", category=RED, config=SMALL, seeds=1)
    result = evaluate(tmp_path / "run", few_flowers, model=judge, gallery="none", rounds=5)
    rows = few_flowers.indices(split="test")
    with torch.no_grad():
        outputs = judge.module(judge.preprocessing([few_flowers.read(i) for i in rows]))[:, 0]
    wrong = [(float(s) > 0) != (few_flowers.categories[i] == RED) for s, i in zip(outputs, rows, strict=True)]
    assert result.reconstruction.errors_by == "performer"
    assert result.reconstruction.performer_error_percent.value == pytest.approx(100 * np.mean(wrong))


def test_what_is_read_is_said() -> None:
    none = torch.zeros(0, dtype=torch.long)
    several = EvaluationRows(range(3), range(5), range(7), none, none).words((RED, "blue"))
    assert several.startswith("reads 3 held-out photos of petal-red, blue, 5 others, 7 training photos, since the cat")
    assert several.endswith("and training photos decide to which category a filter belongs")
    assert EvaluationRows(range(3), (), (), none, none).words(("",)) == "reads 3 held-out photos"


def test_beside_p_stands_what_the_part_filters_keep_alone(run: Path, few_flowers: ImageSet, tiny: Performer) -> None:
    result = evaluate(run, few_flowers, model=tiny, gallery="none", rounds=5)
    alone = result.parts_alone
    for kind in (result.reconstruction, alone.parts, alone.other_photo, alone.nothing):
        assert set(kind.variance_kept) == set(result.reconstruction.variance_kept)
        assert kind.agreement_top1.n == result.data.photos
        assert kind.performer_error_percent == result.reconstruction.performer_error_percent
    # With nothing at all every photo gets one answer and one reconstruction, which no target varies with.
    assert all(kept.value <= 0 for kept in alone.nothing.variance_kept.values())
    last = list(alone.parts.variance_kept)[-1]
    assert alone.parts.variance_kept[last].value < result.reconstruction.variance_kept[last].value


def test_intervals_range_over_photos_not_crops(run: Path, tiny: Performer, few_flowers: ImageSet) -> None:
    kinds = list(zip(few_flowers.categories, few_flowers.splits, strict=True))
    half = dataclasses.replace(
        few_flowers, photos=tuple(f"{kind}-{kinds[:k].count(kind) // 2}" for k, kind in enumerate(kinds))
    )
    whole = evaluate(run, few_flowers, model=tiny, gallery="none", rounds=5)
    pairs = evaluate(run, half, model=tiny, gallery="none", rounds=5)
    held = [
        k
        for k, (c, s) in enumerate(zip(few_flowers.categories, few_flowers.splits, strict=True))
        if c == RED and s == "test"
    ]
    photos = len({half.photos[k] for k in held})
    assert photos < len(held) == pairs.data.photos
    assert whole.explainer.dead_frac.n == len(held)
    for found in (
        pairs.explainer.dead_frac,
        pairs.explainer.silent_frac,
        pairs.nulls["random"].border_frac,
        pairs.reconstruction.agreement_top1,
        *pairs.reconstruction.variance_kept.values(),
    ):
        assert found.n == photos
    assert pairs.reconstruction.error_increase_points.n < whole.reconstruction.error_increase_points.n
    adds = parts(run, half, model=tiny, config={"rule": "clusters", "null_filters": 50, "rounds": 4}).contributions
    assert adds.interpretable_share.n == photos
    assert adds.removal_check["shapley"].correlation.n == photos


def test_photos_without_a_training_split_can_be_measured(run: Path, tiny: Performer, few_flowers: ImageSet) -> None:
    elsewhere = dataclasses.replace(few_flowers, splits=("test",) * len(few_flowers))
    found = evaluate(run, elsewhere, model=tiny, gallery="none", rounds=5)
    assert found.data.photos == few_flowers.category_counts()[RED]
    assert found.reconstruction.errors_by == "logistic head"  # it was fitted on the fit's photos


def test_one_verb_writes_at_a_time_and_a_refused_one_changes_nothing(
    run: Path, tiny: Performer, few_flowers: ImageSet
) -> None:
    evaluate(run, few_flowers, model=tiny, gallery="none", rounds=5)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with Run(run).writing():
        for write in (
            lambda: evaluate(run, few_flowers, model=tiny, gallery="none", rounds=5),
            lambda: report(run),
        ):
            with pytest.raises(AtWorkError, match="is locked by another process"):
                write()
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    with pytest.raises(partlens.PartlensError, match="rounds of at least 1, got 0"):
        evaluate(run, few_flowers, model=tiny, rounds=0)


def test_rounds_widen_no_value_and_narrow_the_doubt_of_intervals(
    run: Path, tiny: Performer, few_flowers: ImageSet
) -> None:
    few, more = (evaluate(run, few_flowers, model=tiny, gallery="none", rounds=rounds) for rounds in (2, 9))
    assert few.explainer.dead_frac.value == more.explainer.dead_frac.value
    for name in ("instability", "peak_spread_cells"):
        assert few.explainer.of(name).value == more.explainer.of(name).value
        assert few.explainer.of(name).interval != more.explainer.of(name).interval
    assert few.reconstruction.error_increase_points.interval != more.reconstruction.error_increase_points.interval


def test_oddities_of_landmarks_are_warnings_of_the_evaluation(
    run: Path, tiny: Performer, few_flowers: ImageSet, tmp_path: Path
) -> None:
    rows = few_flowers.indices(RED, "test")[:3]
    for row in rows:
        few_flowers.read(row).save(tmp_path / f"{row}.png")
    names = "".join(f"{row}.png,{RED},Test\n" for row in rows)
    (tmp_path / "images.csv").write_text(f"image,Category,Split\n{names}")
    places = "".join(f"{row}.png,head,{x},{x},0.9\n" for row, x in zip(rows, (0, 0, 20), strict=True))
    (tmp_path / "landmarks.csv").write_text(f"image,landmark,x,y,score\n{places}gone.PNG,head,3,4,1\n")
    warnings = " ".join(evaluate(run, tmp_path, model=tiny, rounds=2, gallery="none").warnings)
    for text in ("landmarks of 1 images that are not there: gone.PNG", "2 landmarks stand at exactly 0,0", "score"):
        assert text in warnings
