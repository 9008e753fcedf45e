"""Do the relevant features matter to the network? A class's accuracy without them, and without as many others.

The μ-lasso is fitted on some photos, features are removed while the network looks at others. Beside the relevant ones
stand as many features of the same layers (as many in each layer): drawn at random, those with the highest mean
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

import dataclasses
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partlens.experiments.removal_plan import (
    FeatureSet,
    RemovalConfig,
    Side,
    Sides,
    divide,
    masks_of,
    per_layer,
    random_features,
    ranked_features,
    ring_of,
)
from partlens.pipeline.runs import command, described, loaded, opened, spec, versions
from partlens.progress import Progress
from partlens.store import content_hash, read_json, read_tensors, write_json, write_tensors
from partlens.vocabulary import InputError, RunError, expected

if TYPE_CHECKING:
    from torch import Tensor, nn

    from partlens.artefacts.removal import ChannelEffects
    from partlens.data.images import ImageSet
    from partlens.metrics.estimate import Estimate
    from partlens.performer.zoo import Performer
    from partlens.selection.relevance import FeatureIndex

SCHEMA = "partlens.removal/1"
RESULT = "removal.json"
MEASURES = ("accuracy", "probability", "log_odds")

PUBLISHED = (
    # network, intact, ten random filters, relevant filters, features a class
    ("VGG-16, ImageNet val", 0.7159, 0.7139, 0.4871, 5.90),
    ("ResNet-50, ImageNet val, last block", 0.7613, 0.7608, 0.6974, 4.52),
)
"""Mean class accuracies computed from the files that the follow-up released (fitted on the images it tested)."""


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

        from partlens.artefacts.removal import scores_without

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


def _rankings(
    performer: Performer,
    images: ImageSet,
    index: FeatureIndex,
    layers: Sequence[str],
    wanted: Sequence[tuple[int, int, int]],  # photo, group (a side's class), output
    groups: int,
    batch_size: int,
    advance: Callable[[int], None],
) -> tuple[Tensor, Tensor]:
    """Average activation and absolute first-order effect over the photos of each group: ``[group, feature]``."""
    import torch

    from partlens.artefacts.removal import channel_effects

    activation = torch.zeros(groups, index.size)
    effect = torch.zeros(groups, index.size)
    count = torch.zeros(groups, 1)
    for start in range(0, len(wanted), batch_size):
        part = wanted[start : start + batch_size]
        batch = performer.preprocessing([images.read(photo) for photo, _, _ in part])
        group = torch.tensor([g for _, g, _ in part])
        found: ChannelEffects = channel_effects(performer, batch, layers, torch.tensor([o for _, _, o in part]))
        for layer in layers:
            first = index.feature(layer, 0)
            columns = slice(first, first + found.effect[layer].shape[1])
            activation[:, columns].index_add_(0, group, found.activation[layer])
            effect[:, columns].index_add_(0, group, found.effect[layer].abs())
        count.index_add_(0, group, torch.ones(len(part), 1))
        advance(len(part))
    return activation / count.clamp(min=1), effect / count.clamp(min=1)


# The experiment


@dataclass(frozen=True)
class _Found:
    """What one side's fit gave.

    ``ranked`` are the class's features by weight, ``effects`` the rows of activation and gradient rankings.
    """

    ranked: Mapping[int, FeatureSet]
    activation: Mapping[int, Tensor]
    gradient: Mapping[int, Tensor]


def feature_removal(
    model: str | nn.Module | Performer,
    data: str | Path | ImageSet,
    out: str | Path,
    *,
    config: RemovalConfig | Mapping[str, Any] | None = None,
    keep_cache: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure what a class loses without its relevant features, and without others.

    Interrupted, it goes on with the next condition; finished, it returns what stands in ``out``.

    Args:
        model: the performer; see :func:`partlens.layers`. It is not changed.
        data: a folder, a table or an :class:`~partlens.data.images.ImageSet`, whose categories are outputs of the
            performer (unless ``labels`` are the predictions).
        out: folder for ``removal.json`` and ``conditions/``.
        config: how, or fields to change.
        keep_cache: keep the descriptors of all photos.
        progress: how to show progress; silent when left out.

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
    how = config if isinstance(config, RemovalConfig) else RemovalConfig(**dict(config or {}))
    out = Path(out)
    performer = loaded(model)
    images, dropped = opened(data)
    identity = content_hash(
        {
            "performer": performer.weights_sha256,
            "preprocessing": performer.preprocessing.to_dict(),
            "data": images.fingerprint(),
            "config": how.to_dict(),
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
        "performer": described(performer, spec(model)),
        "data": {"name": images.name, "fingerprint": images.fingerprint(), "unreadable": dropped},
        "config": how.to_dict(),
        "seconds": 0.0 if earlier is None else earlier["seconds"],
    }
    write_json(out / RESULT, manifest)
    result = _measured(performer, images, how, out, show)
    if not keep_cache and (out / "cache").exists():
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
    """Do the whole experiment; what is finished stands in ``out`` and is not done again."""
    import numpy as np
    import torch

    from partlens.performer.fitting import frames
    from partlens.selection.relevance import DescriptorConfig, stream_responses

    with show.task("reading all layers", len(images)) as advance:
        responses = stream_responses(
            performer,
            images,
            DescriptorConfig(**dict(how.descriptor)),
            out=out / "cache",
            progress=lambda done, _: advance(done),
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
    fits = [_fitted(x, labels, classes, side, how, out, number) for number, side in enumerate(sides.sides)]
    read = _readout(x, labels, sides, fits)
    del x
    found = _found(performer, images, index, labels, outputs, sides, fits, how, out, show)
    plans = _plans(sides, labels, index, found, how)
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
    return _scored(
        sides, [names[c] for c in classes], [outputs[c] for c in classes], labels, index, fits, plans, measured, how
    ) | {"readout": read, "protocol": sides.protocol}


def _labelled(
    performer: Performer, images: ImageSet, logits: Tensor, how: RemovalConfig
) -> tuple[list[str], list[int], list[int]]:
    """Return class names, their outputs, and the class of each photo."""
    from partlens.selection.relevance import class_of_category

    if how.labels == "predictions":
        outputs = sorted(set(logits.argmax(1).tolist()))
        known = performer.class_names
        names = [known[o] if known is not None else str(o) for o in outputs]
        return names, outputs, [outputs.index(int(o)) for o in logits.argmax(1)]
    names = sorted(set(images.categories))
    found = [class_of_category(performer, name) for name in names]
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


# Fit


def _fitted(
    x: Tensor, labels: Sequence[int], classes: Sequence[int], side: Side, how: RemovalConfig, out: Path, number: int
) -> Tensor:
    """Solve the μ-lasso on the photos of one side: ``[feature, class]``."""
    import torch

    from partlens.selection.lasso import mu_lasso

    path = out / f"weights-{number}.safetensors"
    if path.exists():
        return read_tensors(path)["weights"]
    rows = torch.tensor(side.fit)
    own = torch.tensor([labels[row] for row in side.fit])
    if how.shuffled:
        own = own[torch.randperm(len(own), generator=torch.Generator().manual_seed(how.seed + number))]
    onehot = (own[:, None] == torch.tensor(classes)).double()
    weights = mu_lasso(x[rows], onehot, how.mu, nonnegative=how.nonnegative).weights
    write_tensors(path, {"weights": weights})
    return weights


def _readout(x: Tensor, labels: Sequence[int], sides: Sides, fits: Sequence[Tensor]) -> dict[str, Any]:
    """Measure how well the weights alone tell the class of tested photos."""
    import torch

    from partlens.metrics.estimate import proportion

    right = []
    for side, weights in zip(sides.sides, fits, strict=True):
        rows = torch.tensor(side.test)
        target = torch.tensor([sides.classes.index(labels[row]) for row in side.test])
        right.append((x[rows].double() @ weights).argmax(1) == target)
    return {"accuracy": proportion(torch.cat(right).double()).to_dict(), "chance": 1 / len(sides.classes)}


def _found(
    performer: Performer,
    images: ImageSet,
    index: FeatureIndex,
    labels: Sequence[int],
    outputs: Sequence[int],
    sides: Sides,
    fits: Sequence[Tensor],
    how: RemovalConfig,
    out: Path,
    show: Progress,
) -> list[_Found]:
    """Rank the features of each side: by weight, by activation, by gradient times activation."""
    classes = sides.classes
    ranked = []
    for weights in fits:
        by_class: dict[int, FeatureSet] = {}
        for column, label in enumerate(classes):
            order = weights[:, column].abs().argsort(descending=True, stable=True)
            by_class[label] = tuple(int(f) for f in order[: int((weights[:, column] != 0).sum())])
        ranked.append(by_class)
    used = {index.place(f)[0] for by_class in ranked for features in by_class.values() for f in features}
    layers = [layer for layer in index.layers if layer in used]
    wanted = []
    for number, side in enumerate(sides.sides):
        for place, label in enumerate(classes):
            own = [row for row in side.fit if labels[row] == label][: how.ranking_photos]
            wanted += [(row, number * len(classes) + place, outputs[label]) for row in own]
    path = out / "rankings.safetensors"
    if path.exists():
        tensors = read_tensors(path)
        activation, gradient = tensors["activation"], tensors["gradient"]
    else:
        with show.task("ranking by activation and gradient", len(wanted)) as advance:
            done = [0]

            def more(count: int) -> None:
                done[0] += count
                advance(done[0])

            # Gradients keep every layer's maps, so fewer images at a time.
            size = max(1, how.batch_size // 4)
            activation, gradient = _rankings(
                performer, images, index, layers, sorted(wanted), len(classes) * len(sides.sides), size, more
            )
        write_tensors(path, {"activation": activation, "gradient": gradient})
    return [
        _Found(
            by_class,
            {label: activation[number * len(classes) + place] for place, label in enumerate(classes)},
            {label: gradient[number * len(classes) + place] for place, label in enumerate(classes)},
        )
        for number, by_class in enumerate(ranked)
    ]


# Conditions


def _plans(
    sides: Sides, labels: Sequence[int], index: FeatureIndex, found: Sequence[_Found], how: RemovalConfig
) -> dict[str, list[tuple[int, FeatureSet]]]:
    """Say for each condition which features are removed from each tested photo."""
    import torch

    classes = sides.classes
    plans: dict[str, list[tuple[int, FeatureSet]]] = {}

    def planned(name: str, choose: Callable[[_Found, int, int], FeatureSet]) -> None:
        plan = []
        for number, (side, each) in enumerate(zip(sides.sides, found, strict=True)):
            sets = {label: choose(each, label, number) for label in classes}
            plan += [(row, sets[labels[row]]) for row in side.test]
        plans[name] = sorted(plan)

    def random_of(seed: int, most: int | None) -> Callable[[_Found, int, int], FeatureSet]:
        def choose(each: _Found, label: int, number: int) -> FeatureSet:
            # One stream per seed, side and class, so that the draws do not depend on which conditions are run.
            stream = (seed * len(sides.sides) + number) * 100_003 + label
            generator = torch.Generator().manual_seed(how.seed * 1_000_003 + stream)
            return random_features(per_layer(each.ranked[label][:most], index), index, generator)

        return choose

    def ranked_of(by: str, most: int | None) -> Callable[[_Found, int, int], FeatureSet]:
        def choose(each: _Found, label: int, _number: int) -> FeatureSet:
            if by == "ours":
                return tuple(sorted(each.ranked[label][:most]))
            values = each.activation[label] if by == "activation" else each.gradient[label]
            return ranked_features(per_layer(each.ranked[label][:most], index), index, values)

        return choose

    planned("intact", lambda _each, _label, _number: ())
    planned("ours", ranked_of("ours", None))
    for seed in how.random_seeds:
        planned(f"random-seed-{seed}", random_of(seed, None))
    planned("activation", ranked_of("activation", None))
    planned("gradient", ranked_of("gradient", None))
    for most in how.curve:
        for ranking in how.curve_rankings:
            by = random_of(how.random_seeds[0], most) if ranking == "random" else ranked_of(ranking, most)
            planned(f"{ranking}-top-{most}", by)
    shifts, ring = ring_of(len(classes), how)
    position = {classes[place]: at for at, place in enumerate(ring)}
    for shift in shifts:

        def another(each: _Found, label: int, _number: int, shift: int = shift) -> FeatureSet:
            other = classes[ring[(position[label] + shift) % len(ring)]]
            return tuple(sorted(each.ranked[other]))

        planned(f"other-{shift}", another)
    return plans


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


# Scores


def _scored(
    sides: Sides,
    names: Sequence[str],
    outputs: Sequence[int],
    labels: Sequence[int],
    index: FeatureIndex,
    fits: Sequence[Tensor],
    plans: Mapping[str, Sequence[tuple[int, FeatureSet]]],
    measured: Mapping[str, Mapping[str, list[float]]],
    how: RemovalConfig,
) -> dict[str, Any]:
    """Turn what was measured into estimates."""
    import torch

    from partlens.metrics.estimate import bootstrap

    order = [row for row, _ in plans["intact"]]
    place = {label: column for column, label in enumerate(sides.classes)}
    owner = torch.tensor([place[labels[row]] for row in order])
    count = len(sides.classes)

    def values(name: str) -> dict[str, Tensor]:
        odds = torch.tensor(measured[name]["log_odds"], dtype=torch.float64)
        right = torch.tensor(measured[name]["right"], dtype=torch.float64)
        return {"accuracy": right, "probability": odds.sigmoid(), "log_odds": odds}

    intact = values("intact")

    def drop(name: str) -> dict[str, Tensor]:
        return {measure: intact[measure] - without for measure, without in values(name).items()}

    def mean(each: Tensor, rows: Tensor) -> float:
        """Average over classes of the average over the photos of each."""
        photos = torch.bincount(owner[rows], minlength=count)
        sums = torch.bincount(owner[rows], each[rows], minlength=count)
        return float((sums / photos)[photos > 0].mean())

    def estimate(statistic: Callable[[Tensor], float]) -> Estimate:
        return bootstrap(statistic, len(order), generator=torch.Generator().manual_seed(how.seed), rounds=how.rounds)

    def scores(name: str, drops: Mapping[str, Tensor]) -> dict[str, Any]:
        accuracy = intact["accuracy"] - drops["accuracy"]
        return {
            "features": _removed(plans, name),
            "accuracy": estimate(partial(mean, accuracy)).to_dict(),
            "drop": {m: estimate(partial(mean, d)).to_dict() for m, d in drops.items()},
        }

    seeds = {seed: drop(f"random-seed-{seed}") for seed in how.random_seeds}
    others = [name for name in plans if name.startswith("other-")]
    drops = {name: drop(name) for name in plans if not name.startswith(("intact", "random-seed-", "other-"))}
    drops["random"] = _average(list(seeds.values()))
    drops["others"] = _average([drop(name) for name in others])
    conditions = {name: scores(name, each) for name, each in drops.items()}
    against = {
        baseline: {
            measure: {
                "difference": estimate(partial(mean, drops["ours"][measure] - drops[baseline][measure])).to_dict(),
                "ratio": _ratio(
                    partial(mean, drops["ours"][measure]), partial(mean, drops[baseline][measure]), estimate
                ),
            }
            for measure in MEASURES
        }
        for baseline in ("random", "activation", "gradient", "others")
    }
    shifts, ring = ring_of(count, how)
    matrix = _matrix(drops["ours"], [drop(f"other-{shift}") for shift in shifts], owner, shifts, ring)
    ours = values("ours")["accuracy"]
    layers: Counter[str] = Counter()
    for weights in fits:
        layers.update(index.place(int(f))[0] for f in weights.nonzero()[:, 0])
    records = []
    for column, name in enumerate(names):
        own = owner == column
        records.append(
            {
                "name": name,
                "output": outputs[column],
                "photos": int(own.sum()),
                "features": [int((weights[:, column] != 0).sum()) for weights in fits],
                "accuracy": float(intact["accuracy"][own].mean()),
                "accuracy_without": float(ours[own].mean()),
            }
        )
    return {
        "classes": records,
        "counts": {
            "classes": count,
            "tested_photos": len(order),
            "fit_photos": [len(side.fit) for side in sides.sides],
            "features": index.size,
            "layers": dict(layers.most_common()),
        },
        "intact": {m: estimate(partial(mean, v)).to_dict() for m, v in intact.items()},
        "conditions": conditions,
        "random_seeds": {
            str(seed): estimate(partial(mean, each["accuracy"])).to_dict() for seed, each in seeds.items()
        },
        "against": against,
        "dominance": {m: _dominance(matrix[m], len(shifts)) for m in MEASURES},
        "matrix": {
            "classes": list(names),
            "drop": {m: v.tolist() for m, v in matrix.items()} if len(shifts) == count - 1 else None,
        },
    }


def _average(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    import torch

    return {measure: torch.stack([part[measure] for part in parts]).mean(0) for measure in MEASURES}


def _removed(plans: Mapping[str, Sequence[tuple[int, FeatureSet]]], name: str) -> float:
    """Average the number of features removed from a photo."""
    same = {"random": "random-seed-", "others": "other-"}
    prefix = same.get(name)
    plan = [s for n, p in plans.items() if (n == name if prefix is None else n.startswith(prefix)) for _, s in p]
    return sum(map(len, plan)) / len(plan)


def _ratio(
    above: Callable[[Tensor], float], below: Callable[[Tensor], float], estimate: Callable[..., Estimate]
) -> dict[str, Any]:
    """Estimate a ratio of drops; undefined unless nearly every resampled baseline drop is above 0."""
    drawn = {"rounds": 0, "defined": 0}

    def statistic(rows: Tensor) -> float:
        bottom = below(rows)
        drawn["rounds"] += 1
        drawn["defined"] += bottom > 0
        return above(rows) / bottom if bottom > 0 else math.nan

    found = estimate(statistic)
    share = drawn["defined"] / drawn["rounds"]
    if share < 0.975:  # the interval would reach through infinity
        found = dataclasses.replace(found, interval=(math.nan, math.nan))
    return found.to_dict() | {"rounds_defined": share}


def _matrix(
    own: Mapping[str, Tensor],
    others: Sequence[Mapping[str, Tensor]],
    owner: Tensor,
    shifts: Sequence[int],
    ring: Sequence[int],
) -> dict[str, Tensor]:
    """Average the drops by removed and tested class: ``[removed, tested]``, ``nan`` where not measured."""
    import torch

    count = len(ring)
    at = torch.empty(count, dtype=torch.int64)
    at[torch.tensor(ring)] = torch.arange(count)
    photos = torch.bincount(owner, minlength=count)
    result = {}
    for measure in MEASURES:
        matrix = torch.full((count, count), torch.nan, dtype=torch.float64)
        for shift, drops in zip((0, *shifts), (own, *others), strict=True):
            mean = torch.bincount(owner, drops[measure], minlength=count) / photos
            tested = torch.arange(count)
            matrix[torch.tensor(ring)[(at + shift) % count], tested] = mean
        result[measure] = matrix
    return result


def _dominance(matrix: Tensor, others: int) -> dict[str, Any]:
    """Return the share of removals that hurt their own class more than each other class measured."""
    from partlens.metrics.estimate import proportion

    own = matrix.diagonal()
    rest = matrix.clone()
    rest.fill_diagonal_(-math.inf)
    most = rest.nan_to_num(nan=-math.inf).amax(1)
    share = dataclasses.replace(proportion((own > most).double()), unit="classes")
    return {"share": share.to_dict(), "null": 1 / (1 + others)}


# Table


def table(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return Markdown lines: accuracy intact and without features, beside the published figures.

    Args:
        results: what `feature_removal` returned, one row each.

    Returns:
        Lines of a table; intervals are 95 %.
    """
    lines = [
        "| network, data | classes, photos | intact | relevant | random | activation | gradient | features a class |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        cells = [
            f"{result['performer']['name']}, {result['data']['name']}"
            + (" (shuffled labels)" if result["config"]["shuffled"] else ""),
            f"{result['counts']['classes']}, {result['counts']['tested_photos']}",
            shown(result["intact"]["accuracy"]),
        ]
        cells += [shown(result["conditions"][n]["accuracy"]) for n in ("ours", "random", "activation", "gradient")]
        lines.append(f"| {' | '.join(cells)} | {result['conditions']['ours']['features']:.1f} |")
    for name, intact, random, ours, features in PUBLISHED:
        lines.append(
            f"| {name} (published) | 1000, 50000 | {intact:.3f} | {ours:.3f} | {random:.3f} | – | – | {features} |"
        )
    return lines


