"""Do the relevant features matter to the network? A class's accuracy without them, and without as many others.

The μ-lasso is fitted on some photos, features are removed while the network looks at others. For comparison, as
many other features of the same layers are removed (as many in each layer): drawn at random, those with the highest mean
activation on the class, and those with the largest gradient times activation. Everything is chosen on the photos of
the fit alone.

Two protocols keep the two apart. ``split``: fit on the split ``train``, remove on ``test``. ``two-fold``: where classes
have few photos, one half is tested with the features of the other and the reverse, so that every photo is tested once
with features that were found without it.

Source: Oramas et al., ICLR 2019 (arXiv 1712.06302), removal of relevant filters against as many random ones. The exact
protocol (channels of each layer zeroed by forward hooks, accuracy over all outputs of the network) is that of the same
group's later code (Behzadi-Khormuji et al., ICIP 2023), which did not separate the photos of fit and test and had no
other baseline than random filters.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partlens.errors import InputError, RunError, expected
from partlens.progress import Progress
from partlens.records import content_hash, plain, read_json, write_json
from partlens.run import command, versions
from partlens.verbs.runs import loaded, open_photos, performer_info
from partlens_papers.given import settings_of
from partlens_papers.removal.fit import fitted, found_features, readout
from partlens_papers.removal.plan import FeatureSet, RemovalConfig, divide, masks_of, plans_of
from partlens_papers.removal.scores import scored

if TYPE_CHECKING:
    from torch import Tensor, nn

    from partlens.data.images import ImageSet
    from partlens.network.performer import Performer
    from partlens.selection.record import FeatureIndex

SCHEMA = "partlens.removal/1"
RESULT = "removal.json"


# Running the network


@dataclass
class _Runner:
    """Runs photos without features, each pair of photo and set once."""

    performer: Performer
    index: FeatureIndex
    pictures: Tensor  # bytes of the tested photos, image row col 3
    places: Mapping[int, int]  # photo -> row of pictures
    targets: Mapping[int, int]  # photo -> output
    batch_size: int
    known: dict[tuple[int, FeatureSet], tuple[float, float]] = field(default_factory=dict)

    def run(self, plan: Sequence[tuple[int, FeatureSet]], advance: Callable[[int], None]) -> list[tuple[float, float]]:
        """Return for each pair whether the class is decided (0 or 1) and its log-odds."""
        import torch

        from partlens_papers.removal.removal import scores_without

        missing = sorted({pair for pair in plan if pair not in self.known})
        for start in range(0, len(missing), self.batch_size):
            part = missing[start : start + self.batch_size]
            rows = torch.tensor([self.places[photo] for photo, _ in part])
            batch = self.performer.preprocessing.of_bytes(self.pictures[rows])
            scores = scores_without(self.performer, batch, masks_of([features for _, features in part], self.index))
            target = torch.tensor([self.targets[photo] for photo, _ in part])
            for pair, right, odds in zip(part, *decided(scores.double().cpu(), target), strict=True):
                self.known[pair] = (float(right), float(odds))
            advance(len(part))
        return [self.known[pair] for pair in plan]


def decided(scores: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return whether each target has the highest score (1 or 0) and its log-odds ``log p/(1 - p)`` in nats.

    Example:
        >>> import torch
        >>> right, odds = decided(torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([2]))
        >>> right.item(), round(odds.item(), 4)
        (1.0, 0.3069)
    """
    own = scores.gather(1, target[:, None])
    rest = scores.scatter(1, target[:, None], -math.inf).logsumexp(1)
    right = (scores.argmax(1) == target).to(scores.dtype)
    return right, (own[:, 0] - rest).clamp(-1e4, 1e4)


