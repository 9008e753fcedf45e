"""The verb parts on a tiny network: the file, names a person edits, contributions, and explaining by parts."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import partlens
from partlens.cli import main
from partlens.data.images import ImageSet
from partlens.errors import ImageError, InputError, RunError
from partlens.network.zoo import Performer, weights_sha256
from partlens.records import read_json, read_tensors, write_json
from partlens.verbs import part_shares as parts_run_shares
from partlens.verbs.parts_file import named_parts, read_parts, with_edits
from partlens.verbs.printed import print_parts

SMALL: dict[str, Any] = {
    "epochs": 1,
    "warmup_epochs": 1,
    "views": 2,
    "batch_size": 8,
    "background_batch": 4,
    "candidates_per_filter": 1,
    "votes": 4,
    "precision": "float32",
}
QUICK: dict[str, Any] = {"null_filters": 50, "rounds": 4, "photos_max": 12, "clusters_min": 2, "clusters_max": 3}
RED = "petal-red"


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the run is kept that is fitted once; every test works on a copy."""
    return tmp_path_factory.mktemp("fitted") / "run"


@pytest.fixture
def run(kept: Path, tiny: Performer, few_flowers: ImageSet, tmp_path: Path) -> Path:
    partlens.fit_explainer(tiny, few_flowers, out=kept, category=RED, config=SMALL, seeds=1)
    return Path(shutil.copytree(kept, tmp_path / "run"))


@pytest.fixture
def found(run: Path, tiny: Performer, few_flowers: ImageSet) -> dict[str, Any]:
    return partlens.parts(run, few_flowers, model=tiny, rule="clusters", config=QUICK)


def test_every_filter_has_a_part_and_the_contributions_sum(
    run: Path, found: dict[str, Any], few_flowers: ImageSet
) -> None:
    assert read_json(run / "parts.json") == json.loads(json.dumps(found).replace("NaN", "null"))
    filters = sorted(k for part in found["parts"] for k in part["filters"])
    assert filters == list(range(12))
    assert [p["id"] for p in found["parts"]] == [*(f"part {k}" for k in range(1, len(found["parts"]))), "other"]
    for part in found["parts"]:
        assert part["n"] == len(part["filters"])
        if part["filters"]:
            with Image.open(run / part["strip"]) as strip:
                assert strip.height == 112
            assert {s["filter"] for s in part["shown"]} <= set(part["filters"])
    measured = found["contributions"]
    assert measured["photos"] == found["photos"] == len(few_flowers.indices(category=RED, split="test"))
    assert sum(p["share"]["value"] for p in measured["parts"]) == pytest.approx(1, abs=1e-6) or any(
        p["share"]["value"] is None for p in measured["parts"]
    )
    total = sum(p["shapley"]["value"] for p in measured["parts"])
    rise = measured["score"]["fed_back"]["value"] - measured["score"]["baseline"]["value"]
    assert total == pytest.approx(measured["interpretable_share"]["value"] * rise, abs=1e-4)
    assert measured["remainder_frac"]["shapley"] < 1e-6
    assert measured["remainder_frac"]["integrated_gradients"] <= 0.02
    for check in ("shapley", "integrated_gradients", "gradient_activation", "part_size"):
        assert set(measured["removal_check"][check]) == {"correlation", "slope", "null_correlation", "pairs"}
    for name in ("adjusted_rand", "kept", "null_adjusted_rand", "null_kept"):
        assert set(found["stability"][name]) == {"value", "interval", "n", "unit"}


def test_with_landmarks_nearest_stays_within_the_thresholds(
    run: Path, tiny: Performer, few_flowers: ImageSet, capsys: pytest.CaptureFixture[str]
) -> None:
    found = partlens.parts(
        run, few_flowers, model=tiny, rule="landmarks", split="train", config={**QUICK, "photos_max": 40}
    )
    assert found["rule"] == "landmarks"
    assert found["null"]["kept"] <= 0.1
    least = found["thresholds"]["consistency_min"]
    for row in found["filters"]:
        if row["part"] != "other":
            assert row["part"] == row["nearest"]
            assert row["distance_frac"] <= 0.2
            assert row["consistency"] > least - 1e-5
    loose = {**QUICK, "photos_max": 40, "consistency_min": -1.0, "distance_max_frac": 1.0}
    given = partlens.parts(run, few_flowers, model=tiny, rule="landmarks", split="train", config=loose)
    assert {row["part"] for row in given["filters"] if not row["dead"]} <= set(few_flowers.part_truth.landmarks)
    assert not given["thresholds"]["consistency_is_measured"]
    capsys.readouterr()
    print_parts(given)
    shown = capsys.readouterr().out
    for part in given["parts"]:
        if part["filters"]:
            rows = [row for row in given["filters"] if row["filter"] in part["filters"]]
            far, follows = (np.mean([row[name] for row in rows]) for name in ("distance_frac", "consistency"))
            assert re.search(rf"{part['name']} +{len(rows)} +{far:.2f}, {follows:.2f}".replace("-", "[-]"), shown)


