"""Checks that an explanation depends on what it claims to explain.

``classes``: another class gives other features and another map. ``layers``: with the model's layers randomised from the
top and the μ-lasso fitted again, the map falls apart. ``cue``: a mark planted in the background, which the model had to
learn, lights up, and does not in a model that never saw it. ``labels``: features found for shuffled labels tell nothing
and their removal costs no more than that of random ones.

Plain guided backpropagation from the class score and the plain gradient are measured beside ours in each: guided
backpropagation is known to change little with class and weights (arXiv 1805.07039, 1810.03292), so what ours has of
both comes from which features are chosen.

Source: Adebayo et al., "Sanity Checks for Saliency Maps", NeurIPS 2018 (cascading randomisation, shuffled labels);
that explanations depend on the class is claimed in Oramas et al., ICLR 2019. The planted cue is ours.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partlens.experiments.feature_removal import feature_removal
from partlens.experiments.planted_cue import MARKED, cued_flowers
from partlens.experiments.removal_plan import RemovalConfig, divide
from partlens.experiments.sanity_tables import ALIKE, METHODS, tables
from partlens.pipeline.runs import command, described, loaded, opened, spec, versions
from partlens.progress import Progress
from partlens.store import content_hash, read_json, write_json
from partlens.vocabulary import InputError, RunError, expected

if TYPE_CHECKING:
    from torch import Tensor, nn

    from partlens.artefacts.explanation import ExplanationConfig, Explanations
    from partlens.data.flower_sets import FlowerSet
    from partlens.data.images import ImageSet
    from partlens.metrics.estimate import Estimate
    from partlens.performer.zoo import Performer
    from partlens.selection.relevance import DescriptorConfig, FeatureIndex

SCHEMA = "partlens.sanity/1"
RESULT = "sanity.json"
__all__ = ["ALIKE", "CHECKS", "METHODS", "SanityConfig", "sanity_checks", "tables"]

CHECKS = ("classes", "layers", "cue", "labels")


@dataclass(frozen=True)
class SanityConfig:
    """How much is measured.

    Attributes:
        mu: bound of the μ-lasso (authors: 10; 5 for their generated flowers).
        descriptor: fields of :class:`~partlens.selection.relevance.DescriptorConfig`.
        explanation: fields of :class:`~partlens.artefacts.explanation.ExplanationConfig`; the authors' by default.
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
    descriptor: Mapping[str, Any] = field(default_factory=dict)
    explanation: Mapping[str, Any] = field(default_factory=dict)
    classes: int | None = None
    fit_photos: int = 100
    photos: int = 48
    steps: int | None = None
    images_per_class: int = 300
    epochs: int = 12
    removal_photos: int = 50
    batch_size: int = 8
    rounds: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every field once."""
        counts = (self.fit_photos, self.photos, self.images_per_class, self.epochs, self.removal_photos)
        optional = [v for v in (self.classes, self.steps) if v is not None]
        if min(*counts, *optional, self.batch_size, self.rounds) < 1:
            raise InputError(expected("counts of at least 1", self, "Correct the value"))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)


def mean_of(values: Tensor, config: SanityConfig) -> dict[str, Any]:
    """Return mean and bootstrap interval over photos; undefined values are counted and left out."""
    import torch

    from partlens.metrics.estimate import Estimate, bootstrap

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
        from partlens.selection.relevance import DescriptorConfig

        return DescriptorConfig(**dict(self.config.descriptor))

    @property
    def explanation(self) -> ExplanationConfig:
        """How predictions are explained."""
        from partlens.artefacts.explanation import ExplanationConfig

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

    from partlens.selection.relevance import class_of_category

    counts = images.category_counts()
    names = sorted(sorted(counts), key=lambda name: -counts[name])[: config.classes]
    names.sort()
    outputs = [class_of_category(performer, name) for name in names]
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

    from partlens.metrics.estimate import proportion
    from partlens.selection.lasso import mu_lasso
    from partlens.selection.relevance import stream_responses

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

    from partlens.artefacts.explanation import Explanations, choose_top, explain_batch

    network = performer or bench.performer
    parts = [
        explain_batch(
            network,
            batch,
            fit.weights,
            fit.index,
            bench.descriptor,
            None if classes is None else classes[part],
            bench.explanation,
            choose=choose_top(bench.outputs, 2),
        )
        for part, batch in bench.batches()
    ]
    names = [each.name for each in dataclasses.fields(Explanations)]
    return Explanations(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


def score_maps(bench: Bench, classes: Tensor, rule: str, performer: Performer | None = None) -> Tensor:
    """Return the plain map of each photo from the score of a class: ``[image, row, col]``.

    Args:
        bench: classes and photos.
        classes: column of each photo.
        rule: ``guided`` or ``gradient``.
        performer: another network than the bench's.
    """
    import torch

    from partlens.artefacts.backprop import guided_backprop, heat_map

    targets = torch.tensor(bench.outputs)[classes]
    return torch.cat(
        [
            heat_map(guided_backprop(performer or bench.performer, batch, targets[part], rule=rule))  # type: ignore[arg-type]
            for part, batch in bench.batches()
        ]
    ).float()


# Another class


def check_classes(bench: Bench, fit: Fit) -> dict[str, Any]:
    """Explain the two most likely classes of each photo and compare.

    Returns:
        ``{photos, features: {jaccard: Estimate}, ours, guided, gradient: {correlation: Estimate, below: Estimate}}``:
        the mean Jaccard index of the two sets of shown features (1: the same features), Spearman's correlation of the
        two maps, and the share of photos whose maps correlate by less than :data:`ALIKE`.
    """
    import torch

    from partlens.metrics.estimate import proportion
    from partlens.metrics.likeness import rank_correlation

    found = explained(bench, fit, None)
    first, second = ([{f for f in row if f >= 0} for row in found.features[:, which].tolist()] for which in range(2))
    jaccard = torch.tensor(
        [len(a & b) / len(a | b) if a | b else torch.nan for a, b in zip(first, second, strict=True)]
    )
    result: dict[str, Any] = {"photos": len(bench.test), "features": {"jaccard": mean_of(jaccard, bench.config)}}
    pairs = {"ours": (found.combined[:, 0], found.combined[:, 1])}
    for rule in ("guided", "gradient"):
        pairs[rule] = (score_maps(bench, found.classes[:, 0], rule), score_maps(bench, found.classes[:, 1], rule))
    for method, (one, other) in pairs.items():
        alike = rank_correlation(one, other)
        result[method] = {
            "correlation": mean_of(alike, bench.config),
            "below": proportion((alike[~alike.isnan()] < ALIKE).double()).to_dict(),
        }
    return result


# Randomised layers


def check_layers(bench: Bench, fit: Fit, folder: Path, advance: Callable[..., None]) -> dict[str, Any]:
    """Randomise the layers one after the other from the top, fit again, and compare the maps with the intact ones.

    The class of each photo is the one the intact model holds most likely; it stays the explained class.

    Returns:
        ``{photos, floor: {method: {correlation, overlap}}, stages: [{layers: number randomised, down_to, accuracy,
        readout, methods: {method: {correlation, overlap}}}]}``, all Estimates. The floor is the likeness of maps of
        different photos on the intact model: what maps share that have nothing to do with one another.
    """
    import torch

    from partlens.metrics.likeness import rank_correlation, top_overlap
    from partlens.performer.randomised import layers_from_top, randomised

    original = explained(bench, fit, None)
    classes = original.classes[:, :1]
    maps = {"ours": original.combined[:, 0]}
    for rule in ("guided", "gradient"):
        maps[rule] = score_maps(bench, classes[:, 0], rule)
    floor = {
        method: {
            "correlation": mean_of(rank_correlation(own, own.roll(1, 0)), bench.config),
            "overlap": mean_of(top_overlap(own, own.roll(1, 0)), bench.config),
        }
        for method, own in maps.items()
    }
    units = layers_from_top(bench.performer)
    steps = len(units) if bench.config.steps is None else min(bench.config.steps, len(units))
    counts = torch.linspace(len(units), 1, steps).round().long().unique().tolist()
    stages = []
    for number, count in enumerate(counts):
        path = folder / f"stage-{count:03d}.json"
        if not path.exists():
            other = randomised(bench.performer, units[:count], bench.config.seed)
            again = fit_bench(bench, other)
            now = {"ours": explained(bench, again, classes, other).combined[:, 0]}
            for rule in ("guided", "gradient"):
                now[rule] = score_maps(bench, classes[:, 0], rule, other)
            write_json(
                path,
                {
                    "layers": count,
                    "down_to": units[count - 1],
                    "accuracy": again.accuracy.to_dict(),
                    "readout": again.readout.to_dict(),
                    "methods": {
                        method: {
                            "correlation": mean_of(rank_correlation(maps[method], each), bench.config),
                            "overlap": mean_of(top_overlap(maps[method], each), bench.config),
                        }
                        for method, each in now.items()
                    },
                },
            )
        stages.append(read_json(path))
        advance((number + 1) / len(counts), f"{number + 1} of {len(counts)}")
    return {"photos": len(bench.test), "floor": floor, "stages": stages}


# A planted cue


def _trained(images: ImageSet, path: Path, config: SanityConfig, show: Progress) -> Performer:
    """Train the flower benchmark's network on a set, or load it."""
    from partlens.performer.fitting import save_classifier, train_classifier
    from partlens.performer.flower_network import benchmark_network, flower_preprocessing, without_norms
    from partlens.performer.zoo import load_performer

    if not path.exists():
        fitted = train_classifier(
            lambda outputs: benchmark_network(outputs, normed=True),
            images,
            flower_preprocessing(),
            epochs=config.epochs,
            weight_decay=1e-2,
            channels_last=True,
            seed=config.seed,
            progress=show,
        )
        network = without_norms(fitted.network)  # type: ignore[arg-type]  # built above
        save_classifier(path, network, flower_preprocessing(), fitted.class_names)
    return load_performer(f"partlens:flower-net@{path}")