def _condition(out: Path, name: str, plan: Sequence[tuple[int, FeatureSet]], runner: _Runner) -> dict[str, list[float]]:
    """Measure one condition, or read it where it was measured before."""
    path = out / "conditions" / f"{name}.json"
    if path.exists():
        stored = read_json(path)
        for pair, right, odds in zip(plan, stored["right"], stored["log_odds"], strict=True):
            runner.known[pair] = (right, odds)
        return {"right": stored["right"], "log_odds": stored["log_odds"]}
    values = runner.run(plan, lambda _count: None)
    record = {"right": [right for right, _ in values], "log_odds": [odds for _, odds in values]}
    write_json(path, {"photos": [row for row, _ in plan], "removed": [len(s) for _, s in plan], **record})
    return record


# The experiment


def feature_removal(
    model: str | nn.Module | Performer,
    data: str | Path | ImageSet,
    out: str | Path,
    *,
    config: RemovalConfig | Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure what a class loses without its relevant features, and without others.

    Interrupted, it goes on with the next condition; finished, it returns what is in ``out``.

    Args:
        model: the performer; see :func:`partlens.layers`. It is not changed.
        data: a folder, a table or an :class:`~partlens.data.images.ImageSet`, whose categories are outputs of the
            performer (unless ``labels`` are the predictions).
        out: folder for ``removal.json`` and ``conditions/``.
        config: how, or fields to change.
        progress: how to show progress; silent by default.

    Returns:
        The content of ``removal.json``::

            schema, status, identity, versions, command, performer, data, config, seconds
            protocol          "split" or "two-fold"
            classes           [{name, output, photos, features: [per side], accuracy, accuracy_without}]
            counts            {classes, tested_photos, fit_photos: [per side], features, layers: {layer: relevant}}
            readout           {accuracy: Estimate, chance}: of the μ-lasso's linear read-out on tested photos
            intact            {accuracy, probability, log_odds: Estimate}
            conditions        {name: {features: mean number removed, accuracy: Estimate (without the features),
                              drop: {accuracy, probability, log_odds: Estimate}}}; names: ours, random, activation,
                              gradient, others (features of another class), ours-top-3, random-top-3, ...
            random_seeds      {seed: drop in accuracy, Estimate}
            against           {baseline: {measure: {difference, ratio: Estimate}}} of the drop of ours
            dominance         {measure: {share: Estimate, null}}: classes hurt more by the removal of their own features
                              than every other class measured
            matrix            class names and, where every class was removed from every class, the mean drop per measure
                              as [removed][tested]; null elsewhere

        Drops are intact minus without: accuracy and probability as shares of 1, log-odds in nats. All are means over
        classes with a 95 % bootstrap interval over photos.

    Raises:
        ImageError: too few photos or classes.
        InputError: categories that are no outputs of the performer.
        RunError: ``out`` holds another experiment.
        NotConvergedError: the μ-lasso did not reach its tolerance.
    """
    started = time.monotonic()
    show = progress or Progress.silent()
    how = settings_of(RemovalConfig, config)
    out = Path(out)
    performer = loaded(model)
    images, dropped = open_photos(data)
    identity = content_hash(
        {
            "performer": performer.weights_sha256,
            "preprocessing": performer.preprocessing.to_dict(),
            "data": images.fingerprint(),
            "config": dict(how),
        }
    )
    earlier = _earlier(out, identity)
    if earlier is not None and earlier["status"] == "finished":
        show.say(f"{out} holds this experiment already; nothing to do")
        return earlier
    manifest: dict[str, Any] = {
        "schema": SCHEMA,
        "status": "running",
        "identity": identity,
        "versions": versions(),
        "command": command(),
        "performer": plain(performer_info(performer)),
        "data": {"name": images.name, "fingerprint": images.fingerprint(), "unreadable": plain(dropped)},
        "config": dict(how),
        "seconds": 0.0 if earlier is None else earlier["seconds"],
    }
    write_json(out / RESULT, manifest)
    result = _measured(performer, images, how, out, show)
    if (out / "cache").exists():
        shutil.rmtree(out / "cache")
    manifest |= {"status": "finished", "seconds": round(manifest["seconds"] + time.monotonic() - started, 1), **result}
    write_json(out / RESULT, manifest)
    return read_json(out / RESULT)


def _earlier(out: Path, identity: str) -> dict[str, Any] | None:
    """Return what an earlier start of the same experiment left; weights of a network may lie in the folder."""
    if not out.exists() or all(path.suffix == ".safetensors" for path in out.iterdir()):
        return None
    if not (out / RESULT).exists():
        raise RunError(expected(f"a new folder at {out}", "a folder with other files", "Choose another --out"))
    found = read_json(out / RESULT)
    if found.get("identity") != identity:
        raise RunError(
            expected(
                f"a removal experiment of this model, data and configuration in {out}",
                "one of another configuration",
                "Choose another --out folder, or delete this one",
            )
        )
    return found


def _measured(performer: Performer, images: ImageSet, how: RemovalConfig, out: Path, show: Progress) -> dict[str, Any]:
    """Do the whole experiment; what is finished is in ``out`` and is not done again."""
    import numpy as np
    import torch

    from partlens.network.fitting import frames
    from partlens.selection.record import DescriptorConfig
    from partlens.selection.responses import stream_responses

    with show.task("reading all layers", len(images)) as advance:
        responses = stream_responses(
            performer,
            images,
            DescriptorConfig(**dict(how.descriptor)),
            out=out / "cache",
            progress=advance,
        )
    index = responses.index
    logits = torch.from_numpy(np.array(responses.logits))
    names, outputs, labels = _labelled(performer, images, logits, how)
    sides = divide(labels, images.splits, images.photos, how)
    classes = sides.classes
    tested = sorted({row for side in sides.sides for row in side.test})
    show.say(
        f"{performer.name} · {sides.protocol} · {len(classes)} classes, {len(tested)} photos tested, "
        f"{index.size} features in {len(index.layers)} layers"
    )
    x = torch.from_numpy(np.array(responses.descriptor))
    fits = [fitted(x, labels, classes, side, how, out, number) for number, side in enumerate(sides.sides)]
    read = readout(x, labels, sides, fits)
    del x
    found = found_features(performer, images, index, labels, outputs, sides, fits, how, out, show)
    plans = plans_of(sides, labels, index, found, how)
    runner = _Runner(
        performer,
        index,
        frames(images, tuple(tested), performer.preprocessing),
        {row: place for place, row in enumerate(tested)},
        {row: outputs[labels[row]] for row in tested},
        how.batch_size,
    )
    measured = {}
    with show.task("removing features", len(plans)) as advance:
        for number, (name, plan) in enumerate(plans.items()):
            measured[name] = _condition(out, name, plan, runner)
            advance(number + 1, name)
    return scored(
        sides, [names[c] for c in classes], [outputs[c] for c in classes], labels, index, fits, plans, measured, how
    ) | {"readout": read, "protocol": sides.protocol}


def _labelled(
    performer: Performer, images: ImageSet, logits: Tensor, how: RemovalConfig
) -> tuple[list[str], list[int], list[int]]:
    """Return class names, their outputs, and the class of each photo."""
    if how.labels == "predictions":
        outputs = sorted(set(logits.argmax(1).tolist()))
        known = performer.class_names
        names = [known[o] if known is not None else str(o) for o in outputs]
        return names, outputs, [outputs.index(int(o)) for o in logits.argmax(1)]
    names = sorted(set(images.categories))
    matched = performer.matched(names).outputs
    found = [matched[name] for name in names]
    lost = [name for name, output in zip(names, found, strict=True) if output is None]
    if lost:
        raise InputError(
            expected(
                f"categories that are outputs of {performer.name}",
                ", ".join(lost[:5]) or "none",
                "Name categories as the performer's classes or their numbers, or use labels predictions",
            )
        )
    return names, [int(o) for o in found if o is not None], [names.index(c) for c in images.categories]
