"""Whole tables on generated flowers and a network of four layers: every number, the page, what is missing."""

from __future__ import annotations

import dataclasses
import json
import math
import runpy
import shutil
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import partlens
from partlens.data.flowers import generated_flowers
from partlens.data.images import ImageSet
from partlens.errors import ImageError, InputError, LayerError, RunError
from partlens.estimate import Estimate
from partlens.evaluation import places
from partlens.explainer.config import ExplainerConfig
from partlens.metrics import part_regions
from partlens.progress import Progress
from partlens_papers.cli import main
from partlens_papers.tables import explainer_jobs
from partlens_papers.tables.blocks import Block, Cell, Study, TableRecord, Verdict, expect
from partlens_papers.tables.explainer_jobs import photos_of
from partlens_papers.tables.explainer_tables import build, region_block
from partlens_papers.tables.jobs import JobRecord
from partlens_papers.tables.page import table_lines, table_page
from partlens_papers.tables.rival_measures import MeasuredLayer
from partlens_papers.tables.scores import Row, Tidy
from partlens_papers.tables.sweep import Plan, find_photos, jobs_of, performers_of, reproduce

HERE = Path(__file__).parent
BENCH = runpy.run_path(str(HERE / "job_bench.py"))
Page = runpy.run_path(str(HERE.parents[2] / "tests" / "page" / "page_reader.py"))["Page"]
RED, BLUE = "petal-red", "petal-blue"
TRAINED = {"trained": "train:partlens_papers.performers:flower_net@random:0"}


@pytest.fixture(scope="module", autouse=True)
def _network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("modules")
    (folder / "bench_network.py").write_text(BENCH["NETWORK"])
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setattr(
            explainer_jobs, "BOOTSTRAP_ROUNDS", 5
        )  # most of the time goes into intervals, which have tests of their own
        patch.setattr(places, "NULL_FILTERS", 16)
        patch.setattr(part_regions, "FEWEST_PHOTOS", 2)
        yield


@pytest.fixture(scope="module")
def flower_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    images = generated_flowers(64, seed=3, size=40, categories=(RED, BLUE))
    return BENCH["write_flowers"](images, tmp_path_factory.mktemp("data") / "flowers")


@pytest.fixture(scope="module")
def finished(flower_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TableRecord]:
    """A folder with the explainers of two seeds, which every table here can use."""
    out = tmp_path_factory.mktemp("tables") / "out"
    return out, make("instability", flower_folder, out, seeds=2)


@pytest.fixture
def begun(finished: tuple[Path, TableRecord], tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(finished[0], tmp_path / "out"))


def asked(performers: Any = None, methods: dict[str, Any] | None = None, **sweep: Any) -> dict[str, Any]:
    return {
        "performers": performers or {"tiny": "bench_network:tiny"},
        "sweep": {"categories": (RED,), "seeds": 1, "others": 12, **sweep},
        "methods": {"explainer": BENCH["SMALL"], **(methods or {})},
    }


def make(table: Any, data: Path, out: Path, **changes: Any) -> TableRecord:
    return reproduce(table, data, out=out, **asked(**changes))


def planned(table: str, data: Path, **changes: Any) -> Plan:
    from partlens_papers.given import settings_of
    from partlens_papers.tables.sweep import MethodsConfig, SweepConfig

    given = asked(**changes)
    sweep, methods = settings_of(SweepConfig, given["sweep"]), settings_of(MethodsConfig, given["methods"])
    return Plan(table, str(data), given["performers"], sweep, methods)


def block(record: TableRecord, key: str) -> Block:
    return next(one for one in record.blocks if one.key == key)


def cells(record: TableRecord, key: str) -> dict[str, dict[str, Cell]]:
    return {row.label: row.cells for row in block(record, key).rows}


def evaluation(out: Path, key: str) -> dict[str, Any]:
    """What the run of a job says, as the verb wrote it."""
    return json.loads((out / "jobs" / key / "run" / "evaluation.json").read_text())


def scores(out: Path, key: str) -> dict[tuple[str, str], Estimate]:
    return {(s.subject, s.score): s.estimate for s in JobRecord.read(out / "jobs" / key).scores}