def curve_table(result: Mapping[str, Any], measure: str = "accuracy") -> list[str]:
    """Return Markdown lines: the drop when only the features with the largest weights are removed.

    Args:
        result: what `feature_removal` returned.
        measure: one of :data:`MEASURES`.
    """
    rankings = result["config"]["curve_rankings"]
    lines = [f"| removed | {' | '.join(rankings)} |", "|---" * (len(rankings) + 1) + "|"]
    for most in result["config"]["curve"]:
        cells = [shown(result["conditions"][f"{ranking}-top-{most}"]["drop"][measure]) for ranking in rankings]
        lines.append(f"| top {most} | {' | '.join(cells)} |")
    cells = [shown(result["conditions"][ranking]["drop"][measure]) for ranking in rankings]
    lines.append(f"| all relevant ({result['conditions']['ours']['features']:.1f}) | {' | '.join(cells)} |")
    return lines


def shown(estimate: Mapping[str, Any], digits: int = 3) -> str:
    """Write an estimate as ``0.487 [0.470, 0.505]``; a dash where it is undefined.

    Example:
        >>> shown({"value": 0.5, "interval": [0.25, 0.75], "n": 4, "unit": "photos"}, 2)
        '0.50 [0.25, 0.75]'
    """
    if estimate["value"] is None:
        return "–"
    low, high = estimate["interval"]
    ends = "" if low is None or high is None else f" [{low:.{digits}f}, {high:.{digits}f}]"
    return f"{estimate['value']:.{digits}f}{ends}"
