"""The verb parts on a tiny network: the file, names a person edits, contributions, and explaining by parts."""

from __future__ import annotations

import dataclasses
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

import partlens
from partlens.cli import main
from partlens.data.images import ImageSet
from partlens.errors import AtWorkError, ImageError, InputError, RunError
from partlens.network.performer import Performer, weights_sha256
from partlens.object_parts import shares
from partlens.object_parts.record import PartsFile
from partlens.progress import Progress
from partlens.records import read_json, read_tensors
from partlens.run import Run
from partlens.verbs.printed import print_parts

SMALL: dict[str, Any] = {
    "epochs": 1,
    "warmup_epochs": 1,
    "views": 2,
    "batch_size": 8,
    "background_batch": 4,
    "precision": "float32",
}
QUICK: dict[str, Any] = {
    "rule": "clusters",
    "null_filters": 50,
    "rounds": 4,
    "photos_max": 12,
    "clusters_min": 2,
    "clusters_max": 3,
}
BY_LANDMARK: dict[str, Any] = {**QUICK, "rule": "landmarks", "photos_max": 40}
RED = "petal-red"


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares, "_ROUNDS", 20)  # no test here is about the width of an interval


@pytest.fixture
def found(run: Path, tiny: Performer, few_flowers: ImageSet) -> PartsFile:
    return partlens.parts(run, few_flowers, model=tiny, config=QUICK)


def test_every_filter_has_a_part_and_the_contributions_sum(run: Path, found: PartsFile, few_flowers: ImageSet) -> None:
    assert PartsFile.read(run).model_dump_json() == found.model_dump_json()
    assert sorted(k for part in found.parts for k in part.filters) == list(range(12))
    assert [p.id for p in found.parts] == [*(f"part {k}" for k in range(1, len(found.parts))), "other"]
    own = few_flowers.indices(category=RED, split="test")
    for part in found.parts:
        assert (part.strip is None) == (not part.filters)
        if part.strip is not None:
            with Image.open(run / part.strip) as strip:
                assert strip.height == 112
            assert set(part.shown) <= set(part.filters)
            assert len(part.shown) == min(4, len(part.filters))
    measured = found.contributions
    assert found.photos == len(measured.parts[0].predicted) == min(12, len(own))
    assert found.landmarks == dict.fromkeys(few_flowers.part_truth.landmarks, found.photos)
    assert sum(p.share.value for p in measured.parts) == pytest.approx(1, abs=1e-6) or any(
        not p.share.defined for p in measured.parts
    )
    total = sum(p.shapley.value for p in measured.parts)
    rise = measured.fed_back.value - measured.baseline.value
    assert total == pytest.approx(measured.interpretable_share.value * rise, abs=1e-4)
    assert measured.interpretable_share.value + measured.ordinary_share.value == pytest.approx(1, abs=1e-6)
    assert measured.standard_error == 0
    assert set(measured.removal_check) == {"shapley", "integrated_gradients", "gradient_activation", "part_size"}
    for part in measured.parts:
        assert part.shapley.value == pytest.approx(np.mean(part.predicted), abs=1e-4)
        assert part.removal.value == pytest.approx(np.mean(part.measured), abs=1e-4)
        assert part.integrated_null.n == 20


def test_with_landmarks_nearest_stays_within_the_thresholds(
    run: Path, tiny: Performer, few_flowers: ImageSet, capsys: pytest.CaptureFixture[str]
) -> None:
    found = partlens.parts(run, few_flowers, model=tiny, split="train", config=BY_LANDMARK)
    assert (found.rule, found.split) == ("landmarks", "train")
    (evidence,) = found.evidence
    assert evidence.null_kept_frac <= 0.1
    for row in found.filters:
        if row.part != "other":
            assert row.part == row.nearest
            assert row.distance_frac <= 0.2
            assert row.consistency > evidence.null_consistency_p95 - 1e-5
    loose = {**BY_LANDMARK, "consistency_min": -1.0, "distance_max_frac": 1.0}
    given = partlens.parts(run, few_flowers, model=tiny, split="train", config=loose)
    assert {row.part for row in given.filters if not row.dead} <= set(few_flowers.part_truth.landmarks)
    assert given.config.consistency_min == -1.0
    capsys.readouterr()
    print_parts(given)
    shown = capsys.readouterr().out
    for part in given.parts:
        if part.filters:
            far, follows = given.mean_place(part.filters)
            assert re.search(rf"{part.name} +{len(part.filters)} +{far:.2f}, {follows:.2f}".replace("-", "[-]"), shown)


