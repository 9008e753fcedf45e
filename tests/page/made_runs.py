"""Made-up run folders of a selection and of explanations, with small drawn pictures, exactly as partlens writes them.

No test lies here: other files load this one by its path.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from partlens.selection.record import SelectionRecord

LAYERS = {"conv1": 20, "relu1": 20, "conv2": 50, "relu2": 50, "pool2": 50, "conv3": 200, "relu3": 200, "fc": 500}
KINDS = ("petal", "stem", "leaf", "centre")
COLOURS = ("red", "blue", "yellow")


def estimate(value, half=0.02, n=300, unit="photos"):
    ends = [None, None] if value is None else [round(value - half, 6), round(min(value + half, 1.0), 6)]
    return {"value": value, "interval": ends, "n": n, "unit": unit}


def draw(path: Path, width: int, height: int, seed: int, kind: str = "blob") -> None:
    """Draw a smooth coloured picture: a bright spot (``blob``), noise (``noise``) or several spots (``strip``)."""
    rows, cols = np.mgrid[0:height, 0:width].astype(float)
    rng = np.random.default_rng(seed)
    if kind == "noise":
        small = rng.uniform(90, 150, (max(height // 8, 2), max(width // 8, 2), 3))
        picture = np.asarray(Image.fromarray(small.astype("uint8")).resize((width, height), Image.Resampling.BICUBIC))
    else:
        side = min(width, height)
        spots = (cols % side, rows % side) if kind == "strip" else (cols, rows)
        centre = rng.uniform(0.35, 0.65, 2) * side
        hue = rng.uniform(0.2, 1.0, 3)
        glow = np.exp(-((spots[0] - centre[0]) ** 2 + (spots[1] - centre[1]) ** 2) / (2 * (side * 0.18) ** 2))
        ground = 60 + 40 * np.sin(cols / side * 3 + seed) * np.cos(rows / side * 2)
        picture = ground[..., None] * np.array([0.7, 1.0, 0.7]) + glow[..., None] * 200 * hue
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(picture, 0, 255).astype("uint8")).save(path, compress_level=1)


def class_names(count: int) -> list[str]:
    return [f"{KINDS[i % 4]}-{COLOURS[i // 4 % 3]}" + (f"-{i // 12}" if i >= 12 else "") for i in range(count)]


def feature_row(run: Path, number: int, weight: float, share: float, *, pictures: bool, size: int = 16) -> dict:
    ends = np.cumsum(list(LAYERS.values()))
    place = int(np.searchsorted(ends, number, side="right"))
    layer, channel = list(LAYERS)[place], number - int(ends[place] - list(LAYERS.values())[place])
    picture = None
    if pictures:
        picture = {
            "receptive_field_px": None if layer == "fc" else [6 * (place + 1), 6 * (place + 1)],
            "sharpness": 0.2 + number % 7 / 20,
            "control_sharpness": 0.21,
        }
        for key, kind, width in (("average", "blob", size), ("control", "noise", size), ("crops", "strip", 8 * size)):
            picture[key] = f"pictures/{layer}-{channel}-{key}.png"
            if not (run / picture[key]).exists():
                draw(run / picture[key], width, size, number, kind)
    return {
        "layer": layer,
        "channel": channel,
        "weight": weight,
        "share": share,
        "strongest": [f"photos/{number}-{i}.jpg" for i in range(8)],
        "picture": picture,
    }


def class_row(run: Path, position: int, name: str, *, features: int, pictures: bool, size: int = 16) -> dict:
    weights = [2.0 / (i + 1) for i in range(features)]
    rows = [
        feature_row(
            run, (211 * position + 97 * i) % sum(LAYERS.values()), w, w / sum(weights), pictures=pictures, size=size
        )
        for i, w in enumerate(weights)
    ]
    return {
        "name": name,
        "output": position,
        "photos": 100 + position,
        "norm": sum(weights),
        "objective": 12.5,
        "relative_gap": 3e-6,
        "filters": rows,
    }


def selection(run: Path, classes: int = 12, features: int = 5, *, pictures: bool = True, size: int = 16) -> dict:
    """Return the content of ``selection.json`` and draw its pictures."""
    return {
        "schema": "partlens.selection/2",
        "status": "finished",
        "created": "2026-11-21T09:30:00+00:00",
        "command": "partlens select-features flowers.py:network flowers --out runs/flowers",
        "seconds": 61.0,
        "versions": {"partlens": "0.2.0", "torch": "2.15.0"},
        "performer": {
            "name": "flower-net",
            "spec": "flowers.py:network",
            "weights_sha256": "aa11",
            "preprocessing": {"size_px": [112, 112], "resize": "squash"},
            "notes": ["Dropout is off."],
        },
        "data": {"name": "flowers", "path": "flowers", "fingerprint": "f00d", "unreadable": []},
        "config": {
            "split": "train",
            "mu": 10.0,
            "labels": "data",
            "nonnegative": True,
            "descriptor": {},
            "top_photos": 100,
            "pictures": 200,
            "seed": 0,
        },
        "photos": 1200,
        "found": {
            "index": {"layers": list(LAYERS), "channels": list(LAYERS.values())},
            "weights_sha256": "bb22",
            "dead_layers": 0,
            "iterations": 880,
            "accuracy": estimate(0.961),
            "shuffled": estimate(0.08),
            "model_accuracy": estimate(0.985, 0.01),
            "classes": [
                class_row(run, i, name, features=features, pictures=pictures, size=size)
                for i, name in enumerate(class_names(classes))
            ],
        },
    }


def explanation(folder: Path, image: str, names: tuple[str, ...], seed: int = 0, size: int = 24) -> dict:
    """Return the content of ``explanation.json`` and draw its pictures; averages are those of conv3's filters 71 on."""
    run = folder.parent.parent
    draw(folder / "input.png", size, size, seed)
    explained = []
    for k, name in enumerate(names):
        draw(folder / f"combined-{k + 1}.png", size, size, seed + k)
        draw(folder / f"heat-{k + 1}.png", size, size, seed + 50 + k)
        shares = [0.52, 0.22, 0.12]
        features = []
        for r, share in enumerate(shares):
            draw(folder / f"feature-{k + 1}-{r + 1}.png", size, size, seed + 10 * k + r)
            average = f"../../pictures/conv3-{71 + r}-average.png"
            if (run / "selection.json").exists():
                draw(folder / average, size, size, r)
            contribution = round(share * (0.9 - 0.5 * k), 6)
            features.append(
                {
                    "layer": "conv3",
                    "channel": 71 + r,
                    "weight": 1.5,
                    "response": round(contribution / 1.5, 6),
                    "contribution": contribution,
                    "share": share,
                    "overlay": f"feature-{k + 1}-{r + 1}.png",
                    "average": average if (folder / average).exists() else None,
                }
            )
        explained.append(
            {
                "name": name,
                "output": k,
                "probability": round(0.93 / (1 + 20 * k), 4),
                "rank": k + 1,
                "score": 0.8 - 0.5 * k,
                "combined": f"combined-{k + 1}.png",
                "heat": f"heat-{k + 1}.png",
                "filters": features,
                "rank_correlation": None if k == 0 else 0.41,
            }
        )
    return {
        "schema": "partlens.explanation/4",
        "content": "one",
        "image": image,
        "path": f"photos/{image}",
        "size_px": [640, 480],
        "method": {"features": 3, "rule": "guided", "fix_strides": True, "pooling": "route"},
        "performer": "flower-net",
        "weights_sha256": "aa11",
        "selection": SelectionRecord.read(run).identity if (run / "selection.json").exists() else "77aa01",
        "answers": [
            {"name": name, "output": i, "probability": p}
            for i, (name, p) in enumerate(zip(class_names(5), (0.93, 0.0443, 0.0121, 0.006, 0.0021), strict=True))
        ],
        "explained": explained,
        "parts": [],
        "notes": ["Dropout is off."],
    }


def write(path: Path, content: object) -> Path:
    """Write a JSON file; undefined numbers are refused, as the store writes ``null`` for them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, allow_nan=False), encoding="utf-8")
    return path


def write_selection(run: Path, **arguments) -> Path:
    """Write the folder of a selection."""
    write(run / "selection.json", selection(run, **arguments))
    return run


def write_explanation(
    run: Path,
    image: str = "tulip_3.jpg",
    names: tuple[str, ...] = ("petal-red", "stem-red"),
    seed: int = 0,
    **arguments,
) -> Path:
    """Write the folder of one explained image into a run."""
    folder = run / "explanations" / image.partition(".")[0]
    write(folder / "explanation.json", explanation(folder, image, names, seed, **arguments))
    return folder