def check_cue(folder: Path, config: SanityConfig, show: Progress) -> dict[str, Any]:
    """Train one network that needs a mark in the background and one that never saw it; look for the mark in the maps.

    Both are asked about the same held-out flowers with the mark. The network that needs it is asked why it sees the
    marked class, the other one (trained on the same flowers without marks, where the sixth class cannot be told) for
    the class it holds most likely.

    Returns:
        ``{photos, accuracy: {with_cue, without_cue: Estimate}, area_share, cued, control: {method: {energy_share, lift
        (energy share over area share), pointing, iou_auc: Estimate}}}``. ``accuracy`` is that of the marked class in
        the network that needs the mark, with marks and on the same flowers without.
    """
    import torch

    from partlens.metrics.estimate import proportion
    from partlens.metrics.heat_maps import iou_auc, pointing_game
    from partlens.metrics.likeness import energy_share

    flowers = cued_flowers(config.images_per_class, config.seed)
    marked, plain = flowers.images, cued_flowers(config.images_per_class, config.seed, cue=False).images
    result: dict[str, Any] = {}
    decided: dict[str, dict[str, Any]] = {}
    for name, images in (("cued", marked), ("control", plain)):
        performer = _trained(images, folder / f"{name}.safetensors", config, show)
        bench = make_bench(performer, images, config)
        fit = fit_bench(bench)
        column = bench.classes.index(MARKED)
        rows = marked.indices(category=MARKED, split="test")[: config.photos]
        seen = dataclasses.replace(bench, images=marked, test=rows)
        classes = torch.full((len(rows), 1), column) if name == "cued" else explained(seen, fit, None).classes[:, :1]
        regions = torch.from_numpy(flowers.regions(rows))
        area = regions.double().mean((1, 2))
        maps = {"ours": explained(seen, fit, classes).combined[:, 0]}
        for rule in ("guided", "gradient"):
            maps[rule] = score_maps(seen, classes[:, 0], rule)
        result[name] = {
            method: {
                "energy_share": mean_of(energy_share(each, regions), config),
                "lift": mean_of(energy_share(each, regions) / area, config),
                "pointing": mean_of(pointing_game(each, regions), config),
                "iou_auc": mean_of(iou_auc(each, regions), config),
            }
            for method, each in maps.items()
        }
        if name == "cued":
            output = bench.outputs[column]
            for which, source in (("with_cue", marked), ("without_cue", plain)):
                batch = performer.preprocessing([source.read(row) for row in rows])
                with torch.no_grad():
                    right = performer.module(batch).argmax(1) == output
                decided[which] = proportion(right.double()).to_dict()
            result |= {"photos": len(rows), "accuracy": decided, "area_share": float(area.mean())}
    return result