def test_names_are_kept_when_parts_are_found_again(
    run: Path, found: dict[str, Any], tiny: Performer, few_flowers: ImageSet
) -> None:
    content = partlens.parts(run, rename=["part 1=head"])
    assert content["parts"][0]["name"] == "head"
    assert content["contributions"] == read_json(run / "parts.json")["contributions"] is not None
    again = partlens.parts(run, few_flowers, model=tiny, rule="clusters", config=QUICK)
    assert again["parts"][0]["name"] == "head"
    assert again["unplaced_names"] == []
    assert again["contributions"]["parts"][0]["name"] == "head"
    joined = partlens.parts(run, rename=["part 2 = head"])
    assert named_parts(joined)[0].name == "head"
    assert named_parts(joined)[0].ids == ("part 1", "part 2")
    measured = partlens.parts(run, few_flowers, model=tiny, rule="clusters", config=QUICK)["contributions"]
    assert measured["parts"][0]["ids"] == ["part 1", "part 2"]
    with pytest.raises(InputError, match="a part among .* got part 9. Did you mean part"):
        partlens.parts(run, rename=["part 9=x"])
    with pytest.raises(InputError, match="a new name as OLD=NEW"):
        partlens.parts(run, rename=["part 1"])


def _rows(*parts: tuple[str, str, list[int]]) -> list[dict[str, Any]]:
    return [{"id": i, "name": n, "filters": f} for i, n, f in parts]


def test_names_go_to_the_part_with_the_same_filters() -> None:
    earlier = {
        "parts": _rows(("part 1", "head", [0, 1, 2, 3, 8]), ("part 2", "back", [4, 5, 6]), ("other", "other", [7])),
        "filters": [],
    }
    new = _rows(("part 1", "part 1", [4, 5, 6, 7]), ("part 2", "part 2", [0, 1, 2]), ("other", "other", [3]))
    parts, unplaced = with_edits(new, earlier)
    assert [p["name"] for p in parts] == ["back", "head", "other"]
    assert unplaced == []
    # A name whose filters are scattered is kept aside, and placed when they come back.
    scattered = _rows(*((f"part {k}", f"part {k}", [k - 1]) for k in range(1, 9)), ("other", "other", []))
    parts, unplaced = with_edits(scattered, earlier)
    assert [row["name"] for row in unplaced] == ["head"]
    assert "back" in [p["name"] for p in parts]
    parts, unplaced = with_edits(new, {"parts": parts, "filters": [], "unplaced_names": unplaced})
    assert unplaced == [] or [row["name"] for row in unplaced] == ["back"]
    assert "head" in [p["name"] for p in parts]


def test_a_filter_that_was_moved_by_hand_moves_again() -> None:
    assigned = [{"filter": k, "part": "part 1" if k < 4 else "part 2"} for k in range(8)]
    earlier = {
        "parts": _rows(("part 1", "part 1", [0, 1, 2]), ("part 2", "legs", [3, 4, 5, 6, 7]), ("other", "other", [])),
        "filters": assigned,
    }
    new = _rows(("part 1", "part 1", [0, 1, 2, 3]), ("part 2", "part 2", [4, 5, 6, 7]), ("other", "other", []))
    parts, unplaced = with_edits(new, earlier)
    assert [p["filters"] for p in parts] == [[0, 1, 2], [3, 4, 5, 6, 7], []]
    assert [p["name"] for p in parts] == ["part 1", "legs", "other"]
    assert unplaced == []


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c["parts"][0].update(name=" "), "a name for part part 1 in .*parts.json, got ' '"),
        (lambda c: c["parts"][1].update(id="part 1"), "every id once in .*, got part 1 twice"),
        (lambda c: c["parts"][0]["filters"].append(99), "filters from 0 to 11 in part part 1 .*, got 99. Remove it"),
        (lambda c: c["parts"][0]["filters"].append("3"), "filters from 0 to 11 in part part 1 .*, got '3'"),
        (lambda c: c["parts"][0]["filters"].pop(), "every filter in a part in .*, got .* in none"),
        (
            lambda c: c["parts"][1]["filters"].append(c["parts"][0]["filters"][0]),
            "every filter in one part in .* and part 2. Keep one",
        ),
        (lambda c: c.update(schema="partlens.parts/9"), 'schema "partlens.parts/1"'),
        (lambda c: c.update(parts=[]), "a filter_count and a list of parts"),
    ],
)
def test_wrong_edits_are_one_clear_sentence(tmp_path: Path, edit: Any, message: str) -> None:
    rows = _rows(
        ("part 1", "part 1", [0, 1, 2, 3, 4, 5]), ("part 2", "part 2", [6, 7, 8, 9, 10]), ("other", "other", [11])
    )
    content = {"schema": "partlens.parts/1", "filter_count": 12, "parts": rows}
    write_json(tmp_path / "parts.json", content)
    assert len(named_parts(read_parts(tmp_path / "parts.json"))) == 3
    edit(content)
    write_json(tmp_path / "parts.json", content)
    with pytest.raises(RunError, match=message):
        read_parts(tmp_path / "parts.json")


