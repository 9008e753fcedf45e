from __future__ import annotations

import copy
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from partlens.data.images import ImageSet
from partlens.errors import InputError, RunError
from partlens.explainer import terms, training
from partlens.explainer.config import ExplainerConfig
from partlens.explainer.network import Explainer, build_explainer
from partlens.explainer.record import ExplainerStructure
from partlens.explainer.terms import Objective
from partlens.explainer.training import FACTORS, Extras, _decoder_rate, along_the_price
from partlens.explainer.views import TrainingMaps, epoch_batches, gather, view_windows, viewed_images
from partlens.network.performer import Performer
from partlens.network.stream import batches
from partlens.object_parts.candidates import centroids
from partlens.object_parts.finding import found_places
from partlens.records import read_json, read_tensors, write_tensors

STRUCTURE = ExplainerStructure("relu2", ("relu3", "relu4"), 12, 12, (8, 8), None, "relu2")
SMALL: dict[str, Any] = {
    "epochs": 3,
    "warmup_epochs": 2,
    "views": 3,
    "batch_size": 8,
    "background_batch": 4,
    "precision": "float32",
}


@pytest.fixture
def maps(tiny: Performer) -> TrainingMaps:
    generator = torch.Generator().manual_seed(5)
    tap = torch.rand(20 * 3 + 6, 12, 8, 8, generator=generator)
    targets = tiny.upper("relu2", ["relu3", "relu4"])(tap)
    windows = view_windows(20, 3, generator, 0.5)
    arrays = tuple(t.detach().numpy().astype(np.float16) for t in targets)
    labels = torch.zeros(20, dtype=torch.long)
    return TrainingMaps(tap.numpy().astype(np.float16), arrays, windows, labels, np.arange(60, 66), arrays[-1:])


def fresh(tiny: Performer, **changes: Any) -> Explainer:
    return build_explainer(tiny, STRUCTURE, ExplainerConfig.preset("partlens", **{**SMALL, **changes}))


def train_explainer(explainer: Explainer, data: TrainingMaps, folder: Path, **given: Any) -> Any:
    """Train with the parts that are found on the last target."""
    extras = Extras(places_of=found_places if explainer.config.teachers else None)
    return training.train_explainer(explainer, data, folder, extras=extras, **given)


class Killed(Exception):
    """Stands for a kill at an epoch's end."""


@pytest.mark.parametrize(
    ("changes", "after"),
    [
        ({}, 1),
        ({}, 2),
        ({"precision": "bfloat16", "hidden_filters": 5}, 4),
        ({"learning_rate_ordinary": 1e-4}, 3),
        ({"learning_rate_joint": 0.0}, 4),
    ],
    ids=["in the warm-up", "after it", "narrow", "ordinary", "held"],
)
def test_a_killed_run_continues_bit_equal(
    tiny: Performer, maps: TrainingMaps, tmp_path: Path, after: int, changes: dict[str, Any]
) -> None:
    whole = fresh(tiny, **changes)
    train_explainer(whole, maps, tmp_path / "whole")

    def stop(record: dict[str, Any]) -> None:
        if record["epoch"] == after:
            raise Killed

    with pytest.raises(Killed):
        train_explainer(fresh(tiny, **changes), maps, tmp_path / "killed", report=stop)
    again = fresh(tiny, **changes)
    with torch.no_grad():
        again.conv_interp_1.weight.add_(1)  # what the process had in memory is lost
    torch.rand(17)  # and the global random state is another
    result = train_explainer(again, maps, tmp_path / "killed")
    assert len(result.history) == 5
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_training_lowers_the_reconstruction_error(tiny: Performer, maps: TrainingMaps, tmp_path: Path) -> None:
    config = {"epochs": 25, "warmup_epochs": 1, "p_init": 0.3, "patience": 0, "learning_rate_decoder": 3e-3}
    history = train_explainer(fresh(tiny, **config), maps, tmp_path).history
    joint = [r["reconstruction"] for r in history if r["phase"] == "joint"]
    assert joint[-1] < 0.7 * joint[0]


def test_warm_up_leaves_decoder_and_share_alone(tiny: Performer, maps: TrainingMaps, tmp_path: Path) -> None:
    explainer = fresh(tiny, epochs=1)
    before = {k: v.clone() for k, v in explainer.state_dict().items()}

    def stop(record: dict[str, Any]) -> None:
        if record["epoch"] == 2:
            raise Killed

    with pytest.raises(Killed):
        train_explainer(explainer, maps, tmp_path, report=stop)
    after = explainer.state_dict()
    for name, value in before.items():
        if name.startswith(("decoder", "share_logit", "conv_ordin")):
            assert torch.equal(value, after[name]), name
    assert not torch.equal(before["conv_interp_2.weight"], after["conv_interp_2.weight"])


