from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from partlens.errors import RunError
from partlens.explainer import terms as objective
from partlens.explainer import training
from partlens.explainer.assembly import build_explainer
from partlens.explainer.config import ExplainerConfig
from partlens.explainer.network import Explainer, ExplainerStructure
from partlens.explainer.seeding import part_candidates, seed_parts, voted_parts
from partlens.explainer.terms import Objective
from partlens.explainer.training import CHECKPOINT_STATE, decoder_rate, train_explainer
from partlens.explainer.training_maps import TrainingMaps
from partlens.explainer.views import view_windows, viewed_images
from partlens.network.zoo import Performer
from partlens.records import read_json, read_tensors, write_tensors

STRUCTURE = ExplainerStructure("relu2", ("relu3", "relu4"), 12, 12, (8, 8), None, "relu2")
SMALL: dict[str, Any] = {
    "epochs": 3,
    "warmup_epochs": 2,
    "views": 3,
    "batch_size": 8,
    "background_batch": 4,
    "candidates_per_filter": 2,
    "votes": 4,
    "precision": "float32",
}


@pytest.fixture
def maps(tiny: Performer) -> TrainingMaps:
    generator = torch.Generator().manual_seed(5)
    tap = torch.rand(20 * 3 + 6, 12, 8, 8, generator=generator)
    targets = tiny.graph.cut("relu2", ["relu3", "relu4"])(tap)
    windows = view_windows(20, 3, 0.5, generator)
    arrays = tuple(t.detach().numpy().astype(np.float16) for t in targets)
    return TrainingMaps(tap.numpy().astype(np.float16), arrays, windows, np.arange(60, 66))


def fresh(tiny: Performer, **changes: Any) -> Explainer:
    return build_explainer(tiny, STRUCTURE, ExplainerConfig.preset("partlens", **{**SMALL, **changes}))


class Killed(Exception):
    """Stands for a kill at an epoch's end."""


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"normaliser": "running", "precision": "bfloat16"},
        {"kernel": "full", "learning_rate_ordinary": 1e-4},
        {"learning_rate_joint": 1e-4, "kernel": "box"},
        {"initialisation": "parts", "teachers": 0, "diversity_weight": 8.0, "equivariance_weight": 8.0},
        {"hidden_filters": 5, "normaliser": "running", "teacher_sources": "both", "candidates_per_filter": 1},
        {"teacher_match": False},
        {"learning_rate_joint": 0.0},
    ],
    ids=["default", "running", "full", "joint", "parts", "narrow", "in turns", "held"],
)
@pytest.mark.parametrize("after", [1, 2, 4])
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
        saved = read_tensors(tmp_path / read_json(tmp_path / CHECKPOINT_STATE)["tensors"])
        seen[record["phase"]] = any(name.startswith("network.decoder.") for name in saved)
        if record["phase"] == "joint":
            raise Killed

    with pytest.raises(Killed):
        train_explainer(fresh(tiny), maps, tmp_path, report=look)
    assert seen == {"warmup": False, "joint": True}
    state = read_json(tmp_path / CHECKPOINT_STATE)
    saved = read_tensors(tmp_path / state["tensors"])
    write_tensors(tmp_path / state["tensors"], {k: v for k, v in saved.items() if "conv_interp_2" not in k})
    with pytest.raises(RunError, match=r"a whole checkpoint in .*, got .*conv_interp_2"):
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
    alone = TrainingMaps(maps.tap, maps.targets, maps.windows[:1], maps.background_rows)
    with pytest.raises(ValueError, match="at least 2 photos of the category to learn from, got 1"):
        train_explainer(fresh(tiny), alone, tmp_path)


def test_rows_are_read_in_the_order_asked(maps: TrainingMaps) -> None:
    rows = np.array([40, 3, 3, 59, 0])
    tap, targets = maps.read(rows)
    assert torch.equal(tap, torch.from_numpy(maps.tap[rows]).float())
    assert torch.equal(targets[1], torch.from_numpy(maps.targets[1][rows]).float())


