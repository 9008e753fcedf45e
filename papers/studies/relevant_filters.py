"""Which filters drive a class: recovery of planted ones by the μ-lasso and by what people use instead.

A network is planted: 5 layers of 512 filters with maps of 4x4 cells, correlated through 60 shared causes; the score of
each of 10 classes is a saturating function of the energies of 5 filters (one per layer), plus small weights of random
sign on all 2,560 filters, so that a gradient exists everywhere. Each of these 5 has 3 followers in other layers, which
answer where it answers, with noise of their own, and drive nothing: a network's convolution, rectifier, normalisation
and pooling follow each other like this. Labels are the network's own decisions on 1,000 images. Who recovers the 5
filters of each class?

    mu-lasso, mu 10               descriptors of the paper, non-negative, the authors' mu; returns a set
    mu-lasso, mu by folds         the same; per class the mu of 5 to 1,000 with the least squared error in 5 folds
    scikit-learn lasso path       the same descriptors, LassoCV (non-negative, 5 folds), a class at a time; a set
    gradient x activation         mean over the class's images of d score / d a * a, summed over cells; a ranking
    contribution difference       the same, minus its mean over the other images; a ranking
    mean energy difference        mean descriptor of the class minus that of the others; a ranking
    random                        a ranking; the null

The gradient looks inside the network, where the planted filters act on the score directly; it is what can be reached,
at the price of a backward pass per class. The others see only responses and decisions.

F1 of the set for those that return one; for all, F1 of the 5 best, which tells rankings how many there are. Mean and
95 % interval (Student's t) over seeds; CPU time of one seed, all classes.

    uv run python papers/studies/relevant_filters.py
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = "1"

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from partlens.selection.descriptors import normalised  # noqa: E402
from partlens.selection.lasso import mu_lasso  # noqa: E402
from partlens.selection.record import FeatureIndex  # noqa: E402

IMAGES, LAYERS, FILTERS, CELLS, CLASSES, PLANTED, FOLLOWERS, CAUSES, SEEDS, MU = (
    1000,
    5,
    512,
    16,
    10,
    5,
    3,
    60,
    5,
    10.0,
)
BOUNDS = (5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0)
INDEX = FeatureIndex(tuple(f"layer{i}" for i in range(LAYERS)), (FILTERS,) * LAYERS)
Score = Callable[[Tensor], Tensor]


def planted_network(seed: int) -> tuple[Tensor, Score, Tensor]:
    """Maps ``[image, filter, cell]``, the network's scores as a function of them, and the filters that drive them."""
    generator = torch.Generator().manual_seed(seed)
    filters = LAYERS * FILTERS
    causes = torch.rand(IMAGES, CAUSES, generator=generator).pow(6)
    mixing = torch.rand(CAUSES, filters, generator=generator) * (
        torch.rand(CAUSES, filters, generator=generator) < 0.08
    )
    drive = (causes @ mixing)[:, :, None]
    maps = (drive + 0.6 * torch.randn(IMAGES, filters, CELLS, generator=generator) - 0.4).clamp(min=0)
    maps *= torch.rand(filters, 1, generator=generator) + 0.3
    order = torch.randperm(FILTERS, generator=generator)[: CLASSES * PLANTED * (FOLLOWERS + 1)]
    order = order.reshape(CLASSES, PLANTED, FOLLOWERS + 1)
    truth = order[..., 0] + FILTERS * torch.arange(PLANTED)  # one in each layer
    shown = torch.randint(CLASSES, (IMAGES,), generator=generator)
    for j in range(CLASSES):  # an image shows something to which most of these filters answer
        rows = (shown == j).nonzero()[:, 0]
        answers = torch.rand(len(rows), PLANTED, 1, generator=generator) < 0.8
        strength = 0.5 + torch.rand(len(rows), PLANTED, 1, generator=generator)
        bump = torch.rand(len(rows), PLANTED, CELLS, generator=generator) * strength * answers
        maps[rows[:, None], truth[j]] += bump
    for follower in range(1, FOLLOWERS + 1):
        at = order[..., follower] + FILTERS * ((torch.arange(PLANTED) + follower) % LAYERS)
        noise = 0.5 + torch.rand(IMAGES, CLASSES, PLANTED, 1, generator=generator)
        maps[:, at] = 0.5 * maps[:, at] + maps[:, truth] * noise
    small = 0.004 * torch.randn(filters, CLASSES, generator=generator)
    weights = 0.5 + torch.rand(CLASSES, PLANTED, generator=generator)
    typical = maps.square().mean((0, 2))

    def scores(a: Tensor) -> Tensor:
        energy = a.square().mean(2)
        driven = torch.tanh(energy[:, truth] / (2 * typical[truth]))
        return (driven * weights).sum(2) + a.mean(2) @ small

    return maps, scores, truth


def best(ranking: np.ndarray) -> list[set[int]]:
    """The planted number of features, by ``[feature, class]``."""
    return [set(np.argsort(-ranking[:, j], kind="stable")[:PLANTED].tolist()) for j in range(CLASSES)]


def f1(found: list[set[int]], truth: Tensor) -> float:
    wanted = [set(row.tolist()) for row in truth]
    return statistics.mean(2 * len(a & b) / (len(a) + len(b)) for a, b in zip(found, wanted, strict=True))


