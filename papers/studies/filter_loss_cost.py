"""What the filter loss adds to a training step: time and kept memory, at 512 filters of 14x14, batch 32.

The step is forward, backward and Adam of an explainer of VGG-16's size (512 to 512 channels in all three convolutions)
with a decoder of two 3x3 convolutions at 7x7; once with both filter losses, once without. Steps of the two are
interleaved, so that a machine whose speed drifts does not decide. Also the float32 error against float64.

    uv run python benchmarks/filter_loss_cost.py
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import torch
from partlens.explainer.objective import BatchFacts, Objective
from torch import nn

from partlens.explainer.config import ExplainerConfig
from partlens.explainer.filter_loss import filter_loss
from partlens.explainer.network import Explainer, ExplainerStructure
from partlens.explainer.templates import part_templates

FILTERS, SIDE, BATCH, ROUNDS, THREADS = 512, 14, 32, 10, 1


def step(
    explainer: Explainer, objective: Objective, optimiser: torch.optim.Optimizer, maps: torch.Tensor, *, losses: bool
) -> float:
    started = time.perf_counter()
    output = explainer(maps)
    total = objective.reconstruction(output, (torch.zeros_like(output.reconstructions[0]),)) / 1e6
    if losses:
        _, costs = objective.interpretable(output, BatchFacts(len(maps)), mix=False)
        total = total + 1e-6 * (costs[0].sum() + costs[1].sum())
    optimiser.zero_grad()
    total.backward()
    optimiser.step()
    return time.perf_counter() - started


def kept_bytes(function: object) -> int:
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        seen[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function()  # type: ignore[operator]
    return sum(seen.values())


def main() -> None:
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    structure = ExplainerStructure("tap", ("target",), FILTERS, FILTERS, (SIDE, SIDE), None, "tap")
    config = ExplainerConfig(gradient="exact", filter_mix=False)
    decoder = nn.Sequential(nn.Conv2d(FILTERS, FILTERS, 3, 2, 1), nn.ReLU(), nn.Conv2d(FILTERS, FILTERS, 3, 1, 1))
    explainer = Explainer(structure, config, decoder).train()
    objective = Objective(config, explainer, (1.0,))
    optimiser = torch.optim.Adam(explainer.parameters(), lr=1e-6)
    maps = torch.rand(BATCH, FILTERS, SIDE, SIDE)
    for losses in (True, False):
        step(explainer, objective, optimiser, maps, losses=losses)
    pairs = [
        [step(explainer, objective, optimiser, maps, losses=losses) for losses in (True, False)] for _ in range(ROUNDS)
    ]
    ratios = sorted(with_losses / without for with_losses, without in pairs)
    leaf = torch.rand(BATCH, FILTERS, SIDE, SIDE, requires_grad=True)
    family = part_templates(SIDE)
    added = kept_bytes(lambda: filter_loss(leaf, family))
    wide = torch.rand(BATCH, 64, SIDE, SIDE, dtype=torch.float64) * 400
    exact = filter_loss(wide, part_templates(SIDE, dtype=torch.float64))
    result = {
        "filters": FILTERS,
        "side_cells": SIDE,
        "batch": BATCH,
        "threads": THREADS,
        "torch": torch.__version__,
        "rounds": ROUNDS,
        "step_time_ratio": {
            "median": round(statistics.median(ratios), 4),
            "min": round(ratios[0], 4),
            "max": round(ratios[-1], 4),
        },
        "layers_with_loss": 2,
        "kept_bytes_per_layer": added,
        "map_bytes": leaf.numel() * 4,
        "float32_error_nats": float((filter_loss(wide.float(), family).double() - exact).abs().max()),
    }
    path = Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
