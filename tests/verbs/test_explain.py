"""The verb explain: which images are explained by the parts of an explainer, and that signals are computed once."""

from __future__ import annotations

import dataclasses
import io
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

import partlens
from partlens.attribution import explanation
from partlens.attribution.record import ExplanationRecord
from partlens.data.flowers import generated_flowers
from partlens.data.images import ImageSet
from partlens.errors import InputError, InputTypeError
from partlens.network.performer import Performer
from partlens.progress import Progress
from partlens.verbs import explained_parts
from partlens.verbs.select_features import select_features

RED, BLUE = "petal-red", "petal-blue"


QUICK = {"rule": "clusters", "null_filters": 20, "photos_max": 8, "clusters_min": 2, "clusters_max": 2}


@pytest.fixture(scope="module")
def with_parts(fitted_once: Path, tiny_once: Performer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fitted run with parts, found once."""
    run = Path(shutil.copytree(fitted_once, tmp_path_factory.mktemp("parts") / "run"))
    flowers = generated_flowers(80, seed=3, size=48, categories=(RED, BLUE))
    partlens.parts(run, flowers, model=tiny_once, config=QUICK)
    return run


@pytest.fixture
def run(with_parts: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(with_parts, tmp_path / "run"))


@pytest.fixture
def one(few_flowers: ImageSet) -> ImageSet:
    return few_flowers.take([0])


def called(tiny: Performer, image: ImageSet, name: str, other: str) -> Performer:
    """Return the tiny network with the name for its answer to the image, and another name for another output."""
    with torch.no_grad():
        answer = int(tiny.module.eval()(tiny.preprocessing([image.read(0)])).argmax())
    names = ["tulip", "fern", "rose", "moss"]
    names[answer], names[(answer + 1) % 4] = name, other
    return dataclasses.replace(tiny, class_names=tuple(names))


def explained(run: Path, performer: Performer, image: ImageSet, **options: object) -> ExplanationRecord:
    (folder,) = partlens.explain(run, image, model=performer, out=run / "found", **options)
    assert (folder / "explanation.html").exists()
    return ExplanationRecord.read(folder)


def test_the_parts_of_a_category_explain_its_photos(run: Path, tiny: Performer, one: ImageSet) -> None:
    found = explained(run, called(tiny, one, RED, BLUE), one)
    assert [each.name for each in found.parts] == [RED]
    assert not any("takes this image for" in note for note in found.notes)


def test_the_parts_of_a_category_do_not_explain_photos_of_others(
    run: Path, tiny: Performer, one: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(Progress, "say", lambda _, message: said.append(message))
    foreign = called(tiny, one, BLUE, RED)
    found = explained(run, foreign, one)
    assert found.parts == ()
    assert found.answers[0].name == BLUE
    sentence = f"the network takes this image for {BLUE}, and the explainer knows the parts of {RED}"
    assert found.notes[-1].startswith(sentence)
    assert any(sentence in line for line in said)
    (page,) = (run / "found").rglob("explanation.html")
    assert sentence in page.read_text()


def test_a_named_class_is_shared_among_parts_whatever_the_network_says(
    run: Path, tiny: Performer, one: ImageSet
) -> None:
    foreign = called(tiny, one, BLUE, RED)
    found = explained(run, foreign, one, classes=[RED])
    assert [(each.name, each.rank == 1) for each in found.parts] == [(RED, False)]
    with pytest.raises(InputError, match=f"Expected a class among {RED}, got {BLUE}"):
        explained(run, foreign, one, classes=[BLUE])
    both = explained(run, foreign, one, classes=[RED, BLUE])
    assert [each.name for each in both.parts] == [RED]
    assert any(f"knows the parts of {RED} alone" in note for note in both.notes)


def test_where_the_category_is_no_output_every_prediction_is_shared(run: Path, tiny: Performer, one: ImageSet) -> None:
    found = explained(run, tiny, one)
    assert len(found.parts) == 1
    said = f"no output of the network is called {RED}: the explainer's parts share the score of its answer"
    assert any(said in note for note in found.notes)


def test_parts_are_measured_only_where_they_explain_and_as_in_the_whole_batch(
    run: Path, tiny: Performer, few_flowers: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    performer = dataclasses.replace(tiny, class_names=(RED, BLUE, "tulip", "fern"))
    three = few_flowers.take([0, 1, 2])
    outputs = torch.tensor([[0.0, 9, 0, 0], [9.0, 0, 0, 0], [0.0, 9, 0, 0]])
    monkeypatch.setattr("partlens.verbs.explained_images._outputs", lambda *_: outputs)
    seen: list[tuple[int, ...]] = []
    measure = explained_parts.explain_parts

    def noted(opened, batch, classes, rows):
        seen.append(tuple(rows))
        return measure(opened, batch, classes, rows)

    monkeypatch.setattr("partlens.verbs.explained_images.explain_parts", noted)
    folders = partlens.explain(run, three, model=performer, out=run / "found")
    assert seen == [(1,)]
    assert [len(ExplanationRecord.read(folder).parts) for folder in folders] == [0, 1, 0]
    opened = explained_parts.load_parts(run, performer)
    batch = performer.preprocessing([three.read(i) for i in range(3)])
    whole, some = measure(opened, batch, None), measure(opened, batch, None, [2, 0])
    for place, row in enumerate((2, 0)):
        assert torch.equal(whole.classes[row], some.classes[place])
        assert torch.equal(whole.outputs[row], some.outputs[place])
        assert torch.equal(whole.heat[row], some.heat[place])


def test_signals_run_back_once_a_batch(
    tiny: Performer, few_flowers: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = select_features(tiny, few_flowers, out=tmp_path / "run", pictures=0).path
    calls: list[object] = []
    signals = explanation.backward_signals

    def counted(*args, **options):
        calls.append((options["rule"], options["fix_strides"], options["pooling"]))
        return signals(*args, **options)

    monkeypatch.setattr(explanation, "backward_signals", counted)
    folders = partlens.explain(run, few_flowers.take([0, 1]), model=tiny)
    assert calls == [("guided", "aligned", "resample")]
    first, second = ExplanationRecord.read(folders[0]).explained
    assert math.isnan(first.rank_correlation)
    assert -1 <= second.rank_correlation <= 1
    calls.clear()
    explained(run, tiny, few_flowers.take([0]), preset="paper", config={"rule": "deconvnet"})
    assert calls == [("deconvnet", True, "route")]


def test_pictures_and_arrays_of_python_are_explained_as_files_are(run: Path, tiny: Performer, tmp_path: Path) -> None:
    flower = generated_flowers(1, seed=3, size=48, categories=(RED,)).read(0)
    flower.save(tmp_path / "a.png")
    pixels = np.asarray(flower)
    of_file = explained(run, tiny, tmp_path / "a.png").answers
    for number, given in enumerate((flower, pixels, pixels[None], [flower], [pixels], iter([tmp_path / "a.png"]))):
        (folder,) = partlens.explain(run, given, model=tiny, out=run / f"found{number}")
        assert ExplanationRecord.read(folder).answers == of_file
    for wrong in (None, 3, [3], [flower, tmp_path / "a.png"]):
        with pytest.raises(InputTypeError, match="^Expected .*, got "):
            partlens.explain(run, wrong, model=tiny)


def test_what_a_folder_holds_beside_images_is_said(run: Path, tiny: Performer, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    generated_flowers(1, size=48).read(0).save(tmp_path / "photos" / "a.png")
    (tmp_path / "photos" / "b.heic").touch()
    shown = io.StringIO()
    partlens.explain(run, tmp_path / "photos", model=tiny, out=tmp_path, progress=Progress(Console(file=shown)))
    assert "passed over 1 .heic (b.heic)" in shown.getvalue()
