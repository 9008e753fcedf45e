"""Learn an explainer from cached maps: epochs, checkpoints, resumption.

Everything drawn in an epoch comes from a generator seeded by (seed, epoch), and a checkpoint holds the weights, the
optimiser's moments and the objective's running measurements; so a run that was killed and started again ends, on the
same machine and with the same number of threads, with the same bits as one that was not.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from partlens.explainer.config import ExplainerConfig
from partlens.explainer.evidence import sharpened
from partlens.explainer.network import Explainer, ExplainerOutput, parameter_groups
from partlens.explainer.objective import BatchFacts, Objective, ViewPair, target_norm
from partlens.explainer.seeding import MOST_PHOTOS, VotedParts, seed_parts, voted_parts
from partlens.explainer.teachers import LaterParts, Source, centroids, part_teachers, places_in_view
from partlens.store import SCHEMA, content_hash, read_checkpoint, write_json, write_tensors
from partlens.vocabulary import ImageError, InputError, expected

CHECKPOINT_STATE = "checkpoint.json"
HISTORY = "history.json"
_SEED_VIEWS = 5
_NORM_SAMPLE = 256
_LEAST_UPPER_CELLS = 3
_VOTERS = 256
_VOTED_POWER = 6.0
_WARM_STEPS = 50
_SMOOTHING = 0.6
_LEAST_IMPROVEMENT = 1e-3

EpochReport = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class TrainingMaps:
    """What training reads: cached maps of views of photos.

    Attributes:
        tap: maps at the tap, ``[row, filter, row, col]``; memory maps are read batch by batch.
        targets: features to reconstruct, one array per target.
        windows: how each view of the category's photos was cut (photo, view, 5), see
            :func:`partlens.explainer.views.view_windows`; row ``photo * views + view`` of the arrays.
        background_rows: rows of the arrays that hold other photos; may be empty.
        evidence: the performer's evidence at the tap, ``[row, row, col]``, for the rows of the category's photos.
        labels: the category of each photo, from 0, for an explainer of several categories.
    """

    tap: np.ndarray
    targets: tuple[np.ndarray, ...]
    windows: Float[Tensor, "photo view 5"]
    background_rows: Int[np.ndarray, " background"]
    evidence: np.ndarray | None = None
    labels: Int[Tensor, " photo"] | None = None

    @property
    def categories(self) -> int:
        """Number of categories that filters are shared among."""
        return 1 if self.labels is None else int(self.labels.max()) + 1

    @property
    def photos(self) -> int:
        """Number of photos of the category."""
        return int(self.windows.shape[0])

    @property
    def views(self) -> int:
        """Views of each photo."""
        return int(self.windows.shape[1])

    def rows(self, photos: Tensor, view: Tensor) -> np.ndarray:
        """Return the array rows of photos in views."""
        found: np.ndarray = (photos * self.views + view).numpy()
        return found

    def read(self, rows: np.ndarray) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Read maps and targets of some rows as float32."""
        return _gather(self.tap, rows), tuple(_gather(t, rows) for t in self.targets)


def _gather(array: np.ndarray, rows: np.ndarray) -> Tensor:
    """Read rows in the file's order, which a memory map serves best, and put them back in the order asked."""
    order = np.argsort(rows, kind="stable")
    read = torch.from_numpy(np.asarray(array[rows[order]])).float()
    return read[torch.from_numpy(np.argsort(order, kind="stable"))]


@dataclass(frozen=True)
class TrainingResult:
    """What training did.

    Attributes:
        history: one mapping of logged terms per epoch.
        stopped: ``"finished"`` after all epochs or ``"plateau"``.
    """

    history: tuple[dict[str, Any], ...]
    stopped: str


@dataclass(frozen=True)
class _Batch:
    rows: np.ndarray
    positives: int
    pair: ViewPair | None
    labels: Tensor | None


def _epoch_generator(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + epoch * 7_919 + 17) % (2**63))


