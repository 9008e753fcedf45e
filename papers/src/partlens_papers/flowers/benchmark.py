"""The flower benchmark: train a network on generated flowers, then ask every method which pixels decided.

The evaluation of Oramas et al. (ICLR 2019) on a stand-in for its set an8Flower: heat maps are thresholded and compared
with the known region by intersection over union; the area under the curve over thresholds is averaged over five folds.
For comparison: maps that know nothing of the network, and the same methods on a network with random weights.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from partlens.errors import InputError, RunError, expected
from partlens.network.fitting import SIDE_PX, flower_preprocessing
from partlens.progress import Progress
from partlens.records import Settings, content_hash, read_json, read_tensors, write_json, write_tensors
from partlens_papers.given import settings_of

if TYPE_CHECKING:
    from torch import Tensor

    from partlens.data.images import ImageSet
    from partlens.estimate import Estimate
    from partlens.network.performer import Performer
    from partlens_papers.flowers.baselines import Method
    from partlens_papers.flowers.sets import FlowerSet

SCHEMA = "partlens.flower-benchmark/1"
REFERENCE = "deconvnet + guided backprop"
# Mean and standard deviation of the area, as recalled of the paper's table (single-6c, double-12c); never seen again,
# so no gate, only something to compare ours with.
RECALLED = {
    "upsampled activation": ((16.8, 2.63), (16.1, 1.30)),
    "deconvnet + guided backprop": ((21.3, 0.77), (21.9, 0.72)),
    "grad-cam": ((17.5, 0.25), (14.8, 0.16)),
    "guided grad-cam": ((19.9, 0.61), (19.4, 0.34)),
    "grad-cam++": ((15.6, 0.57), (14.6, 0.12)),
    "guided grad-cam++": ((19.6, 0.65), (19.7, 0.27)),
    "ours": ((22.5, 0.82), (23.2, 0.60)),
}
_BATCH = 64
_ROUNDS = 1000
_ROUNDS_AT_ONCE = 100
_UNIT = "flowers"


class FlowersConfig(Settings):
    """The flowers and how much is measured on them.

    Attributes:
        set_name: which set.
        images_per_class: flowers of each class; a quarter of them is held out and measured.
        folds: how many of the five folds are measured.
        perturbed: flowers per fold whose pixels are inserted and deleted, by far the costliest score; 0 for none.
        epochs: of the training; 10 suffice for 1,000 flowers a class, fewer flowers need more.
        seed: of flowers, weights, order and every draw.
    """

    set_name: Literal["flowers-single-6c", "flowers-double-12c"] = "flowers-single-6c"
    images_per_class: int = Field(1000, ge=20)  # smaller sets leave folds empty
    folds: int = Field(5, ge=1, le=5)
    perturbed: int = Field(40, ge=0)
    epochs: int = Field(10, ge=1)
    seed: int = Field(0, ge=0)


def trained_flower_net(
    images: ImageSet, path: Path, *, epochs: int, seed: int, progress: Progress | None
) -> tuple[Performer, Estimate | None]:
    """Train the benchmark's network on a set and write it, or load it where the file is there.

    It is trained with batch normalisation, which is then melted into the convolutions, so that the network which is
    explained has convolutions, ReLU, max-pooling and fully connected layers only.

    Returns:
        The network, and its accuracy on the held-out flowers with a 95 % Wilson interval; ``None`` where it was loaded.
    """
    from partlens.estimate import proportion
    from partlens.network.fitting import save_classifier, train_classifier
    from partlens.network.zoo import load_performer
    from partlens_papers.flowers.network import benchmark_network, without_norms

    spec = f"partlens_papers.performers:flower_net@{path}"
    if path.exists():
        return load_performer(spec), None
    fitted = train_classifier(
        lambda outputs: benchmark_network(outputs, normed=True),
        images,
        flower_preprocessing(),
        epochs=epochs,
        weight_decay=1e-2,
        channels_last=True,
        seed=seed,
        progress=progress,
    )
    network = without_norms(fitted.network)  # type: ignore[arg-type]  # built above
    save_classifier(path, network, flower_preprocessing(), fitted.class_names)
    return load_performer(spec), dataclasses.replace(proportion(fitted.right.float()), unit=_UNIT)


def train_network(out: Path, how: FlowersConfig, *, progress: Progress | None = None) -> Performer:
    """Train the benchmark's network on the flowers of the split ``train``, or load it where that was done before.

    Args:
        out: folder for ``network.safetensors``, which ``partlens_papers.performers:flower_net@FILE`` loads, and
            ``network.json``, its accuracy on the held-out flowers.
        how: the flowers.
        progress: how to show progress; silent by default.

    Raises:
        RunError: the folder holds a network of another recipe.
    """
    from partlens_papers.flowers.sets import flower_set

    recipe = {"set": how.set_name, "images_per_class": how.images_per_class, "seed": how.seed, "epochs": how.epochs}
    weights, notes = out / "network.safetensors", out / "network.json"
    if notes.is_file() and (found := read_json(notes)).get("recipe") != recipe:
        remedy = "Choose another --out folder"
        raise RunError(expected(f"the recipe {recipe} in {notes}", f"{found.get('recipe')}", remedy))
    if not notes.is_file():
        weights.unlink(missing_ok=True)
    images = flower_set(how.set_name, how.images_per_class, how.seed, SIDE_PX).images
    performer, accuracy = trained_flower_net(images, weights, epochs=how.epochs, seed=how.seed, progress=progress)
    if accuracy is not None:
        content = {"recipe": recipe, "accuracy": accuracy.to_dict(), "weights_sha256": performer.weights_sha256}
        write_json(notes, content)
        said = f"{how.set_name}: accuracy {accuracy.value:.1%} on {accuracy.n} held-out flowers"
        (progress or Progress.silent()).say(said)
    return performer


@dataclass(frozen=True, eq=False)
class _Fold:
    """The held-out flowers of one fold, ready to be measured."""

    images: Tensor
    classes: Tensor
    regions: Tensor
    parts: Tensor


def _load_fold(performer: Performer, flowers: FlowerSet, fold: int) -> _Fold:
    import torch

    from partlens.network.taps import forward_taps

    rows = flowers.rows("test", fold)
    images = performer.preprocessing([flowers.images.read(row) for row in rows])
    parts = torch.from_numpy(flowers.part_regions(rows))
    outputs = torch.cat([forward_taps(performer, part, [])[0] for part in images.split(_BATCH)])
    return _Fold(images, outputs.argmax(1), parts.any(1), parts)


def _measure(maps: Tensor, fold: _Fold, performer: Performer, perturbed: int, generator_seed: int) -> dict[str, Tensor]:
    """Return every score of every image of a fold."""
    import torch

    from partlens.network.borrowed import borrowed
    from partlens_papers.flowers.heat_maps import both_parts_covered, insertion_deletion, iou_per_image, part_recall
    from partlens_papers.flowers.heat_maps import pointing_game as pointing

    scores = {
        "iou": iou_per_image(maps, fold.regions),
        "recall": part_recall(maps, fold.parts),
        "covered": both_parts_covered(maps, fold.parts),
        "pointing": pointing(maps, fold.regions),
    }
    generator = torch.Generator().manual_seed(generator_seed)
    count = min(perturbed, len(maps))
    baseline = torch.zeros(1, *fold.images.shape[1:])  # the preprocessing's mean: a grey that is no class's colour
    pieces = []
    with borrowed(performer.module, copy_weights=False) as network:
        for start in range(0, count, _BATCH):
            part = slice(start, min(start + _BATCH, count))
            pieces.append(
                insertion_deletion(
                    network, fold.images[part], maps[part], fold.classes[part], baseline, generator=generator
                )
            )
    if pieces:
        scores["insertion"], scores["deletion"] = (torch.cat(values) for values in zip(*pieces, strict=True))
    return scores


def _mean(values: Tensor, seed: int) -> Estimate:
    """Return the mean of the defined values with a percentile bootstrap over flowers (all rounds in a few draws)."""
    import torch

    from partlens.estimate import Estimate

    defined = values[~values.isnan()]
    count = len(defined)
    if not count:
        return Estimate.undefined(_UNIT)
    generator = torch.Generator().manual_seed(seed)
    rounds = [
        defined[torch.randint(count, (part, count), generator=generator)].mean(1)
        for part in [_ROUNDS_AT_ONCE] * (_ROUNDS // _ROUNDS_AT_ONCE)
    ]
    ends = torch.quantile(torch.cat(rounds), torch.tensor([0.025, 0.975], dtype=values.dtype))
    return Estimate(float(defined.mean()), (float(ends[0]), float(ends[1])), count, _UNIT)


def _estimates(scores: Sequence[Mapping[str, Tensor]], parts: Sequence[str], seed: int) -> dict[str, Any]:
    """Join the folds' scores: mean with a bootstrap interval over flowers, and mean and deviation over folds."""
    import torch

    from partlens_papers.flowers.heat_maps import THRESHOLDS

    def joined(values: Sequence[Tensor]) -> dict[str, Any]:
        means = torch.stack([value.nanmean() for value in values])
        spread = float(means.std()) if len(means) > 1 else float("nan")
        return _mean(torch.cat(list(values)), seed).to_dict() | {
            "fold_means": means.tolist(),
            "fold_mean": float(means.mean()),
            "fold_sd": spread,
        }

    result: dict[str, Any] = {"iou_auc_percent": joined([100 * each["iou"].mean(1) for each in scores])}
    for index, part in enumerate(parts):
        result[f"recall_{part}"] = joined([each["recall"][:, index] for each in scores])
    if len(parts) > 1:
        result["both_parts_covered"] = joined([each["covered"] for each in scores])
    result["pointing"] = joined([each["pointing"] for each in scores])
    for name in ("insertion", "deletion"):
        if name in scores[0]:
            result[name] = joined([each[name] for each in scores])
    curve = torch.cat([each["iou"] for each in scores]).nanmean(0)
    result["iou_curve"] = dict(zip((f"{t:g}" for t in THRESHOLDS), curve.tolist(), strict=True))
    return result


