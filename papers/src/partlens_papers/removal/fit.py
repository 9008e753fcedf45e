"""What the photos of the fit say in a removal experiment: weights, their read-out, and rankings of features.

See :mod:`partlens_papers.removal.feature_removal`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partlens.progress import Progress
from partlens.records import read_tensors, write_tensors
from partlens_papers.removal.plan import FeatureSet, Found, RemovalConfig, Side, Sides

if TYPE_CHECKING:
    from torch import Tensor

    from partlens.data.images import ImageSet
    from partlens.network.performer import Performer
    from partlens.selection.record import FeatureIndex
    from partlens_papers.removal.removal import ChannelEffects


def fitted(
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


def readout(x: Tensor, labels: Sequence[int], sides: Sides, fits: Sequence[Tensor]) -> dict[str, Any]:
    """Measure how well the weights alone tell the class of tested photos."""
    import torch

    from partlens.estimate import proportion

    right = []
    for side, weights in zip(sides.sides, fits, strict=True):
        rows = torch.tensor(side.test)
        target = torch.tensor([sides.classes.index(labels[row]) for row in side.test])
        right.append((x[rows].double() @ weights).argmax(1) == target)
    return {"accuracy": proportion(torch.cat(right).double()).to_dict(), "chance": 1 / len(sides.classes)}


def found_features(
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
) -> list[Found]:
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
        Found(
            by_class,
            {label: activation[number * len(classes) + place] for place, label in enumerate(classes)},
            {label: gradient[number * len(classes) + place] for place, label in enumerate(classes)},
        )
        for number, by_class in enumerate(ranked)
    ]


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

    from partlens_papers.removal.removal import channel_effects

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