def _epoch_batches(data: TrainingMaps, config: ExplainerConfig, epoch: int) -> Iterator[_Batch]:
    """Draw an epoch: every photo once or twice, each time in a drawn view, beside background photos.

    With equivariance a batch is half photos as they are and half another view of the same photos.
    """
    generator = _epoch_generator(config.seed, epoch)
    paired = config.equivariance_weight > 0 and data.views > 1
    size = min(config.batch_size, data.photos * (2 if paired else 1))
    per_batch = max(2, size // 2) if paired else size
    order = torch.randperm(data.photos, generator=generator)
    steps = max(1, math.ceil(data.photos / per_batch))
    for step in range(steps):
        # The last batch is filled up from the start of the order, so that all batches have one size.
        photos = order[(torch.arange(per_batch) + step * per_batch) % data.photos]
        pair: ViewPair | None = None
        if paired:
            view = torch.randint(1, data.views, (per_batch,), generator=generator)
            rows = np.concatenate([data.rows(photos, torch.zeros_like(view)), data.rows(photos, view)])
            pair = ViewPair(slice(0, per_batch), slice(per_batch, 2 * per_batch), data.windows[photos, view])
        else:
            rows = data.rows(photos, torch.randint(0, data.views, (per_batch,), generator=generator))
        positives = len(rows)
        labels = None if data.labels is None else data.labels[photos].repeat(positives // per_batch)
        if len(data.background_rows) and config.background_batch:
            drawn = torch.randint(len(data.background_rows), (config.background_batch,), generator=generator)
            rows = np.concatenate([rows, data.background_rows[drawn.numpy()]])
        yield _Batch(rows, positives, pair, labels)


def _schedule(step: int, total: int) -> float:
    """Share of the learning rate: a short rise, then a cosine to 5 %."""
    rise = min(1.0, (step + 1) / min(_WARM_STEPS, max(1, total // 10)))
    return rise * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, total)))))


def _event_writer(folder: Path, step: int) -> Any:
    """Open TensorBoard's event file, dropping records from ``step`` on; ``None`` without the extra ``log``.

    The same terms always stand in ``history.json``; the event file is for people who watch several runs at once.
    """
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"), purge_step=step)


def _optimiser(explainer: Explainer, config: ExplainerConfig, *, warm: bool) -> torch.optim.AdamW:
    rates = {
        "interpretable": config.learning_rate if warm else config.learning_rate_joint,
        "ordinary": config.learning_rate_ordinary,
        "share": config.learning_rate_p,
        "decoder": config.learning_rate_decoder,
    }
    for role, parameters in parameter_groups(explainer).items():
        for parameter in parameters:
            parameter.requires_grad_(rates[role] > 0)  # what is held needs no gradient
    groups = [
        {
            "params": list(parameters),
            "lr": rates[role],
            "base": rates[role],
            "weight_decay": config.weight_decay if role == "interpretable" else 0.0,
        }
        for role, parameters in parameter_groups(explainer).items()
    ]
    return torch.optim.AdamW(groups)


def _evidence(data: TrainingMaps, config: ExplainerConfig, rows: np.ndarray) -> Tensor | None:
    """Read the evidence of some rows as the objective wants it; ``None`` where it is not used."""
    if data.evidence is None or config.evidence_weight == 0:
        return None
    return sharpened(_gather(data.evidence, rows), config.evidence_smooth_cells, config.evidence_power)


def _norm_sample(data: TrainingMaps) -> Tensor:
    """Return the photos that norms and target norms are measured on: with several categories, some of each."""
    count = min(data.photos, _NORM_SAMPLE)
    if data.labels is None:
        return torch.arange(count)
    return torch.arange(count) * data.photos // count


def _own_photos(data: TrainingMaps, category: int) -> Tensor:
    return torch.arange(data.photos) if data.labels is None else (data.labels == category).nonzero()[:, 0]