SEEDS = (f"tiny-{RED}-s0/explainer", f"tiny-{RED}-s1/explainer")


def test_a_table_has_every_number_and_its_nulls(finished: tuple[Path, TableRecord], flower_folder: Path) -> None:
    out, found = finished
    assert found.status == "complete"
    for run in out.glob("jobs/*/explainer/run/run.json"):
        # Other verbs open the photos by themselves.
        assert json.loads(run.read_text())["data"]["path"] == str(flower_folder.resolve())
    assert list(found.jobs) == list(SEEDS)
    assert TableRecord.read(out / "instability").blocks == found.blocks
    (row,) = block(found, "instability").rows
    assert row.label == "tiny"
    each = [evaluation(out, key)["explainer"]["instability"]["value"] for key in SEEDS]
    assert each[0] != each[1]
    cell = row.cells["explainer"]
    assert cell.value == pytest.approx(sum(each) / 2)
    assert (cell.n, cell.unit) == (2, "seeds")
    assert cell.interval == pytest.approx(tuple(sorted(each)))
    for null in ("random", "centre", "corner"):
        assert row.cells[null].defined
    # Like with like: the explainer by its largest cells, the tap by centroids.
    same = [evaluation(out, key)["same_peak"] for key in SEEDS]
    for key in ("explainer_largest", "tap_centroid"):
        each = [of[key]["instability"]["value"] for of in same]
        assert row.cells[key].value == pytest.approx(sum(each) / 2)
        assert row.cells[key].value != row.cells[key.partition("_")[0]].value
    assert row.cells["ratio"].value == pytest.approx(row.cells["explainer_largest"].value / row.cells["top"].value)
    # The papers did not study this network: nothing printed, and the page says so.
    assert not row.cells["t_performer"].defined
    assert any("did not study tiny" in remark for remark in found.remarks)
    places = block(found, "beside")
    assert [column.key for column in places.columns][:3] == ["instability", "instability_all", "peak_spread_cells"]
    assert places.rows[0].cells["instability_all"].value > 0
    regions = cells(found, "regions-explainer")
    assert list(regions)[:2] == ["explainer", "… explainer: its regions on other photos"]
    for reading in ("round", "part_sized", "scaled"):
        own = [evaluation(out, key)["part_interpretability"]["readings"][reading] for key in SEEDS]
        for label, of in (
            ("explainer", [one["layers"]["explainer"] for one in own]),
            ("… explainer: its regions on other photos", [one["other_photo"]["explainer"] for one in own]),
            ("performer, tap", [one["layers"]["tap"] for one in own]),
            ("null: centre", [one["centre"] for one in own]),
        ):
            assert regions[label][f"regions_{reading}"].value == pytest.approx(sum(n["value"] for n in of) / 2)


def test_the_page_holds_the_numbers_and_loads_nothing(finished: tuple[Path, TableRecord]) -> None:
    text = (finished[0] / "instability" / "table.html").read_text()
    page = Page(text)
    assert "Location instability" in page.text
    assert "Incomplete" not in page.text
    assert "ICLR 2020, Table 2" in page.text
    assert text.count("<svg") >= 1
    assert "http:" not in text.replace("http://www.w3.org", "")
    assert "https:" not in text
    lines = (finished[0] / "instability" / "scores.csv").read_text().splitlines()
    assert lines[0].startswith("performer,category,seed,kind,subject,score,value")
    assert sum(",explainer,instability," in line for line in lines) == 2