# Shuffled labels


def check_labels(bench: Bench, fit: Fit, folder: Path, show: Progress, flowers: FlowerSet | None) -> dict[str, Any]:
    """Fit shuffled labels: read-out, removal and maps against those of the real ones.

    Returns:
        ``{readout: {real, shuffled: Estimate, chance}, features: {jaccard}, maps: {correlation}, region: {real,
        shuffled: energy share in the region that decides the class, area_share} or null, removal: {real, shuffled:
        against random, drops along the curve}}``.
    """
    import torch

    from partlens.metrics.likeness import energy_share, rank_correlation

    config = bench.config
    null = fit_bench(bench, shuffled=True)
    real = explained(bench, fit, None)
    classes = real.classes[:, :1]
    false = explained(bench, null, classes)
    sets = [
        ({f for f in a if f >= 0}, {f for f in b if f >= 0})
        for a, b in zip(real.features[:, 0].tolist(), false.features[:, 0].tolist(), strict=True)
    ]
    jaccard = torch.tensor([len(a & b) / len(a | b) if a | b else torch.nan for a, b in sets])
    region: dict[str, Any] | None = None
    if flowers is not None:
        where = torch.from_numpy(flowers.regions(bench.test))
        region = {
            "real": mean_of(energy_share(real.combined[:, 0], where), config),
            "shuffled": mean_of(energy_share(false.combined[:, 0], where), config),
            "area_share": float(where.double().mean()),
        }
    removal = {}
    rows = [row for row, label in enumerate(bench.labels) if label >= 0]
    for name in ("real", "shuffled"):
        found = feature_removal(
            bench.performer,
            bench.images.take(rows),
            folder / f"removal-{name}",
            config=RemovalConfig(
                mu=config.mu,
                descriptor=config.descriptor,
                shuffled=name == "shuffled",
                photos_per_class=config.removal_photos,
                others=1,
                rounds=config.rounds,
                seed=config.seed,
            ),
            progress=show,
        )
        removal[name] = {
            "features": found["conditions"]["ours"]["features"],
            "readout": found["readout"]["accuracy"],
            "intact": found["intact"]["accuracy"],
            "drop": {n: c["drop"] for n, c in found["conditions"].items()},
            "against_random": found["against"]["random"],
        }
    return {
        "readout": {
            "real": fit.readout.to_dict(),
            "shuffled": null.readout.to_dict(),
            "chance": 1 / len(bench.classes),
        },
        "features": {"jaccard": mean_of(jaccard, config)},
        "maps": {"correlation": mean_of(rank_correlation(real.combined[:, 0], false.combined[:, 0]), config)},
        "region": region,
        "removal": removal,
    }