def contributions(maps: Tensor, scores: Score, batch: int = 100) -> Tensor:
    """Gradient times activation, summed over cells: ``[class, image, filter]``."""
    whole = torch.zeros(CLASSES, len(maps), maps.shape[1])
    for start in range(0, len(maps), batch):
        a = maps[start : start + batch].clone().requires_grad_(requires_grad=True)
        out = scores(a)
        for j in range(CLASSES):
            (gradient,) = torch.autograd.grad(out[:, j].sum(), a, retain_graph=j < CLASSES - 1)
            whole[j, start : start + batch] = (gradient * a.detach()).sum(2)
    return whole


def one_seed(seed: int) -> tuple[dict[str, dict[str, float]], int]:
    maps, scores, truth = planted_network(seed)
    decided = scores(maps).argmax(1)
    labels = torch.nn.functional.one_hot(decided, CLASSES).double()
    inside = labels / labels.sum(0).clamp(min=1)
    outside = (1 - labels) / (1 - labels).sum(0)
    found: dict[str, dict[str, float]] = {}

    def note(method: str, started: float, ranking: np.ndarray, *, is_set: bool) -> None:
        cpu = time.process_time() - started
        found[method] = {"f1_at_5": f1(best(ranking), truth), "cpu_s": cpu}
        if is_set:
            chosen = [set(np.flatnonzero(ranking[:, j]).tolist()) for j in range(CLASSES)]
            found[method] |= {"f1_of_set": f1(chosen, truth), "set_size": statistics.mean(map(len, chosen))}

    started = time.process_time()
    energies = maps.square().sum(2)
    x = normalised(energies, INDEX)[0]
    made = time.process_time() - started  # counts for every method that uses descriptors

    started = time.process_time() - made
    note("mu-lasso, mu 10", started, mu_lasso(x, labels, MU).weights.numpy(), is_set=True)

    started = time.process_time() - made
    errors = torch.zeros(len(BOUNDS), CLASSES, dtype=torch.float64)
    fold = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(seed)) % 5
    for number in range(5):
        inner, held = fold != number, fold == number
        for place, bound in enumerate(BOUNDS):
            told = x[held].double() @ mu_lasso(x[inner], labels[inner], bound, tolerance=1e-4).weights
            errors[place] += (told - labels[held]).square().sum(0)
    fits = torch.stack([mu_lasso(x, labels, bound).weights for bound in BOUNDS])
    chosen_mu = errors.argmin(0)
    note("mu-lasso, mu by folds", started, fits[chosen_mu, :, torch.arange(CLASSES)].T.numpy(), is_set=True)
    found["mu-lasso, mu by folds"]["median_mu"] = statistics.median(BOUNDS[i] for i in chosen_mu.tolist())

    from sklearn.linear_model import LassoCV

    started = time.process_time() - made
    weights = np.zeros((INDEX.size, CLASSES))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not converged at the end of the path: it chooses elsewhere
        for j in range(CLASSES):
            model = LassoCV(alphas=50, fit_intercept=False, positive=True, cv=5)
            weights[:, j] = model.fit(x.double().numpy(), labels[:, j].numpy()).coef_
    note("scikit-learn lasso path", started, weights, is_set=True)

    started = time.process_time()
    spent = contributions(maps, scores).double()
    mean_inside = torch.einsum("cif,ic->fc", spent, inside)
    note("gradient x activation", started, mean_inside.numpy(), is_set=False)
    difference = mean_inside - torch.einsum("cif,ic->fc", spent, outside)
    note("contribution difference", started, difference.numpy(), is_set=False)

    started = time.process_time() - made
    note("mean energy difference", started, (x.double().T @ (inside - outside)).numpy(), is_set=False)
    started = time.process_time()
    note("random", started, np.random.default_rng(seed).random((INDEX.size, CLASSES)), is_set=False)
    return found, int(labels.sum(0).min())


def interval(values: list[float]) -> dict[str, float]:
    half = 2.776 * statistics.stdev(values) / len(values) ** 0.5 if len(set(values)) > 1 else 0.0  # t of 4 degrees
    mean = statistics.mean(values)
    return {"mean": round(mean, 4), "low": round(mean - half, 4), "high": round(mean + half, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    out = parser.parse_args().out
    torch.set_num_threads(1)
    one_seed(99)  # imports and first calls
    runs, smallest = zip(*(one_seed(seed) for seed in range(SEEDS)), strict=True)
    table = {
        method: {measure: interval([run[method][measure] for run in runs]) for measure in runs[0][method]}
        for method in runs[0]
    }
    result = {
        "images": IMAGES,
        "layers": LAYERS,
        "filters_per_layer": FILTERS,
        "classes": CLASSES,
        "planted_per_class": PLANTED,
        "followers_per_planted": FOLLOWERS,
        "mu": MU,
        "seeds": SEEDS,
        "fewest_images_of_a_class": min(smallest),
        "threads": 1,
        "versions": {p: importlib.metadata.version(p) for p in ("numpy", "torch", "scikit-learn")},
        "methods": table,
    }
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