def test_a_checkpoint_of_the_warm_up_leaves_the_decoder_out(
    tiny: Performer, maps: TrainingMaps, tmp_path: Path
) -> None:
    seen: dict[str, bool] = {}

    def look(record: dict[str, Any]) -> None:
        saved = read_tensors(tmp_path / read_json(tmp_path / "checkpoint.json")["tensors"])
        seen[record["phase"]] = any(name.startswith("network.decoder.") for name in saved)
        if record["phase"] == "joint":
            raise Killed

    with pytest.raises(Killed):
        train_explainer(fresh(tiny), maps, tmp_path, report=look)
    assert seen == {"warmup": False, "joint": True}
    state = read_json(tmp_path / "checkpoint.json")
    saved = read_tensors(tmp_path / state["tensors"])
    write_tensors(tmp_path / state["tensors"], {k: v for k, v in saved.items() if "conv_interp_2" not in k})
    with pytest.raises(RunError, match=r"the tensors that this run wrote in .*, got others"):
        train_explainer(fresh(tiny), maps, tmp_path)


def test_tensorboard_reads_every_term(tiny: Performer, maps: TrainingMaps, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    history = train_explainer(fresh(tiny), maps, tmp_path).history
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name in ("reconstruction", "p", "filter_2", "teacher"):
        logged = {e.step: e.value for e in events.Scalars(name)}
        wanted = {r["epoch"]: r[name] for r in history if name in r}
        assert logged == pytest.approx(wanted, rel=1e-5)


def test_a_plateau_stops_training(tiny: Performer, maps: TrainingMaps, tmp_path: Path) -> None:
    rates = dict.fromkeys(
        ("learning_rate", "learning_rate_ordinary", "learning_rate_decoder", "learning_rate_p"), 1e-12
    )
    result = train_explainer(fresh(tiny, epochs=30, patience=3, **rates), maps, tmp_path)
    assert result.stopped == "plateau"
    assert len(result.history) < 20


def test_a_checkpoint_of_another_configuration_is_refused(tiny: Performer, maps: TrainingMaps, tmp_path: Path) -> None:
    train_explainer(fresh(tiny), maps, tmp_path)
    with pytest.raises(ValueError, match="a checkpoint of this configuration"):
        train_explainer(fresh(tiny, eta=3.0), maps, tmp_path)


def test_one_photo_is_too_few(tiny: Performer, maps: TrainingMaps, tmp_path: Path) -> None:
    alone = replace(maps, windows=maps.windows[:1], labels=maps.labels[:1])
    with pytest.raises(ValueError, match="at least 2 photos of the category to learn from, got 1"):
        train_explainer(fresh(tiny), alone, tmp_path)


def test_rows_are_read_in_the_order_asked(maps: TrainingMaps) -> None:
    rows = np.array([40, 3, 3, 59, 0])
    assert torch.equal(gather(maps.tap, rows), torch.from_numpy(maps.tap[rows]).float())


def test_views_are_mirrored_and_cropped_as_their_windows_say(tiny: Performer) -> None:
    picture = np.zeros((64, 64, 3), dtype=np.uint8)
    picture[:32, :32, 0] = 255
    images = ImageSet.from_arrays([picture])
    windows = torch.tensor([[0.0, 0, 1, 1, 0], [0.0, 0, 1, 1, 1], [0.5, 0.5, 0.5, 0.5, 0], [0.0, 0, 0.5, 0.5, 0]])
    drawn, _ = viewed_images(images, tiny, np.zeros(4, dtype=np.int64), windows)
    corners = [np.asarray(drawn.read(k))[2, 2, 0] for k in range(4)]
    assert corners == [255, 0, 0, 255]
    assert np.asarray(drawn.read(1))[2, 29, 0] == 255
    assert (
        drawn.fingerprint()
        != viewed_images(images, tiny, np.zeros(4, dtype=np.int64), windows.flip(0))[0].fingerprint()
    )
    with pytest.raises(ValueError, match="windows of 3 rows, got 4"):
        viewed_images(images, tiny, np.zeros(3, dtype=np.int64), windows)


def test_a_track_held_after_the_warm_up_stays_as_it_is(tiny: Performer, maps: TrainingMaps, tmp_path: Path) -> None:
    ends = {}
    for rate, epochs in ((0.0, 1), (0.0, 3), (1e-3, 3)):
        explainer = fresh(tiny, learning_rate_joint=rate, epochs=epochs)
        result = train_explainer(explainer, maps, tmp_path / f"{rate}-{epochs}")
        ends[rate, epochs] = explainer
        joint = [record for record in result.history if record["phase"] == "joint"]
        # A held track has nothing to learn from its own terms, which are then not computed.
        assert all({"reconstruction", "p"} <= set(record) for record in joint)
        assert all(("filter_2" in record) == (rate > 0) for record in joint)
    held, longer, moved = ends.values()
    assert torch.equal(held.conv_interp_2.weight, longer.conv_interp_2.weight)
    assert not torch.equal(longer.conv_interp_2.weight, moved.conv_interp_2.weight)
    assert held.p.item() != longer.p.item()


def test_teachers_go_on_while_the_track_learns_from_the_reconstruction(
    tiny: Performer, maps: TrainingMaps, tmp_path: Path
) -> None:
    def seen(_: Explainer, data: TrainingMaps, category: int) -> torch.Tensor:
        return centroids(gather(data.tap, data.rows(data.own(category)))[:, :4])  # what the tap shows can be learned

    missed = {}
    for ratio in (0.0, 100.0):
        config = {"filter_ratio": ratio, "learning_rate_joint": 1e-2, "epochs": 8, "patience": 0}
        explainer, extras = fresh(tiny, **config), Extras(places_of=seen)
        history = training.train_explainer(explainer, maps, tmp_path / str(ratio), extras=extras).history
        missed[ratio] = [record["teacher"] for record in history if record["phase"] == "joint"]
    assert missed[100.0][0] - missed[100.0][-1] > 0.02, missed
    assert missed[100.0][-1] < missed[0.0][-1], missed


def test_the_decoder_takes_no_step_that_is_large_beside_its_weights() -> None:
    fine = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    with torch.no_grad():
        for layer, size in zip(fine, (0.01, 0.02), strict=True):
            layer.weight.fill_(size)
            layer.bias.fill_(5.0)  # no kernel
    config = ExplainerConfig(learning_rate_decoder=1e-3, decoder_step_max=0.01)
    assert _decoder_rate(fine, config) == pytest.approx(0.01 * (2.5e-4) ** 0.5)
    for unlimited in (config.changed({"decoder_step_max": 0.0}), config.changed({"decoder_step_max": 1.0})):
        assert _decoder_rate(fine, unlimited) == pytest.approx(1e-3)
    assert _decoder_rate(torch.nn.ReLU(), config) == pytest.approx(1e-3)


@pytest.mark.parametrize("preset", ["partlens", "paper"])
def test_the_decoder_never_learns_from_magnitudes_of_before_the_warm_up(
    tiny: Performer, maps: TrainingMaps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str
) -> None:
    config = ExplainerConfig.preset(preset, **{**SMALL, "warmup_epochs": 6 * (preset != "paper"), "epochs": 1})
    explainer = build_explainer(tiny, STRUCTURE, config)
    ratios: list[float] = []
    forward = Explainer.forward

    def watched(self: Explainer, batch: torch.Tensor, positives: int | None = None) -> Any:
        if not ratios:
            rows = torch.from_numpy(maps.tap[: 20 * 3 : 3].astype(np.float32))
            with torch.no_grad():
                actual = self.pool(self.masked(self.interpret(rows)[1])).sum((2, 3)).mean(0)
            live = actual > 0.05 * actual.mean()
            ratios.extend((self.norm_interp.magnitude[live] / actual[live]).tolist())
        return forward(self, batch, positives)

    monkeypatch.setattr(Explainer, "forward", watched)
    train_explainer(explainer, maps, tmp_path)
    assert ratios == pytest.approx([1.0] * len(ratios), rel=1e-3)
    assert len(ratios) > 6


def test_epochs_of_the_joint_phase_weaken_the_filter_loss(
    tiny: Performer, maps: TrainingMaps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The papers' λ_f falls as 1/N with the epoch N."""
    seen: list[tuple[int, float]] = []
    weights = Objective.filter_weights

    def watched(self: Objective, layer: str) -> torch.Tensor:
        pull, push = self.state[f"pull.{layer}"], self.state[f"push.{layer}"]
        found = weights(self, layer)
        top = int(push.argmax())
        seen.append((self.epoch, float(found[top] * push[top] / pull[top])))
        return found

    monkeypatch.setattr(Objective, "filter_weights", watched)
    config = ExplainerConfig.preset("paper", **{**SMALL, "warmup_epochs": 1, "epochs": 3})
    train_explainer(build_explainer(tiny, STRUCTURE, config), maps, tmp_path)
    by_epoch = {n: {round(v * 300 * n, 3) for e, v in seen if e == n} for n in (1, 2, 3)}
    assert by_epoch == {1: {1.0}, 2: {1.0}, 3: {1.0}}


def test_a_history_that_is_behind_the_checkpoint_is_mended(
    tiny: Performer, maps: TrainingMaps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = training.History.write

    def killed(self: Any, folder: Path) -> Path:
        if len(self.epochs) == 5:
            raise Killed
        return write(self, folder)

    monkeypatch.setattr(training.History, "write", killed)
    with pytest.raises(Killed):
        train_explainer(fresh(tiny), maps, tmp_path)
    monkeypatch.undo()
    assert len(read_json(tmp_path / "history.json")["epochs"]) == 4
    train_explainer(fresh(tiny), maps, tmp_path)
    assert len(read_json(tmp_path / "history.json")["epochs"]) == 5


def test_every_filter_learns_from_a_teacher_of_its_category(
    tiny: Performer, maps: TrainingMaps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Filters change category; the teacher changes with them."""
    taught: list[torch.Tensor] = []
    cost = terms.teacher_cost

    def watched(own: torch.Tensor, places: torch.Tensor, *rest: Any) -> torch.Tensor:
        taught.append((~places.isnan()).all(-1).any(0))
        return cost(own, places, *rest)

    monkeypatch.setattr(terms, "teacher_cost", watched)
    tap = maps.tap.copy()
    for photo in range(20):  # half of the channels respond to either category, so that both have filters
        tap[photo * 3 : photo * 3 + 3, (6 * (photo % 2)) : (6 * (photo % 2)) + 6] *= 6
    several = replace(maps, tap=tap, labels=torch.arange(20) % 2)
    train_explainer(fresh(tiny, teachers=2, warmup_epochs=3), several, tmp_path)
    shares = [float(found.double().mean()) for found in taught]
    sizes = [len(found) for found in taught]
    assert min(sizes) > 0
    assert len(taught) > 12  # both categories in nearly every batch
    assert min(shares) > 0.7
    assert sum(shares) / len(shares) > 0.95


def test_rates_rise_for_a_tenth_and_fall_to_five_percent() -> None:
    """A rise of at most 50 steps, then half a cosine from 1 to 0.05."""
    assert [training._schedule(k, 40) for k in range(3)] == pytest.approx([0.25, 0.4985, 0.7456], abs=2e-3)
    assert training._schedule(20, 40) == pytest.approx(0.525)
    assert training._schedule(40, 40) == training._schedule(99, 40) == pytest.approx(0.05)
    assert training._schedule(24, 10_000) == pytest.approx(0.5, abs=1e-4)  # 25 of 50 steps
    assert training._schedule(0, 5) == 1


def test_every_part_learns_at_its_own_rate_and_each_phase_has_its_own_schedule(
    tiny: Performer, maps: TrainingMaps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[tuple[float, float, int]]] = []

    def watched(self: torch.optim.AdamW, closure: Any = None) -> None:
        seen.append([(g["lr"], g["weight_decay"], len(g["params"])) for g in self.param_groups])

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    rates = {"learning_rate": 0.1, "learning_rate_joint": 0.2, "learning_rate_ordinary": 0.3, "learning_rate_p": 0.4}
    explainer = fresh(tiny, learning_rate_decoder=0.5, decoder_step_max=0.0, weight_decay=0.6, **rates)
    train_explainer(explainer, maps, tmp_path)
    steps = 3  # 20 photos in batches of 8
    assert len(seen) == 5 * steps
    for k, groups in enumerate(seen):
        step, total = (k, 2 * steps) if k < 2 * steps else (k - 2 * steps, 3 * steps)
        base = [0.1 if k < 2 * steps else 0.2, 0.3, 0.4, 0.5]
        assert [g[0] for g in groups] == pytest.approx([b * training._schedule(step, total) for b in base])
        assert [g[1] for g in groups] == [0.6, 0.0, 0.0, 0.0]
    learned = sum(p.numel() > 0 for p in explainer.parameters())
    assert sum(g[2] for g in seen[0]) == learned


class _Normed(nn.Module):
    """Copies of a performer's norm and dropout layers after the tap."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm2d(12), nn.Dropout(0.5)

    def forward(self, maps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first = self.norm(maps)
        return first, self.drop(first)


def test_the_decoders_norm_and_dropout_layers_stay_as_the_performers_are(maps: TrainingMaps, tmp_path: Path) -> None:
    structure = replace(STRUCTURE, targets=("norm", "drop"))
    config = ExplainerConfig.preset("partlens", **SMALL)
    explainer = Explainer(structure, config, _Normed(), generator=torch.Generator().manual_seed(0))
    explainer.decoder.norm.running_mean.fill_(0.25)
    same = replace(maps, targets=(maps.tap, maps.tap))
    modes: set[bool] = set()
    explainer.decoder.register_forward_hook(lambda module, *_: modes.update(m.training for m in module.modules()))
    history = train_explainer(explainer, same, tmp_path).history
    assert modes == {False}
    assert explainer.decoder.norm.running_mean.tolist() == [0.25] * 12
    assert int(explainer.decoder.norm.num_batches_tracked) == 0
    assert len(history) == 5


def test_the_decoder_learns_and_is_drawn_to_the_targets_only_after_the_warm_up(
    tiny: Performer, maps: TrainingMaps, tmp_path: Path
) -> None:
    history = train_explainer(fresh(tiny), maps, tmp_path).history
    assert ["reconstruction" in record for record in history] == [False] * 2 + [True] * 3
    assert [record["phase"] for record in history] == ["warmup"] * 2 + ["joint"] * 3
    assert "teacher_correlation" in history[0]
    assert "teacher_correlation" not in history[1]


def test_an_epoch_shows_every_photo_in_a_drawn_view_with_background(maps: TrainingMaps) -> None:
    config = ExplainerConfig(batch_size=8, background_batch=4, seed=3)
    batches = list(epoch_batches(maps, config, 5))
    assert [len(b.photos) for b in batches] == [8, 8, 8]
    shown = torch.cat([b.photos for b in batches])
    # The last batch is filled up with the first photos again.
    assert sorted(shown[:20].tolist()) == list(range(20))
    assert torch.equal(shown[20:], shown[:4])
    for batch in batches:
        assert batch.rows[:8].tolist() == (batch.photos * 3 + batch.view).tolist()
        assert len(batch.rows) == 12
        assert set(batch.rows[8:].tolist()) <= set(range(60, 66))
    views = torch.cat([b.view for b in batches])
    assert set(views.tolist()) == {0, 1, 2}
    assert not torch.equal(shown, torch.cat([b.photos for b in epoch_batches(maps, config, 6)]))
    other = config.changed({"seed": 4})
    assert not torch.equal(shown, torch.cat([b.photos for b in epoch_batches(maps, other, 5)]))
    none = config.changed({"background_batch": 0})
    assert [len(b.rows) for b in epoch_batches(maps, none, 5)] == [8, 8, 8]


def test_only_explained_photos_move_the_norm_layers_and_the_warm_up_sees_no_others(
    tiny: Performer, maps: TrainingMaps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int | None]] = []
    warm: list[int] = []
    forward, interpret = Explainer.forward, Explainer.interpret

    def watched(self: Explainer, batch: torch.Tensor, positives: int | None = None) -> Any:
        asked.append((len(batch), positives))
        return forward(self, batch, positives)

    def counted(self: Explainer, batch: torch.Tensor) -> Any:
        if self.draws is not None:
            warm.append(len(batch))
        return interpret(self, batch)

    monkeypatch.setattr(Explainer, "forward", watched)
    monkeypatch.setattr(Explainer, "interpret", counted)
    train_explainer(fresh(tiny), maps, tmp_path)
    assert asked == [(12, 8)] * 9
    assert warm == [8] * 6


def test_a_plateau_is_counted_on_the_smoothed_objective() -> None:
    patience = training._Patience()
    counted = []
    for value in (100.0, 50.0, 49.9, 200.0, 10.0, 10.0):
        patience.follow(value)
        counted.append((patience.smoothed, patience.stale))
    # 0.6 of the past: 100, 80, 67.96, 120.776, 76.466, 49.879; a fall of less than a thousandth is none.
    assert [s for s, _ in counted] == pytest.approx([100, 80, 67.96, 120.776, 76.4656, 49.87936])
    assert [stale for _, stale in counted] == [0, 0, 0, 1, 2, 0]
    patience.follow(patience.smoothed * 0.999)
    assert patience.stale == 1


def test_the_classification_needs_its_head(tiny: Performer, maps: TrainingMaps, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="upper layers for objective=classification"):
        train_explainer(fresh(tiny, objective="classification"), maps, tmp_path)


def test_views_of_a_photo_are_cut_from_one_decode(tiny: Performer, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = [np.random.default_rng(k).integers(0, 255, (40, 40, 3), dtype=np.uint8) for k in range(9)]
    images = ImageSet.from_arrays(pictures)
    read: list[int] = []
    whole = ImageSet.read

    def counted(self: ImageSet, index: int, scaled: Any = None) -> Any:
        if self is images:
            read.append(index)
        return whole(self, index, scaled)

    monkeypatch.setattr(ImageSet, "read", counted)
    windows = view_windows(9, 6, torch.Generator().manual_seed(0)).flatten(0, 1)
    drawn, viewing = viewed_images(images, tiny, np.repeat(np.arange(9), 6), windows)
    for _ in batches(viewing, drawn, range(54), 8):
        pass
    assert sorted(read) == list(range(9))


def test_the_event_file_is_closed_after_an_exception(tiny: Performer, maps: TrainingMaps, tmp_path: Path) -> None:
    def stop(_: dict[str, Any]) -> None:
        raise Killed

    before = threading.active_count()
    for _ in range(2):
        with pytest.raises(Killed):
            train_explainer(fresh(tiny), maps, tmp_path, report=stop)
    assert threading.active_count() == before


def test_patience_follows_fidelity_and_share_of_the_joint_phase(
    tiny: Performer, maps: TrainingMaps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    monkeypatch.setattr(training._Patience, "follow", lambda _, value: seen.append(value))
    history = train_explainer(fresh(tiny), maps, tmp_path).history
    assert seen == [record["reconstruction"] + record["share"] for record in history if record["phase"] == "joint"]


def test_views_are_the_photo_its_mirror_and_crops_of_at_least_the_given_area() -> None:
    windows = view_windows(400, 4, torch.Generator().manual_seed(0), 0.5)
    assert windows[:, 0].unique(dim=0).tolist() == [[0, 0, 1, 1, 0]]
    assert windows[:, 1].unique(dim=0).tolist() == [[0, 0, 1, 1, 1]]
    left, top, width, height, mirrored = windows[:, 2:].flatten(0, 1).unbind(-1)
    # A side that would be longer than the photo is cut to it, which takes area off: only crops that were not cut count.
    area = (width * height)[(width < 1) & (height < 1)]
    assert 0.5 <= float(area.min()) < 0.52
    assert 0.9 < float(area.max()) <= 1
    assert float(mirrored.mean()) == pytest.approx(0.5, abs=0.06)
    assert bool(((left >= 0) & (left + width <= 1 + 1e-6) & (top >= 0) & (top + height <= 1 + 1e-6)).all())
    default = view_windows(400, 3, torch.Generator().manual_seed(0))[:, 2]
    sides = default[(default[:, 2] < 1) & (default[:, 3] < 1)]
    assert 0.55 <= float((sides[:, 2] * sides[:, 3]).min()) < 0.58


def test_teachers_without_a_source_of_places_are_refused(tiny: Performer, maps: TrainingMaps, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a source of the places that teach, got none\. Give Extras\(places_of="):
        training.train_explainer(fresh(tiny), maps, tmp_path)
    with pytest.raises(InputError, match="a source of the places that teach"):
        training.train_explainer(fresh(tiny, teachers=0), maps, tmp_path, extras=Extras(places_of=found_places))


def test_a_price_is_learned_from_what_was_fitted_and_holds_the_filters(
    tiny: Performer, maps: TrainingMaps, tmp_path: Path
) -> None:
    """p rises with the price, the filters and the norms' gain start where the fit ended, and the fit stays as it is."""
    fitted = fresh(tiny, epochs=2, eta=3e4)
    train_explainer(fitted, maps, tmp_path / "fit")
    before = {name: value.clone() for name, value in fitted.state_dict().items()}
    points = [copy.deepcopy(each) for each in along_the_price(fitted, maps, tmp_path / "price", Extras())]
    assert [each.config.eta / fitted.config.eta for each in points] == pytest.approx(FACTORS)
    shares = [float(each.p.detach()) for each in points]
    assert max(shares[1:]) > shares[0] + 0.05
    for each in points:
        assert torch.equal(each.conv_interp_2.weight, fitted.conv_interp_2.weight)
        assert not torch.equal(each.gain, fitted.gain)
    assert all(torch.equal(value, before[name]) for name, value in fitted.state_dict().items())