def _voted_parts(
    explainer: Explainer, data: TrainingMaps, category: int, generator: torch.Generator, *, voters: int, parts: int
) -> VotedParts:
    """Find the parts of one category that the tap's own features vote for."""
    config = explainer.config
    own = _own_photos(data, category)
    photos = own[torch.randperm(len(own), generator=generator)[:MOST_PHOTOS]].sort().values
    views = min(_SEED_VIEWS, data.views)
    maps = torch.stack([_gather(data.tap, data.rows(photos, torch.full_like(photos, v))) for v in range(views)])
    rest = data.background_rows
    if data.labels is not None:
        strangers = (data.labels != category).nonzero()[:, 0]
        rest = np.concatenate([rest, data.rows(strangers, torch.zeros_like(strangers))])
    others = rest[:: max(1, len(rest) // (2 * MOST_PHOTOS))][: 2 * MOST_PHOTOS]
    return voted_parts(
        maps,
        data.windows[photos, :views].transpose(0, 1),
        _gather(data.tap, others),
        generator,
        _evidence(data, config, data.rows(photos, torch.zeros_like(photos))),
        voters=voters,
        parts=parts,
        candidates=config.candidates_per_filter * max(voters, parts),
        votes=config.votes,
    )


def _seed_category(
    explainer: Explainer, data: TrainingMaps, category: int, generator: torch.Generator
) -> dict[str, float]:
    """Seed the filters of one category; with several, each has its share of both layers."""
    first = _share(explainer.conv_interp_1.out_channels, category, data.categories)
    second = _share(explainer.conv_interp_2.out_channels, category, data.categories)
    parts = _voted_parts(explainer, data, category, generator, voters=len(first), parts=len(second))
    seed_parts(explainer, parts, (first, second))
    return parts.found


def _share(filters: int, category: int, categories: int) -> Tensor:
    return torch.arange(category * filters // categories, (category + 1) * filters // categories)


def _upper_view(explainer: Explainer, data: TrainingMaps, own: Tensor, photos: Tensor, number: int) -> Tensor:
    """Return what comes after the tap, for some of a category's ``own`` photos in a view: what teachers are found in.

    Where the tracks take a convolution's place, that convolution's maps; elsewhere the last target that has maps of at
    least 3x3 cells, and the tap itself where none has.
    """
    rows = data.rows(own[photos], torch.full_like(photos, number))
    if explainer.structure.replaced is not None:
        with torch.no_grad():
            parts = [
                explainer.conv_ordin(_gather(data.tap, part)).relu() for part in np.array_split(rows, _pieces(rows))
            ]
        return torch.cat(parts)
    mapped = [t for t in data.targets if t.ndim == 4 and min(t.shape[2:]) >= _LEAST_UPPER_CELLS]
    return _gather(mapped[-1] if mapped else data.tap, rows)


def _voted_places(parts: VotedParts, data: TrainingMaps, own: Tensor, number: int) -> Tensor:
    """Return where voted parts stand in a view of a category's photos."""
    rows = data.rows(own, torch.full_like(own, number))
    pieces = np.array_split(rows, _pieces(rows))
    with torch.no_grad():
        return torch.cat([centroids(parts.maps(_gather(data.tap, some)), _VOTED_POWER) for some in pieces])


def _pieces(rows: np.ndarray) -> int:
    return max(1, math.ceil(len(rows) / _NORM_SAMPLE))


def find_teachers(explainer: Explainer, data: TrainingMaps) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Find the part teachers of every category.

    Returns:
        ``teachers``, places (photo, teacher, 2) in shares, NaN for photos of other categories, and ``teacher_of``, the
        teacher of each filter of conv-interp-2; and what was found, for the log.
    """
    config, structure = explainer.config, explainer.structure
    places = torch.full((data.photos, config.teachers * data.categories, 2), math.nan)
    teacher_of = torch.zeros(structure.channels_out, dtype=torch.long)
    found = {"teacher_movement": 0.0, "teacher_correlation": 0.0}
    for category in range(data.categories):
        generator = _epoch_generator(config.seed, -1 - category)
        own = _own_photos(data, category)
        views = min(data.views, 1 + _SEED_VIEWS)
        sources: list[Source] = []
        if config.teacher_sources != "tap":
            sources.append(LaterParts(functools.partial(_upper_view, explainer, data, own), len(own), generator))
        if config.teacher_sources != "later":
            voted = _voted_parts(explainer, data, category, generator, voters=_VOTERS, parts=_VOTERS)
            sources.append(functools.partial(_voted_places, voted, data, own))
        teachers = part_teachers(
            sources,
            data.windows[own, :views],
            config.teachers,
            config.teacher_variety,
        )
        first, count = category * config.teachers, teachers.places.shape[1]
        places[own, first : first + count] = teachers.places
        share = _share(structure.channels_out, category, data.categories)
        teacher_of[share] = first + torch.arange(len(share)) % count
        found["teacher_movement"] += float(teachers.movement.mean()) / data.categories
        found["teacher_correlation"] += teachers.correlation / data.categories
    return {"teachers": places, "teacher_of": teacher_of}, found


def start_explainer(explainer: Explainer, data: TrainingMaps) -> dict[str, float]:
    """Initialise what needs data: scale of the tap and part candidates (if configured), norm layers and gain.

    Returns:
        What was found, for the log.
    """
    config = explainer.config
    generator = _epoch_generator(config.seed, 0)
    found: dict[str, float] = {}
    if config.standardise:
        photos = _norm_sample(data)
        explainer.start_scale(_gather(data.tap, data.rows(photos, torch.zeros_like(photos))))
    if config.initialisation == "parts":
        for category in range(data.categories):
            seen = _seed_category(explainer, data, category, generator)
            found |= {name: found.get(name, 0.0) + value / data.categories for name, value in seen.items()}
    photos = _norm_sample(data)
    explainer.start_norms(_gather(data.tap, data.rows(photos, torch.zeros_like(photos))))
    return found


def _check(data: TrainingMaps) -> None:
    if data.photos < 2:
        raise ImageError(
            expected("at least 2 photos of the category to learn from", data.photos, "Add photos or another category")
        )


@dataclass(frozen=True)
class Head:
    """The performer after the last target, for ``objective="classification"``.

    Attributes:
        module: takes the last target, returns the outputs.
        outputs: the output of each category.
    """

    module: nn.Module
    outputs: tuple[int, ...]


class _Run:
    """One training run with its state on disk."""

    def __init__(self, explainer: Explainer, data: TrainingMaps, folder: Path, head: Head | None = None) -> None:
        self.explainer, self.data, self.folder = explainer, data, folder
        self.device = torch.device("cpu")
        self.config = explainer.config
        self.optimiser = _optimiser(explainer, self.config, warm=self.config.warmup_epochs > 0)
        photos = _norm_sample(data)
        sample = data.rows(photos, torch.zeros_like(photos))
        norms = tuple(target_norm(t) for t in data.read(sample)[1])
        self.objective = Objective(
            self.config,
            explainer,
            norms,
            data.categories,
            None if head is None else head.module,
            (0,) if head is None else head.outputs,
        )
        self.history: list[dict[str, Any]] = []
        self.best = math.inf
        self.stale = 0
        self.smoothed = math.nan
        self.found: dict[str, float] = {}
        self.fingerprint = content_hash(
            {
                "config": self.config.to_dict(),
                "structure": explainer.structure.to_dict(),
                "photos": data.photos,
                "background": len(data.background_rows),
                "evidence": data.evidence is not None,
                "categories": data.categories,
                "ordinary": sum(p.numel() for p in explainer.conv_ordin.parameters()),
            }
        )

    def to(self, device: torch.device) -> None:
        """Move everything that learns; the optimiser's moments follow their weights."""
        self.device = device
        self.explainer.to(device)
        self.objective.to(device)
        for moments in self.optimiser.state.values():
            for name, value in moments.items():
                if isinstance(value, Tensor) and name != "step":
                    moments[name] = value.to(device)

    def restore(self) -> bool:
        """Continue from a checkpoint if there is one.

        Raises:
            RunError: the checkpoint belongs to another configuration.
        """
        remedy = "Choose another --out folder, or delete this one"
        found = read_checkpoint(self.folder / CHECKPOINT_STATE, self.fingerprint, remedy)
        if found is None:
            return False
        state, tensors = found

        def part(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        self.explainer.load_state_dict(part("network."))
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in part("optimiser.").items():
            index, key = name.split(".", 1)
            moments.setdefault(int(index), {})[key] = value
        if len(state["history"]) > self.config.warmup_epochs:
            self.optimiser = _optimiser(self.explainer, self.config, warm=False)
        plain = self.optimiser.state_dict()
        self.optimiser.load_state_dict({"state": moments, "param_groups": plain["param_groups"]})
        self.objective.state = part("objective.")
        self.objective.step = int(state["step"])
        self.history = list(state["history"])
        self.best, self.stale = _number(state["best"]), int(state["stale"])
        self.smoothed = math.nan if state["smoothed"] is None else float(state["smoothed"])
        return True

    def save(self) -> None:
        """Write a checkpoint: tensors under a new name first, then the state that points to them."""
        tensors = {f"network.{k}": v for k, v in self.explainer.state_dict().items()}
        for index, moments in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{index}.{k}": v for k, v in moments.items() if isinstance(v, Tensor)}
        tensors |= {f"objective.{k}": v for k, v in self.objective.state.items()}
        name = f"checkpoint-{len(self.history) % 2}.safetensors"
        write_tensors(self.folder / name, tensors)
        write_json(
            self.folder / CHECKPOINT_STATE,
            {
                "schema": SCHEMA,
                "fingerprint": self.fingerprint,
                "tensors": name,
                "step": self.objective.step,
                "history": self.history,
                "best": None if math.isinf(self.best) else self.best,
                "stale": self.stale,
                "smoothed": self.smoothed,
            },
        )
        write_json(self.folder / HISTORY, {"schema": SCHEMA, "epochs": self.history})

    def epoch(self, number: int) -> dict[str, Any]:
        """Run one epoch and return its logged means."""
        config, explainer = self.config, self.explainer
        warm = number <= config.warmup_epochs
        explainer.draws = _epoch_generator(config.seed + 1, number) if warm else None
        if number == config.warmup_epochs + 1:
            # The joint objective has other units: moments of the warm-up would all but stop the interpretable track.
            self.optimiser = _optimiser(explainer, config, warm=False)
        explainer.train()
        explainer.decoder.eval()  # copies of the performer's norm and dropout layers stay as they are
        self.objective.epoch = max(1, number - config.warmup_epochs)
        batches = list(_epoch_batches(self.data, config, number))
        epochs = config.warmup_epochs if warm else config.epochs
        done = (number - 1 if warm else number - 1 - config.warmup_epochs) * len(batches)
        sums: dict[str, float] = {}
        started = time.monotonic()
        for index, batch in enumerate(batches):
            share = _schedule(done + index, epochs * len(batches))
            for group in self.optimiser.param_groups:
                group["lr"] = group["base"] * share
            terms = self._step(batch, warm=warm)
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + float(value)
        means = {name: value / len(batches) for name, value in sums.items()}
        phase = "warmup" if warm else "joint"
        return {"epoch": number, "phase": phase, "seconds": round(time.monotonic() - started, 3), **means}

    def _step(self, batch: _Batch, *, warm: bool) -> Mapping[str, Tensor]:
        explainer = self.explainer
        rows = batch.rows[: batch.positives] if warm else batch.rows
        maps, targets = (_gather(self.data.tap, rows), ()) if warm else self.data.read(rows)
        evidence = _evidence(self.data, self.config, rows[: batch.positives])
        device = self.device
        maps, targets = maps.to(device), tuple(target.to(device) for target in targets)
        pair = batch.pair
        if pair is not None:
            pair = ViewPair(pair.first, pair.second, pair.windows.to(device))
        labels = None if batch.labels is None else batch.labels.to(device)
        taught = self._taught(rows[: batch.positives]) if warm else None
        evidence = None if evidence is None else evidence.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            if warm:
                interp1, interp2 = explainer.interpret(maps)
                output = ExplainerOutput(interp1, interp2, interp2, explainer.p, ())
            else:
                output = explainer(maps, batch.positives if self.config.norm_positives_only else None)
        facts = BatchFacts(batch.positives, pair, evidence, labels, taught)
        if warm:
            loss, terms = self.objective.warmup(output, facts)
        else:
            loss, terms = self.objective.joint(output, targets, facts)
        if not bool(torch.isfinite(loss.detach())):
            raise InputError(
                expected("a finite objective", float(loss.detach()), "Lower the learning rates or check the photos")
            )
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        return terms

    def _taught(self, rows: np.ndarray) -> Tensor | None:
        """Return the cells at which teachers stand in views of the category's photos."""
        if not self.config.teachers:
            return None
        photo, view = (torch.from_numpy(v) for v in np.divmod(rows, self.data.views))
        places = self.objective.state["teachers"][photo.to(self.device)]
        shares = places_in_view(places, self.data.windows[photo, view].to(self.device))
        side = torch.tensor(self.explainer.structure.side_cells, device=self.device)
        return torch.where(((shares > 0) & (shares < 1)).all(-1, keepdim=True), shares * side - 0.5, math.nan)

    def follow(self, record: dict[str, Any]) -> None:
        """Keep count of the epochs in which the smoothed objective of the joint phase did not fall."""
        if record["phase"] == "warmup":
            return
        value = record.get("classification", record["reconstruction"]) + record["share"]
        past = self.smoothed
        self.smoothed = value if math.isnan(past) else _SMOOTHING * past + (1 - _SMOOTHING) * value
        if self.smoothed < self.best * (1 - _LEAST_IMPROVEMENT):
            self.best, self.stale = self.smoothed, 0
        else:
            self.stale += 1


def _number(value: float | None) -> float:
    """Read back a number that JSON could not hold."""
    return math.inf if value is None else float(value)


def train_explainer(
    explainer: Explainer,
    data: TrainingMaps,
    folder: Path,
    *,
    head: Head | None = None,
    device: str | torch.device = "cpu",
    report: EpochReport | None = None,
) -> TrainingResult:
    """Learn an explainer; continue where a killed run stopped.

    Args:
        explainer: from :func:`partlens.explainer.assembly.build_explainer`; holds its configuration.
        data: cached maps.
        folder: where checkpoints, ``history.json`` and, with the extra ``log``, TensorBoard's event files are written,
            after every epoch.
        head: what classifies the reconstruction; needed for ``objective="classification"`` only.
        device: where it learns; the explainer is handed back on the CPU.
        report: gets each epoch's record; an exception from it ends training with the last checkpoint intact.

    Returns:
        The history and why training stopped.

    Raises:
        ImageError: fewer than two photos.
        InputError: the objective is not finite.
        RunError: ``folder`` holds a checkpoint of another configuration.
    """
    _check(data)
    config = explainer.config
    run = _Run(explainer, data, folder, head)
    if not run.restore():
        run.found = start_explainer(explainer, data)
        if config.teachers:
            state, found = find_teachers(explainer, data)
            run.objective.state |= state
            run.found |= found
    run.to(torch.device(device))
    total = config.warmup_epochs + config.epochs
    stopped = "finished"
    events = _event_writer(folder, len(run.history) + 1)
    for number in range(len(run.history) + 1, total + 1):
        if run.config.patience and run.stale >= run.config.patience:
            stopped = "plateau"
            break
        record = run.epoch(number) | (run.found if number == 1 else {})
        run.history.append(record)
        run.follow(record)
        run.save()
        if events is not None:
            for name, value in record.items():
                if isinstance(value, float):
                    events.add_scalar(name, value, number)
            events.flush()
        if report is not None:
            report(record)
    if events is not None:
        events.close()
    explainer.draws = None
    explainer.cpu().eval()
    return TrainingResult(tuple(run.history), stopped)