def _difference(
    scores: Sequence[Mapping[str, Tensor]], others: Sequence[Mapping[str, Tensor]], seed: int
) -> dict[str, Any]:
    """Return a method's area minus the reference's, flower by flower."""
    import torch

    def area(each: Sequence[Mapping[str, Tensor]]) -> Tensor:
        return 100 * torch.cat([fold["iou"] for fold in each]).mean(1)

    return _mean(area(scores) - area(others), seed).to_dict()


def _nulls(seed: int) -> dict[str, Method]:
    """Return maps that know nothing of the network, as methods."""
    import torch

    from partlens_papers.flowers.heat_maps import centre_box_maps, edge_maps, random_maps

    def drawn(_: Performer, images: Tensor, __: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return random_maps(len(images), (images.shape[2], images.shape[3]), generator=generator)

    def box(_: Performer, images: Tensor, __: Tensor) -> Tensor:
        return centre_box_maps(len(images), (images.shape[2], images.shape[3]))

    def edges(_: Performer, images: Tensor, __: Tensor) -> Tensor:
        return edge_maps(images)

    return {"random": drawn, "centre box": box, "edges": edges}


def _file_name(method: str) -> str:
    plain = "".join(letter if letter.isalnum() else "-" for letter in method)
    return f"{plain}-{hashlib.sha256(method.encode()).hexdigest()[:6]}"


def flower_benchmark(
    out: str | Path,
    *,
    config: FlowersConfig | Mapping[str, Any] | None = None,
    methods: Mapping[str, Method] | None = None,
    ours: Callable[[Performer, FlowerSet], Mapping[str, Method]] | None = None,
    performer: Performer | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure heat maps of many methods on the held-out flowers of a set.

    Every method explains the class that the network predicts. What is finished is kept per method and fold under
    ``out/scores``, so that a call which was stopped goes on, and a call with another method measures only that one.
    A method is known by its name: give a changed method another name.

    Args:
        out: folder for the network, the scores and ``benchmark.json``.
        config: the set and how much is measured.
        methods: by name; by default :data:`partlens_papers.flowers.baselines.BASELINES`.
        ours: makes further methods for a network and a set (say, from features selected on its training flowers). It
            is called for the trained network and again for the one with random weights.
        performer: the network to explain, with one output per class in the order of ``FlowerSet.classes``; by default
            trained here by :func:`train_network`.
        progress: how to show progress; silent by default.

    Returns:
        What ``benchmark.json`` holds: the recipe; for each method under ``methods``, ``nulls`` and ``random_weights``
        the scores, each with value, 95 % bootstrap interval over flowers, n, and mean and standard deviation over
        folds as published; ``minus_reference``, the difference of the area to deconvnet + guided backprop's, flower by
        flower; and ``recalled``, the paper's table as remembered.

    Raises:
        InputError: a number out of range, methods of one name, or a network of another size.
        RunError: the folder belongs to another recipe.
    """
    from partlens_papers.flowers.baselines import BASELINES
    from partlens_papers.flowers.sets import flower_set

    how, out, show = settings_of(FlowersConfig, config), Path(out), progress or Progress.silent()
    flowers = flower_set(how.set_name, how.images_per_class, how.seed, SIDE_PX)
    if performer is None:
        performer = train_network(out, how, progress=show)
    if performer.preprocessing.size_px != (SIDE_PX, SIDE_PX):
        rule, got = f"a network for {SIDE_PX} px", f"{performer.preprocessing.size_px}"
        raise InputError(expected(rule, got, "Use partlens_papers.performers:flower_net"))
    random_performer = _randomised(performer, how.seed)
    given = dict(BASELINES if methods is None else methods)
    groups: dict[str, tuple[Performer, dict[str, Method]]] = {
        "nulls": (performer, _nulls(how.seed)),
        "methods": (performer, _joined(given, ours(performer, flowers) if ours else {})),
        "random_weights": (random_performer, _joined(given, ours(random_performer, flowers) if ours else {})),
    }
    scores = _measured(groups, performer, flowers, how, out / "scores", show)
    result = _result(scores, performer, flowers, how)
    notes = out / "network.json"
    if notes.is_file() and read_json(notes)["weights_sha256"] == performer.weights_sha256:
        result["network"]["accuracy"] = read_json(notes)["accuracy"]
    write_json(out / "benchmark.json", result)
    return result


Scores = dict[str, dict[str, list[dict[str, "Tensor"]]]]
"""Scores of every flower: group, method, fold, score."""


def _measured(
    groups: Mapping[str, tuple[Performer, Mapping[str, Method]]],
    performer: Performer,
    flowers: FlowerSet,
    how: FlowersConfig,
    folder: Path,
    show: Progress,
) -> Scores:
    """Measure every method on every fold, or read what was measured before."""
    common = {
        "flowers": flowers.images.fingerprint(),
        "seed": how.seed,
        "network": performer.weights_sha256,
        "perturbed": how.perturbed,
    }
    loaded: dict[int, _Fold] = {}
    scores: Scores = {group: {} for group in groups}
    # Fold by fold, so that only one fold's pictures are held at a time.
    jobs = [(group, m, fold) for fold in range(how.folds) for group, (_, of) in groups.items() for m in of]
    with show.task(f"measuring on {how.set_name}", len(jobs)) as advance:
        for number, (group, method, fold) in enumerate(jobs, start=1):
            explained, of = groups[group]
            key = content_hash({**common, "explained": explained.weights_sha256})
            path = folder / key / group / _file_name(method) / f"fold-{fold}.safetensors"
            if not path.is_file():
                if fold not in loaded:
                    loaded = {fold: _load_fold(performer, flowers, fold)}
                maps = of[method](explained, loaded[fold].images, loaded[fold].classes)
                write_tensors(path, _measure(maps, loaded[fold], performer, how.perturbed, how.seed))
            scores[group].setdefault(method, []).append(read_tensors(path))
            advance(number, f"{method}, fold {fold + 1}")
    return scores


def _result(scores: Scores, performer: Performer, flowers: FlowerSet, how: FlowersConfig) -> dict[str, Any]:
    """Join the scores of all folds."""
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "set": how.set_name,
        "recipe": {
            "images_per_class": how.images_per_class,
            "folds": how.folds,
            "perturbed_per_fold": how.perturbed,
            "seed": how.seed,
        },
        "network": {"name": performer.name, "weights_sha256": performer.weights_sha256},
        "deciding_parts": list(flowers.parts),
        **{
            group: {method: _estimates(each, flowers.parts, how.seed) for method, each in found.items()}
            for group, found in scores.items()
        },
    }
    if REFERENCE in scores["methods"]:
        other = scores["methods"][REFERENCE]
        for group in ("methods", "nulls"):
            for method, each in scores[group].items():
                result[group][method]["minus_reference"] = _difference(each, other, how.seed)
    column = 0 if len(flowers.parts) == 1 else 1
    result["recalled"] = {
        "source": "the paper's table as remembered, not seen again",
        "iou_auc_percent": {method: list(values[column]) for method, values in RECALLED.items()},
    }
    return result


def _joined(first: Mapping[str, Method], second: Mapping[str, Method]) -> dict[str, Method]:
    if twice := set(first) & set(second):
        raise InputError(expected("methods of different names", f"{min(twice)!r} twice", "Rename one"))
    return {**first, **second}


def _randomised(performer: Performer, seed: int) -> Performer:
    """Return the same network with its initial, random weights."""
    import copy
    import dataclasses

    import torch

    from partlens.network.borrowed import random_state_kept
    from partlens.network.performer import weights_sha256

    module = copy.deepcopy(performer.module)
    with random_state_kept():
        torch.manual_seed(seed + 1000)  # not the weights that the training began with
        for child in module.modules():
            reset = getattr(child, "reset_parameters", None)
            if callable(reset):
                reset()
    return dataclasses.replace(
        performer, module=module, name=f"{performer.name}, random weights", weights_sha256=weights_sha256(module)
    )


def benchmark_table(result: Mapping[str, Any]) -> list[str]:
    """Return the result of :func:`flower_benchmark` as a Markdown table, the best area first within each group."""
    both = len(result["deciding_parts"]) > 1
    head = ["map", "IoU-AUC % (mean ± sd of folds)", "95 % interval", "pointing", "insertion", "deletion"]
    head += ["both parts"] if both else []
    recalled = result["recalled"]["iou_auc_percent"]
    head.append("the paper's, as recalled")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]

    def shown(estimate: Mapping[str, Any] | None, digits: int = 2) -> str:
        return "–" if estimate is None or estimate["value"] is None else f"{estimate['value']:.{digits}f}"

    titles = {"methods": "", "nulls": "null: ", "random_weights": "random weights: "}
    for group, title in titles.items():
        scores = result[group]
        for name in sorted(scores, key=lambda n: -(scores[n]["iou_auc_percent"]["value"] or 0.0)):
            area = scores[name]["iou_auc_percent"]
            low, high = area["interval"]
            spread = area["fold_sd"] if area["fold_sd"] is not None and math.isfinite(area["fold_sd"]) else None
            of_folds = f"{area['fold_mean']:.1f}" + ("" if spread is None else f" ± {spread:.2f}")
            cells = [title + name, of_folds, f"{low:.1f}–{high:.1f}"]
            cells += [shown(scores[name].get(score)) for score in ("pointing", "insertion", "deletion")]
            cells += [shown(scores[name].get("both_parts_covered"))] if both else []
            known = recalled.get(name) if group == "methods" else None
            cells.append("–" if known is None else f"{known[0]} ± {known[1]}")
            lines.append("| " + " | ".join(cells) + " |")
    return lines
