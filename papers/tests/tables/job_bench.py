"""A folder of flowers, a network that any process can load, and jobs that count, fail or wait."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np

from partlens.data.images import ImageSet
from partlens_papers.tables.jobs import Job

SMALL: dict[str, Any] = {
    "epochs": 1,
    "warmup_epochs": 1,
    "views": 2,
    "batch_size": 8,
    "background_batch": 4,
    "precision": "float32",
}

NETWORK = """
import dataclasses
from collections import OrderedDict

import torch
from torch import nn

from partlens.network.preprocessing import Preprocessing
from partlens.network.performer import Performer, weights_sha256


def tiny():
    torch.manual_seed(7)
    layers = OrderedDict(
        conv1=nn.Conv2d(3, 6, 3, stride=2, padding=1), relu1=nn.ReLU(),
        conv2=nn.Conv2d(6, 8, 3, stride=2, padding=1), relu2=nn.ReLU(),
        conv3=nn.Conv2d(8, 8, 3, padding=1), relu3=nn.ReLU(),
        pool3=nn.MaxPool2d(2), conv4=nn.Conv2d(8, 12, 3, padding=1), relu4=nn.ReLU(),
        pool4=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), classes=nn.Linear(12, 4),
    )
    module = nn.Sequential(layers).eval()
    prepare = Preprocessing(size_px=(32, 32), resize="squash", mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    return Performer(module, "tiny", prepare, weights_sha256(module), "relu2")


def named():
    return dataclasses.replace(tiny(), class_names=("petal-red", "petal-blue", "stem", "leaf"))
"""

JOBS = """
import os
import random
import time
from pathlib import Path


def count(job, folder, show):
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "calls").open("a") as file:
        file.write(f"{os.getpid()}\\n")
    return [], {"drawn": random.Random(job.seed).random(), "threads": os.environ.get("OMP_NUM_THREADS")}


def fail(job, folder, show):
    from partlens.errors import InputError

    if job.settings.get("bug"):
        return {}["nothing"]
    raise InputError("Expected luck,\\n got none. Try again.")


def die_once(job, folder, show):
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "begun").exists():
        (folder / "begun").write_text(str(os.getpid()))
        os._exit(9)
    return count(job, folder, show)


def wait_once(job, folder, show):
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "begun").exists():
        (folder / "begun").write_text(str(os.getpid()))
        time.sleep(60)
    return count(job, folder, show)
"""


def job(work: str = "count", kind: str = "counted", *, seed: int = 0, category: str = "fox", **settings: Any) -> Job:
    """A job of the module that :data:`JOBS` is written to."""
    return Job(f"bench_jobs:{work}", kind, "net", category, seed, settings)


def write_flowers(images: ImageSet, folder: Path) -> Path:
    """Write a set as files with tables, so that another process can open it."""
    folder.mkdir(parents=True)
    truth = images.part_truth
    assert truth is not None
    with (
        (folder / "images.csv").open("w", newline="") as table,
        (folder / "landmarks.csv").open("w", newline="") as marks,
    ):
        rows, parts = csv.writer(table), csv.writer(marks)
        rows.writerow(["image", "category", "split"])
        parts.writerow(["image", "landmark", "x", "y", "width", "height"])
        for index, (category, split) in enumerate(zip(images.categories, images.splits, strict=True)):
            name = f"{index:03d}.png"
            images.read(index).save(folder / name)
            rows.writerow([name, category, split])
            places, sizes = truth.positions_px[index].tolist(), truth.sizes_px[index].tolist()
            for landmark, place, size in zip(truth.landmarks, places, sizes, strict=True):
                if np.isfinite(place[0]):
                    parts.writerow([name, landmark, *place, *size])
    return folder