# All together


def sanity_checks(
    out: str | Path,
    *,
    model: str | nn.Module | Performer | None = None,
    data: str | Path | ImageSet | None = None,
    checks: Sequence[str] = CHECKS,
    config: SanityConfig | Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run the checks; interrupted, it goes on with the next one.

    Args:
        out: folder for ``sanity.json``, one JSON file per check, and the networks trained here.
        model: the performer of all checks but ``cue``; the flower benchmark's network, trained here, when left out.
        data: its photos; the generated flowers of six classes when left out. Categories have to be outputs of the
            model.
        checks: which of :data:`CHECKS`.
        config: how much, or fields to change.
        progress: how to show progress; silent when left out.

    Returns:
        The content of ``sanity.json``: ``{schema, versions, command, performer, data, config, checks: {name: what
        check_classes, check_layers, check_cue, check_labels return}, seconds}``.

    Raises:
        InputError: an unknown check, a model without data or data without a model, categories that are no outputs.
        ImageError: too few photos.
        RunError: ``out`` holds other checks.
    """
    started = time.monotonic()
    show = progress or Progress.silent()
    how = config if isinstance(config, SanityConfig) else SanityConfig(**dict(config or {}))
    out = Path(out)
    unknown = [name for name in checks if name not in CHECKS]
    if unknown or not checks:
        raise InputError(expected(f"checks among {', '.join(CHECKS)}", unknown, "Choose among them"))
    if (model is None) != (data is None):
        raise InputError(
            expected("a model with its data, or neither", "one of them", "Give both, or none for generated flowers")
        )
    performer, images, flowers = _subject(model, data, out, how, show)
    identity = content_hash(
        {
            "performer": performer.weights_sha256,
            "preprocessing": performer.preprocessing.to_dict(),
            "data": images.fingerprint(),
            "config": how.to_dict(),
        }
    )
    seconds = 0.0
    if (out / RESULT).exists():
        earlier = read_json(out / RESULT)
        if earlier.get("identity") != identity:
            raise RunError(
                expected(
                    f"checks of this model, data and configuration in {out}",
                    "others",
                    "Choose another --out folder, or delete this one",
                )
            )
        seconds = float(earlier["seconds"])
    manifest: dict[str, Any] = {
        "schema": SCHEMA,
        "identity": identity,
        "versions": versions(),
        "command": command(),
        "performer": described(performer, spec(model) if model is not None else None),
        "data": {"name": images.name, "fingerprint": images.fingerprint()},
        "config": how.to_dict(),
        "checks": {},
        "seconds": seconds,
    }
    write_json(out / RESULT, manifest)
    bench: Bench | None = None
    fit: Fit | None = None
    for name in checks:
        path = out / f"{name}.json"
        if not path.exists():
            show.say(f"sanity check: {name}")
            if name != "cue" and (bench is None or fit is None):
                bench = make_bench(performer, images, how)
                fit = fit_bench(bench)
            if name == "cue":
                found = check_cue(out / "cue", how, show)
            elif name == "classes":
                found = check_classes(bench, fit)  # type: ignore[arg-type]  # made above
            elif name == "layers":
                with show.task("randomising layers", 1) as advance:
                    found = check_layers(bench, fit, out / "stages", advance)  # type: ignore[arg-type]  # made above
            else:
                found = check_labels(bench, fit, out, show, flowers)  # type: ignore[arg-type]  # made above
            write_json(path, found)
        manifest["checks"][name] = read_json(path)
    for name in CHECKS:
        if name not in manifest["checks"] and (out / f"{name}.json").exists():
            manifest["checks"][name] = read_json(out / f"{name}.json")
    manifest["seconds"] = round(seconds + time.monotonic() - started, 1)
    write_json(out / RESULT, manifest)
    return read_json(out / RESULT)


def _subject(
    model: str | nn.Module | Performer | None,
    data: str | Path | ImageSet | None,
    out: Path,
    config: SanityConfig,
    show: Progress,
) -> tuple[Performer, ImageSet, FlowerSet | None]:
    """Return the network, its photos, and the flowers with their regions where the photos are such."""
    from partlens.data.flower_sets import FLOWER_SETS, flower_set
    from partlens.performer.flower_network import SIDE_PX

    if data is not None and data not in FLOWER_SETS:
        assert model is not None
        return loaded(model), opened(data)[0], None
    flowers = flower_set(str(data or FLOWER_SETS[0]), config.images_per_class, config.seed, SIDE_PX)
    performer = (
        loaded(model) if model is not None else _trained(flowers.images, out / "flowers.safetensors", config, show)
    )
    return performer, flowers.images, flowers
