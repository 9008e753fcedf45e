"""The file of parts: what a person edits in it, which names come back, and settings that are refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from partlens.errors import InputError, RunError
from partlens.estimate import Estimate
from partlens.object_parts.record import (
    Contributions,
    FilterPart,
    FoundPart,
    PartContribution,
    PartsConfig,
    PartsFile,
    Stability,
    UnplacedName,
    renamed,
    with_edits,
)

SOME = Estimate(0.5, (0.4, 0.6), 9)


def _part(name: str, filters: tuple[int, ...]) -> PartContribution:
    return PartContribution(
        name=name,
        filters=filters,
        predicted=(0.5, math.nan),
        measured=(0.4, 0.3),
        **dict.fromkeys(
            (
                "shapley",
                "share",
                "gradient_activation_share",
                "integrated_share",
                "integrated_null",
                "removal",
            ),
            SOME,
        ),
    )


def _file(*parts: tuple[str, str, tuple[int, ...]], **fields: Any) -> PartsFile:
    """A file whose filters were assigned to the parts that now hold them, unless ``filters`` says otherwise."""
    home = {k: i for i, _, filters in parts for k in filters}
    whole = {
        "rule": "clusters",
        "config": PartsConfig(),
        "split": "test",
        "photos": 9,
        "categories": ("",),
        "landmarks": {},
        "data": "photos",
        "evidence": (),
        "stability": Stability(adjusted_rand=SOME, kept=SOME, null_adjusted_rand=SOME, null_kept=SOME),
        "parts": tuple(FoundPart(id=i, name=n, filters=f) for i, n, f in parts),
        "filters": tuple(FilterPart(filter=k, part=home[k], dead=False) for k in sorted(home)),
        "command": "",
        "versions": {},
    }
    return PartsFile(**{**whole, **fields})


THREE = (
    ("part 1", "part 1", (0, 1, 2, 3, 4, 5)),
    ("part 2", "part 2", (6, 7, 8, 9, 10)),
    ("other", "other", (11,)),
)


def test_parts_of_one_name_count_as_one_and_empty_ones_do_not_count() -> None:
    file = _file(("a", "head", (2,)), ("b", "head ", (0,)), ("c", "tail", ()), ("d", "leg", (1,)))
    assert [tuple(part) for part in file.named] == [("head", ("a", "b"), (0, 2)), ("leg", ("d",), (1,))]


def test_contributions_hold_for_the_parts_they_were_measured_on() -> None:
    adds = Contributions(
        method="exact",
        standard_error=0.0,
        parts=(_part("head", (0, 2)), _part("leg", (1,))),
        removal_check={},
        **dict.fromkeys(("performer_score", "fed_back", "baseline", "interpretable_share", "ordinary_share"), SOME),
    )
    file = _file(("a", "head", (0, 2)), ("b", "leg", (1,)), ("c", "tail", ()), contributions=adds)
    assert set(file.measured() or {}) == {(0, 2), (1,)}
    assert set(renamed(file, ["a=nose"]).measured() or {}) == {(0, 2), (1,)}
    assert renamed(file, ["a=leg"]).measured() is None
    assert file.changed(contributions=None).measured() is None


def test_the_file_comes_back_as_it_was_written(tmp_path: Path) -> None:
    file = _file(*THREE, unplaced_names=(UnplacedName(name="tail", filters=(1,)),))
    path = file.write(tmp_path)
    assert PartsFile.read(tmp_path).model_dump_json() == file.model_dump_json()
    assert json.loads(path.read_text())["schema"] == "partlens.parts/3"


def test_mean_places_of_filters() -> None:
    rows = tuple(
        FilterPart(filter=k, part="a", dead=False, distance_frac=far, consistency=r2)
        for k, (far, r2) in enumerate([(0.1, 0.5), (0.3, math.nan), (0.2, 0.1)])
    )
    file = _file(("a", "a", (0, 1, 2)), filters=rows)
    assert file.mean_place((0, 2)) == pytest.approx((0.15, 0.3))
    far, follows = file.mean_place((0, 1))
    assert far == pytest.approx(0.2)
    assert math.isnan(follows)
    assert all(map(math.isnan, file.mean_place(())))


def test_renaming_finds_ids_before_names() -> None:
    file = _file(("a", "b", (0,)), ("b", "c", (1,)))
    assert [part.name for part in renamed(file, ["b=x"]).parts] == ["b", "x"]
    assert [part.name for part in renamed(file, ["c = y y"]).parts] == ["b", "y y"]
    assert [part.name for part in renamed(file, ["a=c", "c=z"]).parts] == ["z", "z"]
    with pytest.raises(InputError, match="a part among a, b, c, got tail. Did you mean"):
        renamed(file, ["tail=x"])
    for wrong in ("a", "a=", "=x"):
        with pytest.raises(InputError, match="a new name as OLD=NEW"):
            renamed(file, [wrong])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c["parts"][0].update(name=" "), "a name for part part 1 in .*parts.json, got ' '. Write a name"),
        (lambda c: c["parts"][0].update(id=" "), "an id for every part in .*, got ' '. Correct it"),
        (lambda c: c["parts"][1].update(id="part 1"), "every id once in .*, got part 1 twice"),
        (lambda c: c["parts"][0]["filters"].append(12), "filters from 0 to 11 in part part 1 .*, got 12. Remove it"),
        (lambda c: c["parts"][0]["filters"].append(-1), "filters from 0 to 11 in part part 1 .*, got -1. Remove it"),
        (lambda c: c["parts"][0]["filters"].append("3"), "parts.0.filters.6 to be a valid integer in .*, got '3'"),
        (lambda c: c["parts"][0]["filters"].pop(), "every filter in a part in .*, got 5 in none. Add it"),
        (
            lambda c: c["parts"][1]["filters"].append(c["parts"][0]["filters"][0]),
            "every filter in one part in .*, got 0 in part 1 and part 2. Keep one",
        ),
        (lambda c: c.update(schema="partlens.parts/9"), "schema partlens.parts/3 in .*, got partlens.parts/9"),
        (lambda c: c.pop("parts"), "the field parts of PartsFile in .*, got nothing. .*run partlens parts again"),
    ],
)
def test_wrong_edits_are_one_clear_sentence(tmp_path: Path, edit: Any, message: str) -> None:
    path = _file(*THREE).write(tmp_path)
    assert len(PartsFile.read(tmp_path).named) == 3
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    with pytest.raises(RunError, match=message):
        PartsFile.read(tmp_path)


def _parts(*rows: tuple[str, str, tuple[int, ...]]) -> list[FoundPart]:
    return [FoundPart(id=i, name=n, filters=f) for i, n, f in rows]


def test_names_go_to_the_part_with_the_same_filters() -> None:
    earlier = _file(("part 1", "head", (0, 1, 2, 3, 8)), ("part 2", "back", (4, 5, 6)), ("other", "other", (7,)))
    new = _parts(("part 1", "part 1", (4, 5, 6, 7)), ("part 2", "part 2", (0, 1, 2)), ("other", "other", (3,)))
    parts, unplaced = with_edits(new, earlier)
    assert [p.name for p in parts] == ["back", "head", "other"]
    assert unplaced == ()
    # A name whose filters are scattered is kept aside, and placed when they come back.
    scattered = _parts(*((f"part {k}", f"part {k}", (k - 1,)) for k in range(1, 9)), ("other", "other", (8,)))
    parts, unplaced = with_edits(scattered, earlier)
    assert [(row.name, row.filters) for row in unplaced] == [("head", (0, 1, 2, 3, 8))]
    assert "back" in [p.name for p in parts]
    again = earlier.changed(parts=parts, filters=(), unplaced_names=unplaced)
    parts, unplaced = with_edits(new, again)
    assert "head" in [p.name for p in parts]
    assert [row.name for row in unplaced] in ([], ["back"])


def test_a_quarter_of_overlap_is_enough_for_a_name() -> None:
    earlier = _file(("part 1", "head", (0, 1, 2, 3)))
    whole = _parts(("part 1", "part 1", (0,)), ("other", "other", (1, 2, 3)))
    assert [p.name for p in with_edits(whole, earlier)[0]] == ["part 1", "head"]
    one = _parts(("part 1", "part 1", (0, 5, 6, 7, 8)), ("other", "other", ()))
    parts, unplaced = with_edits(one, earlier)  # 1 of 8
    assert [p.name for p in parts] == ["part 1", "other"]
    assert [row.filters for row in unplaced] == [(0, 1, 2, 3)]
    parts, unplaced = with_edits(_parts(("part 1", "part 1", (0,)), ("other", "other", ())), earlier)  # 1 of 4
    assert [p.name for p in parts] == ["head", "other"]
    assert unplaced == ()


def test_of_equal_overlaps_the_same_id_keeps_the_name() -> None:
    earlier = _file(("part 1", "head", (0, 1)), ("part 2", "tail", (2, 3)))
    new = _parts(("part 2", "part 2", (0, 2)), ("part 1", "part 1", (1, 3)))
    assert [(p.id, p.name) for p in with_edits(new, earlier)[0]] == [("part 2", "tail"), ("part 1", "head")]


def test_a_filter_that_was_moved_by_hand_moves_again() -> None:
    assigned = tuple(FilterPart(filter=k, part="part 1" if k < 4 else "part 2", dead=False) for k in range(8))
    earlier = _file(
        ("part 1", "part 1", (0, 1, 2)),
        ("part 2", "legs", (3, 4, 5, 6, 7)),
        ("other", "other", ()),
        filters=assigned,
    )
    new = _parts(("part 1", "part 1", (0, 1, 2, 3)), ("part 2", "part 2", (4, 5, 6, 7)), ("other", "other", ()))
    parts, unplaced = with_edits(new, earlier)
    assert [p.filters for p in parts] == [(0, 1, 2), (3, 4, 5, 6, 7), ()]
    assert [p.name for p in parts] == ["part 1", "legs", "other"]
    assert unplaced == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rule": "hand"}, "rule to be 'auto', 'landmarks' or 'clusters', got 'hand'"),
        ({"clusters_min": 5, "clusters_max": 4}, "clusters_max to be at least clusters_min, 5, got 4"),
        ({"clusters_min": 9}, "clusters_max to be at least clusters_min, 9, got 8"),
        ({"clusters_min": 1}, "clusters_min to be greater than or equal to 2, got 1"),
        ({"distance_max_frac": 1.5}, "distance_max_frac to be less than or equal to 1, got 1.5"),
        ({"consistency_min": -1.5}, "consistency_min to be greater than or equal to -1, got -1.5"),
        ({"rounds": 1}, "rounds to be greater than or equal to 2, got 1"),
        ({"null_filters": 19}, "null_filters to be greater than or equal to 20, got 19"),
        ({"photos_max": 1}, "photos_max to be greater than or equal to 2, got 1"),
        ({"photos_max": "9"}, "photos_max to be a valid integer, got '9'"),
        ({"rounds": 1.5}, "rounds to be a valid integer, got 1.5"),
        ({"rounds": True}, "rounds to be a valid integer, got True"),
        ({"consistency_min": "a"}, "consistency_min to be a valid number, got 'a'"),
        ({"round": 3}, "a field of PartsConfig, got round. Did you mean rounds"),
    ],
)
def test_wrong_settings_name_the_value(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PartsConfig(**changes)
