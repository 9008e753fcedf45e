"""Made-up run folders of an explainer, written by its own records.

No test lies here: other files load this one by its path.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from partlens.estimate import Estimate
from partlens.evaluation.results import (
    Attention,
    AttentionPhoto,
    CategoryScores,
    Covering,
    EvaluatedData,
    Evaluation,
    Fidelity,
    FilterScores,
    Gallery,
    GalleryFilter,
    GalleryPhoto,
    LayerScores,
    PartsAlone,
    PerformerScores,
)
from partlens.explainer.config import ExplainerConfig
from partlens.explainer.network import ExplainerStructure
from partlens.explainer.record import ExplainerRun, Grid, History
from partlens.run import DataInfo, PerformerInfo, Unreadable

LAYERS = ("interpretable", "tap", "top")
SCORES = {
    "instability": 0.08,
    "instability_all": 0.09,
    "consistency": 0.6,
    "peak_spread_cells": 3.0,
    "border_frac": 0.05,
    "dead_frac": 0.01,
    "silent_frac": 0.02,
    "filter_correlation": 0.4,
    "distinct_parts": 12.0,
}


def estimate(value: float | None, half: float | None = 0.01, n: int = 63, unit: str = "photos") -> Estimate:
    """Return an estimate with an interval of a half width; undefined for ``None``."""
    if value is None:
        return Estimate(math.nan, (math.nan, math.nan), n, unit)
    ends = (math.nan, math.nan) if half is None else (round(value - half, 6), round(value + half, 6))
    return Estimate(value, ends, n, unit)


def scores(**changes: Any) -> LayerScores:
    """Return scores of a layer; numbers and ``None`` become estimates."""
    found: dict[str, Any] = {"landmark_shares": {"head": 0.8, "front_legs": 0.2}, **SCORES, **changes}
    found = {k: v if k == "landmark_shares" or isinstance(v, Estimate) else estimate(v) for k, v in found.items()}
    return LayerScores(**found, by_category={"fox": CategoryScores(**found, filters=2)})


def parts_alone(kept: dict[str, Any]) -> PartsAlone:
    """Return what part filters keep by themselves, and their nulls."""
    fed = {}
    for name, share, variance in (("parts", 0.37, 0.12), ("other_photo", 0.05, -0.4), ("nothing", 0.01, -0.6)):
        variances = {**kept["variance_kept"], "layer4.1": estimate(variance)}
        fed[name] = Fidelity(**{**kept, "agreement_top1": estimate(share), "variance_kept": variances})
    return PartsAlone(**fed)


def evaluation(**changes: Any) -> Evaluation:
    """Return an evaluation, some fields changed; those of its photos and its fidelity by ``data`` and ``kept``."""
    data = {
        "name": "animal-part",
        "split": "test",
        "photos": 63,
        "categories": ("fox",),
        "same_as_fit": True,
        "used_in_fit": 0,
        "unreadable": (),
        **changes.pop("data", {}),
    }
    kept = {
        "agreement_top1": estimate(0.83, 0.05),
        "agreement_top1_background": estimate(0.9),
        "variance_kept": {"layer4.0": estimate(0.79), "layer4.1": estimate(0.83)},
        "errors_by": "logistic head",
        "performer_error_percent": estimate(0.8, 0.5),
        "explainer_error_percent": estimate(2.4, 1.0),
        "error_increase_points": estimate(1.6, 1.0),
        **changes.pop("kept", {}),
    }
    fields: dict[str, Any] = {
        "data": EvaluatedData(**data),
        "landmarks": {"head": 47, "front_legs": 35},
        "explainer": scores(),
        "performer": PerformerScores(
            tap=scores(instability=0.154, consistency=0.06),
            top=scores(instability=0.149, consistency=0.1),
            top_layer="layer4",
        ),
        "nulls": {
            "random": scores(instability=0.158, consistency=-0.01),
            "centre": scores(instability=0.055, consistency=0.0),
            "corner": scores(instability=0.13, consistency=0.0),
        },
        "instability_minus_null": {kind: estimate(None) for kind in ("random", "centre", "corner")},
        "same_peak": None,
        "p": estimate(0.42, 0.03),
        "reconstruction": Fidelity(**kept),
        "parts_alone": parts_alone(kept),
        "part_interpretability": None,
        "filters": {
            "explainer": (filter_scores(0, 0.08, 0.6, "head"), filter_scores(1, math.nan, math.nan, None, dead=True)),
            "performer": (filter_scores(0, 0.15, 0.05, "head"),),
        },
        "warnings": ("few photos show legs",),
        "versions": {"torch": "2.15.0"},
    }
    return Evaluation(**{**fields, **changes})


def filter_scores(
    number: int, instability: float, consistency: float, landmark: str | None, *, dead: bool = False
) -> FilterScores:
    """Return the scores of one filter."""
    return FilterScores(
        filter=number,
        category="fox",
        instability=instability,
        consistency=consistency,
        landmark=landmark,
        spread_cells=2.0,
        dead=dead,
    )


def explainer_run(**changes: Any) -> ExplainerRun:
    """Return the record of a fit, some fields changed; those of photos by ``data``, of the performer by ``network``."""
    data = {
        "name": "animal-part",
        "path": None,
        "fingerprint": "9b1f0c6b",
        "categories": ("fox",),
        "unreadable": (Unreadable(key="images/fox/00031.jpg", reason="truncated"),),
        **changes.pop("data", {}),
    }
    network = {
        "name": "torchvision:resnet18@weights/resnet18.safetensors",
        "spec": None,
        "weights_sha256": "5c106cde",
        "preprocessing": {"mean": [0.485, 0.456, 0.406]},
        "notes": ("a note",),
        **changes.pop("network", {}),
    }
    structure = {
        "tap": "layer3",
        "targets": ("layer4.0", "layer4.1"),
        "channels_in": 256,
        "channels_out": 256,
        "side_cells": (14, 14),
        "replaced": None,
        "decoder_from": "layer3",
        **changes.pop("structure", {}),
    }
    fields: dict[str, Any] = {
        "created": "2026-11-20T12:00:00+00:00",
        "command": "partlens fit-explainer torchvision:resnet18 photos --category fox",
        "versions": {"partlens": "0.1.0", "torch": "2.15.0"},
        "performer": PerformerInfo(**network),
        "data": DataInfo(**data),
        "status": "finished",
        "seconds": 512.3,
        "train_photos": 223,
        "background": 1500,
        "structure": ExplainerStructure(**structure),
        "preset": "partlens",
        "config": ExplainerConfig.preset("partlens"),
        "seeds": 1,
        "grid": Grid(stride_px=(16.0, 16.0), size_px=(211.0, 211.0), start_px=(-98.0, -98.0)),
        "p_by_seed": (0.42,),
    }
    return ExplainerRun(**{**fields, **changes})


def history(**changes: Any) -> History:
    """Return three logged epochs."""
    joint = {"phase": "joint", "seconds": 9.0, "filter_1": -3.0, "filter_2": -4.0, "correlation": 0.4, "p": 0.4217}
    warm = {"phase": "warmup", "seconds": 5.0, "filter_1": -2.0, "filter_2": -2.5, "correlation": 0.2}
    epochs = (
        {"epoch": 1, **warm},
        {"epoch": 2, "reconstruction": 2.1e6, "share": 3e5, **joint},
        {"epoch": 3, "reconstruction": 1.9e6, "share": 3e5, **joint},
    )
    return History(**{"epochs": epochs, **changes})


def shot(file: str, region: str | None = None, box: tuple[float, ...] = (60, 44, 148, 132)) -> GalleryPhoto:
    """Return one photo of a filter."""
    return GalleryPhoto(
        key="images/fox/1.jpg",
        file=file,
        region_file=region,
        map_file=f"map-{file}",
        score=3.2,
        peak_px=(104.0, 88.0),
        box_px=tuple(map(float, box)),
        size_px=(224, 224),
    )


def gallery(**changes: Any) -> Gallery:
    """Return a gallery of two filters of the explainer and one of the performer, some fields changed."""

    def one(number: int, reads: float = 33.4) -> GalleryFilter:
        found = filter_scores(number, 0.07, 0.71, "head")
        photos = (shot("0.jpg"), shot("1.jpg", "region.jpg"), shot("2.jpg", box=(-20, 44, 68, 132)))
        return GalleryFilter(scores=found, reads_px=reads, photos=photos)

    attended = AttentionPhoto(
        key="images/fox/1.jpg",
        label="red fox & co",
        file="0.jpg",
        maps=dict.fromkeys(LAYERS, "1.jpg"),
    )
    fields: dict[str, Any] = {
        "kind": "quick",
        "fields": "occlusion",
        "covering": Covering(
            settings={"occluder_px": 33, "stride_px": 18},
            places=121,
            photos=8,
            photos_per_filter=4,
            reads_px={
                "explainer": estimate(32.4, 2.1, 12, "filters"),
                "performer": estimate(48.0, 7, 12, "filters"),
            },
        ),
        "theoretical_px": {"explainer": (275, 275), "performer": (211, 211)},
        "layers": {"explainer": (one(12), one(13)), "performer": (one(200),)},
        "attention": Attention(
            layers=dict(zip(LAYERS, ("conv-interp-2 at layer3", "layer3", "layer4"), strict=True)),
            size_px=(224, 224),
            photos=(attended,),
            concentration_frac={
                name: estimate(value, 0.01, 24 - i)
                for i, (name, value) in enumerate(zip(LAYERS, (0.052, 0.21, None), strict=True))
            },
            random_frac={name: estimate(0.35, 0.005, 24) for name in LAYERS},
            empty={name: i for i, name in enumerate(LAYERS)},
        ),
    }
    return Gallery(**{**fields, **changes})


def draw(folder: Path, content: Gallery) -> None:
    """Draw every picture that a gallery names, each in another colour."""
    shots = [photo for layer in content.layers.values() for one in layer for photo in one.photos]
    names = [name for s in shots for name in (s.file, s.region_file, s.map_file) if name]
    names += [name for photo in content.attention.photos for name in (photo.file, *photo.maps.values())]
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(dict.fromkeys(names)):
        Image.new("RGB", (8, 6), (20 * number, 90, 200 - 15 * number)).save(folder / name)


def write_run(folder: Path, *, bare: bool = False, **records: Any) -> Path:
    """Write a run; ``bare`` leaves out all but ``run.json`` and what is given as ``run``, ``measured``, …"""
    made: Mapping[str, Any] = {
        "run": explainer_run(),
        **({} if bare else {"measured": evaluation(), "trained": history(), "pictures": gallery()}),
        **records,
    }
    for name, record in made.items():
        if name == "pictures":
            record.write(folder / "gallery")
            draw(folder / "gallery", record)
        else:
            record.write(folder)
    return folder