def test_the_account_on_the_performer_itself_stands_beside_that_through_the_explainer(
    run: Path, tiny: Performer, few_flowers: ImageSet
) -> None:
    def said() -> str:
        partlens.parts(run, few_flowers, model=tiny, config=QUICK, progress=Progress(Console(file=out, width=600)))
        return out.getvalue()

    out = io.StringIO()
    assert "on the performer itself: not in this run; partlens inspect" in said()
    small = {"photos": 16, "measured": 8, "views": 2, "background": 8}
    found = partlens.inspect(tiny, few_flowers, out=run, config=small)
    own, other = (one.sentence for one in sorted(found.categories, key=lambda one: one.name != "petal-red"))
    out = io.StringIO()
    assert f"on the performer itself: {own}" in said()
    assert other not in out.getvalue()


def test_names_are_kept_when_parts_are_found_again(
    run: Path, found: PartsFile, tiny: Performer, few_flowers: ImageSet
) -> None:
    content = partlens.parts(run, rename=["part 1=head"])
    assert content.parts[0].name == "head"
    assert content.contributions is not None
    assert PartsFile.read(run).contributions.model_dump_json() == found.contributions.model_dump_json()
    again = partlens.parts(run, few_flowers, model=tiny, config=QUICK)
    assert again.parts[0].name == "head"
    assert again.unplaced_names == ()
    assert again.contributions.parts[0].name == "head"
    joined = partlens.parts(run, rename=["part 2 = head"])
    assert joined.named[0].name == "head"
    assert joined.named[0].ids == ("part 1", "part 2")
    assert joined.measured() is None
    measured = partlens.parts(run, few_flowers, model=tiny, config=QUICK)
    assert measured.contributions.parts[0].filters == measured.named[0].filters == joined.named[0].filters
    assert partlens.parts(run, few_flowers, model=tiny, config=QUICK, rename=["other=rest"]).parts[-1].name == "rest"


def test_explaining_by_parts_sums_and_draws(
    run: Path, found: PartsFile, tiny: Performer, few_flowers: ImageSet
) -> None:
    folders = partlens.explain(run, few_flowers.take([0, 1]), model=tiny)
    for folder in folders:
        content = read_json(folder / "explanation.json")
        assert content["explained"] == []
        (one,) = content["parts"]
        assert one["rank"] == 1
        rise = one["fed_back"] - one["baseline"]
        assert sum(p["shapley"] for p in one["parts"]) + one["ordinary"] == pytest.approx(rise, abs=1e-5)
        assert {p["name"] for p in one["parts"]} == {p.name for p in found.named}
        for part in one["parts"]:
            assert (folder / part["heat"]).is_file()
            assert part["null"]["n"] == 20
        arrays = read_tensors(folder / "arrays.safetensors")
        assert arrays["part_heat"].shape == (1, len(one["parts"]), 32, 32)
        assert "Parts through the explainer" in (folder / "explanation.html").read_text()
    (alone,) = partlens.explain(run, few_flowers.take([1]), model=tiny, out=run / "alone")
    first, second = (read_tensors(f / "arrays.safetensors") for f in (folders[1], alone))
    for name in ("part_shapley", "part_filters", "part_heat"):
        assert torch.allclose(first[name], second[name], atol=1e-5), name
    page = partlens.report(run).read_text()
    for words in ("Parts of the explainer", "Taken away", 'href="#image-1"'):
        assert words in page
    (named,) = partlens.explain(run, few_flowers.take([0]), model=tiny, classes=["2", "0"], out=run / "named")
    assert [row["output"] for row in read_json(named / "explanation.json")["parts"]] == [2, 0]
    with pytest.raises(InputError, match="a class of tiny, got tulip. Nearest"):
        partlens.explain(run, few_flowers.take([0]), model=tiny, classes=["tulip"])


def test_before_parts_are_found_explaining_says_what_to_do(run: Path, tiny: Performer, few_flowers: ImageSet) -> None:
    with pytest.raises(RunError, match="parts.json in .*run, got nothing there. Run partlens parts .*run first"):
        partlens.explain(run, few_flowers.take([0]), model=tiny)
    partlens.select_features(tiny, few_flowers, out=run, top_photos=4, pictures=2)
    (folder,) = partlens.explain(run, few_flowers.take([0]), model=tiny)
    content = read_json(folder / "explanation.json")
    assert len(content["explained"]) == 2
    assert content["parts"] == []
    assert any("run partlens parts" in note for note in content["notes"])


