"""The yardstick of unsupervised part discovery: do the places of K parts foretell landmarks that people marked?

*Landmark regression* (SCOPS, Hung et al., CVPR 2019; Huang & Li, CVPR 2020; Choudhury et al., NeurIPS 2021; PDiscoNet,
ICCV 2023; PDiscoFormer, ECCV 2024): a linear regression with intercept from the ``2 K`` coordinates of the parts to the
coordinates of a landmark, one a landmark, fitted on the training split's photos where it is visible; the error is the
distance on the test split, in percent of the sides of the object's box. A constant place foretells the mean landmark,
so parts that never move win nothing, unlike under location instability.

*Agreement of labels*: each visible landmark gets the nearest part as its label. Normalised mutual information and the
adjusted Rand index compare these labels with the landmarks' names (Choudhury et al., 2021; ours label by the nearest
place, theirs by segments). scikit-learn computes both.

Coordinates are (row, col) as shares of the box's sides.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from partlens.errors import InputError, expected
from partlens.estimate import Estimate, bootstrap

_LEAST_PHOTOS = 3


def _solved(design: Tensor, wanted: Tensor, ridge: float) -> Tensor:
    """Return weights of a (ridge) regression of centred numbers, from the smaller of both Gram matrices."""
    weights: Tensor
    if not ridge:
        weights = torch.linalg.lstsq(design, wanted, driver="gelsd").solution
        return weights
    wide = design.shape[1] > design.shape[0]
    gram = design @ design.T if wide else design.T @ design
    gram = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    weights = design.T @ torch.linalg.solve(gram, wanted) if wide else torch.linalg.solve(gram, design.T @ wanted)
    return weights


def landmark_errors(
    numbers: Float[Tensor, "photo number"],
    landmarks: Float[Tensor, "photo landmark 2"],
    train: Bool[Tensor, " photo"],
    *,
    ridge: float = 0.0,
) -> Float[Tensor, "test landmark"]:
    """Return how far each landmark of the test photos is from where the numbers foretell it.

    Args:
        numbers: what is known of every photo without labels, such as the coordinates of its parts.
        landmarks: (row, col) as shares of the box's sides; NaN where not visible.
        train: photos that the regressions are fitted on; the others are tested.
        ridge: penalty as a share of the mean diagonal of the Gram matrix; 0 is ordinary least squares.

    Returns:
        Distances in percent of the box's sides; NaN where the landmark is not visible, or is visible on fewer than
        three training photos.

    Example:
        >>> places = torch.rand(40, 2)
        >>> errors = landmark_errors(places, (0.2 + 0.5 * places)[:, None], torch.arange(40) < 20)
        >>> bool(errors.max() < 1e-3)
        True
    """
    if numbers.shape[0] != landmarks.shape[0]:
        raise InputError(
            expected(f"landmarks of {numbers.shape[0]} photos", landmarks.shape[0], "Choose the same ones")
        )
    visible = ~landmarks.isnan().any(-1)
    errors = torch.full(landmarks.shape[:2], math.nan, dtype=torch.float64)
    for landmark in range(landmarks.shape[1]):
        fit, tested = train & visible[:, landmark], ~train & visible[:, landmark]
        if int(fit.sum()) < _LEAST_PHOTOS:
            continue
        design, wanted = numbers[fit].double(), landmarks[fit, landmark].double()
        middle, mean = design.mean(0), wanted.mean(0)
        weights = _solved(design - middle, wanted - mean, ridge)
        foretold = (numbers[tested].double() - middle) @ weights + mean
        errors[tested, landmark] = 100 * (foretold - landmarks[tested, landmark]).norm(dim=-1)
    return errors[~train]


def landmark_error(
    numbers: Float[Tensor, "photo number"],
    landmarks: Float[Tensor, "photo landmark 2"],
    train: Bool[Tensor, " photo"],
    generator: torch.Generator,
    *,
    ridge: float = 0.0,
) -> Estimate:
    """Return the mean of :func:`landmark_errors` over all visible landmarks, its interval over test photos."""
    errors = landmark_errors(numbers, landmarks, train, ridge=ridge)
    return bootstrap(lambda rows: float(errors[rows].nanmean()), len(errors), generator=generator, rounds=1000)


def nearest_parts(
    places: Float[Tensor, "photo part 2"], landmarks: Float[Tensor, "photo landmark 2"]
) -> tuple[Int[Tensor, " visible"], Int[Tensor, " visible"]]:
    """Return for every visible landmark the nearest part and which landmark it is."""
    visible = ~landmarks.isnan().any(-1)
    nearest = torch.cdist(landmarks.nan_to_num().double(), places.double()).argmin(-1)
    names = torch.arange(landmarks.shape[1]).expand(landmarks.shape[:2])
    return nearest[visible], names[visible]


def label_agreement(
    places: Float[Tensor, "photo part 2"], landmarks: Float[Tensor, "photo landmark 2"]
) -> dict[str, float]:
    """Return ``nmi`` and ``ari`` of the nearest parts and the landmarks' names; 0 where one part is nearest to all."""
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    parts, names = nearest_parts(places, landmarks)
    return {
        "nmi": float(normalized_mutual_info_score(names, parts)),
        "ari": float(adjusted_rand_score(names, parts)),
    }
