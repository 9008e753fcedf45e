"""What a second process and a second thread gain where an explainer learns: epochs of ResNet-18's, side by side.

One process of one thread, two processes of one thread that torchrun starts, and one process of two threads learn from
the same made maps in turn, several rounds. Of each phase its last epoch counts, and of the rounds the median. ``wall``
says how many times as fast an epoch is; other work on the machine takes from it, and its load is written beside.
``cpu`` is the CPU time of the one process over that of the first of two: the most that ``wall`` can be.

    uv run python papers/studies/processes.py [--rounds 3] [--out papers/studies/processes.json]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from partlens.explainer.config import ExplainerConfig
from partlens.explainer.network import build_explainer, explainer_structure
from partlens.explainer.processes import started
from partlens.explainer.training import Extras, follow, train_explainer
from partlens.explainer.views import TrainingMaps, view_windows
from partlens.network.zoo import load_performer

PHOTOS, VIEWS, OTHERS = 160, 2, 32
WAYS = {"one": (1, 1), "two processes": (2, 1), "two threads": (1, 2)}
PHASES = ("warmup", "joint")


def maps_of(performer: Any, structure: Any) -> TrainingMaps:
    """Noise after a ReLU in place of photos' maps: what it costs does not hang on what is seen."""
    draws = torch.Generator().manual_seed(0)
    rows = PHOTOS * VIEWS + OTHERS
    tap = torch.rand(rows, structure.channels_in, *structure.side_cells, generator=draws)
    with torch.no_grad():
        upper = performer.upper(structure.tap, structure.targets)
        parts = [upper(block) for block in tap.split(64)]
    targets = tuple(torch.cat(each).half().numpy() for each in zip(*parts, strict=True))
    windows = view_windows(PHOTOS, VIEWS, draws)
    labels = torch.zeros(PHOTOS, dtype=torch.long)
    return TrainingMaps(tap.half().numpy(), targets, windows, labels, np.arange(PHOTOS * VIEWS, rows), targets[-1:])


def places(_explainer: Any, data: TrainingMaps, _category: int) -> torch.Tensor:
    return torch.rand(data.photos, 8, 2, generator=torch.Generator().manual_seed(1))


def learn(precision: str) -> None:
    """Learn in this process and print seconds and CPU seconds of the last epoch of each phase."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.set_flush_denormal(True)
    performer = load_performer("torchvision:resnet18@random:0")
    with started() as processes, tempfile.TemporaryDirectory() as folder:
        if processes.number:
            follow(performer, performer.weights_sha256, Extras(processes=processes))
            return
        structure = explainer_structure(performer, torch.zeros(1, 3, 224, 224), performer.tap)
        config = ExplainerConfig.preset("partlens", epochs=2, warmup_epochs=2, views=VIEWS, precision=precision)
        marks, found = [time.process_time()], {}

        def report(record: dict[str, Any]) -> None:
            marks.append(time.process_time())
            found[record["phase"]] = {"wall": record["seconds"], "cpu": marks[-1] - marks[-2]}

        explainer = build_explainer(performer, structure, config)
        extras = Extras(places_of=places, processes=processes)
        train_explainer(explainer, maps_of(performer, structure), Path(folder), extras=extras, report=report)
        processes.shared()
    print(json.dumps(found))


def measured(way: str, precision: str) -> dict[str, dict[str, float]]:
    count, threads = WAYS[way]
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] if count > 1 else []
    arguments = [sys.executable, *launch, __file__, "--learn", precision]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(arguments, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--learn")
    options = parser.parse_args()
    if options.learn:
        learn(options.learn)
        return
    result: dict[str, Any] = {"network": "torchvision:resnet18@random:0", "photos": PHOTOS, "rounds": options.rounds}
    for precision in ("float32", "bfloat16"):
        load = [os.getloadavg()[0]]
        runs: dict[str, list[Any]] = {way: [] for way in WAYS}
        for _ in range(options.rounds):
            for way in WAYS:
                runs[way].append(measured(way, precision))
                load.append(os.getloadavg()[0])
                print(precision, way, runs[way][-1], load[-1], flush=True)
        result[precision] = {"load": [round(each, 1) for each in load]}
        for phase in PHASES:

            def of(way: str, what: str, phase: str = phase, runs: dict[str, list[Any]] = runs) -> float:
                return median(run[phase][what] for run in runs[way])

            result[precision][phase] = {
                way: {"wall": round(of("one", "wall") / of(way, "wall"), 2)}
                | ({"cpu": round(of("one", "cpu") / of(way, "cpu"), 2)} if WAYS[way][0] > 1 else {})
                for way in list(WAYS)[1:]
            }
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
