"""What a GPU changes: verbs with ``--device`` on cuda against the CPU, photos a second, an epoch's share of the peak.

Where no GPU is at hand it says so, checks itself with the CPU in the GPU's place, and ends with 0. It is made to take
less than eight minutes on one card.

    uv run python papers/gpu_check.py [--device cuda] [--out FILE.json]
"""
# ruff: noqa: INP001

from __future__ import annotations

import argparse
import functools
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from partlens.data.flowers import generated_flowers
from partlens.data.images import ImageSet
from partlens.network.performer import Performer
from partlens.network.preprocessing import Preprocessing
from partlens.network.stream import stream
from partlens.network.zoo import load_performer
from partlens.selection.responses import stream_responses
from partlens.verbs.evaluate import evaluate
from partlens.verbs.explain import explain
from partlens.verbs.fit_explainer import fit_explainer
from partlens.verbs.inspection import inspect
from partlens.verbs.parts import parts
from partlens.verbs.select_features import select_features

LARGEST_ERROR = 2e-3  # of descriptors and scores, the norm of the difference over the norm: float32 with TF32 off
LARGEST_SHARE_APART = 0.05  # of accuracies and of the explainer's p
WANTED_SHARE_OF_PEAK = 0.4
CATEGORIES = ("petal-red", "petal-blue")


def network(tiny: bool) -> Performer:
    """Return the network that the verbs are compared on."""
    torch.manual_seed(0)
    if not tiny:
        return load_performer("torchvision:resnet18@random:0")
    layers = (
        nn.Conv2d(3, 8, 5, 2, 2),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, 1, 1),
        nn.ReLU(),
    )
    module = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2))
    return load_performer(module.eval(), Preprocessing(size_px=(48, 48)))


def apart(one: np.ndarray, other: np.ndarray) -> float:
    """Return the norm of the difference over the norm."""
    first, second = np.asarray(one, np.float64), np.asarray(other, np.float64)
    return float(np.linalg.norm(first - second) / max(np.linalg.norm(first), 1e-30))


def on_both(work: Callable[[str], Any], device: str) -> tuple[Any, Any, float]:
    """Do something on the CPU and on the device; return both results and how many times as fast the device was."""
    found, seconds = [], []
    for where in ("cpu", device):
        started = time.monotonic()
        found.append(work(where))
        seconds.append(time.monotonic() - started)
    return found[0], found[1], seconds[0] / max(seconds[1], 1e-9)


def compared(device: str, folder: Path, *, tiny: bool) -> dict[str, dict[str, float]]:
    """Run the verbs on both and say how far apart their results are."""
    performer, flowers = (
        network(tiny),
        generated_flowers(60 if tiny else 400, seed=3, size=48 if tiny else 96, categories=CATEGORIES),
    )
    small = {"epochs": 2, "warmup_epochs": 1, "precision": "float32", **({"views": 2, "batch_size": 8} if tiny else {})}

    def kept(name: str, where: str) -> dict[str, Any]:
        return {"out": Path(tempfile.mkdtemp(dir=folder, prefix=name)) / "run", "compute": {"device": where}}

    def read(where: str) -> Any:
        return stream_responses(performer.on(torch.device(where)), flowers)

    cpu, gpu, faster = on_both(read, device)
    rows = {
        "pass": {
            "error": max(apart(getattr(cpu, n), getattr(gpu, n)) for n in ("descriptor", "logits")),
            "faster": faster,
        }
    }
    chosen, same, faster = on_both(
        lambda where: select_features(performer, flowers, pictures=0, **kept("select", where)), device
    )
    rows["select-features"] = {"apart": abs(chosen.found.accuracy.value - same.found.accuracy.value), "faster": faster}
    fitted, same, faster = on_both(
        lambda where: fit_explainer(
            performer, flowers, category=CATEGORIES[0], seeds=1, config=small, **kept("fit", where)
        ),
        device,
    )
    rows["fit-explainer"] = {"apart": abs(fitted.history[-1]["p"] - same.history[-1]["p"]), "faster": faster}
    rows |= compared_on_a_run(device, fitted.path, performer, flowers)
    if not tiny:
        one, other, faster = on_both(lambda where: inspect(performer, flowers, **kept("inspect", where)), device)
        pairs = zip(one.categories, other.categories, strict=True)
        rows["inspect"] = {"apart": float(np.mean([a.sentence != b.sentence for a, b in pairs])), "faster": faster}
    return rows


