"""Learn an explainer from cached maps: start, epochs, checkpoints, resumption.

Everything drawn in an epoch comes from a generator seeded by (seed, epoch), and a checkpoint holds the weights, the
optimiser's moments and the objective's running measurements; so a run that was killed and started again ends, on the
same machine and with the same number of threads, with the same bits as one that was not.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from partlens.checkpoint import Checkpoint, moments, restore_moments
from partlens.errors import ImageError, InputError, RunError, expected
from partlens.explainer.config import ExplainerConfig
from partlens.explainer.network import Explainer, build_explainer, parameter_groups, performer_head
from partlens.explainer.processes import ALONE, Processes
from partlens.explainer.record import History
from partlens.explainer.teachers import PlaceSource, find_teachers
from partlens.explainer.terms import BatchFacts, Classification, Objective, target_norm
from partlens.explainer.views import Batch, TrainingMaps, epoch_batches, epoch_generator, gather
from partlens.network.performer import Performer
from partlens.records import content_hash, plain

_DECODER = "decoder."
_WARM_STEPS = 50
_LEAST_RATE = 0.05
_SMOOTHING = 0.6
_LEAST_IMPROVEMENT = 1e-3

FACTORS = (3.0, 10.0, 30.0)
"""Prices of the ordinary track along the curve of p, times the fitted ``eta``."""

_PRICE_EPOCHS = 2
_REACH_NATS = 8.0  # how far the logit of p can move in the epochs of a point: from 0.3 to 0.999, whatever their steps

EpochReport = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class _TrainingResult:
    """The logged terms of each epoch, and why training stopped: ``"finished"`` after all epochs or ``"plateau"``."""

    history: tuple[dict[str, Any], ...]
    stopped: str


@dataclass(frozen=True)
class Extras:
    """What a fit takes from outside its configuration."""

    places_of: PlaceSource | None = None  # where the parts that teach are; needed where the configuration asks for them
    classification: Classification | None = None  # replaces the reconstruction, for that objective
    device: str | torch.device = "cpu"
    processes: Processes = ALONE  # others learn along (`follow`)
    going_on: bool = False  # from what the explainer has learned: neither its norms nor its gain are measured anew


def _schedule(step: int, total: int) -> float:
    """Share of the learning rate: a short rise, then a cosine to 5 %."""
    rise = min(1.0, (step + 1) / min(_WARM_STEPS, max(1, total // 10)))
    fall = 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, total))))
    return rise * (_LEAST_RATE + (1 - _LEAST_RATE) * fall)


@contextlib.contextmanager
def _events(folder: Path, step: int) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Write epochs to TensorBoard's event file, records from ``step`` on anew; to nowhere without the extra ``log``."""
    if importlib.util.find_spec("tensorboard") is None:
        yield lambda _: None
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder / "tensorboard"), purge_step=step) as events:

        def write(record: Mapping[str, Any]) -> None:
            for name, value in record.items():
                if isinstance(value, float):
                    events.add_scalar(name, value, record["epoch"])
            events.flush()

        yield write


def _decoder_rate(decoder: nn.Module, config: ExplainerConfig) -> float:
    """Return the decoder's rate: the configured one, at most ``decoder_step_max`` of the size of its kernels (ours).

    The size is the root mean square over all weights of two or more dimensions; biases and scales of norm layers do not
    count.
    """
    kernels = [weight.detach() for weight in decoder.parameters() if weight.ndim > 1]
    if not config.decoder_step_max or not kernels:
        return config.learning_rate_decoder
    squares = sum(float(kernel.square().sum()) for kernel in kernels)
    size = math.sqrt(squares / sum(kernel.numel() for kernel in kernels))
    return min(config.learning_rate_decoder, config.decoder_step_max * size)


def _optimiser(explainer: Explainer, of_decoder: float, *, warm: bool) -> torch.optim.AdamW:
    config = explainer.config
    rates = {
        "interpretable": config.learning_rate if warm else config.learning_rate_joint,
        "ordinary": config.learning_rate_ordinary,
        "share": config.learning_rate_p,
        "decoder": of_decoder,
    }
    groups = []
    for role, parameters in parameter_groups(explainer).items():
        for parameter in parameters:
            parameter.requires_grad_(rates[role] > 0)  # what is held needs no gradient
        decay = config.weight_decay if role == "interpretable" else 0.0
        groups.append({"params": list(parameters), "lr": rates[role], "base": rates[role], "weight_decay": decay})
    return torch.optim.AdamW(groups, fused=True)  # of a fully connected decoder the rest is eight times as slow


