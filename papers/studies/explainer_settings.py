"""What the papers leave open of an explainer, tried on one category: after each second epoch, everything at once.

    python papers/studies/explainer_settings.py NETWORK CATEGORY runs/reproduction SETTINGS.json RESULT.json

NETWORK is ``alexnet`` or ``vgg16``; ``runs/reproduction`` has the tables of ``reproduction.py`` and performers.
SETTINGS.json is a list of settings: ``name``, ``preset``, fields of the explainer's configuration and ``start``, the
interpretable track's: ``random`` as in the product, or ``copy``: conv-interp-1 the identity, conv-interp-2 the
convolution it replaces. Results: papers/results/reproduction/settings-alexnet-cat.json.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from partlens.data.images import ImageSet
from partlens.evaluation.places import MeasuredPhotos
from partlens.explainer.config import ExplainerConfig
from partlens.explainer.network import (
    Explainer,
    build_explainer,
    explainer_structure,
    identity_kernel,
    performer_head,
)
from partlens.explainer.training import train_explainer
from partlens.explainer.views import TrainingMaps, viewed_images
from partlens.metrics.localisation import (
    dead_filters,
    distinct_parts,
    filter_correlation_of,
    instability_per_filter,
    null_peaks,
    peaks_from_cells,
    spread_per_filter,
)
from partlens.network.receptive_field import grid_of
from partlens.network.stream import stream_maps
from partlens.network.zoo import load_performer
from partlens.verbs.runs import sampled
from partlens_papers.networks.remembered import remembering
from partlens_papers.networks.settings import paper_setting

OTHERS, AWAY, EVERY = 200, 150, 2  # training and held-out photos of anything else; epochs between measurements
FACTORIES = {"alexnet": "alexnet_caffe", "vgg16": "vgg16"}


class Bench:
    """One performer with the maps of its training and held-out photos."""

    def __init__(self, network: str, category: str, folder: Path, kept: Path) -> None:
        weights = folder / "performers" / f"{network}-{category}.safetensors"
        performer = load_performer(f"partlens_papers.performers:{FACTORIES[network]}@{weights}")
        self.performer = remembering(performer, folder / "maps")
        setting = paper_setting(self.performer)
        assert setting is not None
        self.setting = setting
        images = ImageSet.open(folder / ("cub" if category == "bird" else "voc"))
        images = images.take([r for r, c in enumerate(images.categories) if c in (category, "background")])
        own, others = images.rows_of((category,), "train")
        held, away = images.rows_of((category,), "test")
        shown, away = sampled(others, OTHERS, 0), away[:AWAY]
        example = self.performer.preprocessing([images.read(own[0])])
        self.structure = explainer_structure(self.performer, example, setting.tap, setting.targets)
        self.names = [self.structure.read, *self.structure.targets]
        train, self.test = (
            self._maps(images, rows, views, kept / split)
            for split, rows, views in (("train", (*own, *shown), 2), ("test", (*held, *away), 1))
        )
        windows = torch.tensor([[0.0, 0.0, 1.0, 1.0, 0.0], [0.0, 0.0, 1.0, 1.0, 1.0]]).repeat(len(own), 1, 1)
        background = np.arange(2 * len(own), 2 * (len(own) + len(shown)))
        targets = tuple(train[name] for name in self.names[1:])
        self.data = TrainingMaps(train[self.names[0]], targets, windows, torch.zeros(len(own)).long(), background)
        self.held = len(held)
        self.labels = torch.cat([torch.ones(len(held)), torch.zeros(len(away))])
        labels = torch.zeros(len(held)).long()
        self.on = MeasuredPhotos.of(images, held, self.performer, (category,), labels, seed=0)
        self.grid = grid_of(self.performer.field(setting.tap))
        self.head = performer_head(self.performer, self.structure)

    def _maps(self, images: ImageSet, rows: Any, views: int, folder: Path) -> dict[str, np.ndarray]:
        windows = torch.tensor([[0.0, 0.0, 1.0, 1.0, float(view)] for view in range(views)]).repeat(len(rows), 1)
        drawn, viewing = viewed_images(images, self.performer, np.repeat(np.array(rows), views), windows)
        return stream_maps(viewing, drawn, self.names, folder)

    def places(self, maps: Tensor) -> dict[str, float | None]:
        """Score where filters peak, by largest cells."""
        score, index = maps.flatten(2).max(-1)
        cells = torch.stack([index // maps.shape[3], index % maps.shape[3]], -1)
        return self._scored(peaks_from_cells(cells, score.double(), self.structure.side_cells, *self.grid))

    def _scored(self, peaks: Any) -> dict[str, float | None]:
        live = ~dead_filters(peaks)
        found: dict[str, Tensor | float] = {
            "instability": instability_per_filter(peaks, self.on.landmarks, self.on.size_px).nanmean(),
            "spread_cells": spread_per_filter(peaks).nanmean(),
            "correlation": filter_correlation_of(peaks, live),
            "distinct_parts": distinct_parts(peaks, live),
            "dead": (~live).float().mean(),
        }
        rounded = {name: round(float(value), 4) for name, value in found.items()}
        return {name: None if math.isnan(value) else value for name, value in rounded.items()}

    def nulls(self) -> dict[str, dict[str, float | None]]:
        """Score the tap and filters that see nothing."""
        tap = torch.from_numpy(np.array(self.test[self.structure.tap][: self.held])).float()
        found = {"tap": self.places(tap)}
        for kind in ("random", "centre", "corner"):
            drawn = null_peaks(
                kind,
                self.held,
                self.structure.side_cells,
                *self.grid,
                input_size_px=self.on.size_px,
                filters=64,
                generator=torch.Generator().manual_seed(0),
            )
            found[kind] = self._scored(drawn)
        return found

    @torch.no_grad()
    def measured(self, explainer: Explainer) -> dict[str, Any]:
        """Score an explainer on the held-out photos."""
        was = explainer.training
        explainer.eval()
        maps: list[Tensor] = []
        wrong: list[Tensor] = []
        lost = total = 0.0
        for start in range(0, len(self.labels), 32):
            rows = slice(start, start + 32)
            tap, own = (torch.from_numpy(np.array(self.test[n][rows])).float() for n in (self.names[0], self.names[-1]))
            output = explainer(tap)
            fed = output.reconstructions[-1]
            maps.append(output.interp2[: max(0, self.held - start)])
            lost += float((fed - own).square().sum())
            total += float((own - own.mean(0)).square().sum())
            said = torch.stack([(self.head(each)[0][:, 0] > 0).float() for each in (own, fed)])
            wrong.append(said != self.labels[rows])
        explainer.train(was)
        errors = 100 * torch.cat(wrong, 1).float().mean(1)
        return {
            "p": round(float(explainer.p), 4),
            "performer_error_percent": round(float(errors[0]), 2),
            "error_increase_points": round(float(errors[1] - errors[0]), 2),
            "lost_variance": round(lost / total, 3),
            **self.places(torch.cat(maps)),
        }

    def run(self, setting: dict[str, Any]) -> dict[str, Any]:
        """Learn an explainer and score it after each second epoch."""
        given = dict(setting)
        name, start = given.pop("name"), given.pop("start", "random")
        usual = {"eta": self.setting.eta, "views": 2, "precision": "bfloat16", "patience": 0}
        config = ExplainerConfig.preset(given.pop("preset", "paper"), **{**usual, **given})
        explainer = build_explainer(self.performer, self.structure, config)
        if start == "copy":
            with torch.no_grad():
                explainer.conv_interp_1.weight.copy_(identity_kernel(explainer.conv_interp_1))
                explainer.conv_interp_2.load_state_dict(explainer.conv_ordin.state_dict())
        log: list[dict[str, Any]] = []

        def report(record: dict[str, Any]) -> None:
            if record["epoch"] % EVERY == 0 or record["epoch"] == config.warmup_epochs + config.epochs:
                terms: dict[str, Any] = {
                    key: round(float(record[key]), 4) for key in ("filter_1", "filter_2") if key in record
                }
                log.append({"epoch": record["epoch"], "phase": record["phase"], **terms, **self.measured(explainer)})
                print(name, json.dumps(log[-1]), flush=True)

        with tempfile.TemporaryDirectory() as folder:
            train_explainer(explainer, self.data, Path(folder), report=report)
        return {"setting": setting, "epochs": log}


def main() -> None:
    """Run all settings and keep the results after each."""
    network, category, folder, settings, out = sys.argv[1:]
    with tempfile.TemporaryDirectory() as kept:
        bench = Bench(network, category, Path(folder), Path(kept))
        content: dict[str, Any] = {"network": network, "category": category, "held_out_photos": bench.held}
        content |= {"nulls": bench.nulls(), "runs": []}
        for setting in json.loads(Path(settings).read_text()):
            content["runs"].append(bench.run(setting))
            Path(out).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
