"""The verbs select-features and explain on a tiny network: files, resumption, repetition, errors (T25)."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

import partlens
from partlens.attribution.average_pictures import average_pictures
from partlens.cli import main
from partlens.data.images import ImageSet
from partlens.errors import AtWorkError, ImageError, InputError, RunError
from partlens.network.performer import Performer, weights_sha256
from partlens.progress import Progress
from partlens.records import file_sha256, read_json, read_tensors, sole_writer, write_json, write_tensors
from partlens.run import Run
from partlens.selection.lasso import mu_lasso
from partlens.selection.record import SelectionRecord
from partlens.selection.responses import stream_responses
from partlens.verbs.explain import _folder_names, explain
from partlens.verbs.select_features import load_selection, select_features


@pytest.fixture
def selected(tiny: Performer, few_flowers: ImageSet, tmp_path: Path) -> Path:
    return select_features(tiny, few_flowers, out=tmp_path / "run", top_photos=10).path


@pytest.fixture
def photo(few_flowers: ImageSet, tmp_path: Path) -> Path:
    few_flowers.read(few_flowers.indices(split="test")[0]).save(tmp_path / "a flower.png")
    return tmp_path / "a flower.png"


def test_a_selection_names_its_features_and_their_certificate(selected: Path, few_flowers: ImageSet) -> None:
    record = SelectionRecord.read(selected)
    found = record.found
    assert record.finished
    assert record.photos == len(few_flowers.indices(split="train"))
    assert [one.name for one in found.classes] == ["petal-blue", "petal-red"]
    weights = read_tensors(selected / "selection.safetensors")["weights"]
    assert tuple(weights.shape) == (found.index.size, 2)
    for column, one in enumerate(found.classes):
        assert int((weights[:, column] != 0).sum()) == len(one.filters)
        assert one.photos == sum(
            c == one.name for c, s in zip(few_flowers.categories, few_flowers.splits, strict=True) if s == "train"
        )
        assert one.norm == pytest.approx(float(weights[:, column].sum()))
        assert one.norm <= 10 * (1 + 1e-6)
        assert sum(f.share for f in one.filters) == pytest.approx(1)
        assert [f.weight for f in one.filters] == sorted(f.weight for f in one.filters)[::-1]
        for each in one.filters:
            assert float(weights[found.index.feature(each.layer, each.channel), column]) == each.weight
            for name in ("average", "control", "crops"):
                assert (selected / getattr(each.picture, name)).is_file()
            assert len(each.strongest) == 8
            assert set(each.strongest) <= {few_flowers.keys[i] for i in few_flowers.indices(split="train")}
    assert found.relative_gap <= 1e-6
    assert found.accuracy.n == found.shuffled.n == len(few_flowers.indices(split="test"))
    assert found.chance == 0.5
    assert not (selected / "cache-selection").exists()


def test_the_record_says_what_the_solver_found(tiny: Performer, few_flowers: ImageSet, tmp_path: Path) -> None:
    """Everything is computed again from the descriptors, with settings that are not the default."""
    named = dataclasses.replace(tiny, class_names=("petal-red", "tulip", "petal-blue", "fern"))
    record = select_features(
        named, few_flowers, out=tmp_path / "run", mu=0.8, nonnegative=False, seed=3, pictures=1, top_photos=3
    ).record
    found = record.found
    assert [one.output for one in found.classes] == [2, 0]
    fit, held = (list(few_flowers.indices(split=split)) for split in ("train", "test"))
    responses = stream_responses(named, few_flowers.take([*fit, *held]), top=(8, len(fit)))
    x, logits = (torch.from_numpy(np.array(rows)) for rows in (responses.descriptor, responses.logits))
    classes = ["petal-blue", "petal-red"]
    kind = torch.tensor([classes.index(few_flowers.categories[i]) for i in [*fit, *held]])
    matrix = torch.nn.functional.one_hot(kind[: len(fit)], 2).double()
    solved = mu_lasso(x[: len(fit)], matrix, 0.8, nonnegative=False)
    order = torch.randperm(len(fit), generator=torch.Generator().manual_seed(3))
    null = mu_lasso(x[: len(fit)], matrix[order], 0.8, nonnegative=False, on_failure="return")
    truth, rest = kind[len(fit) :], x[len(fit) :].double()
    for estimate, told in (
        (found.accuracy, (rest @ solved.weights).argmax(1)),
        (found.shuffled, (rest @ null.weights).argmax(1)),
        (found.model_accuracy, torch.tensor([1, -1, 0, -1])[logits[len(fit) :].argmax(1)]),
    ):
        assert estimate.value == pytest.approx(float((told == truth).double().mean()))
        assert estimate.n == len(held)
    for column, one in enumerate(found.classes):
        assert one.norm == float(solved.norm[column])
        assert one.objective == float(solved.objective[column])
        assert one.relative_gap == float(solved.relative_gap[column])
        sizes = [abs(each.weight) for each in one.filters]
        assert sizes == sorted(sizes, reverse=True)
        assert [each.share for each in one.filters] == [size / one.norm for size in sizes]
    assert found.iterations == solved.iterations
    assert record.at_bound(found) == int(solved.constraint_active.sum()) == 2
    # One picture: of the largest weight among the first filters of the classes.
    pictured = {(f.layer, f.channel) for one in found.classes for f in one.filters if f.picture}
    first = max((one.filters[0] for one in found.classes), key=lambda each: abs(each.weight))
    assert pictured == {(first.layer, first.channel)}
    top = responses.top.of([found.index.feature(first.layer, first.channel)]).first(3)
    place = [(first.layer, first.channel)]
    (drawn,) = average_pictures(named, few_flowers.take(fit), place, top, seed=3)
    picture = next(f.picture for one in found.classes for f in one.filters if f.picture)
    assert (picture.sharpness, picture.control_sharpness) == (drawn.contrast, drawn.control_contrast)
    assert picture.receptive_field_px == drawn.receptive_field_px
    strongest = next(f.strongest for one in found.classes for f in one.filters if f.picture)
    assert strongest[:3] == tuple(few_flowers.keys[fit[row]] for row in drawn.rows)


def test_the_record_says_where_it_computed(tiny: Performer, few_flowers: ImageSet, tmp_path: Path) -> None:
    record = select_features(tiny, few_flowers, out=tmp_path / "run", pictures=0, compute={"device": "cpu"}).record
    assert record.performer.device == "cpu"
    with pytest.raises(InputError, match="a device that this machine has, got cuda:99"):
        select_features(tiny, few_flowers, out=tmp_path / "other", compute={"device": "cuda:99"})
    with pytest.raises(InputError, match="workers"):
        select_features(tiny, few_flowers, out=tmp_path / "other", compute={"workers": 0})
    assert not (tmp_path / "other").exists()


def test_the_same_command_again_changes_nothing_and_another_is_refused(
    selected: Path, tiny: Performer, few_flowers: ImageSet
) -> None:
    before = (selected / "selection.json").read_bytes()
    select_features(tiny, few_flowers, out=selected, top_photos=10)
    assert (selected / "selection.json").read_bytes() == before
    with pytest.raises(RunError, match=r"holds a run with mu = 10, not 3\. Choose another --out"):
        select_features(tiny, few_flowers, out=selected, top_photos=10, mu=3.0)


def test_a_killed_selection_goes_on_and_ends_the_same(
    selected: Path, tiny: Performer, few_flowers: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from partlens.verbs import selected_features as verb

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "again"
    with monkeypatch.context() as patch:
        patch.setattr(verb, "_draw", stop)
        with pytest.raises(KeyboardInterrupt):
            select_features(tiny, few_flowers, out=out, top_photos=10)
    assert not SelectionRecord.read(out).finished
    assert (out / "cache-selection" / "rows.json").exists()
    with pytest.raises(RunError, match="got running. Run partlens select-features again with the same arguments"):
        load_selection(out, tiny)
    with pytest.raises(RunError, match="got the selection is not finished: the same select-features goes on with it"):
        explain(out, few_flowers.take([0]), model=tiny)
    select_features(tiny, few_flowers, out=out, top_photos=10)
    assert (out / "selection.safetensors").read_bytes() == (selected / "selection.safetensors").read_bytes()
    for file in sorted((selected / "pictures").iterdir()):
        assert (out / "pictures" / file.name).read_bytes() == file.read_bytes()


def test_T25_a_reloaded_selection_explains_bit_for_bit_the_same(
    selected: Path, tiny: Performer, photo: Path, tmp_path: Path
) -> None:
    first, again = (
        partlens.explain(selected, photo, model=tiny, out=tmp_path / name)[0] / "arrays.safetensors"
        for name in ("one", "two")
    )
    assert first.read_bytes() == again.read_bytes()


def test_an_explanation_is_a_folder_with_numbers_arrays_pictures_and_a_page(
    selected: Path, tiny: Performer, photo: Path
) -> None:
    (folder,) = partlens.explain(selected, [photo], model=tiny)
    assert folder == selected / "explanations" / "a_flower"
    content = read_json(folder / "explanation.json")
    arrays = read_tensors(folder / "arrays.safetensors")
    assert len(content["explained"]) == 2
    assert arrays["combined"].shape == (2, 32, 32)
    for k, one in enumerate(content["explained"]):
        assert one["name"] in {"petal-red", "petal-blue"}
        with Image.open(folder / one["combined"]) as drawn:
            assert drawn.size == (448, 448)
        index = SelectionRecord.read(selected).found.index
        shown = [index.feature(f["layer"], f["channel"]) for f in one["filters"]]
        assert shown == [f for f in arrays["features"][k].tolist() if f >= 0]
        for feature in one["filters"]:
            assert (folder / feature["overlay"]).is_file()
            assert (folder / feature["average"]).is_file()
            assert feature["contribution"] == pytest.approx(feature["weight"] * feature["response"], rel=1e-4)
    # The tiny network has two outputs too many and no names: the linear scores rank the classes, and that is said.
    assert any("not outputs of the performer" in note for note in content["notes"])
    assert content["explained"][0]["score"] >= content["explained"][1]["score"]
    assert "<script" not in (folder / "explanation.html").read_text()


def test_the_performer_is_handed_back_as_it_was(selected: Path, tiny: Performer, photo: Path, state: Any) -> None:
    tiny.module.train()
    before = state(tiny.module, python=False)
    partlens.explain(selected, photo, model=tiny)
    assert state(tiny.module, python=False) == before


def test_predictions_can_be_the_labels(tiny: Performer, few_flowers: ImageSet, tmp_path: Path) -> None:
    batch = tiny.preprocessing([few_flowers.read(i) for i in few_flowers.indices(split="train")])
    with torch.no_grad():
        decided = sorted(set(tiny.module(batch).argmax(1).tolist()))
    if len(decided) < 2:
        # Shift the bias so that the tiny random network decides for two classes.
        with torch.no_grad():
            scores = tiny.module(batch)
            tiny.module.classes.bias += (scores.mean(0).max() - scores.mean(0)).clamp(max=10)
            decided = sorted(set(tiny.module(batch).argmax(1).tolist()))
    assert len(decided) >= 2
    run = select_features(tiny, few_flowers, out=tmp_path / "run", labels="predictions", pictures=0)
    assert [one.output for one in run.found.classes] == decided
    assert run.found.classes[0].filters[0].picture is None
    assert not run.found.model_accuracy.defined


def test_named_classes_are_explained_in_their_order(selected: Path, tiny: Performer, photo: Path) -> None:
    (folder,) = partlens.explain(selected, photo, model=tiny, classes=["petal-red"])
    assert [one["name"] for one in read_json(folder / "explanation.json")["explained"]] == ["petal-red"]
    with pytest.raises(InputError, match="Expected a class of the selection .* got petal-rad. Nearest: petal-red"):
        partlens.explain(selected, photo, model=tiny, classes=["petal-rad"])


def test_files_of_the_same_name_get_their_own_folders(
    selected: Path, tiny: Performer, few_flowers: ImageSet, tmp_path: Path
) -> None:
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        few_flowers.read(0).save(tmp_path / name / "flower.png")
    found = partlens.explain(selected, [tmp_path / "x" / "flower.png", tmp_path / "y"], model=tiny, count=1)
    assert [f.name for f in found] == ["flower", "flower-2"]


def test_a_batch_of_images_equals_them_one_by_one(
    selected: Path, tiny: Performer, few_flowers: ImageSet, tmp_path: Path
) -> None:
    some = few_flowers.take(range(3))
    together = partlens.explain(selected, some, model=tiny, out=tmp_path / "all")
    for i, folder in enumerate(together):
        (alone,) = partlens.explain(selected, some.take([i]), model=tiny, out=tmp_path / f"one-{i}")
        a, b = (read_tensors(f / "arrays.safetensors") for f in (folder, alone))
        assert torch.equal(a["features"], b["features"])
        assert torch.allclose(a["combined"], b["combined"], atol=1e-5)


def test_errors_name_the_value_and_the_remedy(
    selected: Path, tiny: Performer, few_flowers: ImageSet, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match="made with a network object, got none"):
        partlens.explain(selected, few_flowers)
    with pytest.raises(ImageError, match="nothing there"):
        partlens.explain(selected, tmp_path / "missing.png", model=tiny)
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"an image that can be decoded at .*broken\.png"):
        partlens.explain(selected, tmp_path / "broken.png", model=tiny)
    with pytest.raises(ImageError, match="Expected at least 1 image to explain, got 0"):
        partlens.explain(selected, [], model=tiny)
    with pytest.raises(
        RunError,
        match="Expected a finished inspection, selection or explainer in .* got none. Run inspect, select-features",
    ):
        partlens.explain(tmp_path, few_flowers, model=tiny)
    with pytest.raises(InputError, match="Expected labels as one of data, predictions, got 'guesses'"):
        select_features(tiny, few_flowers, out=tmp_path / "b", labels="guesses")  # type: ignore[arg-type]
    with pytest.raises(ImageError, match="Expected photos of at least 2 categories to fit on, got \\['petal-red'\\]"):
        select_features(tiny, few_flowers.select("petal-red"), out=tmp_path / "c")
    assert not (tmp_path / "c").exists()  # refused before a photo is read
    other = ImageSet.from_arrays(np.zeros((3, 32, 32, 3), np.uint8), categories=["a", "a", "b"], splits=["x"] * 3)
    with pytest.raises(ImageError, match="Expected a split of arrays, got 'train'"):
        select_features(tiny, other, out=tmp_path / "d")


def test_changed_weights_are_noticed(selected: Path, tiny: Performer, few_flowers: ImageSet) -> None:
    with (selected / "selection.safetensors").open("ab") as file:
        file.write(b" ")
    with pytest.raises(RunError, match=r"safetensors in .*selection\.safetensors, got"):
        partlens.explain(selected, few_flowers, model=tiny)


def test_the_command_line_selects_explains_and_reports(
    few_flowers: ImageSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "photos"
    for i in range(24):
        (folder / few_flowers.categories[i]).mkdir(parents=True, exist_ok=True)
        few_flowers.read(i).save(folder / few_flowers.categories[i] / f"{i:02}.png")
    run = tmp_path / "run"
    model = "partlens:flower-demo@random:0"
    arguments = [
        model,
        str(folder),
        "--out",
        str(run),
        "--descriptor.layers",
        "activations",
        "--top-photos",
        "5",
        "--mu",
        "5",
    ]
    assert main(["select-features", *arguments]) == 0
    assert capsys.readouterr().out.strip() == str(run)
    image = str(next(folder.rglob("*.png")))
    assert main(["explain", str(run), image, "--count", "1", "--explanation.features", "2", "--style", "jet"]) == 0
    shown = Path(capsys.readouterr().out.strip())
    content = json.loads((shown / "explanation.json").read_text())
    assert content["method"]["features"] == 2
    assert content["method"]["fix_strides"] == "aligned"
    assert SelectionRecord.read(run).config.descriptor.layers == "activations"
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "What each class is read from" in page
    assert main(["explain", str(run), image, "--classes", "nothing"]) == 1
    assert "Expected a class of the selection" in capsys.readouterr().err


def test_numbered_categories_get_the_performers_names_and_equal_names_their_number(tiny: Performer) -> None:
    import dataclasses

    from partlens.verbs.selected_features import _readable

    named = dataclasses.replace(tiny, class_names=("crane", "fox", "crane", "bow"))
    assert _readable(named, ["0", "1", "2"], [0, 1, 2]) == ["crane (0)", "fox", "crane (2)"]
    assert _readable(named, ["red fox", "3"], [1, 3]) == ["red fox", "bow"]
    assert _readable(tiny, ["0", "unknown"], [0, None]) == ["0", "unknown"]


def test_held_out_photos_of_a_class_that_was_not_fitted_do_not_count(tiny: Performer, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    photos = rng.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    categories = ["a", "b"] * 4 + ["a", "b", "c", "c"]
    images = ImageSet.from_arrays(photos, categories=categories, splits=["train"] * 8 + ["test"] * 4)
    found = select_features(tiny, images, out=tmp_path / "run", pictures=0).found
    assert found.accuracy.n == found.shuffled.n == 2


def test_folder_names_are_told_apart_whatever_the_file_system(tmp_path: Path) -> None:
    given = ["x/a.png", "y/a.png", "z/a-2.png", "z/A.png", "ö.png", "é.png", "a-2-2.png"]
    found = _folder_names(given, given, tmp_path)
    assert len({name.casefold() for name in found}) == len(given)
    assert found[0] == "a"
    assert found[2] == "a-2"  # its own name
    assert found[4:6] == ["ö", "é"]


def test_an_explanation_of_another_file_of_the_same_name_is_kept(
    selected: Path, tiny: Performer, few_flowers: ImageSet, tmp_path: Path
) -> None:
    for number, name in enumerate(("x", "y")):
        (tmp_path / name).mkdir()
        few_flowers.read(number).save(tmp_path / name / "flower.png")
    files = [tmp_path / name / "flower.png" for name in ("x", "y")]
    folders = [partlens.explain(selected, file, model=tiny, count=1)[0] for file in (*files, files[0])]
    assert [f.name for f in folders] == ["flower", "flower-2", "flower"]  # the same one again is renewed
    for folder, file in zip(folders, files, strict=False):
        assert read_json(folder / "explanation.json")["path"] == str(file)
    moved = files[1].rename(tmp_path / "flower.png")  # the same photo under another path
    assert partlens.explain(selected, moved, model=tiny, count=1) == [folders[1]]
    for old in ('{"schema": "partlens.explanation/1", "path": "' + str(moved) + '"}', "damaged"):
        (folders[1] / "explanation.json").write_text(old)
        assert partlens.explain(selected, moved, model=tiny, count=1) == [folders[1]]


def test_a_folder_is_explained_without_what_cannot_be_read(
    selected: Path, tiny: Performer, few_flowers: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(Progress, "say", lambda _, message: said.append(message))
    folder = tmp_path / "mixed"
    folder.mkdir()
    few_flowers.read(0).save(folder / "good.png")
    (folder / "bad.png").write_bytes(b"no picture")
    found = partlens.explain(selected, folder, model=tiny, count=1, out=tmp_path / "out")
    assert [f.name for f in found] == ["good"]
    assert any(line.startswith("skipped") and "bad.png: " in line for line in said)
    with pytest.raises(ImageError):  # a file that was named has to be there
        partlens.explain(selected, folder / "bad.png", model=tiny)


@pytest.mark.parametrize("changes", [{"mu": -1.0}, {"mu": float("nan")}, {"top_photos": 0}, {"pictures": -1}])
def test_what_is_refused_leaves_no_folder(
    tiny: Performer, few_flowers: ImageSet, tmp_path: Path, changes: dict[str, float]
) -> None:
    with pytest.raises(InputError, match=next(iter(changes))):
        select_features(tiny, few_flowers, out=tmp_path / "new", **changes)
    assert not (tmp_path / "new").exists()


def test_held_out_photos_that_are_copies_are_said_and_not_used(
    tiny: Performer, few_flowers: ImageSet, tmp_path: Path
) -> None:
    train, test = (few_flowers.indices(split=split) for split in ("train", "test"))
    pictures = [np.asarray(few_flowers.read(row)) for row in (*train, *test[2:], *train[:2])]
    told, names = io.StringIO(), [few_flowers.categories[row] for row in (*train, *test[2:], *train[:2])]
    copied = ImageSet.from_arrays(pictures, names, ["train"] * len(train) + ["test"] * len(test))
    show = Progress(Console(file=told, width=200))
    found = partlens.select_features(tiny, copied, out=tmp_path / "s", pictures=1, progress=show)
    assert "2 held-out photos are copies of photos to fit on and are not used: see data check" in told.getvalue()
    assert found.found.accuracy.n == len(test) - 2


def test_photos_without_a_test_split_are_selected_from(tiny: Performer, few_flowers: ImageSet, tmp_path: Path) -> None:
    train = dataclasses.replace(few_flowers, splits=("train",) * len(few_flowers))
    found = partlens.select_features(tiny, train, out=tmp_path / "s", pictures=1)
    assert not found.found.accuracy.defined


def test_a_single_output_of_a_selection_is_yes_or_no(tiny: Performer, few_flowers: ImageSet, tmp_path: Path) -> None:
    """Softmax over one output would call everything the category."""
    torch.manual_seed(0)
    tiny.module.classes = torch.nn.Linear(16, 1)
    torch.nn.init.constant_(tiny.module.classes.bias, -50.0)
    judge = Performer(
        tiny.module, "judge", tiny.preprocessing, weights_sha256(tiny.module), "relu2", class_names=("petal-red",)
    )
    run = tmp_path / "s"
    partlens.select_features(judge, few_flowers, out=run, pictures=1)
    (folder,) = partlens.explain(run, few_flowers.take([0]), model=judge, classes=["petal-red"])
    (one,) = read_json(folder / "explanation.json")["explained"]
    assert one["probability"] < 1e-6
    assert one["rank"] == 2


def test_results_inside_the_folder_of_photos_do_not_become_a_category(
    tiny: Performer, few_flowers: ImageSet, tmp_path: Path
) -> None:
    for row, category in enumerate(few_flowers.categories[:24]):
        (tmp_path / category).mkdir(exist_ok=True)
        few_flowers.read(row).save(tmp_path / category / f"{row}.png")
    first = select_features(tiny, tmp_path, out=tmp_path / "run1", top_photos=4)
    again = select_features(tiny, tmp_path, out=tmp_path / "run1", top_photos=4)
    assert again.record == first.record
    partlens.explain(tmp_path / "run1", tmp_path / "petal-red" / "0.png", model=tiny, out=tmp_path / "looked")
    second = select_features(tiny, tmp_path, out=tmp_path / "run2", top_photos=4)
    assert second.record.data.fingerprint == first.record.data.fingerprint
    assert [one.name for one in second.found.classes] == ["petal-blue", "petal-red"]


@pytest.mark.parametrize("harm", ["deleted", "cut", "other shape", "other kind", "not finite", "another selection's"])
def test_damaged_weights_of_a_selection_are_named_with_what_to_do(
    selected: Path, tiny: Performer, photo: Path, harm: str
) -> None:
    path = selected / "selection.safetensors"
    weights = read_tensors(path)["weights"]
    changed = {
        "other shape": torch.zeros(3, 2, dtype=torch.float64),
        "other kind": weights.to(torch.int8),
        "not finite": weights * float("nan"),
        "another selection's": weights.flip(1),
    }
    if harm in changed:
        write_tensors(path, {"weights": changed[harm]})
    elif harm == "cut":
        path.write_bytes(path.read_bytes()[:-8])
    else:
        path.unlink()
    with pytest.raises(RunError, match=r"selection\.safetensors.*Restore the file, or delete it and selection\.json"):
        load_selection(selected, tiny)
    if harm in changed:  # also where the hash was changed with it
        record = json.loads((selected / "selection.json").read_text())
        record["found"]["weights_sha256"] = file_sha256(path)
        write_json(selected / "selection.json", record)
        if harm != "another selection's":
            with pytest.raises(RunError, match=r"weights in .*selection\.safetensors|finite numbers in weights"):
                explain(selected, photo, model=tiny)


def test_explaining_holds_the_run_and_writes_nowhere_else(selected: Path, tiny: Performer, photo: Path) -> None:
    with Run(selected).writing():
        with pytest.raises(AtWorkError, match="is locked by another process"):
            explain(selected, photo, model=tiny)
        elsewhere = selected.parent / "elsewhere"
        explain(selected, photo, model=tiny, out=elsewhere)  # another folder is free
        with sole_writer(elsewhere), pytest.raises(AtWorkError, match="elsewhere is locked"):
            explain(selected, photo, model=tiny, out=elsewhere)
    mine = selected.parent / "mine"
    mine.mkdir()
    (selected / "explanations").symlink_to(mine)
    with pytest.raises(RunError, match="explanations, got a link to .*mine. Delete the link"):
        explain(selected, photo, model=tiny)
    assert not list(mine.iterdir())


def test_a_stopped_explanation_leaves_no_temporary_file(selected: Path, tiny: Performer, photo: Path) -> None:
    (folder,) = explain(selected, photo, model=tiny, out=selected.parent / "elsewhere")
    (folder / f".{'0' * 16}.tmp").write_text("half")
    explain(selected, photo, model=tiny, out=folder.parent)
    assert not list(folder.parent.rglob(".*"))
