"""What is removed from which photo: the sides of a removal experiment, feature sets, and the conditions made of them.

See :mod:`partlens_papers.removal.feature_removal`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from partlens.errors import ImageError, expected
from partlens.records import Settings

if TYPE_CHECKING:
    from torch import Tensor

    from partlens.selection.record import FeatureIndex

ALL_OTHERS_UP_TO = 12
SOME_OTHERS = 3
_FEW_PHOTOS = 10

FeatureSet = tuple[int, ...]
Count = Annotated[int, Field(ge=1)]


class RemovalConfig(Settings):
    """How removal is measured.

    Attributes:
        mu: bound of the μ-lasso.
        nonnegative: weights are at least 0.
        labels: ``data``: the photos' categories; ``predictions``: the performer's decisions on the intact photos, so
            that "accuracy" is the share of decisions that are kept.
        descriptor: fields of :class:`~partlens.selection.record.DescriptorConfig`.
        protocol: see the module's text; ``auto`` takes ``split`` where each tested class has at least 10 photos in
            ``train``.
        shuffled: fit on shuffled labels, the null of the whole procedure.
        curve: remove only that many features of a class, those with the largest weights.
        curve_rankings: which of ``ours``, ``random``, ``activation``, ``gradient`` are measured along the curve.
        random_seeds: one random draw of features each, at least 3 for an interval worth the name.
        others: other classes whose features are removed from each photo; all of them up to 12 classes, else 3.
        classes: most classes that are tested, drawn at random; all when ``None``.
        photos_per_class: most photos of each class that are tested.
        ranking_photos: most photos of each class that activation and gradient are averaged over.
        batch_size: images at a time.
        rounds: of the bootstrap.
        seed: of every draw that has no seed of its own.
    """

    mu: float = 10.0
    nonnegative: bool = True
    labels: Literal["data", "predictions"] = "data"
    descriptor: dict[str, Any] = Field(default_factory=dict)
    protocol: Literal["auto", "split", "two-fold"] = "auto"
    shuffled: bool = False
    curve: tuple[Count, ...] = (1, 2, 3, 5, 10)
    curve_rankings: tuple[Literal["ours", "random", "activation", "gradient"], ...] = ("ours", "random")
    random_seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0, 1, 2)
    others: Count | None = None
    classes: Count | None = None
    photos_per_class: Count | None = None
    ranking_photos: Count = 20
    batch_size: Count = 16
    rounds: Count = 1000
    seed: int = 0


# Which photos are fitted and which are tested


@dataclass(frozen=True)
class Side:
    """Photos that features are found on, and others on which they are removed.

    Attributes:
        fit: positions of the photos of the fit.
        test: positions of the tested photos.
    """

    fit: tuple[int, ...]
    test: tuple[int, ...]


@dataclass(frozen=True)
class Sides:
    """A protocol applied to a data set.

    Attributes:
        protocol: ``split`` or ``two-fold``.
        classes: the tested classes.
        sides: one, or two that mirror each other.
    """

    protocol: str
    classes: tuple[int, ...]
    sides: tuple[Side, ...]


def divide(labels: Sequence[int], splits: Sequence[str], photos: Sequence[str], config: RemovalConfig) -> Sides:
    """Divide photos into those of the fit and those that are tested.

    Args:
        labels: class of each photo.
        splits: its split.
        photos: its group; a group is never divided.
        config: protocol, limits and seed.

    Returns:
        Each tested class has a photo on both sides of each pair; photos of other classes take part in the fit.

    Raises:
        ImageError: fewer than two classes can be tested.
    """
    import torch

    generator = torch.Generator().manual_seed(config.seed)
    by_class: dict[int, list[int]] = {}
    for row, label in enumerate(labels):
        by_class.setdefault(label, []).append(row)
    train = Counter(label for label, split in zip(labels, splits, strict=True) if split == "train")
    tested = {label for label, split in zip(labels, splits, strict=True) if split == "test"}
    enough = bool(tested) and all(train[label] >= _FEW_PHOTOS for label in tested)
    protocol = config.protocol if config.protocol != "auto" else ("split" if enough else "two-fold")
    fold: list[int] = [0] * len(labels)
    if protocol == "split":
        fold = [1 if split == "test" else (0 if split == "train" else -1) for split in splits]
    else:
        side_of: dict[str, int] = {}
        for label in sorted(by_class):
            groups = list(dict.fromkeys(photos[row] for row in by_class[label]))
            start = int(torch.randint(2, (1,), generator=generator))
            for number, place in enumerate(torch.randperm(len(groups), generator=generator).tolist()):
                side_of.setdefault(groups[place], (start + number) % 2)
        fold = [side_of[photo] for photo in photos]
    both = [label for label, rows in sorted(by_class.items()) if {0, 1} <= {fold[row] for row in rows}]
    if config.classes is not None and len(both) > config.classes:
        drawn = torch.randperm(len(both), generator=generator)[: config.classes].tolist()
        both = sorted(both[place] for place in drawn)
    if len(both) < 2:
        raise ImageError(
            expected(
                "at least 2 classes with photos to fit on and others to test",
                len(both),
                "Add photos, or take another protocol",
            )
        )

    def tests(side: int) -> tuple[int, ...]:
        rows: list[int] = []
        for label in both:
            own = [row for row in by_class[label] if fold[row] == side]
            if config.photos_per_class is not None and len(own) > config.photos_per_class:
                order = torch.randperm(len(own), generator=generator)[: config.photos_per_class].tolist()
                own = sorted(own[place] for place in order)
            rows += own
        return tuple(sorted(rows))

    def fits(side: int) -> tuple[int, ...]:
        return tuple(row for row, own in enumerate(fold) if own == side)

    sides = [Side(fits(0), tests(1))]
    if protocol == "two-fold":
        sides.append(Side(fits(1), tests(0)))
    return Sides(protocol, tuple(both), tuple(sides))


# Which features


def per_layer(features: Sequence[int], index: FeatureIndex) -> dict[str, int]:
    """Count features by layer."""
    return dict(Counter(index.place(feature)[0] for feature in features))


def random_features(counts: Mapping[str, int], index: FeatureIndex, generator: Any) -> FeatureSet:
    """Draw features at random, as many in each layer as ``counts`` says, all of a layer equally likely."""
    import torch

    drawn: list[int] = []
    for layer, count in sorted(counts.items()):
        size = index.channels[list(index.layers).index(layer)]
        drawn += [index.feature(layer, int(k)) for k in torch.randperm(size, generator=generator)[:count]]
    return tuple(sorted(drawn))


def ranked_features(counts: Mapping[str, int], index: FeatureIndex, values: Tensor) -> FeatureSet:
    """Take the features with the highest values, as many in each layer as ``counts`` says; earlier ones win ties."""
    taken: list[int] = []
    for layer, count in sorted(counts.items()):
        size = index.channels[list(index.layers).index(layer)]
        start = index.feature(layer, 0)
        order = values[start : start + size].argsort(descending=True, stable=True)[:count]
        taken += [start + int(k) for k in order]
    return tuple(sorted(taken))


def masks_of(sets: Sequence[FeatureSet], index: FeatureIndex) -> dict[str, Tensor]:
    """Turn a set of features for each image into masks by layer, for `partlens_papers.removal.removal.removed`."""
    import torch

    masks: dict[str, Tensor] = {}
    for row, features in enumerate(sets):
        for feature in features:
            layer, channel = index.place(feature)
            if layer not in masks:
                size = index.channels[list(index.layers).index(layer)]
                masks[layer] = torch.zeros(len(sets), size, dtype=torch.bool)
            masks[layer][row, channel] = True
    return masks


def ring_of(count: int, how: RemovalConfig) -> tuple[list[int], list[int]]:
    """Put the classes in a random ring, and say how many places on each photo's other classes stand.

    A photo of the class at place ``i`` loses the features of the class at ``i + shift``. Random, because neighbours in
    a list of classes are often alike.
    """
    import torch

    generator = torch.Generator().manual_seed(how.seed)
    ring = torch.randperm(count, generator=generator).tolist()
    wanted = how.others if how.others is not None else (count if count <= ALL_OTHERS_UP_TO else SOME_OTHERS)
    if wanted >= count - 1:
        return list(range(1, count)), ring
    return sorted((1 + torch.randperm(count - 1, generator=generator)[:wanted]).tolist()), ring


# Conditions


@dataclass(frozen=True)
class Found:
    """What one side's fit gave.

    ``ranked`` are the class's features by weight, ``effects`` the rows of activation and gradient rankings.
    """

    ranked: Mapping[int, FeatureSet]
    activation: Mapping[int, Tensor]
    gradient: Mapping[int, Tensor]


def plans_of(
    sides: Sides, labels: Sequence[int], index: FeatureIndex, found: Sequence[Found], how: RemovalConfig
) -> dict[str, list[tuple[int, FeatureSet]]]:
    """Say for each condition which features are removed from each tested photo."""
    import torch

    classes = sides.classes
    plans: dict[str, list[tuple[int, FeatureSet]]] = {}

    def planned(name: str, choose: Callable[[Found, int, int], FeatureSet]) -> None:
        plan = []
        for number, (side, each) in enumerate(zip(sides.sides, found, strict=True)):
            sets = {label: choose(each, label, number) for label in classes}
            plan += [(row, sets[labels[row]]) for row in side.test]
        plans[name] = sorted(plan)

    def random_of(seed: int, most: int | None) -> Callable[[Found, int, int], FeatureSet]:
        def choose(each: Found, label: int, number: int) -> FeatureSet:
            # One stream per seed, side and class, so that the draws do not depend on which conditions are run.
            stream = (seed * len(sides.sides) + number) * 100_003 + label
            generator = torch.Generator().manual_seed(how.seed * 1_000_003 + stream)
            return random_features(per_layer(each.ranked[label][:most], index), index, generator)

        return choose

    def ranked_of(by: str, most: int | None) -> Callable[[Found, int, int], FeatureSet]:
        def choose(each: Found, label: int, _number: int) -> FeatureSet:
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

        def another(each: Found, label: int, _number: int, shift: int = shift) -> FeatureSet:
            other = classes[ring[(position[label] + shift) % len(ring)]]
            return tuple(sorted(each.ranked[other]))

        planned(f"other-{shift}", another)
    return plans