def test_a_selection_with_the_explainer_gives_both(
    run: Path, found: PartsFile, tiny: Performer, few_flowers: ImageSet
) -> None:
    partlens.select_features(tiny, few_flowers, out=run, top_photos=4, pictures=2)
    (folder,) = partlens.explain(run, few_flowers.take([0]), model=tiny)
    content = read_json(folder / "explanation.json")
    assert len(content["explained"]) == 2
    assert len(content["parts"]) == 1
    assert {"maps", "part_heat"} <= set(read_tensors(folder / "arrays.safetensors"))
    (folder,) = partlens.explain(run, few_flowers.take([0]), model=tiny, classes=[RED])
    assert read_json(folder / "explanation.json")["parts"] == []  # its classes are no outputs of the tiny network


def test_the_performer_is_handed_back_as_it_was(run: Path, tiny: Performer, few_flowers: ImageSet, state: Any) -> None:
    tiny.module.train()
    before = state(tiny.module, python=False)
    partlens.parts(run, few_flowers, model=tiny, config=QUICK)
    partlens.explain(run, few_flowers.take([0]), model=tiny)
    with pytest.raises(InputError):
        partlens.parts(run, few_flowers, model=tiny, config={"rule": "hand"})
    assert state(tiny.module, python=False) == before


def test_the_same_seed_finds_the_same_parts(
    run: Path, found: PartsFile, tiny: Performer, few_flowers: ImageSet
) -> None:
    before = (run / "parts.json").read_bytes()
    partlens.parts(run, few_flowers, model=tiny, config=QUICK)
    assert (run / "parts.json").read_bytes() == before


def test_a_folder_that_another_process_writes_to_is_left_alone(
    run: Path, found: PartsFile, tiny: Performer, few_flowers: ImageSet
) -> None:
    before = (run / "parts.json").read_bytes()
    with Run(run).writing():
        for write in (
            lambda: partlens.parts(run, few_flowers, model=tiny, config=QUICK),
            lambda: partlens.parts(run, rename=["part 1=head"]),
        ):
            with pytest.raises(AtWorkError, match="is locked by another process. Wait for it or use another folder"):
                write()
    assert (run / "parts.json").read_bytes() == before


def test_errors_name_value_and_remedy(run: Path, tiny: Performer, few_flowers: ImageSet) -> None:
    with pytest.raises(RunError, match="Give them again"):
        partlens.parts(run, model=tiny)
    one = ImageSet.from_arrays([np.zeros((32, 32, 3), np.uint8)] * 2, splits=["test", "train"], categories=[RED] * 2)
    with pytest.raises(ImageError, match="at least 2 photos of petal-red in the split test, got 1. Add photos"):
        partlens.parts(run, one, model=tiny)
    bare = ImageSet.from_arrays(
        [np.full((32, 32, 3), 20 * k, np.uint8) for k in range(8)], splits=["test"] * 8, categories=[RED] * 8
    )
    with pytest.raises(InputError, match="a landmark that enough photos show, got none. Use rule clusters"):
        partlens.parts(run, bare, model=tiny, config=BY_LANDMARK)


def test_a_performer_with_one_output_is_explained_by_its_logit(
    tiny: Performer, few_flowers: ImageSet, tmp_path: Path
) -> None:
    module = tiny.module
    module.classes = torch.nn.Linear(16, 1)
    performer = Performer(module, "tiny", tiny.preprocessing, weights_sha256(module), "relu2")
    run = partlens.fit_explainer(performer, few_flowers, out=tmp_path / "run", category=RED, config=SMALL, seeds=1).path
    partlens.parts(run, few_flowers, model=performer, config=QUICK)
    (folder,) = partlens.explain(run, few_flowers.take([0]), model=performer)
    (one,) = read_json(folder / "explanation.json")["parts"]
    assert one["output"] == 0
    assert one["probability"] == pytest.approx(1 / (1 + np.exp(-one["performer_score"])), abs=1e-6)


