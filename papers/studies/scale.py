"""How cost grows with photos: CPU seconds and bytes of memory and disk of what reads many of them, per photo.

Each figure is a slope: one process of one thread runs a pass on a small and on a larger number of generated photos, and
the difference is divided. Resident memory is the most that the kernel saw (``ru_maxrss``). ``two_processes`` is the CPU
time of two workers and their client over that of one process, the start of the workers apart: what a second core gains
is at most 2 over it. The network of the memory rows is small, so that
many photos are read; seconds are of ResNet-18 at 224 px beside one plain forward pass of the same photos.

    uv run python papers/studies/scale.py [--photos 500 20000] [--out papers/studies/scale.json]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from partlens.data.images import ImageSet
from partlens.network.performer import Performer
from partlens.network.preprocessing import Preprocessing
from partlens.network.stream import stream_maps
from partlens.network.zoo import load_performer
from partlens.selection.responses import stream_responses
from partlens.shards import Compute
from partlens.verbs.inspection import inspect
from partlens.verbs.select_features import select_features

FEATURES = 1000
SECONDS_PHOTOS = (64, 192)
TWO_PHOTOS = (320, 576)  # so many shards that both workers have some in either run
Work = Callable[[Performer, ImageSet, Path, Compute], object]


def pictures(count: int, side: int) -> ImageSet:
    """Two categories of noise, one of them with a red square; a fifth of the photos is held out."""

    def draw(row: int) -> np.ndarray:
        image = np.random.default_rng(row).integers(0, 120, (side, side, 3), dtype=np.uint8)
        if row % 2:
            image[side // 4 : -side // 4, side // 4 : -side // 4, 0] += 100
        return image

    return ImageSet.from_generator(
        draw,
        [f"p{row:07d}" for row in range(count)],
        categories=["ab"[row % 2] for row in range(count)],
        splits=["test" if row % 10 > 7 else "train" for row in range(count)],
        recipe=f"scale {side}",
    )


def small() -> Performer:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 300, 3, stride=2), nn.ReLU(), nn.Conv2d(300, 200, 3), nn.ReLU())
    module = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(200, 2))
    return load_performer(module.eval(), Preprocessing(size_px=(16, 16)))


def _select(performer: Performer, images: ImageSet, out: Path, where: Compute) -> object:
    return select_features(performer, images, out=out, pictures=8, keep_cache=True, compute=where)


def _inspect(performer: Performer, images: ImageSet, out: Path, where: Compute) -> object:
    return inspect(performer, images, out=out, tap="3", keep_cache=True, compute=where)


def _responses(performer: Performer, images: ImageSet, out: Path, where: Compute) -> object:
    config = {"top": (50, len(images)), "out": out, "compute": where}
    return stream_responses(performer, images, **config)


def _maps(performer: Performer, images: ImageSet, out: Path, where: Compute) -> object:
    return stream_maps(performer, images, [performer.layers[1].name], out, compute=where)


def _forward(performer: Performer, images: ImageSet, out: Path, where: Compute) -> object:  # noqa: ARG001
    from partlens.network.stream import stream

    return [None for _ in stream(performer, images, range(len(images)))]


MEMORY: dict[str, Work] = {"select-features": _select, "inspect": _inspect, "maps": _maps}
SECONDS: dict[str, Work] = {"forward": _forward, "responses": _responses, "maps": _maps}


def one(kind: str, name: str, count: int, workers: int) -> dict[str, float]:
    """Run one pass in this process and say what it took."""
    torch.set_num_threads(1)
    performer = small() if kind == "memory" else load_performer("torchvision:resnet18@random:0")
    images = pictures(count, 16 if kind == "memory" else 224)
    work = (MEMORY if kind == "memory" else SECONDS)[name]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        cpu = time.process_time()
        work(performer, images, out, Compute(workers=workers))
        cpu = time.process_time() - cpu
        disk = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"photos": count, "cpu_s": cpu + ended.ru_utime + ended.ru_stime, "resident": most, "disk": disk}


def apart(kind: str, name: str, count: int, workers: int = 1) -> dict[str, float]:
    """The same in a process of its own, so that memory is that of this pass alone."""
    words = [sys.executable, __file__, "--one", kind, name, str(count), str(workers)]
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    sys.stderr.write(f"{kind} {name} {count} on {workers}: {found}\n")
    return found


def slope(pair: list[dict[str, float]], what: str) -> float:
    few, many = pair
    return (many[what] - few[what]) / (many["photos"] - few["photos"])


def measured(photos: tuple[int, int]) -> dict[str, object]:
    memory = {name: [apart("memory", name, count) for count in photos] for name in MEMORY}
    seconds = {name: [apart("seconds", name, count) for count in SECONDS_PHOTOS] for name in SECONDS}
    forward = slope(seconds["forward"], "cpu_s")
    two = [apart("seconds", "responses", count, 2) for count in TWO_PHOTOS]
    return {
        "features_of_the_small_network": FEATURES,
        "memory": {
            name: {
                "photos": list(photos),
                "growth_of_resident_memory": pair[1]["resident"] / pair[0]["resident"] - 1,
                "disk_bytes_per_photo": slope(pair, "disk"),
                "cpu_seconds_per_1000_photos": 1000 * slope(pair, "cpu_s"),
            }
            for name, pair in memory.items()
        },
        "resnet18": {
            name: {
                "cpu_over_a_forward_pass": slope(pair, "cpu_s") / forward,
                "disk_bytes_per_photo": slope(pair, "disk"),
            }
            for name, pair in seconds.items()
        },
        "two_processes": slope(two, "cpu_s") / slope(seconds["responses"], "cpu_s"),
        "runs": {"memory": memory, "seconds": seconds, "two": two},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, nargs=2, default=(500, 20_000))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        kind, name, count, workers = given.one
        print(json.dumps(one(kind, name, int(count), int(workers))))
    else:
        given.out.write_text(json.dumps(measured(tuple(given.photos)), indent=2) + "\n")