def compared_on_a_run(
    device: str, fitted: Path, performer: Performer, flowers: ImageSet
) -> dict[str, dict[str, float]]:
    """Run the verbs that read a finished explainer on both, each on a copy of it."""
    given = {"model": performer}
    parts(fitted, flowers, **given)  # explain shares the score among them

    def on(where: str) -> tuple[Path, dict[str, Any]]:
        copy = shutil.copytree(fitted, Path(tempfile.mkdtemp(dir=fitted.parent)) / "run")
        return copy, {**given, "compute": {"device": where}}

    def evaluated(where: str) -> Any:
        run, options = on(where)
        return evaluate(run, flowers, rounds=5, fields="occlusion", **options)

    def shared(where: str) -> Any:
        run, options = on(where)
        return parts(run, flowers, **options).contributions

    def explained(where: str) -> np.ndarray:
        run, options = on(where)
        folders = explain(run, flowers.take(range(4)), **options)
        return np.concatenate([load_file(each / "arrays.safetensors")["part_shapley"].ravel() for each in folders])

    def fidelity(scores: Any) -> float:
        return float(np.mean([each.value for each in scores.reconstruction.variance_kept.values()]))

    one, other, faster = on_both(evaluated, device)
    rows = {"evaluate": {"apart": abs(fidelity(one) - fidelity(other)), "faster": faster}}
    one, other, faster = on_both(shared, device)
    kept = [each.interpretable_share.value for each in (one, other)]
    rows["parts"] = {"apart": abs(kept[0] - kept[1]), "faster": faster}
    one, other, faster = on_both(explained, device)
    rows["explain"] = {"error": apart(one, other), "faster": faster}
    return rows


def photos_per_second(performer: Performer, count: int) -> float:
    """Return how many photos a pass reads in a second, drawing and preprocessing included; the first batch apart."""
    side = performer.preprocessing.size_px[0]
    images = ImageSet.from_generator(
        lambda row: np.full((side, side, 3), row % 256, np.uint8), [f"{row}" for row in range(count)]
    )
    taken = stream(performer, images, range(count), [performer.tap])
    before = len(next(taken).rows)
    started = time.monotonic()
    read = sum(len(batch.rows) for batch in taken)
    assert read == count - before
    return read / max(time.monotonic() - started, 1e-9)


def peak(device: str, side: int) -> float:
    """Return operations a second of a bfloat16 product of square matrices."""
    left = torch.randn(side, side, device=device, dtype=torch.bfloat16)

    def product(times: int) -> float:
        started = time.monotonic()
        for _ in range(times):
            found = left @ left
        float(found[0, 0])  # waits
        return time.monotonic() - started

    product(3)
    return 10 * 2 * side**3 / product(10)


def share_of_peak(device: str, folder: Path, *, tiny: bool) -> float:
    """Return what share of the peak the epochs of the joint phase reach, in bfloat16."""
    performer, flowers = (
        network(tiny),
        generated_flowers(60 if tiny else 400, seed=3, size=48 if tiny else 96, categories=CATEGORIES),
    )

    def fit(epochs: int) -> tuple[float, float]:
        config = {
            "epochs": epochs,
            "warmup_epochs": 0,
            "teachers": 0,
            "precision": "bfloat16",
            "patience": 0,
            **({"batch_size": 8} if tiny else {}),
        }
        fitting = functools.partial(
            fit_explainer,
            performer,
            flowers,
            category=CATEGORIES[0],
            seeds=1,
            config=config,
            compute={"device": device},
        )
        with FlopCounterMode(display=False) as counted:
            fitting(out=folder / f"{epochs} counted")
        timed = fitting(out=folder / f"{epochs} timed")
        return float(counted.get_total_flops()), timed.history[-1]["seconds"]

    one, two = fit(1), fit(2)
    return (two[0] - one[0]) / max(two[1], 1e-9) / peak(device, 256 if tiny else 8192)


def checked(device: str, *, tiny: bool) -> tuple[dict[str, Any], list[str]]:
    """Return the figures and what misses its bound."""
    with tempfile.TemporaryDirectory() as place:
        found: dict[str, Any] = {"device": device, "compared": compared(device, Path(place), tiny=tiny)}
        found["photos_per_second"] = photos_per_second(network(tiny).on(torch.device(device)), 96 if tiny else 4096)
        found["epoch_share_of_peak"] = share_of_peak(device, Path(place), tiny=tiny)
    missed = [
        f"{verb}: {name} {row[name]:.3g}"
        for verb, row in found["compared"].items()
        for name, bound in (("error", LARGEST_ERROR), ("apart", LARGEST_SHARE_APART))
        if row.get(name, 0.0) > bound
    ]
    if not tiny and found["epoch_share_of_peak"] < WANTED_SHARE_OF_PEAK:
        missed.append(
            f"an epoch reaches {found['epoch_share_of_peak']:.0%} of the peak, wanted {WANTED_SHARE_OF_PEAK:.0%}"
        )
    return found, missed


def main(words: Sequence[str] | None = None) -> int:
    """Run the check; 1 where a bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(words)
    tiny = given.device == "cpu" or not torch.cuda.is_available()
    if tiny:
        sys.stdout.write(
            "No GPU is at hand or asked for: the check runs itself, small, on the CPU; no figure is a GPU's.\n"
        )
    found, missed = checked("cpu" if tiny else given.device, tiny=tiny)
    text = json.dumps({**found, "missed": missed}, indent=2)
    sys.stdout.write(f"{text}\n")
    if given.out is not None and not tiny:
        given.out.write_text(text + "\n")
    return int(bool(missed))


if __name__ == "__main__":
    raise SystemExit(main())
