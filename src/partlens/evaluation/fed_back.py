"""What the performer says of its own features and of the reconstruction, and the errors of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from partlens.metrics.faithfulness import HeadErrors, decision_errors
from partlens.network.zoo import Performer


@dataclass(frozen=True)
class FedBack:
    """Outputs and features of photos, the performer's own and from the reconstruction.

    Attributes:
        outputs: the performer's outputs (image, class).
        fed_outputs: its outputs when the reconstruction is fed back.
        features: the last target, averaged over cells (image, filter).
        fed_features: the same of the reconstruction.
    """

    outputs: Tensor
    fed_outputs: Tensor
    features: Tensor
    fed_features: Tensor


def class_outputs(outputs: Float[Tensor, "image output"]) -> Float[Tensor, "image class"]:
    """Return outputs whose largest is the decision: a single logistic output gets a 0 for "not the category" before it.

    Example:
        >>> class_outputs(torch.tensor([[2.0], [-1.0]])).argmax(1).tolist()
        [1, 0]
    """
    return torch.cat([torch.zeros_like(outputs), outputs], 1) if outputs.shape[1] == 1 else outputs


def own_columns(performer: Performer, names: Sequence[str]) -> tuple[int, ...] | None:
    """Return the column of :func:`class_outputs` of each category; ``None`` where the performer does not know one."""
    known = performer.class_names
    if known is None or not names or any(name not in known for name in names):
        return None
    return tuple(known.index(name) + (1 if len(known) == 1 else 0) for name in names)


def own_errors(
    performer: Performer,
    names: Sequence[str],
    held: FedBack,
    others: FedBack | None,
    labels: Tensor,
    photos: Tensor,
    seed: torch.Generator,
) -> HeadErrors | None:
    """Return errors by the performer's own outputs, where these are the categories; ``None`` where they are not.

    Args:
        performer: whose outputs they are.
        names: of the categories.
        held: held-out photos of the categories.
        others: held-out photos of other categories, or nothing.
        labels: of ``held``, an index into ``names``.
        photos: an integer per row of ``held`` and, for a single category, of ``others`` behind it; equal for crops of
            one photo.
        seed: draws of the bootstrap.
    """
    columns = own_columns(performer, names)
    if columns is None:
        return None
    own, fed, truth = held.outputs.argmax(1), held.fed_outputs.argmax(1), torch.tensor(columns)[labels]
    if len(names) == 1 and others is not None:
        # Category against everything else: the other outputs are one class.
        own = (torch.cat([own, others.outputs.argmax(1)]) == columns[0]).long()
        fed = (torch.cat([fed, others.fed_outputs.argmax(1)]) == columns[0]).long()
        truth = torch.cat([torch.ones(len(labels)), torch.zeros(len(others.outputs))]).long()
    return decision_errors(own, fed, truth, photos=photos[: len(truth)], generator=seed)
