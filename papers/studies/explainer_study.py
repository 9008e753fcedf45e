"""What each idea gives: variants of the explainer on one category, all measured on held-out photos.

Each variant is an ordinary run (fit-explainer, evaluate) that shares the cached maps; finished ones are kept, so the
study goes on where it was stopped. Results: explainer_study.CATEGORY.json and the table in docs/study.md.

    uv run python benchmarks/explainer_study.py MODEL DATA CATEGORY WORK_FOLDER [VARIANT or VARIANT=FINISHED_RUN ...]
    uv run python benchmarks/explainer_study.py --table
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

import partlens
from partlens.progress import Progress

HERE = Path(__file__).parent
# A track that learns with the whole network from the first step, as in the papers.
PLAIN: dict[str, Any] = {
    "initialisation": "identity",
    "diversity_weight": 0.0,
    "equivariance_weight": 0.0,
    "warmup_epochs": 0,
    "learning_rate_joint": 1e-3,
    "score_scale_nats": 0.0,
    "filter_decay": 1.0,
}
# Candidates in a third of their epochs, to compare more settings in the same time.
SHORT: dict[str, Any] = {"warmup_epochs": 8, "epochs": 6}
# One weight for nine taps, and the rates that it bears.
BOX: dict[str, Any] = {"kernel": "box", "learning_rate": 3e-3, "learning_rate_joint": 3e-4}
# What the papers' loss does by itself, and without each of its pieces.
ALONE: dict[str, Any] = {
    "initialisation": "identity",
    "diversity_weight": 0.0,
    "equivariance_weight": 0.0,
    "warmup_epochs": 8,
    "epochs": 4,
    "learning_rate": 1e-3,
    "learning_rate_joint": 1e-4,
}
# The present default in fewer epochs and views.
NOW: dict[str, Any] = {"warmup_epochs": 12, "epochs": 8, "views": 5}
NOW_BACKGROUND = 400
NOW_VARIANTS: dict[str, dict[str, Any]] = {
    "now": {},
    "now, seed 1": {"seed": 1},
    "now, seed 2": {"seed": 2},
    "now, approximate gradient": {"gradient": "approximate"},
    "now, maps scaled to 2 nats": {"score_scale_nats": 2.0},
    "now, maps scaled to 32 nats": {"score_scale_nats": 32.0},
    "now, filter loss ten times weaker": {"filter_ratio": 1.0},
    "now, filter loss ten times stronger": {"filter_ratio": 100.0},
    "now, filter loss fades (1 / epoch)": {"filter_decay": 1.0},
    "now, equivariance 8": {"equivariance_weight": 8.0},
    "now, diversity 8 above 0.25": {"diversity_weight": 8.0, "diversity_target": 0.25},
    "now, teachers more various (1.5)": {"teacher_variety": 1.5},
    "now, no teachers, from the identity": {
        "teachers": 0,
        "teacher_match": False,
        "initialisation": "identity",
        "hidden_filters": 0,
    },
    "now, largest cells": {"peak": "largest"},
    "now, without mask": {"mask": False},
    "now, shuffled templates": {"templates": "shuffled"},
    "now, no dropout": {"dropout": 0.0},
    "now, 1,500 background photos": {"background": 1500},
    "now, tap layer2": {"tap": "layer2"},
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "partlens (default)": ("partlens", {}),
    "candidates": ("candidates", {}),
    "paper preset": ("paper", {"epochs": 24, "patience": 0, "precision": "bfloat16"}),
    "exact loss, gradient ratio 1.0/N": ("candidates", {**PLAIN, "filter_ratio": 1.0}),
    "exact loss, gradient ratio 0.3/N": ("candidates", {**PLAIN, "filter_ratio": 0.3}),
    "no diversity": ("candidates", {"diversity_weight": 0.0}),
    "no equivariance": ("candidates", {"equivariance_weight": 0.0}),
    "no warm-up": ("candidates", {"warmup_epochs": 0}),
    "no part candidates (identity)": ("candidates", {"initialisation": "identity", "learning_rate": 1e-3}),
    "part candidates, track not learned": (
        "candidates",
        {"warmup_epochs": 0, "learning_rate_joint": 1e-12, "filter_ratio": 0.0},
    ),
    "track learns fast in the joint phase": ("candidates", {"learning_rate_joint": 1e-4, "filter_ratio": 3.0}),
    "ordinary track learns (2e-4)": ("candidates", {"learning_rate_ordinary": 2e-4}),
    "eta 1.5e5 (paper's)": ("candidates", {"eta": 1.5e5, "p_init": 0.1}),
    "eta 1e6, p from 0.3": ("candidates", {"eta": 1e6, "p_init": 0.3}),
    "eta 3e6, p from 0.5": ("candidates", {"eta": 3e6, "p_init": 0.5}),
    "short": ("candidates", SHORT),
    "short, no diversity": ("candidates", {**SHORT, "diversity_weight": 0.0}),
    "short, evidence 4, diversity 16": (
        "candidates",
        {**SHORT, "learning_rate": 3e-4, "evidence_weight": 4.0, "diversity_weight": 16.0},
    ),
    "short, evidence 16 (power 8), diversity 4": (
        "candidates",
        {**SHORT, "learning_rate": 3e-4, "evidence_weight": 16.0, "evidence_power": 8.0, "diversity_weight": 4.0},
    ),
    "short, without mask": ("candidates", {**SHORT, "mask": False}),
    "short, shuffled templates": ("candidates", {**SHORT, "templates": "shuffled"}),
    "short, box kernel": ("candidates", {**SHORT, **BOX}),
    "short, box kernel, evidence 4, diversity 16": (
        "candidates",
        {**SHORT, **BOX, "evidence_weight": 4.0, "diversity_weight": 16.0},
    ),
    "filter loss only, from the identity": ("candidates", ALONE),
    "… without mask": ("candidates", {**ALONE, "mask": False}),
    "… with shuffled templates": ("candidates", {**ALONE, "templates": "shuffled"}),
    "… without filter loss": ("candidates", {**ALONE, "warmup_epochs": 0, "epochs": 12, "filter_ratio": 0.0}),
    "short, eta 1e6, p from 0.3": ("candidates", {**SHORT, "eta": 1e6, "p_init": 0.3}),
    **{name: ("partlens", {**NOW, **changes}) for name, changes in NOW_VARIANTS.items()},
}
COLUMNS = {
    "instability": ("explainer", "instability"),
    "consistency": ("explainer", "consistency"),
    "correlation": ("explainer", "filter_correlation"),
    "parts": ("explainer", "distinct_parts"),
    "spread": ("explainer", "peak_spread_cells"),
    "border": ("explainer", "border_frac"),
    "dead": ("explainer", "dead_frac"),
    "p": ("p",),
    "agreement": ("reconstruction", "agreement_top1"),
    "background": ("reconstruction", "agreement_top1_background"),
    "error +points": ("reconstruction", "error_increase_points"),
}
# Of the variants of the present default also: how much of the last target is lost.
LOST = ("reconstruction", "relative_error", "last")


def pick(scores: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    for name in path:
        scores = list(scores.values())[-1] if name == "last" else scores[name]
    return scores


def study(model: str, data: str, category: str, work: Path, wanted: list[str]) -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    results = HERE / f"explainer_study.{category}.json"
    before = json.loads(results.read_text()) if results.exists() else {}
    known = before.get("variants", {})
    finished = dict(w.split("=", 1) for w in wanted if "=" in w)
    for name, (preset, changes) in VARIANTS.items():
        if wanted and name not in wanted and name not in finished:
            continue
        run = Path(finished.get(name, work / name.replace(" ", "-").replace(",", "").replace("/", "-per-")))
        if name in known and not wanted and not run.exists():
            continue  # committed, and not in this work folder
        now = name in NOW_VARIANTS
        fields = {key: value for key, value in changes.items() if key not in ("tap", "background")}
        tap, background = changes.get("tap", "layer3"), changes.get("background", NOW_BACKGROUND if now else 1500)
        # Presets differ in their views; what else decides the cached maps stands in its name, too.
        which = f"now-{tap}-{background}-{fields.get('seed', 0)}" if now else preset
        arguments: dict[str, Any] = {"out": run, "category": category, "tap": tap, "preset": preset, "seeds": 1}
        if name not in finished:
            show = Progress.terminal()
            arguments |= {"cache": work / f"cache-{which}", "background": background, "progress": show}
            partlens.fit_explainer(model, data, config=fields, **arguments)
        scores = partlens.evaluate(run, gallery="none")
        manifest = json.loads((run / "run.json").read_text())
        known[name] = {
            "preset": preset,
            "changes": changes,
            "seconds": manifest["seconds"],
            "scores": {
                **{column: pick(scores, path) for column, path in COLUMNS.items()},
                "lost": pick(scores, LOST),
            },
            "warnings": scores["warnings"],
        }
        nulls = {kind: scores["nulls"][kind]["instability"] for kind in ("random", "centre", "corner")}
        own = {
            layer: {c: scores["performer"][layer][p[1]] for c, p in COLUMNS.items() if p[0] == "explainer"}
            for layer in ("tap", "top")
        }
        if "tap" in changes:
            own = before.get("performer", own)  # the table's rows are of layer3
        content = {
            "category": category,
            "model": manifest["performer"]["name"],
            "weights_sha256": manifest["performer"]["weights_sha256"],
            "data_fingerprint": manifest["data"]["fingerprint"],
            "held_out_photos": scores["photos"],
            "landmarks": scores["landmarks"],
            "versions": manifest["versions"],
            "nulls": nulls,
            "performer": own,
            "variants": known,
        }
        results.write_text(json.dumps(content, indent=2) + "\n")


def table() -> str:
    lines = []
    for path in sorted(HERE.glob("explainer_study.*.json")):
        content = json.loads(path.read_text())
        nulls = ", ".join(f"{kind} {value['value']:.3f}" for kind, value in content["nulls"].items())
        landmarks = ", ".join(f"{name} {count}" for name, count in content["landmarks"].items())
        lines += [
            f"\n### {content['category']}: {content['held_out_photos']} held-out photos ({landmarks})\n",
            f"Instability of the nulls on the same photos: {nulls}.",
        ]
        now = {name: content["variants"][name] for name in NOW_VARIANTS if name in content["variants"]}
        before = {name: one for name, one in content["variants"].items() if name not in now}
        for variants, columns in ((now, [*COLUMNS, "lost"]), (before, list(COLUMNS))):
            if not variants:
                continue
            lines += ["\n| variant | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
            for layer, label in (("tap", "*performer, layer3*"), ("top", "*performer, layer4*")):
                cells = [content["performer"][layer].get(c) for c in columns]
                lines.append(f"| {label} | " + " | ".join(shown(c) for c in cells) + " |")
            for name, variant in variants.items():
                lines.append(f"| {name} | " + " | ".join(shown(variant["scores"][c]) for c in columns) + " |")
    return "\n".join(lines) + "\n"


def shown(estimate: dict[str, Any] | None) -> str:
    if estimate is None or estimate["value"] is None:
        return "–"
    low, high = estimate["interval"]
    interval = "" if low is None or low == high else f" <small>[{low:.3g}, {high:.3g}]</small>"
    return f"{estimate['value']:.3g}{interval}"


def main() -> None:
    if sys.argv[1:] == ["--table"]:
        page = HERE.parent / "docs" / "study.md"
        text = page.read_text()
        mark = "<!-- table: benchmarks/explainer_study.py --table -->"
        page.write_text(text[: text.index(mark) + len(mark)] + "\n" + table())
        return
    model, data, category, work, *wanted = sys.argv[1:]
    study(model, data, category, Path(work), wanted)


if __name__ == "__main__":
    main()
