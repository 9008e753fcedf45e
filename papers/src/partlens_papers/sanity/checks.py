"""Checks that an explanation depends on what it claims to explain.

``classes``: another class gives other features and another map. ``layers``: with the model's layers randomised from the
top and the μ-lasso fitted again, the map falls apart. ``cue``: a mark planted in the background, which the model had to
learn, lights up, and does not in a model that never saw it. ``labels``: features found for shuffled labels tell nothing
and their removal costs no more than that of random ones.

Plain guided backpropagation from the class score and the plain gradient are measured for comparison in each: guided
backpropagation is known to change little with class and weights (arXiv 1805.07039, 1810.03292), so what ours has of
both comes from which features are chosen.

Source: Adebayo et al., "Sanity Checks for Saliency Maps", NeurIPS 2018 (cascading randomisation, shuffled labels);
that explanations depend on the class is claimed in Oramas et al., ICLR 2019. The planted cue is ours.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partlens.errors import InputError, RunError, expected
from partlens.progress import Progress
from partlens.records import content_hash, plain, read_json, write_json
from partlens.run import command, versions
from partlens.verbs.runs import loaded, open_photos, performer_info
from partlens_papers.given import settings_of
from partlens_papers.removal.feature_removal import feature_removal
from partlens_papers.removal.plan import RemovalConfig
from partlens_papers.sanity.bench import (
    Bench,
    Fit,
    SanityConfig,
    explained,
    fit_bench,
    make_bench,
    mean_of,
    score_maps,
)
from partlens_papers.sanity.planted_cue import MARKED, cued_flowers
from partlens_papers.sanity.sanity_tables import ALIKE, METHODS

if TYPE_CHECKING:
    from torch import Tensor, nn

    from partlens.attribution.explanation import Explanations
    from partlens.data.images import ImageSet
    from partlens.network.performer import Performer
    from partlens_papers.flowers.sets import FlowerSet

SCHEMA = "partlens.sanity/1"
RESULT = "sanity.json"
CHECKS = ("classes", "layers", "cue", "labels")


# What checks have in common


def _maps(bench: Bench, found: Explanations, which: int = 0, performer: Performer | None = None) -> dict[str, Tensor]:
    """Return ours and the plain maps of one explained class of each photo, by method."""
    plain_maps = {rule: score_maps(bench, found.classes[:, which], rule, performer) for rule in METHODS[1:]}
    return {METHODS[0]: found.combined[:, which], **plain_maps}


def _likeness(maps: Mapping[str, Tensor], others: Mapping[str, Tensor], config: SanityConfig) -> dict[str, Any]:
    """Return by method how alike two maps of each photo are."""
    from partlens.metrics.likeness import rank_correlation
    from partlens_papers.sanity.likeness import top_overlap

    return {
        method: {
            "correlation": mean_of(rank_correlation(own, others[method]), config),
            "overlap": mean_of(top_overlap(own, others[method]), config),
        }
        for method, own in maps.items()
    }


def _jaccard(features: Tensor, others: Tensor, config: SanityConfig) -> dict[str, Any]:
    """Return the mean Jaccard index of two sets of shown features (1: the same); places without one hold -1."""
    import torch

    pairs = [
        [{f for f in row if f >= 0} for row in both] for both in zip(features.tolist(), others.tolist(), strict=True)
    ]
    return {
        "jaccard": mean_of(torch.tensor([len(a & b) / len(a | b) if a | b else torch.nan for a, b in pairs]), config)
    }


# Another class


def check_classes(bench: Bench, fit: Fit) -> dict[str, Any]:
    """Explain the two most likely classes of each photo and compare.

    Returns:
        ``{photos, features: {jaccard: Estimate}, ours, guided, gradient: {correlation: Estimate, below: Estimate}}``:
        the mean Jaccard index of the two sets of shown features (1: the same features), Spearman's correlation of the
        two maps, and the share of photos whose maps correlate by less than :data:`ALIKE`.
    """
    from partlens.estimate import proportion
    from partlens.metrics.likeness import rank_correlation

    found = explained(bench, fit, None)
    features = _jaccard(found.features[:, 0], found.features[:, 1], bench.config)
    result: dict[str, Any] = {"photos": len(bench.test), "features": features}
    others = _maps(bench, found, 1)
    for method, one in _maps(bench, found).items():
        alike = rank_correlation(one, others[method])
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

    from partlens_papers.networks.randomised import layers_from_top, randomised

    original = explained(bench, fit, None)
    classes = original.classes[:, :1]
    maps = _maps(bench, original)
    floor = _likeness(maps, {method: own.roll(1, 0) for method, own in maps.items()}, bench.config)
    units = layers_from_top(bench.performer)
    steps = len(units) if bench.config.steps is None else min(bench.config.steps, len(units))
    counts = torch.linspace(len(units), 1, steps).round().long().unique().tolist()
    stages = []
    for number, count in enumerate(counts):
        path = folder / f"stage-{count:03d}.json"
        if not path.exists():
            other = randomised(bench.performer, units[:count], bench.config.seed)
            again = fit_bench(bench, other)
            now = _maps(bench, explained(bench, again, classes, other), performer=other)
            stage = {"layers": count, "down_to": units[count - 1]}
            stage |= {"accuracy": again.accuracy.to_dict(), "readout": again.readout.to_dict()}
            write_json(path, {**stage, "methods": _likeness(maps, now, bench.config)})
        stages.append(read_json(path))
        advance((number + 1) / len(counts), f"{number + 1} of {len(counts)}")
    return {"photos": len(bench.test), "floor": floor, "stages": stages}


# A planted cue


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

    from partlens.estimate import proportion
    from partlens_papers.flowers.benchmark import trained_flower_net
    from partlens_papers.flowers.heat_maps import iou_auc, pointing_game
    from partlens_papers.sanity.likeness import energy_share

    flowers = cued_flowers(config.images_per_class, config.seed)
    marked, plain = flowers.images, cued_flowers(config.images_per_class, config.seed, cue=False).images
    result: dict[str, Any] = {}
    decided: dict[str, dict[str, Any]] = {}
    for name, images in (("cued", marked), ("control", plain)):
        weights = folder / f"{name}.safetensors"
        performer, _ = trained_flower_net(images, weights, epochs=config.epochs, seed=config.seed, progress=show)
        bench = make_bench(performer, images, config)
        fit = fit_bench(bench)
        column = bench.classes.index(MARKED)
        rows = marked.indices(category=MARKED, split="test")[: config.photos]
        seen = dataclasses.replace(bench, images=marked, test=rows)
        classes = torch.full((len(rows), 1), column) if name == "cued" else explained(seen, fit, None).classes[:, :1]
        regions = torch.from_numpy(flowers.regions(rows))
        area = regions.double().mean((1, 2))
        result[name] = {
            method: {
                "energy_share": mean_of(energy_share(each, regions), config),
                "lift": mean_of(energy_share(each, regions) / area, config),
                "pointing": mean_of(pointing_game(each, regions), config),
                "iou_auc": mean_of(iou_auc(each, regions), config),
            }
            for method, each in _maps(seen, explained(seen, fit, classes)).items()
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

    from partlens.metrics.likeness import rank_correlation
    from partlens_papers.sanity.likeness import energy_share

    config = bench.config
    null = fit_bench(bench, shuffled=True)
    real = explained(bench, fit, None)
    classes = real.classes[:, :1]
    false = explained(bench, null, classes)
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
        "features": _jaccard(real.features[:, 0], false.features[:, 0], config),
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
        model: the performer of all checks but ``cue``; the flower benchmark's network, trained here, by default.
        data: its photos; the generated flowers of six classes by default. Categories have to be outputs of the
            model.
        checks: which of :data:`CHECKS`.
        config: how much, or fields to change.
        progress: how to show progress; silent by default.

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
    how = settings_of(SanityConfig, config)
    out = Path(out)
    unknown = [name for name in checks if name not in CHECKS]
    if unknown or not checks:
        raise InputError(expected(f"checks among {', '.join(CHECKS)}", unknown, "Choose among them"))
    if (model is None) != (data is None):
        rule, remedy = "a model with its data, or neither", "Give both, or none for generated flowers"
        raise InputError(expected(rule, "one of them", remedy))
    performer, images, flowers = _subject(model, data, out, how, show)
    manifest = _begun(out, performer, images, how)
    fitted: list[tuple[Bench, Fit]] = []

    def bench_and_fit() -> tuple[Bench, Fit]:
        if not fitted:  # once for all checks that are missing
            bench = make_bench(performer, images, how)
            fitted.append((bench, fit_bench(bench)))
        return fitted[0]

    def layers() -> dict[str, Any]:
        with show.task("randomising layers", 1) as advance:
            return check_layers(*bench_and_fit(), out / "stages", advance)

    makers: dict[str, Callable[[], dict[str, Any]]] = {
        "classes": lambda: check_classes(*bench_and_fit()),
        "layers": layers,
        "cue": lambda: check_cue(out / "cue", how, show),
        "labels": lambda: check_labels(*bench_and_fit(), out, show, flowers),
    }
    for name, make in makers.items():
        path = out / f"{name}.json"
        if name in checks and not path.exists():
            show.say(f"sanity check: {name}")
            write_json(path, make())
        if path.exists():
            manifest["checks"][name] = read_json(path)
    manifest["seconds"] = round(manifest["seconds"] + time.monotonic() - started, 1)
    write_json(out / RESULT, manifest)
    return read_json(out / RESULT)


def _begun(out: Path, performer: Performer, images: ImageSet, config: SanityConfig) -> dict[str, Any]:
    """Write the record of these checks, with the seconds of an earlier start; refuse the folder of others."""
    fingerprint, used = images.fingerprint(), performer.preprocessing.to_dict()
    of = {"performer": performer.weights_sha256, "preprocessing": used, "data": fingerprint, "config": dict(config)}
    identity, seconds = content_hash(of), 0.0
    if (out / RESULT).exists():
        earlier = read_json(out / RESULT)
        if earlier.get("identity") != identity:
            rule, remedy = f"checks of this model, data and configuration in {out}", "Choose another --out folder"
            raise RunError(expected(rule, "others", f"{remedy}, or delete this one"))
        seconds = float(earlier["seconds"])
    manifest: dict[str, Any] = {
        "schema": SCHEMA,
        "identity": identity,
        "versions": versions(),
        "command": command(),
        "performer": plain(performer_info(performer)),
        "data": {"name": images.name, "fingerprint": fingerprint},
        "config": dict(config),
        "checks": {},
        "seconds": seconds,
    }
    write_json(out / RESULT, manifest)
    return manifest


def _subject(
    model: str | nn.Module | Performer | None,
    data: str | Path | ImageSet | None,
    out: Path,
    config: SanityConfig,
    show: Progress,
) -> tuple[Performer, ImageSet, FlowerSet | None]:
    """Return the network, its photos, and the flowers with their regions where the photos are such."""
    from partlens.network.fitting import SIDE_PX
    from partlens_papers.flowers.benchmark import trained_flower_net
    from partlens_papers.flowers.sets import FLOWER_SETS, flower_set

    if data is not None and data not in FLOWER_SETS:
        assert model is not None
        return loaded(model), open_photos(data)[0], None
    flowers = flower_set(str(data or FLOWER_SETS[0]), config.images_per_class, config.seed, SIDE_PX)
    if model is not None:
        return loaded(model), flowers.images, flowers
    weights = out / "flowers.safetensors"
    performer, _ = trained_flower_net(flowers.images, weights, epochs=config.epochs, seed=config.seed, progress=show)
    return performer, flowers.images, flowers