def test_explaining_by_parts_sums_and_draws(
    run: Path, found: dict[str, Any], tiny: Performer, few_flowers: ImageSet
) -> None:
    folders = partlens.explain(run, few_flowers.take([0, 1]), model=tiny)
    for folder in folders:
        content = read_json(folder / "explanation.json")
        assert content["explained"] == []
        (one,) = content["parts"]
        assert one["rank"] == 1
        rise = one["fed_back"] - one["baseline"]
        assert sum(p["shapley"] for p in one["parts"]) + one["ordinary"] == pytest.approx(rise, abs=1e-5)
        assert abs(one["integrated_remainder"]) <= 0.02 * abs(rise) + 1e-6
        assert {p["name"] for p in one["parts"]} == {p.name for p in named_parts(found)}
        for part in one["parts"]:
            assert (folder / part["heat"]).is_file()
            assert part["null"]["n"] == 20
        arrays = read_tensors(folder / "arrays.safetensors")
        assert arrays["part_heat"].shape == (1, len(one["parts"]), 32, 32)
        assert "Shares of what the parts add" in (folder / "explanation.html").read_text()
    (alone,) = partlens.explain(run, few_flowers.take([1]), model=tiny, out=run / "alone")
    first, second = (read_tensors(f / "arrays.safetensors") for f in (folders[1], alone))
    for name in ("part_shapley", "part_filters", "part_heat"):
        assert torch.allclose(first[name], second[name], atol=1e-5), name
    page = partlens.report(run).read_text()
    for words in ("Parts of filters", "Taken away", 'href="#image-1"'):
        assert words in page
    (named,) = partlens.explain(run, few_flowers.take([0]), model=tiny, classes=["2", "0"], out=run / "named")
    assert [row["output"] for row in read_json(named / "explanation.json")["parts"]] == [2, 0]
    with pytest.raises(InputError, match="a class of tiny, got tulip. Nearest"):
        partlens.explain(run, few_flowers.take([0]), model=tiny, classes=["tulip"])


def test_without_parts_all_filters_are_one_and_that_is_said(run: Path, tiny: Performer, few_flowers: ImageSet) -> None:
    (folder,) = partlens.explain(run, few_flowers.take([0]), model=tiny)
    content = read_json(folder / "explanation.json")
    assert [p["name"] for p in content["parts"][0]["parts"]] == ["all filters"]
    assert any("partlens parts run finds them" in note for note in content["notes"])


def test_a_selection_beside_the_explainer_gives_both(run: Path, tiny: Performer, few_flowers: ImageSet) -> None:
    partlens.select_features(tiny, few_flowers, out=run, top_photos=4, pictures=2)
    (folder,) = partlens.explain(run, few_flowers.take([0]), model=tiny)
    content = read_json(folder / "explanation.json")
    assert len(content["explained"]) == 2
    assert len(content["parts"]) == 1
    assert {"maps", "part_heat"} <= set(read_tensors(folder / "arrays.safetensors"))
    (folder,) = partlens.explain(run, few_flowers.take([0]), model=tiny, classes=[RED])
    assert read_json(folder / "explanation.json")["parts"] == []  # its classes are no outputs of the tiny network


def test_the_performer_is_handed_back_as_it_was(run: Path, tiny: Performer, few_flowers: ImageSet) -> None:
    before = {name: value.clone() for name, value in tiny.module.state_dict().items()}
    tiny.module.train()
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    partlens.parts(run, few_flowers, model=tiny, config=QUICK)
    partlens.explain(run, few_flowers.take([0]), model=tiny)
    with pytest.raises(InputError):
        partlens.parts(run, few_flowers, model=tiny, config={"rule": "hand"})
    assert tiny.module.training
    assert torch.equal(state, torch.get_rng_state())
    assert (numpy_state == np.random.get_state()[1]).all()  # noqa: NPY002
    assert all(torch.equal(before[name], value) for name, value in tiny.module.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in tiny.module.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny.module.modules())


