"""Learn an explainer from cached maps: epochs, checkpoints, resumption.

Everything drawn in an epoch comes from a generator seeded by (seed, epoch), and a checkpoint holds the weights, the
optimiser's moments and the objective's running measurements; so a run that was killed and started again ends, on the
same machine and with the same number of threads, with the same bits as one that was not.
"""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from partlens.errors import ImageError, InputError, RunError, expected, listed
from partlens.explainer.config import REVISION, ExplainerConfig
from partlens.explainer.network import Explainer, ExplainerOutput, parameter_groups
from partlens.explainer.starting import find_teachers, start_explainer
from partlens.explainer.teachers import places_in_view
from partlens.explainer.terms import BatchFacts, Objective, ViewPair, target_norm
from partlens.explainer.training_maps import (
    Batch,
    TrainingMaps,
    epoch_batches,
    epoch_generator,
    gather,
    norm_sample,
    read_evidence,
)
from partlens.records import SCHEMA, content_hash, read_checkpoint, write_json, write_tensors

CHECKPOINT_STATE = "checkpoint.json"
HISTORY = "history.json"
_DECODER = "decoder."
_WARM_STEPS = 50
_SMOOTHING = 0.6
_LEAST_IMPROVEMENT = 1e-3

EpochReport = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class TrainingResult:
    """What training did.

    Attributes:
        history: one mapping of logged terms per epoch.
        stopped: ``"finished"`` after all epochs or ``"plateau"``.
    """

    history: tuple[dict[str, Any], ...]
    stopped: str


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


def decoder_rate(decoder: nn.Module, config: ExplainerConfig) -> float:
    """Return the decoder's rate: the configured one, at most ``decoder_step_max`` of the size of its kernels.

    The size is the root mean square over all weights of two or more dimensions; biases and scales of norm layers do not
    count. Source: ours.
    """
    kernels = [weight.detach() for weight in decoder.parameters() if weight.ndim > 1]
    if not config.decoder_step_max or not kernels:
        return config.learning_rate_decoder
    squares = sum(float(kernel.square().sum()) for kernel in kernels)
    size = math.sqrt(squares / sum(kernel.numel() for kernel in kernels))
    return min(config.learning_rate_decoder, config.decoder_step_max * size)


def _optimiser(explainer: Explainer, config: ExplainerConfig, of_decoder: float, *, warm: bool) -> torch.optim.AdamW:
    rates = {
        "interpretable": config.learning_rate if warm else config.learning_rate_joint,
        "ordinary": config.learning_rate_ordinary,
        "share": config.learning_rate_p,
        "decoder": of_decoder,
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
        # Measured on the performer's copy, before a checkpoint is read, so that a killed run goes on at the same rate.
        self.of_decoder = decoder_rate(explainer.decoder, self.config)
        self.optimiser = _optimiser(explainer, self.config, self.of_decoder, warm=self.config.warmup_epochs > 0)
        photos = norm_sample(data)
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
                "revision": REVISION,
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

        missing, strange = self.explainer.load_state_dict(part("network."), strict=False)
        if strange or any(not name.startswith(_DECODER) for name in missing):
            raise RunError(expected(f"a whole checkpoint in {self.folder}", listed([*strange, *missing]), remedy))
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in part("optimiser.").items():
            index, key = name.split(".", 1)
            moments.setdefault(int(index), {})[key] = value
        if len(state["history"]) > self.config.warmup_epochs:
            self.optimiser = _optimiser(self.explainer, self.config, self.of_decoder, warm=False)
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
        # The decoder is still the performer's copy in the warm-up, and often the largest part by far.
        held = _DECODER if len(self.history) <= self.config.warmup_epochs else ()
        tensors = {f"network.{k}": v for k, v in self.explainer.state_dict().items() if not k.startswith(held)}
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
        explainer.draws = epoch_generator(config.seed + 1, number) if warm else None
        if number == config.warmup_epochs + 1:
            # The joint objective has other units: moments of the warm-up would all but stop the interpretable track.
            self.optimiser = _optimiser(explainer, config, self.of_decoder, warm=False)
            if config.warmup_epochs:
                photos = norm_sample(self.data)
                maps = gather(self.data.tap, self.data.rows(photos, torch.zeros_like(photos)))
                explainer.restart_norm(maps.to(self.device))
        explainer.train()
        explainer.decoder.eval()  # copies of the performer's norm and dropout layers stay as they are
        self.objective.epoch = max(1, number - config.warmup_epochs)
        batches = list(epoch_batches(self.data, config, number))
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

    def _step(self, batch: Batch, *, warm: bool) -> Mapping[str, Tensor]:
        explainer = self.explainer
        rows = batch.rows[: batch.positives] if warm else batch.rows
        maps, targets = (gather(self.data.tap, rows), ()) if warm else self.data.read(rows)
        evidence = read_evidence(self.data, self.config, rows[: batch.positives])
        device = self.device
        maps, targets = maps.to(device), tuple(target.to(device) for target in targets)
        pair = batch.pair
        if pair is not None:
            pair = ViewPair(pair.first, pair.second, pair.windows.to(device))
        labels = None if batch.labels is None else batch.labels.to(device)
        learns = warm or self.config.learning_rate_joint > 0  # a track that is held needs no teacher
        taught = self._taught(rows[: batch.positives]) if learns else None
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
    else:
        # A kill between two writes may have left it an epoch behind.
        write_json(folder / HISTORY, {"schema": SCHEMA, "epochs": run.history})
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
