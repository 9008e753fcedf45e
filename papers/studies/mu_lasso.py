"""The μ-lasso against spgl1, SPAMS and scikit-learn's LARS: time to a relative gap of 1e-4, and whether it is true.

Three problems, made as descriptors are (sparse energies of correlated filters, layers that sum to one, length one; four
filters planted for each class):

    plain       4,096 features, 10,000 images, 20 classes, mu 10
    copies      the same with 100 copied and 300 dead filters among them
    large       19,456 features (VGG-F), 20,000 images, 100 classes; the rivals get a few classes

Each run is a process of its own, so that memory can be compared; rivals take turns, round by round. Time covers all
that happens between the responses in memory (float32) and the weights: conversion, Gram matrix (also reported alone)
and solving. Data of ``large`` are a memory map for ours, whose time includes reading them. The gap is computed here, in
float64 with plain NumPy, at the weights that were returned. SPGL1 has no non-negative mode and is compared with our
signed one; it gets the loosest of its tolerances that reaches the gap, and a single run, being slow.

    uv run python papers/studies/mu_lasso.py                 # plain and copies, 3 rounds
    uv run python papers/studies/mu_lasso.py large           # some 20 minutes on one core, 10 GB

Needs spgl1 and spams-bin.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

THREADS = "1"
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = THREADS

import numpy as np  # noqa: E402

MU, GAP, ROUNDS, SEED = 10.0, 1e-4, 3, 0
PROBLEMS: dict[str, dict[str, int]] = {
    "plain": {"features": 4096, "images": 10_000, "classes": 20, "copies": 0, "dead": 0},
    "copies": {"features": 4096, "images": 10_000, "classes": 20, "copies": 100, "dead": 300},
    "large": {"features": 19_456, "images": 20_000, "classes": 100, "copies": 0, "dead": 0},
    "small": {"features": 300, "images": 400, "classes": 5, "copies": 20, "dead": 20},  # to try the script
}
# Contestant: non-negative, classes it gets on the large problem (on the others: all, but a few for spgl1 and its peer).
CONTESTANTS = {
    "ours": (True, None),
    "ours from the Gram matrix": (True, None),
    "SPAMS float64": (True, 2),
    "SPAMS float32": (True, 2),
    "scikit-learn LARS": (True, 2),
    "ours signed": (False, 2),
    "spgl1 signed": (False, 2),
}
FEW = 2


def make(folder: Path, features: int, images: int, classes: int, copies: int, dead: int) -> None:
    """Write responses and labels of a problem."""
    rng = np.random.default_rng(SEED)
    kind = rng.integers(0, classes, images)
    latent = rng.gamma(0.3, 1.0, (images, 40)).astype(np.float32)
    energy = np.lib.format.open_memmap(folder / "x.npy", mode="w+", dtype=np.float32, shape=(images, features))
    special = rng.choice(features, dead + copies, replace=False)
    live = np.setdiff1d(np.arange(features), special)
    planted = rng.permutation(live)[: 4 * classes].reshape(classes, 4)
    copied = np.concatenate([planted.ravel(), rng.choice(live, copies)])[:copies]
    blocks = np.array_split(np.arange(features), 8)
    for block in blocks:
        mixing = (rng.random((40, len(block))) < 0.1) * rng.gamma(1.0, 1.0, (40, len(block)))
        here = 0.5 * latent @ mixing.astype(np.float32) + rng.standard_normal((images, len(block)), dtype=np.float32)
        here = np.maximum(here + rng.normal(-0.5, 0.5, len(block)).astype(np.float32), 0)
        energy[:, block[0] : block[-1] + 1] = np.square(here * rng.gamma(1.0, 1.0, len(block)).astype(np.float32))
    for j in range(classes):
        rows = np.flatnonzero(kind == j)
        for feature in planted[j]:
            column = 0.3 * np.asarray(energy[:, feature])
            answers = rng.gamma(2.0, 2.0, len(rows)) * (rng.random(len(rows)) < 0.8)
            column[rows] += (answers * (3 * column.std() + 0.1)).astype(np.float32)
            energy[:, feature] = column
    energy[:, special[:dead]] = 0
    energy[:, special[dead:]] = energy[:, copied]
    for start in range(0, images, 2000):
        rows = np.array(energy[start : start + 2000])
        for block in blocks:
            part = rows[:, block[0] : block[-1] + 1]
            part /= np.maximum(part.sum(1, keepdims=True), 1e-12)
        energy[start : start + 2000] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    energy.flush()
    np.save(folder / "l.npy", np.eye(classes)[kind])
    np.save(folder / "planted.npy", planted)


def referee(x: np.ndarray, labels: np.ndarray, weights: np.ndarray, *, nonnegative: bool) -> dict[str, Any]:
    """Objective, Frank-Wolfe gap and feasibility from their definitions."""
    objective, slope = np.zeros(labels.shape[1]), np.zeros(weights.shape)
    for start in range(0, len(x), 2000):
        rows = np.asarray(x[start : start + 2000], dtype=np.float64)
        rest = rows @ weights - labels[start : start + 2000]
        objective += (rest**2).sum(0)
        slope += 2 * rows.T @ rest
    steepest = np.maximum(0, (-slope).max(0)) if nonnegative else np.abs(slope).max(0)
    gap = (slope * weights).sum(0) + MU * steepest
    norm = float(np.abs(weights).sum(0).max())
    lowest = float(weights.min()) if nonnegative else 0.0
    feasible = norm <= MU * (1 + 1e-5) and lowest >= -1e-9  # rounding is forgiven
    worst = float((gap / objective).max())
    return {
        "relative_gap": worst,
        "largest_norm": norm,
        "lowest_weight": lowest,
        "nonzeros_mean": float((weights != 0).sum(0).mean()),
        "objective_sum": float(objective.sum()),
        "right": bool(feasible and worst <= GAP),
    }


# Contestants: responses and labels in, weights and the time of the Gram matrix (or None) out


def run_ours(x: np.ndarray, labels: np.ndarray, *, nonnegative: bool) -> tuple[np.ndarray, float | None]:
    from partlens.selection.lasso import mu_lasso

    return mu_lasso(x, labels, MU, nonnegative, tolerance=GAP).weights.numpy(), None


def run_ours_gram(x: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, float | None]:
    import torch

    from partlens.selection.inner_products import FromGram
    from partlens.selection.lasso import mu_lasso

    started = time.process_time()
    FromGram(x, torch.from_numpy(labels).double(), torch.device("cpu"))
    took = time.process_time() - started
    return mu_lasso(x, labels, MU, tolerance=GAP, method="gram").weights.numpy(), took


def run_spams(x: np.ndarray, labels: np.ndarray, kind: type) -> tuple[np.ndarray, float | None]:
    import spams

    found = spams.lasso(
        np.asfortranarray(labels, dtype=kind),
        D=np.asfortranarray(x, dtype=kind),
        lambda1=MU,
        mode=0,
        pos=True,
        numThreads=1,
    )
    return np.asarray(found.todense(), dtype=np.float64), None


def run_lars(x: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, float | None]:
    """Follow the path on one shared Gram matrix to the point where the weights sum to mu."""
    import warnings

    from sklearn.linear_model import lars_path_gram

    warnings.simplefilter("ignore")  # it warns when it stops early; the referee sees that
    started = time.process_time()
    design = np.asarray(x, dtype=np.float64)
    gram = design.T @ design
    took = time.process_time() - started
    weights = np.zeros((x.shape[1], labels.shape[1]))
    for j in range(labels.shape[1]):
        _, _, path = lars_path_gram(
            Xy=design.T @ labels[:, j], Gram=gram, n_samples=len(x), method="lasso", positive=True, max_iter=2000
        )
        norms = path.sum(0)
        at = int(np.searchsorted(norms, MU))
        if at >= len(norms):
            weights[:, j] = path[:, -1]
        else:
            share = (MU - norms[at - 1]) / (norms[at] - norms[at - 1])
            weights[:, j] = (1 - share) * path[:, at - 1] + share * path[:, at]
    return weights, took


def run_spgl1(x: np.ndarray, labels: np.ndarray, tolerance: float) -> tuple[np.ndarray, float | None]:
    import spgl1

    design = np.asarray(x, dtype=np.float64)
    columns = [
        spgl1.spg_lasso(design, labels[:, j], MU, opt_tol=tolerance, iter_lim=5000)[0] for j in range(labels.shape[1])
    ]
    return np.stack(columns, axis=1), None


def one(folder: Path, contestant: str, classes: int, tolerance: float) -> None:
    """Run one contestant once in this process."""
    runs: dict[str, Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, float | None]]] = {
        "ours": lambda x, labels: run_ours(x, labels, nonnegative=True),
        "ours signed": lambda x, labels: run_ours(x, labels, nonnegative=False),
        "ours from the Gram matrix": run_ours_gram,
        "SPAMS float64": lambda x, labels: run_spams(x, labels, np.float64),
        "SPAMS float32": lambda x, labels: run_spams(x, labels, np.float32),
        "scikit-learn LARS": run_lars,
        "spgl1 signed": lambda x, labels: run_spgl1(x, labels, tolerance),
    }
    run = runs[contestant]
    rng = np.random.default_rng(0)
    run(rng.random((50, 20)).astype(np.float32), np.eye(2)[rng.integers(0, 2, 50)])  # imports and first calls
    mapped = np.load(folder / "x.npy", mmap_mode="r")
    x = mapped if contestant.startswith("ours") and mapped.nbytes > 1e9 else np.array(mapped)
    labels = np.load(folder / "l.npy")[:, :classes]
    cpu, wall = time.process_time(), time.perf_counter()
    weights, gram = run(x, labels)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    np.save(folder / "w.npy", weights)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"cpu_s": cpu, "wall_s": wall, "gram_cpu_s": gram, "peak_mb": peak}))


def started(folder: Path, contestant: str, classes: int, tolerance: float) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, "--one", str(folder), contestant, str(classes), str(tolerance)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{contestant}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(problem: str, rounds: int) -> dict[str, Any]:
    shape = PROBLEMS[problem]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, **shape)
        x, labels = np.load(folder / "x.npy", mmap_mode="r"), np.load(folder / "l.npy")
        planted = np.load(folder / "planted.npy")
        counts, runs, verdicts, tolerances = {}, {c: [] for c in CONTESTANTS}, {}, dict.fromkeys(CONTESTANTS, 0.0)
        for contestant, (_, few) in CONTESTANTS.items():
            whole = contestant in {"ours", "ours from the Gram matrix"}
            few_here = few if problem == "large" else FEW if contestant.endswith("signed") else None
            counts[contestant] = shape["classes"] if whole or few_here is None else few_here
        for turn in range(rounds):
            for contestant, (nonnegative, _) in CONTESTANTS.items():
                count, slow = counts[contestant], contestant.startswith("spgl1")
                if slow and turn > 0:
                    continue
                options = [1e-3, 1e-4, 1e-5] if slow else [tolerances[contestant]]
                for tolerance in options:
                    taken = started(folder, contestant, count, tolerance)
                    verdict = referee(x, labels[:, :count], np.load(folder / "w.npy"), nonnegative=nonnegative)
                    tolerances[contestant] = tolerance
                    if verdict["right"]:
                        break
                runs[contestant].append(taken)
                weights = np.abs(np.load(folder / "w.npy"))
                inside = [weights[planted[j], j].sum() / max(weights[:, j].sum(), 1e-30) for j in range(count)]
                verdicts[contestant] = {**verdict, "planted_share_mean": float(np.mean(inside))}
                print(problem, contestant, {**taken, **verdict}, flush=True)
    table = {}
    base = statistics.median(r["cpu_s"] for r in runs["ours"]) / counts["ours"]
    base_signed = statistics.median(r["cpu_s"] for r in runs["ours signed"]) / counts["ours signed"]
    for contestant, taken_all in runs.items():
        cpu, wall = sorted(r["cpu_s"] for r in taken_all), sorted(r["wall_s"] for r in taken_all)
        grams = [r["gram_cpu_s"] for r in taken_all if r["gram_cpu_s"] is not None]
        per_class = statistics.median(cpu) / counts[contestant]
        table[contestant] = {
            "classes": counts[contestant],
            "runs": len(taken_all),
            "cpu_s": {"median": round(statistics.median(cpu), 3), "min": round(cpu[0], 3), "max": round(cpu[-1], 3)},
            "wall_s": {
                "median": round(statistics.median(wall), 3),
                "min": round(wall[0], 3),
                "max": round(wall[-1], 3),
            },
            "gram_cpu_s": round(statistics.median(grams), 3) if grams else None,
            "cpu_s_per_class": round(per_class, 4),
            "times_ours_per_class": round(per_class / (base_signed if contestant.endswith("signed") else base), 2),
            "peak_mb": round(max(r["peak_mb"] for r in taken_all)),
            "tolerance": tolerances[contestant] or None,
            **{k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in verdicts[contestant].items()},
        }
    return {**shape, "mu": MU, "rounds": rounds, "contestants": table}


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        one(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), float(sys.argv[5]))
        return
    path = Path(__file__).with_suffix(".json")
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    try:
        versions = {p: importlib.metadata.version(p) for p in ("numpy", "torch", "scikit-learn", "spgl1", "spams-bin")}
    except importlib.metadata.PackageNotFoundError as error:
        sys.exit(f"Expected spgl1 and spams-bin, got {error.name} not installed. Run: pip install spgl1 spams-bin")
    setting = {"seed": SEED, "threads": int(THREADS), "wanted_relative_gap": GAP, "python": platform.python_version()}
    for problem in sys.argv[1:] or ["plain", "copies"]:
        found = compare(problem, 1 if problem == "large" else ROUNDS)
        if problem == "small":
            print(json.dumps(found, indent=2))
            continue
        result[problem] = {**setting, "versions": versions, **found}
        path.write_text(json.dumps(result, indent=2) + "\n")
        print(json.dumps(result[problem], indent=2))


if __name__ == "__main__":
    main()