def _means(sums: Mapping[str, Tensor], batches: int) -> dict[str, float]:
    """Return the means of an epoch's numbers, after a look at its objective."""
    means = {name: float(value) / batches for name, value in sums.items()}
    if not math.isfinite(objective := means.pop("objective")):
        raise InputError(expected("a finite objective", objective, "Lower the learning rates or check the photos"))
    return means


class _Patience:
    """Counts the epochs in which the smoothed objective of the joint phase did not fall."""

    def __init__(self) -> None:
        self.best, self.smoothed, self.stale = math.inf, math.nan, 0

    def follow(self, value: float) -> None:
        past = self.smoothed
        self.smoothed = value if math.isnan(past) else _SMOOTHING * past + (1 - _SMOOTHING) * value
        if self.smoothed < self.best * (1 - _LEAST_IMPROVEMENT):
            self.best, self.stale = self.smoothed, 0
        else:
            self.stale += 1


class _Training:
    """One training with its state on disk."""

    def __init__(
        self, explainer: Explainer, data: TrainingMaps, folder: Path, extras: Extras, of_decoder: float | None = None
    ) -> None:
        self.explainer, self.data, self.folder, self.extras = explainer, data, folder, extras
        self.config = explainer.config
        # Measured on the performer's copy, before a checkpoint is read, so that a killed run goes on at the same rate.
        self.of_decoder = _decoder_rate(explainer.decoder, self.config) if of_decoder is None else of_decoder
        self.optimiser = _optimiser(explainer, self.of_decoder, warm=self.config.warmup_epochs > 0)
        norms = tuple(target_norm(gather(target, data.sample)) for target in data.targets)
        self.objective = Objective.of(explainer, norms, data.categories, extras.classification)
        self.history: list[dict[str, Any]] = []
        self.patience = _Patience()
        self.stopped = "finished"
        self.device, self.processes = torch.device(extras.device), extras.processes
        self.found: dict[str, float] = {}
        settings = {
            "config": self.config,
            "structure": explainer.structure,
            "photos": data.photos,
            "background": len(data.background_rows),
            "categories": data.categories,
        }
        self.checkpoint = Checkpoint(folder, content_hash(plain(settings)))

    def begin(self) -> None:
        """Measure what the explainer starts from and find its teachers, or go on from a checkpoint."""
        if (found := self.checkpoint.load()) is not None:
            self.take(*found)
            # A kill between two writes may have left it an epoch behind.
            self._write_history()
        elif not self.extras.going_on:
            sample = gather(self.data.tap, self.data.sample)
            if self.config.standardise:
                self.explainer.start_scale(sample)
            self.explainer.start_norms(sample)
            if self.extras.places_of is not None:
                state, self.found = find_teachers(self.explainer, self.data, self.extras.places_of)
                self.objective.state.update(state)

    def call_others(self) -> None:
        """Give the other processes what they need to learn along (`follow`)."""
        data, others, most = self.data, self.extras.classification, min(self.config.batch_size, self.data.photos)
        if self.processes.count > most:
            rule, remedy = (
                f"at most {most} processes for batches of {most} photos",
                "Start fewer, or enlarge the batches",
            )
            raise InputError(expected(rule, self.processes.count, remedy))
        arrays = tuple(map(_opening, (data.tap, *data.targets)))
        known = (data.windows, data.labels, data.background_rows)
        outputs = () if others is None else others.outputs
        explainer = self.explainer
        job = (explainer.structure, self.config, arrays, known, outputs, self.of_decoder, self.state())
        self.processes.shared(job)

    def move(self) -> None:
        """Bring everything to the device that it is learned on."""
        device = self.device
        self.explainer.to(device)
        self.objective.to(device)
        for kept in self.optimiser.state.values():  # moments follow their weights
            kept.update({n: v.to(device) for n, v in kept.items() if isinstance(v, Tensor) and n != "step"})

    def take(self, values: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Go on from a state, of a checkpoint or of another process."""
        self.explainer.load_state_dict(tensors["network"], strict=False)  # in the warm-up without the decoder
        self.history = list(values["history"])
        if len(self.history) > self.config.warmup_epochs:
            self.optimiser = _optimiser(self.explainer, self.of_decoder, warm=False)
        restore_moments(self.optimiser, tensors["optimiser"])
        self.objective.state.update(tensors["objective"])
        self.objective.step = values["step"]
        for record in self.history:
            self._follow(record)

    def state(self) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
        """Return everything that training changes: values, and groups of tensors."""
        tensors = {
            "network": self.explainer.state_dict(),
            "optimiser": moments(self.optimiser),
            "objective": self.objective.state,
        }
        return {"step": self.objective.step, "history": self.history}, tensors

    def _save(self) -> None:
        values, tensors = self.state()
        if len(self.history) <= self.config.warmup_epochs:
            # The decoder is still the performer's copy in the warm-up, and often the largest part by far.
            kept = {name: v for name, v in tensors["network"].items() if not name.startswith(_DECODER)}
            tensors["network"] = kept
        self.checkpoint.save(values, **tensors)
        self._write_history()

    def _write_history(self) -> None:
        History(epochs=tuple(self.history)).write(self.folder)

    def _follow(self, record: Mapping[str, Any]) -> None:
        if record["phase"] == "joint":
            self.patience.follow(record[self.objective.fidelity.NAME] + record["share"])

    def epochs(self) -> Iterator[dict[str, Any]]:
        """Run the epochs that are left; each is saved before its record is given."""
        config = self.config
        for number in range(len(self.history) + 1, config.warmup_epochs + config.epochs + 1):
            if 0 < config.patience <= self.patience.stale:
                self.stopped = "plateau"
                return
            record = self._epoch(number) | (self.found if number == 1 else {})
            record = self.processes.shared(record)  # whatever a process of another machine makes of the same numbers
            self.history.append(record)
            self._follow(record)
            if self.processes.number == 0:
                self._save()
            yield record

    def _epoch(self, number: int) -> dict[str, Any]:
        """Run one epoch and return its logged means."""
        config, explainer = self.config, self.explainer
        warm = number <= config.warmup_epochs
        explainer.draws = epoch_generator(config.seed + 1, number) if warm else None
        if number == config.warmup_epochs + 1:
            # The joint objective has other units: moments of the warm-up would all but stop the interpretable track.
            self.optimiser = _optimiser(explainer, self.of_decoder, warm=False)
            if config.warmup_epochs:
                explainer.restart_norm(gather(self.data.tap, self.data.sample, self.device))
        explainer.train()
        explainer.decoder.eval()  # copies of the performer's norm and dropout layers stay as they are
        self.objective.epoch = max(1, number - config.warmup_epochs)
        batches = list(epoch_batches(self.data, config, number))
        epochs, before = (config.warmup_epochs, 0) if warm else (config.epochs, config.warmup_epochs)
        # Numbers stay on the device until the epoch is over: to look at one is to wait for all that was asked of a GPU.
        sums: dict[str, Tensor] = {}
        started = time.monotonic()
        for index, batch in enumerate(batches):
            share = _schedule((number - 1 - before) * len(batches) + index, epochs * len(batches))
            for group in self.optimiser.param_groups:
                group["lr"] = group["base"] * share
            for name, value in self._step(batch, warm=warm).items():
                sums[name] = sums.get(name, value.new_zeros((), dtype=torch.float64)) + value.double()
        means = _means(sums, len(batches))
        phase = "warmup" if warm else "joint"
        seconds = round(time.monotonic() - started, 3)
        return {"epoch": number, "phase": phase, "seconds": seconds, "processes": self.processes.count, **means}

    def _step(self, whole: Batch, *, warm: bool) -> Mapping[str, Tensor]:
        """Take one step and return its logged terms; of the batch this process computes its own part."""
        batch = whole.of(self.processes)
        with self.processes.step(len(whole.photos)):
            loss, terms = self._loss(batch, warm=warm)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.processes.sum_gradients(self.explainer.parameters())
        self.optimiser.step()
        return {**terms, "objective": loss.detach()}

    def _loss(self, batch: Batch, *, warm: bool) -> tuple[Tensor, Mapping[str, Tensor]]:
        explainer, data, device = self.explainer, self.data, self.device
        positives = len(batch.photos)
        known = (data.labels[batch.photos], batch.photos, data.windows[batch.photos, batch.view])
        facts = BatchFacts(*(value.to(device) for value in known))
        rows = batch.rows[:positives] if warm else batch.rows
        maps = gather(data.tap, rows, device)
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16")
        if warm:
            with autocast:
                interp1, interp2 = explainer.interpret(maps)
            return self.objective.warmup(interp1, interp2, facts)
        with autocast:
            output = explainer(maps, positives)
        targets = tuple(gather(target, rows, device) for target in data.targets)
        return self.objective.joint(output, targets, facts)


def train_explainer(
    explainer: Explainer,
    data: TrainingMaps,
    folder: Path,
    *,
    extras: Extras | None = None,
    report: EpochReport | None = None,
) -> _TrainingResult:
    """Learn an explainer; continue where a killed run stopped.

    The checkpoint, ``history.json`` and, with the extra ``log``, TensorBoard's event files are written to ``folder``
    after every epoch. The explainer is handed back on the CPU. An exception from ``report``, which gets each epoch's
    record, ends training with the last checkpoint intact.

    Raises:
        ImageError: fewer than two photos.
        InputError: the objective is not finite, the classification has no head, teachers have no source of places, or
            there are more processes than photos in a batch.
        RunError: ``folder`` holds a checkpoint of another configuration.
    """
    if data.photos < 2:
        remedy = "Add photos or another category"
        raise ImageError(expected("at least 2 photos of the category to learn from", data.photos, remedy))
    extras = Extras() if extras is None else extras
    if (explainer.config.objective == "classification") != (extras.classification is not None):
        remedy = "Give Classification(performer_head(...), outputs) with objective=classification, and only with it"
        raise InputError(expected("the performer's upper layers for objective=classification", "none", remedy))
    if (explainer.config.teachers > 0) != (extras.places_of is not None):
        remedy = "Give Extras(places_of=found_places) with teachers, and only with them"
        raise InputError(expected("a source of the places that teach", "none", remedy))
    training = _Training(explainer, data, folder, extras)
    training.begin()
    training.call_others()
    training.move()
    with _events(folder, len(training.history) + 1) as write:
        for record in training.epochs():
            write(record)
            if report is not None:
                report(record)
    explainer.draws = None
    explainer.cpu().eval()
    return _TrainingResult(tuple(training.history), training.stopped)


def _opening(array: np.ndarray) -> Callable[[], np.ndarray]:
    """Return what gives an array in another process, which opens its file where there is one."""
    if isinstance(array, np.memmap):
        return functools.partial(np.memmap, array.filename, array.dtype, "r", array.offset, array.shape)
    return functools.partial(np.asarray, array)


def follow(performer: Performer, weights_sha256: str, extras: Extras) -> None:
    """Learn along with the first process, whatever it learns, until it is done; nothing is written.

    The first one calls `train_explainer` with ``extras`` of the same ``processes``, and ``shared(None)`` at the end.

    Raises:
        RunError: the first process has a performer of other weights, or another process ended.
    """
    if performer.weights_sha256 != weights_sha256:
        rule = f"the first process's performer (weights {weights_sha256[:12]})"
        raise RunError(expected(rule, performer.weights_sha256[:12], "Give all processes the same model"))
    while (job := extras.processes.shared()) is not None:
        structure, config, arrays, known, outputs, of_decoder, state = job
        explainer = build_explainer(performer, structure, config)
        tap, *targets = (opened() for opened in arrays)
        classification = Classification(performer_head(performer, structure), outputs) if outputs else None
        mine = replace(extras, classification=classification)
        training = _Training(explainer, TrainingMaps(tap, tuple(targets), *known), Path(), mine, of_decoder)
        training.take(*state)
        training.move()
        for _ in training.epochs():
            pass


def along_the_price(explainer: Explainer, data: TrainingMaps, folder: Path, extras: Extras) -> Iterator[Explainer]:
    """Give the explainers of rising prices, each learned from the one before; the fitted one is left as it is.

    p is where the price of the ordinary track, ``-eta log p``, meets what its loss costs the reconstruction: alone it
    says what ``eta`` was, and the curve over ``eta`` what part filters can do. These stay as they are; p, gain and
    decoder follow in a few epochs (ours).

    ``folder`` holds what of it is under way; ``extras`` says on which device it is learned.
    """
    steps = _PRICE_EPOCHS * math.ceil(data.photos / min(explainer.config.batch_size, data.photos))
    # The fitted explainer is kept: its p and decoder are what the run is about.
    point = copy.deepcopy(explainer)
    for factor in FACTORS:
        point.config = explainer.config.changed(
            {
                "eta": factor * explainer.config.eta,
                "learning_rate_joint": 0.0,
                "learning_rate_p": 2 * _REACH_NATS / steps,
                "teachers": 0,
                "warmup_epochs": 0,
                "epochs": _PRICE_EPOCHS,
                "patience": 0,
            }
        )
        alone = replace(extras, places_of=None, classification=None, going_on=True)
        train_explainer(point, data, folder / f"{factor:g}", extras=alone)
        yield point
