"""What the sanity checks compare: a model with photos, classes and fitted weights, and its maps.

See :mod:`partlens_papers.sanity.checks`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field

from partlens.errors import InputError, expected
from partlens.records import Settings
from partlens_papers.removal.plan import Count, RemovalConfig, divide

if TYPE_CHECKING:
    from torch import Tensor

    from partlens.attribution.explanation import Explanations
    from partlens.attribution.record import ExplanationConfig
    from partlens.data.images import ImageSet
    from partlens.estimate import Estimate
    from partlens.network.performer import Performer
    from partlens.selection.record import DescriptorConfig, FeatureIndex


class SanityConfig(Settings):
    """How much is measured.

    Attributes:
        mu: bound of the μ-lasso (authors: 10; 5 for their generated flowers).
        descriptor: fields of :class:`~partlens.selection.record.DescriptorConfig`.
        explanation: fields of :class:`~partlens.attribution.record.ExplanationConfig`; the authors' by default.
        classes: most classes, those with the most photos first; all when ``None``.
        fit_photos: most photos of each class that the μ-lasso is fitted on.
        photos: most photos that are explained.
        steps: most steps of the randomisation, spread over the layers; every layer when ``None``.
        images_per_class: generated flowers of each class, where flowers are used.
        epochs: of the networks trained here.
        removal_photos: most photos of each class that are tested without features.
        batch_size: images explained at a time.
        rounds: of the bootstrap.
        seed: of every draw.
    """

    mu: float = 10.0
    descriptor: dict[str, Any] = Field(default_factory=dict)
    explanation: dict[str, Any] = Field(default_factory=dict)
    classes: Count | None = None
    fit_photos: Count = 100
    photos: Count = 48
    steps: Count | None = None
    images_per_class: Count = 300
    epochs: Count = 12
    removal_photos: Count = 50
    batch_size: Count = 8
    rounds: Count = 1000
    seed: int = 0


def mean_of(values: Tensor, config: SanityConfig) -> dict[str, Any]:
    """Return mean and bootstrap interval over photos; undefined values are counted and excluded."""
    import torch

    from partlens.estimate import Estimate, bootstrap

    defined = values[~values.isnan()].double()
    if not len(defined):
        return Estimate.undefined().to_dict() | {"undefined": len(values)}
    found: Estimate = bootstrap(
        lambda rows: float(defined[rows].mean()),
        len(defined),
        generator=torch.Generator().manual_seed(config.seed),
        rounds=config.rounds,
    )
    return found.to_dict() | {"undefined": len(values) - len(defined)}


# A model with photos, classes and fitted weights


@dataclass(frozen=True, eq=False)
class Bench:
    """A model and photos to check it with.

    Attributes:
        performer: the network.
        images: the photos.
        fit: positions of the photos that features are found on.
        test: positions of the photos that are explained.
        labels: class of each photo, as a column of the weights; -1 for classes that take no part.
        classes: names.
        outputs: the performer's output of each class.
        config: how much.
    """

    performer: Performer
    images: ImageSet
    fit: tuple[int, ...]
    test: tuple[int, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]
    outputs: tuple[int, ...]
    config: SanityConfig

    @property
    def descriptor(self) -> DescriptorConfig:
        """How descriptors are made."""
        from partlens.selection.record import DescriptorConfig

        return DescriptorConfig(**dict(self.config.descriptor))

    @property
    def explanation(self) -> ExplanationConfig:
        """How predictions are explained."""
        from partlens.attribution.record import ExplanationConfig

        return ExplanationConfig(**dict(self.config.explanation))

    def truth(self, rows: Sequence[int]) -> Tensor:
        """Return the class of photos."""
        import torch

        return torch.tensor([self.labels[row] for row in rows])

    def batches(self) -> Sequence[tuple[slice, Tensor]]:
        """Return the explained photos, preprocessed, a few at a time."""
        size = self.config.batch_size
        return [
            (slice(s, s + size), self.performer.preprocessing([self.images.read(r) for r in self.test[s : s + size]]))
            for s in range(0, len(self.test), size)
        ]


def make_bench(performer: Performer, images: ImageSet, config: SanityConfig) -> Bench:
    """Choose classes and photos.

    Args:
        performer: the network.
        images: photos whose categories are its outputs.
        config: how many.

    Raises:
        ImageError: fewer than two classes with photos for both sides.
        InputError: categories that are no outputs.
    """
    import torch

    counts = images.category_counts()
    names = sorted(sorted(counts), key=lambda name: -counts[name])[: config.classes]
    names.sort()
    matched = performer.matched(names).outputs
    outputs = [matched[name] for name in names]
    if None in outputs:
        raise InputError(
            expected(
                f"categories that are outputs of {performer.name}",
                names[outputs.index(None)],
                "Name categories as the performer's classes or their numbers",
            )
        )
    rows = [row for row, category in enumerate(images.categories) if category in set(names)]
    labels = [names.index(images.categories[row]) for row in rows]
    settings = RemovalConfig(seed=config.seed)
    sides = divide(labels, [images.splits[r] for r in rows], [images.photos[r] for r in rows], settings)
    side = sides.sides[0]
    generator = torch.Generator().manual_seed(config.seed)
    fit: list[int] = []
    for label in sides.classes:
        own = [rows[place] for place in side.fit if labels[place] == label]
        fit += sorted(own[i] for i in torch.randperm(len(own), generator=generator)[: config.fit_photos].tolist())
    order = torch.randperm(len(side.test), generator=generator)[: config.photos].tolist()
    test = sorted(rows[side.test[place]] for place in order)
    known = {name: column for column, name in enumerate(names[label] for label in sides.classes)}
    return Bench(
        performer,
        images,
        tuple(sorted(fit)),
        tuple(test),
        tuple(known.get(category, -1) for category in images.categories),
        tuple(known),
        tuple(int(outputs[label] or 0) for label in sides.classes),
        config,
    )


@dataclass(frozen=True, eq=False)
class Fit:
    """Relevant features of a model.

    Attributes:
        weights: ``[feature, class]``.
        index: of the features.
        readout: accuracy of the linear read-out on the explained photos.
        accuracy: accuracy of the model on them, among all its outputs.
    """

    weights: Tensor
    index: FeatureIndex
    readout: Estimate
    accuracy: Estimate


def fit_bench(bench: Bench, performer: Performer | None = None, *, shuffled: bool = False) -> Fit:
    """Find the relevant features of a bench's classes.

    Args:
        bench: classes and photos.
        performer: another network than the bench's.
        shuffled: with the labels of the fit shuffled.
    """
    import numpy as np
    import torch

    from partlens.estimate import proportion
    from partlens.selection.lasso import mu_lasso
    from partlens.selection.responses import stream_responses

    network = performer or bench.performer
    found = stream_responses(network, bench.images.take([*bench.fit, *bench.test]), bench.descriptor)
    x = torch.from_numpy(np.array(found.descriptor))
    own = bench.truth(bench.fit)
    if shuffled:
        own = own[torch.randperm(len(own), generator=torch.Generator().manual_seed(bench.config.seed))]
    onehot = torch.nn.functional.one_hot(own, len(bench.classes)).double()
    weights = mu_lasso(x[: len(own)], onehot, bench.config.mu).weights
    truth = bench.truth(bench.test)
    decided = torch.from_numpy(np.array(found.logits[len(own) :])).argmax(1)
    return Fit(
        weights,
        found.index,
        proportion(((x[len(own) :].double() @ weights).argmax(1) == truth).double()),
        proportion((decided == torch.tensor(bench.outputs)[truth]).double()),
    )


# Its maps


def explained(bench: Bench, fit: Fit, classes: Tensor | None, performer: Performer | None = None) -> Explanations:
    """Explain all photos of a bench.

    Args:
        bench: classes and photos.
        fit: the relevant features.
        classes: ``[image, explained]`` columns; the model's two most likely classes of the bench when ``None``.
        performer: another network than the bench's.

    Returns:
        The explanations of all batches together.
    """
    import torch

    from partlens.attribution.explanation import Explanations, choose_top, explain_batch

    network = performer or bench.performer
    parts = [
        explain_batch(
            network,
            batch,
            fit.weights,
            fit.index,
            choose_top(bench.outputs, 2) if classes is None else classes[part],
            bench.explanation,
        )
        for part, batch in bench.batches()
    ]
    names = [each.name for each in dataclasses.fields(Explanations) if each.name != "notes"]
    joined: dict[str, Any] = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    return Explanations(**joined, notes=parts[0].notes)


def score_maps(bench: Bench, classes: Tensor, rule: str, performer: Performer | None = None) -> Tensor:
    """Return the plain map of each photo from the score of a class: ``[image, row, col]``.

    Args:
        bench: classes and photos.
        classes: column of each photo.
        rule: ``guided`` or ``gradient``.
        performer: another network than the bench's.
    """
    import torch

    from partlens.attribution.backprop import guided_backprop, heat_map

    targets = torch.tensor(bench.outputs)[classes]
    return torch.cat(
        [
            heat_map(guided_backprop(performer or bench.performer, batch, targets[part], rule=rule))  # type: ignore[arg-type]
            for part, batch in bench.batches()
        ]
    ).float()