def test_the_same_seed_finds_the_same_parts(
    run: Path, found: dict[str, Any], tiny: Performer, few_flowers: ImageSet
) -> None:
    before = (run / "parts.json").read_bytes()
    partlens.parts(run, few_flowers, model=tiny, rule="clusters", config=QUICK)
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
        partlens.parts(run, bare, model=tiny, rule="landmarks", config=QUICK)


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
    run: Path, found: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["parts", str(run), "--rename", "part 1=head"]) == 0
    shown = capsys.readouterr().out
    assert "head (part 1)" in shown
    assert "keep their part" in " ".join(shown.split())
    assert main(["parts", str(run), "--rename", "part 2=head"]) == 0
    assert "run partlens parts again" in capsys.readouterr().out
    assert main(["parts", str(run), "--rename", "tail=x", "--json"]) == 1
    assert "Did you mean" in capsys.readouterr().err


def test_a_single_output_below_zero_is_not_the_answer(
    kept: Path, tiny: Performer, few_flowers: ImageSet, tmp_path: Path
) -> None:
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


def test_what_a_single_output_says_is_kept_or_turned(
    kept: Path, tiny: Performer, few_flowers: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agreement of a logistic performer is of its signs, as in an evaluation."""
    tiny.module.classes = torch.nn.Linear(16, 1)
    judge = Performer(
        tiny.module, "judge", tiny.preprocessing, weights_sha256(tiny.module), "relu2", class_names=(RED,)
    )
    run = tmp_path / "run"
    partlens.fit_explainer(judge, few_flowers, out=run, category=RED, config=SMALL, seeds=1)
    shares = parts_run_shares.part_shares

    def turned(*args: Any, **kwargs: Any) -> Any:
        found = shares(*args, **kwargs)
        return dataclasses.replace(found, fed_outputs=-torch.ones_like(found.fed_outputs))

    monkeypatch.setattr(parts_run_shares, "part_shares", turned)
    content = partlens.parts(run, few_flowers, model=judge, rule="clusters", config=QUICK)["contributions"]
    with torch.no_grad():
        rows = few_flowers.indices(category=RED, split="test")
        signs = judge.module(judge.preprocessing([few_flowers.read(i) for i in rows])) > 0
    assert content["score"]["agreement_top1"]["value"] == pytest.approx(1 - float(signs.double().mean()))
    assert content["score_of"] == "the performer's only output, whatever the answer"


def test_a_landmark_may_be_called_other(run: Path, tiny: Performer, few_flowers: ImageSet) -> None:
    truth = few_flowers.part_truth
    assert truth is not None
    renamed = dataclasses.replace(truth, landmarks=("other", *truth.landmarks[1:]))
    named = dataclasses.replace(few_flowers, _truth=renamed.for_keys)
    lenient = {**QUICK, "consistency_min": -1.0, "distance_max_frac": 1.0}
    partlens.parts(run, named, model=tiny, rule="landmarks", split="train", config=lenient)
    ids = [part["id"] for part in read_parts(run / "parts.json")["parts"]]
    assert sorted(ids) == sorted({*ids})
    assert {"other", "other (landmark)"} <= {*ids}
    assert partlens.explain(run, few_flowers.take([0]), model=tiny)


def test_one_prediction_is_measured_as_all_were(run: Path, tiny: Performer, few_flowers: ImageSet) -> None:
    partlens.parts(
        run, few_flowers, model=tiny, rule="clusters", config={**QUICK, "coalitions_max": 4, "order_pairs": 3}
    )
    (folder,) = partlens.explain(run, few_flowers.take([0]), model=tiny)
    (one,) = read_json(folder / "explanation.json")["parts"]
    assert one["method"] == "6 random orders, half of them the others reversed"


def test_settings_and_edits_that_are_wrong_say_what_to_do(run: Path, tiny: Performer, few_flowers: ImageSet) -> None:
    with pytest.raises(InputError, match="a field of PartsConfig, got round. Did you mean rounds"):
        partlens.parts(run, few_flowers, model=tiny, config={"round": 3})
    (run / "parts.json").write_text('{"parts": [,]}')
    with pytest.raises(RunError, match="JSON in .*line 1 column 12.* Correct it there, or take back the last edit"):
        partlens.parts(run, few_flowers, model=tiny, config=QUICK)