def test_the_command_line_prints_parts_and_renames(
    run: Path, found: PartsFile, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["parts", str(run), "--rename", "part 1=head"]) == 0
    shown = capsys.readouterr().out
    assert "head (part 1)" in shown
    assert "keep their part" in " ".join(shown.split())
    assert main(["parts", str(run), "--rename", "part 2=head"]) == 0
    assert "run partlens parts again" in capsys.readouterr().out
    assert main(["parts", str(run), "--rename", "tail=x", "--json"]) == 1
    assert "Did you mean" in capsys.readouterr().err


def test_a_single_output_below_zero_is_not_the_answer(tiny: Performer, few_flowers: ImageSet, tmp_path: Path) -> None:
    """A logistic performer that says "something else" is not shown to take the photo for its category."""
    ranks = {}
    for bias in (50.0, -50.0):
        torch.manual_seed(0)
        tiny.module.classes = torch.nn.Linear(16, 1)
        torch.nn.init.constant_(tiny.module.classes.bias, bias)
        judge = Performer(
            tiny.module, "judge", tiny.preprocessing, weights_sha256(tiny.module), "relu2", class_names=(RED,)
        )
        run = tmp_path / f"run{bias}"
        partlens.fit_explainer(judge, few_flowers, out=run, category=RED, config=SMALL, seeds=1)
        partlens.parts(run, few_flowers, model=judge, config=QUICK)
        (folder,) = partlens.explain(run, few_flowers.take([0]), model=judge)
        content, page = read_json(folder / "explanation.json"), (folder / "explanation.html").read_text()
        assert len(content["parts"]) == (bias > 0)
        assert ("judge takes" in page) == (bias > 0)
        assert ("judge does not take" in page) == (bias < 0)
        assert any("takes this image for something else" in note for note in content["notes"]) == (bias < 0)
        (folder,) = partlens.explain(run, few_flowers.take([0]), model=judge, classes=[RED], out=run / "named")
        (one,) = read_json(folder / "explanation.json")["parts"]
        ranks[bias] = one["rank"]
        assert one["same_answer"]
        assert ("judge takes" in (folder / "explanation.html").read_text()) == (bias > 0)
    assert ranks == {50.0: 1, -50.0: 2}


def test_of_a_single_output_its_own_score_is_shared(tiny: Performer, few_flowers: ImageSet, tmp_path: Path) -> None:
    tiny.module.classes = torch.nn.Linear(16, 1)
    judge = Performer(
        tiny.module, "judge", tiny.preprocessing, weights_sha256(tiny.module), "relu2", class_names=(RED,)
    )
    run = tmp_path / "run"
    partlens.fit_explainer(judge, few_flowers, out=run, category=RED, config=SMALL, seeds=1)
    content = partlens.parts(run, few_flowers, model=judge, config=QUICK).contributions
    with torch.no_grad():
        rows = few_flowers.indices(category=RED, split="test")
        said = judge.module(judge.preprocessing([few_flowers.read(i) for i in rows]))
    assert content.performer_score.value == pytest.approx(float(said.double().mean()), abs=1e-5)


def test_a_landmark_may_be_called_other(run: Path, tiny: Performer, few_flowers: ImageSet) -> None:
    truth = few_flowers.part_truth
    assert truth is not None
    renamed = dataclasses.replace(truth, landmarks=("other", *truth.landmarks[1:]))
    named = dataclasses.replace(few_flowers, _truth=renamed.for_keys)
    lenient = {**BY_LANDMARK, "consistency_min": -1.0, "distance_max_frac": 1.0}
    partlens.parts(run, named, model=tiny, split="train", config=lenient)
    ids = [part.id for part in PartsFile.read(run).parts]
    assert sorted(ids) == sorted({*ids})
    assert {"other", "other (landmark)"} <= {*ids}
    assert partlens.explain(run, few_flowers.take([0]), model=tiny)


def test_settings_and_edits_that_are_wrong_say_what_to_do(run: Path, tiny: Performer, few_flowers: ImageSet) -> None:
    with pytest.raises(InputError, match="a field of PartsConfig, got round. Did you mean rounds"):
        partlens.parts(run, few_flowers, model=tiny, config={"round": 3})
    (run / "parts.json").write_text('{"parts": [,]}')
    with pytest.raises(
        RunError, match="JSON in .*line 1 column 12.* Correct it, or delete it and run partlens parts again"
    ):
        partlens.parts(run, few_flowers, model=tiny, config=QUICK)