def test_seeding_finds_a_planted_part(tiny: Performer) -> None:
    """One feature marks a part that moves; candidates must find it among features that fire anywhere."""
    generator = torch.Generator().manual_seed(2)
    photos, views = 40, 3
    windows = view_windows(photos, views, 0.6, generator).transpose(0, 1)
    windows[2] = torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0])  # mirrors only, which cells can follow exactly
    maps = 0.3 * torch.rand(views, photos, 12, 8, 8, generator=generator)
    place = torch.randint(1, 7, (photos, 2), generator=generator)
    for i, (row, col) in enumerate(place.tolist()):
        maps[0, i, 4, row, col] += 4
        for v in (1, 2):
            maps[v, i, 4, row, 7 - col] += 4
    others = 0.3 * torch.rand(30, 12, 8, 8, generator=generator)
    explainer = fresh(tiny, candidates_per_filter=8)
    parts = voted_parts(maps, windows, others, generator, voters=12, parts=12, candidates=96, votes=64)
    assert parts.found["movement_error_cells"] < 1.5
    seed_parts(explainer, parts)
    peaks = explainer.interpret(maps[0])[1].detach().flatten(2).argmax(-1)
    distance = torch.maximum((peaks // 8 - place[:, :1]).abs(), (peaks % 8 - place[:, 1:]).abs())
    assert float((distance <= 1).float().mean(0).median()) > 0.9


@pytest.mark.parametrize("kernel", ["full", "box"])
@pytest.mark.parametrize("hidden", [0, 5])
def test_a_seeded_track_answers_as_the_parts_it_was_set_to(tiny: Performer, kernel: str, hidden: int) -> None:
    generator = torch.Generator().manual_seed(3)
    maps = torch.rand(3, 20, 12, 8, 8, generator=generator)
    windows = view_windows(20, 3, 0.6, generator).transpose(0, 1)
    others = torch.rand(10, 12, 8, 8, generator=generator)
    explainer = fresh(tiny, kernel=kernel, standardise=False, hidden_filters=hidden)
    voters = explainer.conv_interp_1.out_channels
    assert voters == (hidden or 12)
    parts = voted_parts(maps, windows, others, generator, voters=voters, parts=12, candidates=60, votes=4)
    seed_parts(explainer, parts)
    assert torch.allclose(explainer.interpret(maps[1])[1], parts.maps(maps[1]), atol=1e-5)
    assert parts.votes.sum(1).tolist() == pytest.approx([1.0] * 12)


def test_candidates_are_as_many_as_asked(generator: torch.Generator) -> None:
    detectors, mean = part_candidates(torch.rand(9, 5, 6, 6), torch.zeros(0, 5, 6, 6), 50, generator)
    assert detectors.shape[0] >= 50
    assert torch.isfinite(detectors).all()
    assert mean.shape == (5,)


def test_views_are_mirrored_and_cropped_as_their_windows_say(tiny: Performer) -> None:
    from partlens.data.images import ImageSet

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
        assert all({"filter_1", "filter_2", "reconstruction", "p"} <= set(record) for record in joint)
    held, longer, moved = ends.values()
    assert torch.equal(held.conv_interp_2.weight, longer.conv_interp_2.weight)
    assert not torch.equal(longer.conv_interp_2.weight, moved.conv_interp_2.weight)
    assert held.p.item() != longer.p.item()


def test_teachers_go_on_while_the_track_learns_from_the_reconstruction(
    tiny: Performer, maps: TrainingMaps, tmp_path: Path
) -> None:
    missed = {}
    for ratio in (0.0, 10.0):
        config = {"filter_ratio": ratio, "learning_rate_joint": 1e-2, "epochs": 8, "patience": 0}
        history = train_explainer(fresh(tiny, **config), maps, tmp_path / str(ratio)).history
        missed[ratio] = [record["teacher"] for record in history if record["phase"] == "joint"]
    fell = {ratio: values[0] - values[-1] for ratio, values in missed.items()}
    assert fell[10.0] > 2 * abs(fell[0.0]), fell
    held = train_explainer(fresh(tiny, learning_rate_joint=0.0), maps, tmp_path / "held").history
    assert ["teacher" in record for record in held] == [True] * 2 + [False] * 3


def test_the_decoder_takes_no_step_that_is_large_beside_its_weights() -> None:
    fine = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    with torch.no_grad():
        for layer, size in zip(fine, (0.01, 0.02), strict=True):
            layer.weight.fill_(size)
            layer.bias.fill_(5.0)  # no kernel
    config = ExplainerConfig(learning_rate_decoder=1e-3, decoder_step_max=0.01)
    assert decoder_rate(fine, config) == pytest.approx(0.01 * (2.5e-4) ** 0.5)
    for unlimited in (replace(config, decoder_step_max=0.0), replace(config, decoder_step_max=1.0)):
        assert decoder_rate(fine, unlimited) == pytest.approx(1e-3)
    assert decoder_rate(torch.nn.ReLU(), config) == pytest.approx(1e-3)


@pytest.mark.parametrize("preset", ["partlens", "held", "paper"])
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


@pytest.mark.parametrize("only", [True, False])
def test_the_background_moves_the_norm_layers_only_where_it_is_asked_to(
    tiny: Performer, maps: TrainingMaps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, only: bool
) -> None:
    asked: list[tuple[int, int | None]] = []
    forward = Explainer.forward

    def watched(self: Explainer, batch: torch.Tensor, positives: int | None = None) -> Any:
        asked.append((len(batch), positives))
        return forward(self, batch, positives)

    monkeypatch.setattr(Explainer, "forward", watched)
    train_explainer(fresh(tiny, norm_positives_only=only), maps, tmp_path)
    assert asked
    assert all((p is not None and p < n) if only else p is None for n, p in asked)


def test_a_history_that_is_behind_the_checkpoint_is_mended(
    tiny: Performer, maps: TrainingMaps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = training.write_json

    def killed(path: Path, content: Any) -> None:
        if path.name == "history.json" and len(content["epochs"]) == 5:
            raise Killed
        write(path, content)

    monkeypatch.setattr(training, "write_json", killed)
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
    cost = objective.teacher_cost

    def watched(own: torch.Tensor, places: torch.Tensor, *rest: Any) -> torch.Tensor:
        taught.append((~places.isnan()).all(-1).any(0))
        return cost(own, places, *rest)

    monkeypatch.setattr(objective, "teacher_cost", watched)
    tap = maps.tap.copy()
    for photo in range(20):  # half of the channels answer to either category, so that both have filters
        tap[photo * 3 : photo * 3 + 3, (6 * (photo % 2)) : (6 * (photo % 2)) + 6] *= 6
    several = replace(maps, tap=tap, labels=torch.arange(20) % 2)
    train_explainer(fresh(tiny, teachers=2, warmup_epochs=3), several, tmp_path)
    shares = [float(found.double().mean()) for found in taught]
    sizes = [len(found) for found in taught]
    assert min(sizes) > 0
    assert len(taught) > 12  # both categories in nearly every batch
    assert min(shares) > 0.7
    assert sum(shares) / len(shares) > 0.95
