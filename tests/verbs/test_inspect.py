"""The verb inspect on a tiny network: records, resumption, errors."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

import partlens
from partlens.attribution.record import ExplanationRecord
from partlens.cli import main
from partlens.data.images import ImageSet
from partlens.errors import ImageError, InputError, LayerError, RunError
from partlens.estimate import Estimate
from partlens.network.performer import Performer, weights_sha256
from partlens.network.preprocessing import Preprocessing
from partlens.network.taps import Reduce
from partlens.object_parts.inspection import InspectRecord
from partlens.progress import Progress
from partlens.records import file_sha256, read_tensors, write_tensors
from partlens.run import PassPrecision
from partlens.selection.record import SelectionRecord
from partlens.verbs import inspected_category
from partlens.verbs.explained_windows import _headline, load_inspection
from partlens.verbs.printed import print_verdicts

SMALL = {"photos": 30, "measured": 12, "views": 3, "parts_max": 3}


@pytest.fixture(scope="module")
def inspected(tiny_once: Performer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    flowers = partlens.generated_flowers(80, seed=3, size=48, categories=("petal-red", "petal-blue"))
    out = tmp_path_factory.mktemp("inspected") / "run"
    partlens.inspect(tiny_once, flowers, out=out, config=SMALL)
    return out


def test_every_category_has_a_verdict_with_its_numbers(inspected: Path) -> None:
    content = json.loads((inspected / "inspect.json").read_text())
    assert content["schema"] == "partlens.inspect/1"
    assert [one["name"] for one in content["categories"]] == ["petal-blue", "petal-red"]
    for one in content["categories"]:
        assert one["verdict"] in {"parts", "texture", "elsewhere", "undecided"}
        assert {"value", "interval", "n"} <= set(one["advantage"])
        lists = ("area", "parts", "other_photos", "random", "centre", "rest", "ceiling")
        assert {len(one["kept"][name]) for name in lists} == {4}
        assert 1 <= len(one["parts"]) <= 3
        for part in one["parts"]:
            assert {"id", "name", "share", "movement", "stability"} <= set(part)
            assert (inspected / part["gallery"]).is_file()
        assert f"n = {one['advantage']['n']}" in one["sentence"] or one["verdict"] == "undecided"


def test_shares_of_parts_and_elsewhere_sum_to_the_whole(inspected: Path) -> None:
    for one in InspectRecord.read(inspected).categories:
        for photo in one.shown:
            assert sum(photo.shares) == pytest.approx(1)
            assert (inspected / photo.picture).is_file()


def test_the_network_is_as_it_was(tiny: Performer, few_flowers: ImageSet, tmp_path: Path) -> None:
    tiny.module.train()
    before = weights_sha256(tiny.module)
    partlens.inspect(tiny, few_flowers, out=tmp_path / "run", config=SMALL, category="petal-red")
    assert weights_sha256(tiny.module) == before
    assert tiny.module.training


def test_a_stopped_inspection_goes_on_and_finds_the_same(
    inspected: Path, tiny: Performer, few_flowers: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = inspected_category.find_parts
    calls: list[int] = []
    # A run that goes on reads in the precision that its record names; only the first start chooses one.
    found = iter([PassPrecision(used="float32", photos=16)])

    def chosen(*_: object, reduce: dict[str, Reduce], **__: object) -> PassPrecision:
        # Energies must agree; where in a map two equal peaks are found may differ.
        assert {tuple(each(torch.ones(2, 3, 4, 4)).shape) for each in reduce.values()} == {(2, 3)}
        return next(found)

    monkeypatch.setattr("partlens.network.precision.chosen_precision", chosen)

    def stops(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(inspected_category, "find_parts", stops)
    with pytest.raises(KeyboardInterrupt):
        partlens.inspect(tiny, few_flowers, out=tmp_path / "run", config=SMALL)
    again = partlens.inspect(tiny, few_flowers, out=tmp_path / "run", config=SMALL)
    assert again.performer.precision == PassPrecision(used="float32", photos=16)
    assert len(calls) == 3  # the first category was not searched again
    assert again.categories == InspectRecord.read(inspected).categories
    assert not (tmp_path / "run" / "cache-inspect").exists()


def test_a_selection_is_said_to_be_of_before_only_where_the_inspection_did_not_make_it(
    tiny: Performer, few_flowers: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stops(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    small = {**SMALL, "views": 2, "parts_max": 2}
    with monkeypatch.context() as patched:
        patched.setattr("partlens.run.Run.finish", stops)
        with pytest.raises(KeyboardInterrupt):
            partlens.inspect(tiny, few_flowers, out=tmp_path / "run", config=small)
    assert partlens.inspect(tiny, few_flowers, out=tmp_path / "run", config=small).notes == ()
    (tmp_path / "run" / "inspect.json").unlink()
    earlier = SelectionRecord.read(tmp_path / "run")
    earlier.changed(created="2020-01-01T00:00:00+00:00").write(tmp_path / "run")
    stale = tmp_path / "run" / "inspect" / "001-petal-blue" / "part-9.jpg"
    stale.write_text("of a run whose record was deleted, as the error says that it may be")
    (note,) = partlens.inspect(tiny, few_flowers, out=tmp_path / "run", config=small).notes
    assert "held already" in note
    assert not stale.exists()


def test_a_finished_run_is_returned_and_another_one_refused(
    inspected: Path, tiny: Performer, few_flowers: ImageSet
) -> None:
    assert partlens.inspect(tiny, few_flowers, out=inspected, config=SMALL) == InspectRecord.read(inspected)
    with pytest.raises(RunError, match="seed = 0, not 5"):
        partlens.inspect(tiny, few_flowers, out=inspected, config={**SMALL, "seed": 5})
    with pytest.raises(RunError, match=r"mu = auto, not 3"):
        partlens.inspect(tiny, few_flowers, out=inspected, config=SMALL, mu=3)


def test_photos_of_the_page_are_explained_and_a_lost_page_is_made_again(
    inspected: Path, tiny: Performer, few_flowers: ImageSet, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(inspected, tmp_path / "run"))
    shutil.rmtree(run / "explanations")
    (run / "report.html").unlink()
    partlens.inspect(tiny, few_flowers, out=run, config=SMALL)
    first = [one.shown[0].image for one in InspectRecord.read(run).categories]
    for made in (inspected, run):
        records = [ExplanationRecord.read(folder) for folder in (made / "explanations").iterdir()]
        assert sorted(record.path for record in records) == sorted(first)
        assert all(record.windows and record.explained for record in records)
        assert "No prediction explained yet" not in (made / "report.html").read_text()


def test_photos_of_a_network_without_gradients_are_explained_by_parts_and_it_is_said_why_by_no_filters(
    tiny: Performer, few_flowers: ImageSet, tmp_path: Path
) -> None:
    class Blind(nn.Sequential):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return super().forward(images)

    blind, told = Performer(Blind(tiny.module), "blind", tiny.preprocessing, "blind"), io.StringIO()
    show = Progress(Console(file=told, width=400))
    partlens.inspect(blind, few_flowers, out=tmp_path / "run", config=SMALL, progress=show)
    assert told.getvalue().count("no filters are shown: Expected") == 1
    assert "Remove no_grad" in told.getvalue()
    for folder in (tmp_path / "run" / "explanations").iterdir():
        record = ExplanationRecord.read(folder)
        assert record.windows
        assert (record.explained, record.method) == ((), None)
        assert any(note.startswith("no filters are shown: Expected") for note in record.notes)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Parts on the network itself" in page
    assert "no filters are shown: Expected" in page
    with pytest.raises(LayerError, match="Remove no_grad"):  # what was asked for by name is not left out
        partlens.explain(tmp_path / "run", few_flowers.take([0]), model=blind, classes=["petal-red"])


def test_an_inspection_still_explains_once_an_explainer_without_parts_is_beside_it(
    inspected: Path, tiny: Performer, few_flowers: ImageSet, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(inspected, tmp_path / "run"))
    (run / "selection.json").unlink()  # photos of one category have none
    quick = {"epochs": 1, "warmup_epochs": 1, "views": 2, "precision": "float32"}
    partlens.fit_explainer(tiny, few_flowers, out=run, category="petal-red", config=quick)
    (folder,) = partlens.explain(run, few_flowers.take([0]), model=tiny)
    found = ExplanationRecord.read(folder)
    assert found.windows
    assert not found.parts
    assert any("run partlens parts" in note for note in found.notes)


def test_photos_without_categories_are_one(tiny: Performer, tmp_path: Path) -> None:
    pictures = np.random.default_rng(0).integers(0, 255, (24, 48, 48, 3), np.uint8)
    record = partlens.inspect(tiny, ImageSet.from_arrays(pictures), out=tmp_path / "run", config=SMALL)
    assert [one.name for one in record.categories] == [""]
    assert "these photos" in record.categories[0].sentence
    assert "whether the network tells these photos from others is not known" in record.categories[0].notes[0]


def test_a_category_of_few_photos_is_named_and_left_out(tiny: Performer, tmp_path: Path) -> None:
    pictures = np.random.default_rng(0).integers(0, 255, (24, 48, 48, 3), np.uint8)
    kinds = ["rare"] * 3 + ["often"] * 21
    images = ImageSet.from_arrays(pictures, kinds, ["train"] * 24)
    record = partlens.inspect(tiny, images, out=tmp_path / "run", config=SMALL)
    assert [one.name for one in record.categories] == ["often"]
    assert "not inspected, with fewer than 4 photos to find parts on: rare (3)" in record.notes
    assert not record.categories[0].held_out
    with pytest.raises(ImageError, match=r"at least 4 photos of a category in train, got rare \(3\)\."):
        partlens.inspect(tiny, images, out=tmp_path / "other", config=SMALL, category="rare")


def test_a_tap_with_negative_values_is_filled_with_the_mean(
    tiny: Performer, few_flowers: ImageSet, tmp_path: Path
) -> None:
    record = partlens.inspect(tiny, few_flowers, out=tmp_path / "run", tap="conv2", config=SMALL)
    assert record.fill == "mean"


def test_held_out_photos_that_are_copies_are_said(tiny: Performer, few_flowers: ImageSet, tmp_path: Path) -> None:
    pictures = [few_flowers.read(row) for row in few_flowers.indices("petal-red")[:9]]
    splits = ["train"] * 9 + ["test"] * 10
    other = few_flowers.read(few_flowers.indices("petal-blue")[0])
    twice = ImageSet.from_arrays([*pictures, *pictures[:8], pictures[0], other], splits=splits)
    found = partlens.inspect(tiny, twice, out=tmp_path / "run", config={**SMALL, "parts_max": 2})
    assert "9 of the held-out photos are copies of photos that parts were found on: see data check" in found.notes


def test_wrong_settings_are_refused(tiny: Performer, few_flowers: ImageSet, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="parts_min"):
        partlens.inspect(tiny, few_flowers, out=tmp_path / "run", config={"parts_min": 5, "parts_max": 4})
    with pytest.raises(ImageError, match="petal-rde"):
        partlens.inspect(tiny, few_flowers, out=tmp_path / "run", category="petal-rde")
    for mu in (-1.0, float("inf")):
        with pytest.raises(InputError, match=f"Expected mu to be auto or a finite number above 0, got {mu}"):
            partlens.inspect(tiny, few_flowers, out=tmp_path / "run", mu=mu)
    assert not (tmp_path / "run").exists()


def test_json_of_the_command_is_the_record(
    few_flowers: ImageSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(16):
        folder = tmp_path / "photos" / few_flowers.categories[number]
        folder.mkdir(parents=True, exist_ok=True)
        few_flowers.read(number).save(folder / f"{number}.png")
    command = ["inspect", "partlens:flower-demo@random:0", str(tmp_path / "photos"), "--out", str(tmp_path / "run")]
    assert main([*command, "--json", "--inspect.views", "2", "--inspect.parts_max", "2"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "run" / "inspect.json").read_text())


def test_the_command_prints_what_could_not_be_done_with_a_category(
    inspected: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = InspectRecord.read(inspected)
    advantage = Estimate(-0.001, (-0.1, 0.1), 3)  # of fewer photos than were measured
    notes = ("measured on the photos that the parts were found on",)
    last = found.categories[-1].model_copy(update={"notes": notes, "advantage": advantage})
    drawing = found.performer.model_copy(update={"notes": ("the network draws at random",)})
    categories = (*found.categories[:-1], last)
    print_verdicts(found.changed(categories=categories, performer=drawing, notes=("no filters",)))
    said = capsys.readouterr().out
    assert "\nthe network draws at random\n" in said
    assert re.search(r"\n petal-red .* 0\.00 \[-0\.10, 0\.10\] .* 3 *\n", said)
    assert "petal-red: measured on the photos that the parts were found on\n" in said
    assert said.rstrip().endswith("no filters")


def test_names_are_printed_as_they_are(inspected: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = InspectRecord.read(inspected)
    for name in ("[red] fox :fox:", "fox [/b]"):
        print_verdicts(found.changed(categories=(found.categories[0].model_copy(update={"name": name}),)))
        assert f"\n {name} " in capsys.readouterr().out


def test_the_random_state_is_as_it_was(tiny: Performer, few_flowers: ImageSet, tmp_path: Path) -> None:
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    partlens.inspect(tiny, few_flowers, out=tmp_path / "run", config=SMALL, category="petal-red")
    assert torch.equal(torch.rand(2), wanted)


def test_a_photo_is_explained_by_the_parts_on_the_network_itself(
    inspected: Path, few_flowers: ImageSet, tiny: Performer, tmp_path: Path
) -> None:
    row = few_flowers.indices(split="test")[0]
    few_flowers.read(row).save(tmp_path / "a flower.png")
    folder = partlens.explain(inspected, [tmp_path / "a flower.png"], model=tiny, out=tmp_path / "out")[0]
    record = ExplanationRecord.read(folder)
    (shared,) = record.windows
    assert sum(part.share for part in shared.parts) + shared.elsewhere == pytest.approx(1)
    assert (folder / shared.picture).is_file()
    page = (folder / "explanation.html").read_text()
    assert page.index("Parts on the network itself") < page.index('<div class="columns')
    assert "Its parts carry:" in page


def test_an_inspection_of_another_version_says_which_tensor_it_lacks(
    inspected: Path, tiny: Performer, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(inspected, tmp_path / "run"))
    tensors = {name: each for name, each in read_tensors(run / "inspect.safetensors").items() if "searched" not in name}
    record = InspectRecord.read(run)
    write_tensors(run / "inspect.safetensors", tensors)
    record.model_copy(update={"tensors_sha256": file_sha256(run / "inspect.safetensors")}).write(run)
    with pytest.raises(RunError, match=r"the tensor 0\.searched\.scale in .*inspect\.safetensors.*inspect again"):
        load_inspection(run, tiny)


def test_an_inspection_leaves_the_selection_to_explain_by_filters(inspected: Path, tiny: Performer) -> None:
    selection = partlens.load_selection(inspected, tiny)
    assert selection.found.mu in {mu for mu, _ in selection.found.tried}
    assert selection.classes == ("petal-blue", "petal-red")


def _yes_or_no(tap: str) -> Performer:
    """A network of one output, blue against red, that is sure of it: its one weight looks at a colour."""
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, 2, 1), torch.nn.ReLU(), torch.nn.Conv2d(4, 1, 1), torch.nn.AdaptiveAvgPool2d(1)
    ).eval()
    with torch.no_grad():
        for layer in (network[0], network[2]):
            layer.weight.zero_()
            layer.bias.zero_()
        network[0].weight[0, 2, 1, 1] = network[0].weight[1, 0, 1, 1] = 1.0  # blue, red
        network[2].weight[0, :2, 0, 0] = torch.tensor([40.0, -40.0])
    preprocessing = partlens.Preprocessing(size_px=(32, 32), resize="squash")
    return Performer(network, "blue", preprocessing, weights_sha256(network), tap, class_names=("blue",))


def test_a_network_that_decides_alike_on_all_photos_is_not_said_to_know_them(
    few_flowers: ImageSet, tmp_path: Path
) -> None:
    layers = torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 3, 2), torch.nn.ReLU(), torch.nn.Conv2d(6, 6, 3), torch.nn.ReLU()
    )
    head = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(6, 3))
    torch.nn.init.constant_(head[2].bias, 0.0)
    with torch.no_grad():
        head[2].bias[1] = 9.0
    model = partlens.load_performer(torch.nn.Sequential(*layers, *head), Preprocessing(size_px=(32, 32)))
    found = partlens.inspect(model, few_flowers, out=tmp_path / "run", tap="1", config=SMALL)
    assert {one.verdict for one in found.categories} == {"undecided"}
    for one in found.categories:
        assert one.told is not None
        assert one.told.advantage == pytest.approx(0, abs=1e-9)
        assert one.sentence.startswith(f"Undecided: the network decides on {one.name} as on the other photos")


def test_one_output_says_yes_or_no_and_its_probabilities_are_its_own(tmp_path: Path) -> None:
    flowers = partlens.generated_flowers(60, seed=3, size=48, categories=("petal-red", "petal-blue"))
    performer = _yes_or_no("1")
    found = partlens.inspect(performer, flowers, out=tmp_path / "run", config=SMALL)
    names = {each.name for one in found.categories for each in one.decided}
    assert names <= {"blue", "not blue"}
    for one in found.categories:
        for photo in one.shown:
            row = flowers.keys.index(photo.image)
            score = performer.module(performer.preprocessing([flowers.read(row)]))
            yes = float(score.detach().sigmoid())
            assert photo.predicted == ("blue" if yes > 0.5 else "not blue")
            assert photo.probability == pytest.approx(max(yes, 1 - yes), abs=1e-4)
            assert photo.probability < 1  # a softmax of one output would be 1


def test_a_tap_below_layers_without_weights_is_inspected(tmp_path: Path) -> None:
    flowers = partlens.generated_flowers(60, seed=3, size=48, categories=("petal-red", "petal-blue"))
    found = partlens.inspect(_yes_or_no("2"), flowers, out=tmp_path / "run", tap="2", config=SMALL)
    assert all(one.parts for one in found.categories)


def test_a_tap_that_a_shortcut_goes_around_is_refused_before_a_photo_is_read(
    few_flowers: ImageSet, tmp_path: Path
) -> None:
    class Around(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.Conv2d(4, 4, 3, padding=1)
            self.head = torch.nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x).relu()
            return self.head((x + self.second(x).relu()).mean((2, 3)))

    preprocessing = partlens.Preprocessing(size_px=(32, 32), resize="squash")
    around = Around().eval()
    performer = Performer(around, "around", preprocessing, weights_sha256(around))
    with pytest.raises(LayerError, match="second"):
        partlens.inspect(performer, few_flowers, out=tmp_path / "run", tap="second", config=SMALL)
    assert not (tmp_path / "run").exists()


def test_a_share_that_rounds_to_nothing_has_no_sign() -> None:
    assert _headline([("head", -0.001), ("head 2", 0.4)], 0.6) == "head 2: 40%, head: 0%; everything elsewhere: 60%"
