"""How much of the performer survives when the explainer's reconstruction is fed back to it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from partlens.errors import InputError, expected
from partlens.estimate import Estimate, bootstrap, proportion


class LostVariance:
    """What a reconstruction of one target loses, collected batch by batch, so that maps are never held together.

    ``1 - sum |x - x*|² / sum |x* - mean x*|²`` is kept of the target's variance (over photos, per element): 1 is
    perfect, 0 is what the constant mean map achieves. Between batches the mean is merged by Chan's formula, in float64.
    """

    def __init__(self) -> None:
        self.count, self.scatter = 0, 0.0
        self._mean: Tensor | None = None
        self._errors: list[Tensor] = []  # of each photo

    def add(self, reconstruction: Tensor, target: Tensor) -> None:
        """Take in one batch of equal shapes (image, ...)."""
        if reconstruction.shape != target.shape:
            rule, got = f"a reconstruction of shape {tuple(target.shape)}", str(tuple(reconstruction.shape))
            raise InputError(expected(rule, got, "Decode with the targets the explainer was trained for"))
        value, truth = (one.to(_double(one.device), torch.float64).flatten(1) for one in (reconstruction, target))
        self._errors.append((value - truth).square().sum(1).cpu())
        batch, mean = truth.shape[0], truth.mean(0)
        self.scatter += float((truth - mean).square().sum())
        if self._mean is None:
            self._mean = mean
        else:
            step = mean - self._mean
            self.scatter += float(step.square().sum()) * self.count * batch / (self.count + batch)
            self._mean = self._mean + step * batch / (self.count + batch)
        self.count += batch

    def kept(self, generator: torch.Generator, photos: Int[Tensor, " image"], rounds: int) -> Estimate:
        """Return the share of the target's variance that is kept, with a bootstrap over photos of what is lost.

        Undefined for fewer than two photos or a constant target.
        """
        if self.count < 2 or self.scatter <= 0:
            return Estimate.undefined()
        kept = 1 - torch.cat(self._errors) / (self.scatter / self.count)
        return bootstrap(lambda i: float(kept[i].mean()), len(kept), generator=generator, rounds=rounds, groups=photos)


def _double(device: torch.device) -> torch.device:
    """Return where float64 is at hand: Apple's GPUs have none."""
    return torch.device("cpu") if device.type == "mps" else device


def class_outputs(outputs: Float[Tensor, "image output"]) -> Float[Tensor, "image class"]:
    """Return outputs whose largest is the decision: a single logistic output gets a 0 for "not the category" before it.

    Example:
        >>> class_outputs(torch.tensor([[2.0], [-1.0]])).argmax(1).tolist()
        [1, 0]
    """
    return torch.cat([torch.zeros_like(outputs), outputs], 1) if outputs.shape[1] == 1 else outputs


def agreement_top1(
    fed_back: Float[Tensor, "image output"],
    performer: Float[Tensor, "photo class"],
    photos: Int[Tensor, " image"] | None = None,
) -> Estimate:
    """Return the share of photos whose strongest class stays the same, with Wilson's interval.

    Raises:
        InputError: outputs of different shapes, or a single output, whose strongest class is always the same.
    """
    if fed_back.shape != performer.shape:
        rule, got = f"outputs of shape {tuple(performer.shape)}", str(tuple(fed_back.shape))
        raise InputError(expected(rule, got, "Use one set of photos"))
    if performer.shape[1] < 2:
        got = f"outputs of shape {tuple(performer.shape)}"
        raise InputError(expected("outputs of at least 2 classes", got, "Pass class_outputs(outputs)"))
    return proportion((fed_back.argmax(1) == performer.argmax(1)).double(), groups=photos)


def logistic_head(
    features: Float[Tensor, "train feature"], labels: Int[Tensor, " train"]
) -> Callable[[Float[Tensor, "image feature"]], Int[Tensor, " image"]]:
    """Fit what tells a category from others by the performer's features, the paper's classifier.

    Features are standardised, L2 has scikit-learn's default strength, and classes weigh equally. (ICLR 2020 submission,
    Tables 5 and 10: category against background.)

    Returns:
        A function from features to labels.

    Raises:
        InputError: the photos are of one label alone.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    found = labels.unique().tolist()
    if found != list(range(max(2, len(found)))):
        rule = "category and background, or several categories, among the training photos"
        raise InputError(expected(rule, f"labels {found}", "Add photos of other categories"))
    head = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000, class_weight="balanced"))
    head.fit(features.double().numpy(), labels.numpy())
    return lambda given: torch.from_numpy(head.predict(given.double().numpy()))


def decision_errors(
    performer: Int[Tensor, " image"],
    explainer: Int[Tensor, " image"],
    labels: Int[Tensor, " image"],
    *,
    photos: Int[Tensor, " image"] | None = None,
    generator: torch.Generator,
    rounds: int = 1000,
) -> dict[str, Estimate]:
    """Compare decisions on the performer's own features and on the reconstruction with the truth.

    Returns:
        ``performer_error_percent`` on the performer's own features, ``explainer_error_percent`` on what replaces
        them, and ``error_increase_points``, the difference in percentage points with a paired bootstrap over photos.

    Example:
        >>> truth = torch.tensor([0, 1, 1, 0])
        >>> decision_errors(truth, 1 - truth, truth, generator=torch.Generator())["error_increase_points"].value
        100.0
    """
    wrong = [(x != labels).double() for x in (performer, explainer)]
    increase = bootstrap(
        lambda i: 100 * float((wrong[1][i] - wrong[0][i]).mean()),
        len(labels),
        generator=generator,
        rounds=rounds,
        groups=photos,
    )
    own, fed = (proportion(w, groups=photos).scaled(100) for w in wrong)
    return {"performer_error_percent": own, "explainer_error_percent": fed, "error_increase_points": increase}