def test_another_table_uses_the_explainers(
    begun: Path, flower_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stamps = {path: path.stat().st_mtime_ns for path in begun.glob("jobs/*/*/*")}
    share = make("p", flower_folder, begun, seeds=2)
    again = make("instability", flower_folder, begun, seeds=2)
    assert {path: path.stat().st_mtime_ns for path in begun.glob("jobs/*/*/*")} == stamps
    assert again.status == "complete"
    p = cells(share, "p")["tiny"]["p"]
    assert (p.n, p.unit) == (2, "seeds")
    assert p.interval[0] < p.value < p.interval[1]
    assert next(one for one in share.verdicts if one.title == "Order of p").met is None
    Page((begun / "p" / "table.html").read_text())


def test_errors_have_a_second_explainer_and_a_baseline(flower_folder: Path, tmp_path: Path) -> None:
    """The classification loss needs a performer that knows the category; its errors are by its own output."""
    found = make("errors", flower_folder, tmp_path, performers={"named": "bench_network:named"})
    assert [key.partition("/")[2] for key in found.jobs] == ["explainer", "explainer-cls"]
    assert found.status == "complete", [job["error"] for job in found.jobs.values()]
    row = cells(found, "errors")["named"]
    for name in ("performer", "explainer", "explainer+cls", "always"):
        assert 0 <= row[name].value <= 100
    assert row["increase"].value == pytest.approx(row["explainer"].value - row["performer"].value)
    assert {job["errors_by"] for job in found.jobs.values()} == {"performer"}
    Page((tmp_path / "errors" / "table.html").read_text())


def test_rivals_are_measured_as_the_explainer_is(flower_folder: Path, begun: Path) -> None:
    rivals = {"methods": ["nmf", "kmeans"], "units": [3]}
    found = make("rivals", flower_folder, begun, methods={"rivals": rivals})
    assert found.status == "complete", [job["error"] for job in found.jobs.values()]
    rows = cells(found, "rivals")
    assert list(rows)[:3] == ["explainer", "NMF, 3 units", "k-means, 3 units"]
    nmf, explainer = rows["NMF, 3 units"], rows["explainer"]
    assert rows["NMF, 3 units, largest cells"]["instability"].value != nmf["instability"].value
    assert nmf["instability"].n == explainer["instability"].n
    assert 0 < nmf["variance_explained"].value < 1
    assert 0 <= nmf["agreement_top1"].value <= 1
    assert nmf["error_increase_points"].n == explainer["error_increase_points"].n
    assert rows["null: centre"]["instability"].defined
    assert not rows["null: centre"]["variance_explained"].defined
    regions, own = cells(found, "regions-explainer"), scores(begun, f"tiny-{RED}-s0/rivals")
    for rival in ("NMF, 3 units", "k-means, 3 units"):
        assert regions[rival]["regions_part_sized"].value == own[rival, "regions_part_sized"].value
        assert 0 <= own[rival, "regions_round"].value <= 1
    assert not (begun / "jobs" / f"tiny-{RED}-s0" / "rivals" / "maps").exists()
    assert any("the best rival" in one.words for one in found.verdicts)


def test_a_performer_is_trained_on_the_category_first(flower_folder: Path, tmp_path: Path) -> None:
    text, train = StringIO(), {"train": {"epochs": 1, "batch_size": 16}}
    shown, given = Progress(Console(file=text, width=200)), asked(performers=TRAINED, methods=train)
    found = reproduce("p", flower_folder, out=tmp_path, progress=shown, **given)
    assert list(found.jobs) == [f"trained-{RED}-s0/performer", f"trained-{RED}-s0/explainer"]
    assert found.status == "complete", [job["error"] for job in found.jobs.values()]
    assert (tmp_path / "performers" / f"trained-{RED}.safetensors").exists()
    first, second = (job["weights_sha256"] for job in found.jobs.values())
    assert first == second
    assert list(found.jobs.values())[1]["errors_by"] == "performer"
    said = text.getvalue()  # what a job in this process says of its own work, too
    assert said.index(f"trained-{RED}-s0/performer begins") < said.index("drawn anew")
    assert said.index("drawn anew") < said.index("explainer begins") < said.index("explainer finished")


def test_interpretable_cnns_of_both_losses(flower_folder: Path, tmp_path: Path) -> None:
    small = {"interpretable_cnn": {"epochs": 2, "batch_size": 16, "weight_std": 0.0}}
    found = make("interpretable-cnn", flower_folder, tmp_path, methods=small)
    assert [key.partition("/")[2] for key in found.jobs] == ["icnn-published", "icnn-released"]
    assert found.status == "complete", [job["error"] for job in found.jobs.values()]
    rows = cells(found, "icnn")
    assert set(rows) == {"tiny, published loss", "tiny, released loss"}
    for row in rows.values():
        assert 0 < row["interpretable"].value < 0.5
        assert row["interpretable"].n == row["top"].n == row["centre"].n
        assert 0 <= row["error"].value <= 100
        assert row["error"].n == row["own_error"].n
    assert [job["config"]["method"] for job in found.jobs.values()] == ["published", "released"]
    for key in found.jobs:
        own, kind = scores(tmp_path, key), key.partition("/")[2]
        regions = cells(found, f"regions-{kind}")
        assert regions["interpretable CNN"]["regions_round"].value == own["interpretable", "regions_round"].value
        assert regions["null: random cells"]["regions_round"].value == own["random", "regions_round"].value
    Page((tmp_path / "interpretable-cnn" / "table.html").read_text())


def test_a_failing_performer_is_named_and_the_command_ends_with_1(
    flower_folder: Path, begun: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["reproduce", "instability", str(flower_folder), "--out", str(begun), "--sweep.seeds", "1"]
    arguments += ["--sweep.categories", f"[{RED}]", "--sweep.others", "12"]
    arguments += ["--methods.explainer", json.dumps(BENCH["SMALL"])]
    arguments += ["--performers", "tiny=bench_network:tiny", "gone=bench_network:nothing"]
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert "Expected a result of every job, got none of gone-petal-red-s0/explainer." in " ".join(err.split())
    assert "| tiny |" in out
    found = TableRecord.read(begun / "instability")
    assert found.status == "incomplete"
    assert [row.label for row in block(found, "instability").rows] == ["tiny"]
    page = Page((begun / "instability" / "table.html").read_text())
    assert "1 of 2 jobs gave no result" in page.text
    assert "gone-petal-red-s0/explainer" in page.text
    assert any("missing: gone" in line for line in table_lines(found))


def test_a_job_with_other_settings_is_refused_before_anything_runs(flower_folder: Path, begun: Path) -> None:
    seen = r"of these settings in .*got one of others \(explainer.eta: .* there, 3.0 here; fields.eta: .*, 3.0 here\)"
    with pytest.raises(RunError, match=seen):
        make("instability", flower_folder, begun, methods={"explainer": BENCH["SMALL"] | {"eta": 3.0}})


def test_a_result_of_other_defaults_is_not_taken_for_this_one(
    flower_folder: Path, begun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The preset keeps its name when a later version changes what it means.
    monkeypatch.setitem(ExplainerConfig.PRESETS["partlens"], "weight_decay", 0.125)
    with pytest.raises(RunError, match=r"\(fields.weight_decay: 0.05 there, 0.125 here\)"):
        make("instability", flower_folder, begun)
    one = planned("p", flower_folder, performers=TRAINED, methods={"train": {"epochs": 1}})
    told = planned("p", flower_folder, performers=TRAINED, methods={"train": {"epochs": 1, "momentum": 0.9}})
    first, same = (jobs_of(plan, find_photos(plan, begun), begun)[0] for plan in (one, told))
    assert first.settings["fields"] == same.settings["fields"]
    assert first.settings["fields"]["momentum"] == 0.9


def test_results_of_several_versions_say_so(flower_folder: Path, begun: Path) -> None:
    found = make("instability", flower_folder, begun)
    assert found.jobs[SEEDS[0]]["partlens"] == partlens.__version__
    assert not any("several versions" in remark for remark in found.remarks)
    folder = begun / "jobs" / SEEDS[0]
    JobRecord.read(folder).model_copy(update={"partlens": "0.0.9"}).write(folder)
    found = make("instability", flower_folder, begun, seeds=2)
    assert f"Made by several versions of partlens: 0.0.9, {partlens.__version__}." in found.remarks


def test_rivals_of_a_run_that_was_deleted_say_what_to_do(flower_folder: Path, begun: Path) -> None:
    shutil.rmtree(begun / "jobs" / SEEDS[0] / "run")
    rivals = {"rivals": {"methods": ["kmeans"], "units": [3]}}
    found = make("rivals", flower_folder, begun, methods=rivals)
    assert found.status == "incomplete"
    assert "got only its result. Delete" in found.jobs[f"tiny-{RED}-s0/rivals"]["error"]
    shutil.rmtree(begun / "jobs" / SEEDS[0])
    assert make("rivals", flower_folder, begun, methods=rivals).status == "complete"


def test_wrong_requests_have_one_clear_error(flower_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Did you mean explainer"):
        make("p", flower_folder, tmp_path, methods={"explaner": {}})
    with pytest.raises(InputError, match="Did you mean epochs"):  # before anything runs
        make("p", flower_folder, tmp_path, methods={"explainer": {"epoch": 1}})
    with pytest.raises(InputError, match="Did you mean epochs"):
        make("p", flower_folder, tmp_path, performers=TRAINED, methods={"train": {"epoch": 1}})
    with pytest.raises(InputError, match="seeds to be greater than or equal to 1"):
        make("p", flower_folder, tmp_path, seeds=0)
    with pytest.raises(InputError, match="labels that can name a folder"):
        make("p", flower_folder, tmp_path, performers={"a/b": "torchvision:resnet18"})
    with pytest.raises(ImageError, match="Did you mean petal-red"):
        make("p", flower_folder, tmp_path, categories=("petal-rad",))
    with pytest.raises(ImageError, match="the category background in .*, got none. Give --sweep.background FOLDER"):
        make("p", flower_folder, tmp_path, against="background")
    with pytest.raises(ImageError, match="a split of .*, got 'tset'. Choose one of test"):
        make("p", flower_folder, tmp_path, split="tset")
    with pytest.raises(LayerError, match=r"got relu44. Nearest: relu4"):  # before hours of training
        make("p", flower_folder, tmp_path, performers=TRAINED, tap="relu44")
    with pytest.raises(LayerError, match="a target after relu3, got fc44"):
        make("p", flower_folder, tmp_path, performers=TRAINED, targets=("fc44",))
    with pytest.raises(InputError, match="every label once, got a twice"):
        performers_of(["a=x:y", "a=x:z"])
    with pytest.raises(InputError, match="at least one performer"):
        performers_of([])
    with pytest.raises(InputError, match="a table among instability, p, errors of several categories together"):
        make("rivals", flower_folder, tmp_path, joint=True)
    with pytest.raises(InputError, match="two categories or more together, got petal-red. Make it without joint"):
        make("p", flower_folder, tmp_path, joint=True)


def study_of(
    table: str,
    rows: list[tuple[str, str, float]],
    networks: dict[str, str | None],
    categories: tuple[str, ...] = ("fox",),
    data: str = "ILSVRC Animal-Part",
) -> Study:
    """The given (subject, score, value) as those of every performer and category."""
    tidy = [
        Row(label, category, 0, "explainer", subject, score, Estimate(value, (value, value), 9))
        for label in networks
        for category in categories
        for subject, score, value in rows
    ]
    return Study(table, Tidy(tidy), networks, categories, data)


def test_part_interpretability_is_compared_with_print_and_only_where_it_was_measured() -> None:
    subjects = ("explainer", "other_photo", "random", "centre")
    study = study_of("instability", [(s, "regions_round", 0.4) for s in subjects], {"alexnet": "AlexNet"})
    found = region_block(study, "explainer", ("explainer", "explainer"), [("explainer", "top", "top")])
    assert {row.label: row.cells["regions_round"].value for row in found.rows} == {
        "explainer": 0.4,
        "… explainer: its regions on other photos": 0.4,
        "null: random cells": 0.4,
        "null: centre": 0.4,
        "performer, printed, single, VOC Part": 0.348,
        "interpretable, printed, single, VOC Part": 0.654,
    }
    bare = study_of("instability", [("explainer", "p", 0.4)], {"alexnet": "AlexNet"})
    assert region_block(bare, "explainer", ("explainer", "explainer"), []).rows == ()


def verdicts_of(study: Study) -> dict[str, Verdict]:
    return {one.title: one for one in build(study)["verdicts"]}


def test_figures_are_judged_against_print_and_nulls() -> None:
    # Read by centroids it may look better; what is printed is of largest cells.
    for ours, largest, met in ((0.06, 0.07, True), (0.06, 0.12, False), (0.12, 0.12, False)):
        rows = [("explainer", ours), ("explainer_largest", largest), ("top", 0.14), ("centre", 0.1), ("corner", 0.09)]
        places = [(subject, "instability", value) for subject, value in rows]
        study = study_of("instability", [*places, ("explainer", "peak_spread_cells", 0.5)], {"alexnet": "AlexNet"})
        row = build(study)["blocks"][0].rows[0].cells
        assert row["t_interpretable"].value == 0.087
        assert row["t_performer"].source == "CVPR 2018, Table 3"
        assert row["ratio"].value == pytest.approx(largest / 0.14)
        found = verdicts_of(study)
        assert found["Against the interpretable CNN"].met is met
        assert f"alexnet: {largest:.3f}; expected at most 0.087" in found["Against the interpretable CNN"].words
        assert found["Against the centre"].met is (ours < 0.1)
        assert found["Not in the corner"].met is (ours < 0.09)
        assert found["Not stuck"].met is False
        assert found["Performer as printed"].met is True
        assert found["Explainer against its performer"].met is (largest / 0.14 < 0.688)
    unknown = verdicts_of(study_of("instability", [("explainer", "p", 0.5)], {"alexnet": "AlexNet"}))
    assert unknown["Instability unknown"].met is None


def test_an_expectation_has_two_ends_and_needs_a_number() -> None:
    assert [one.met for value in (0.9, 1.0, 2.0, 2.1) for one in expect("t", "a", value, 2.0, "w", 1.0)] == [
        False,
        True,
        True,
        False,
    ]
    assert expect("t", "a", math.nan, 1.0, "w") == []
    assert expect("t", "a", 1.0, math.nan, "w") == []


def test_means_are_over_categories_and_the_order_of_p_is_judged() -> None:
    networks: dict[str, str | None] = {"a": "AlexNet", "v": "VGG-16", "r": "ResNet-101"}

    def with_p(shares: dict[tuple[str, str], float]) -> Study:
        study = study_of("p", [("explainer", "p", 0.0)], networks, ("fox", "cat"))
        rows = [row._replace(estimate=Estimate(shares[row[:2]], (math.nan,) * 2, 1)) for row in study.tidy.rows]
        return dataclasses.replace(study, tidy=Tidy(rows))

    rising = {("a", "fox"): 0.4, ("a", "cat"): 0.6, ("v", "fox"): 0.8, ("v", "cat"): 0.8}
    rising |= {("r", "fox"): 0.9, ("r", "cat"): 0.9}
    built = build(with_p(rising))
    rows = built["blocks"][0].rows
    assert [row.label for row in rows[:3]] == ["a", "fox", "cat"]
    assert rows[0].cells["p"].value == pytest.approx(0.5)
    assert rows[0].cells["p"].interval == pytest.approx((0.4, 0.6))
    assert rows[0].cells["voc"].value == 0.71
    assert verdicts_of(with_p(rising))["Order of p"].met is True
    assert verdicts_of(with_p(rising | {("r", "fox"): 0.1}))["Order of p"].met is False


def test_the_page_of_a_record_is_the_same_twice(finished: tuple[Path, TableRecord], tmp_path: Path) -> None:
    record = TableRecord.read(finished[0] / "instability")
    first, second = (table_page(record, tmp_path / name).read_text() for name in ("a.html", "b.html"))
    assert first == second == (finished[0] / "instability" / "table.html").read_text()


def test_a_sweep_writes_down_how_its_photos_are_opened(
    flower_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others, more = tmp_path / "others", tmp_path / "more"
    for folder, count in ((others, 1), (more, 2)):
        folder.mkdir()
        for index in range(count):
            ImageSet.open(flower_folder).read(index).save(folder / f"{index}.png")
    monkeypatch.chdir(tmp_path)
    made = []
    # A second table of other photos does not touch the first one's, and a job refuses photos that are not its own.
    for background in (others, more):
        plan = planned("p", flower_folder, background=str(background))
        photos = find_photos(plan, Path("out"))
        assert Path(photos.path).parent == tmp_path.resolve() / "out"
        made.append((photos, jobs_of(plan, photos, Path("out"))))
    assert ImageSet.open(made[0][0].path).category_counts()["background"] == 1
    for photos, jobs in made:
        assert {photos_of(job).fingerprint() for job in jobs} == {photos.facts["fingerprint"]}
    ImageSet.open(flower_folder).read(3).save(others / "0.png")
    with pytest.raises(RunError, match="Make the table again from these"):
        photos_of(made[0][1][0])


@pytest.mark.parametrize(("against", "counts"), [("all", {RED: 32, BLUE: 32}), ("background", {RED: 32})])
def test_a_category_is_told_from_all_others_or_from_background(
    flower_folder: Path, tmp_path: Path, against: str, counts: dict[str, int]
) -> None:
    plan = planned("errors", flower_folder, performers=TRAINED, background=str(flower_folder), against=against)
    for job in jobs_of(plan, find_photos(plan, tmp_path), tmp_path):  # also the one that trains the performer
        assert photos_of(job).category_counts() == {**counts, "background": 64}


def test_teachers_can_come_from_the_tap(
    finished: tuple[Path, TableRecord], flower_folder: Path, tmp_path: Path
) -> None:
    found = make("instability", flower_folder, tmp_path, teachers="tap")
    assert found.status == "complete", [job["error"] for job in found.jobs.values()]
    run = json.loads((tmp_path / "jobs" / SEEDS[0] / "run" / "run.json").read_text())
    assert run["places"] == "partlens_papers.tap_teachers:tap_places"
    later = scores(finished[0], SEEDS[0])["explainer", "instability"].value
    assert scores(tmp_path, SEEDS[0])["explainer", "instability"].value != later


def test_rivals_are_read_as_the_explainer_is() -> None:
    maps = torch.zeros(1, 1, 5, 5)
    maps[0, 0, 2, 0], maps[0, 0, 2, 4] = 1.0, 0.99
    found = {}
    for power in (None, 6.0):
        measured = MeasuredLayer()
        measured.add(maps, power)
        found[power] = measured.peaks((0.0, 0.0), (1.0, 1.0), power).cells[0, 0].tolist()
        assert measured.peaks((0.0, 0.0), (1.0, 1.0)).cells[0, 0].tolist() == [2, 0]
    assert found[None] == [2, 0]
    assert found[6.0] == pytest.approx([2, 2], abs=0.1)


def test_categories_together_are_compared_with_the_multi_category_figures(flower_folder: Path, tmp_path: Path) -> None:
    """One performer of both is trained first, once, for both explainers."""
    given = {"categories": (RED, BLUE), "joint": True, "performers": {"tiny": "train:bench_network:tiny"}}
    given["methods"] = {"train": {"epochs": 1, "loss": "softmax"}}
    content = make("errors", flower_folder, tmp_path, **given)
    assert content.status == "complete", [job["error"] for job in content.jobs.values()]
    together = f"tiny-{BLUE}+{RED}-s0"
    assert list(content.jobs) == [f"{together}/{kind}" for kind in ("performer", "explainer", "explainer-cls")]
    assert content.data["setting"] == "multi softmax"
    assert {job["errors_by"] for job in list(content.jobs.values())[1:]} == {"performer"}
    assert content.plan["joint"] is True
    found = make("instability", flower_folder, tmp_path, **given)
    of = evaluation(tmp_path, f"{together}/explainer")
    assert set(of["explainer"]["by_category"]) <= {RED, BLUE}
    assert {row["setting"] for row in found.published} == {"multi softmax"}
    main_row = block(found, "instability").rows[0].cells
    assert main_row["explainer"].value == pytest.approx(of["explainer"]["instability"]["value"])
    # Alone they are other jobs: one is not taken for the other.
    single = planned("instability", flower_folder, categories=(RED, BLUE))
    jobs = jobs_of(single, find_photos(single, tmp_path), tmp_path)
    assert "joint" not in jobs[0].settings
    assert {job.category for job in jobs} == {RED, BLUE}


def test_the_printed_figures_are_of_the_same_setting() -> None:
    for setting, value in (("single", 0.141), ("multi", 0.135), ("multi softmax", 0.137)):
        study = Study("instability", Tidy(()), {"a": "VGG-M"}, ("x",), "VOC Part", setting)
        found = study.lines("instability", "a", "performer")
        assert found[0].average == value
        assert {row.setting for row in found} == {setting}
