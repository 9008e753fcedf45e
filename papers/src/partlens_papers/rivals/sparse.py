"""A sparse autoencoder that keeps the k largest codes of every cell.

    z(x) = TopK(max((x - c) Eᵀ + e, 0)),      x ≈ z D + c,      |d_j| = 1

``E`` and ``e`` encode, the rows ``d_j`` of ``D`` are the units' directions, ``c`` is a common offset. Training
minimises ``|x - z D - c|²`` relative to the cells' variance. Units that have not been active for a while start anew at
what the others leave over.

Sources: Gao et al., Scaling and evaluating sparse autoencoders, 2024 (TopK, unit directions); Makhzani & Frey, k-Sparse
Autoencoders, 2014; Bricken et al., Towards monosemanticity, 2023 (starting anew). Gao et al. revive units by an
auxiliary loss instead; in runs as short as these it left more units dead than no remedy at all (planted features, 256
units that start in one direction: 240 dead with their weight of 1/32, 145 without, 1 when they start anew). Sizes, step
count and schedule are ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from partlens.errors import InputError, expected
from partlens_papers.rivals.cells import Rival, sample_cells, spread_directions

SAE_CELLS = 65_536
"""Cells to learn from by default; as float32 with 384 filters they take 100 MB."""

ACTIVE = 16
"""Most units per cell by default (fewer where there are not four times as many units)."""

_DEAD_AFTER = 50
_STEADY_SHARE = 0.7
_LOGGED = 10


@dataclass(frozen=True, eq=False)
class TopKSae(Rival):
    """A fitted sparse autoencoder; see the module.

    Attributes:
        encoder: ``E`` (unit, filter).
        bias: ``e``, per unit.
        decoder: ``D`` (unit, filter), rows of length 1.
        offset: ``c``, per filter.
        active: k, a number.
        non_negative: whether the sample had no value below 0; reconstructions are then clipped at 0, which can only
            bring them nearer.
        answering: for each unit, the share of the sample's cells that it is active in; 0 for a dead one.
        history: ``|x - z D - c|² / |x - mean|²`` over the batch, every tenth step.
    """

    encoder: Float[Tensor, "unit filter"]
    bias: Float[Tensor, " unit"]
    decoder: Float[Tensor, "unit filter"]
    offset: Float[Tensor, " filter"]
    active: Int[Tensor, ""]
    non_negative: Bool[Tensor, ""]
    answering: Float[Tensor, " unit"]

    @property
    def units(self) -> int:
        """Number of units."""
        return int(self.decoder.shape[0])

    @property
    def filters(self) -> int:
        """Number of filters of the tap."""
        return int(self.decoder.shape[1])

    def encode(self, cells: Float[Tensor, "cell filter"]) -> Float[Tensor, "cell unit"]:
        """Return the k largest of ``max((x - c) Eᵀ + e, 0)``, zero elsewhere."""
        before = torch.addmm(self.bias.to(cells), cells - self.offset.to(cells), self.encoder.to(cells).T)
        return _largest(before, int(self.active))

    def decode(self, codes: Float[Tensor, "cell unit"]) -> Float[Tensor, "cell filter"]:
        """Return ``z D + c``."""
        found = torch.addmm(self.offset.to(codes), codes, self.decoder.to(codes))
        return found.clamp_(min=0) if bool(self.non_negative) else found


def _largest(before: Tensor, count: int) -> Tensor:
    """Keep the ``count`` largest entries of each row, those above 0; zero elsewhere."""
    if count >= before.shape[1]:
        return before.relu()
    value, place = before.topk(count, dim=1, sorted=False)
    return torch.zeros_like(before).scatter(1, place, value.relu())


def fit_topk_sae(
    maps: Tensor | np.ndarray,
    units: int,
    *,
    seed: int = 0,
    active: int | None = None,
    cells: int = SAE_CELLS,
    steps: int = 1500,
    batch: int = 1024,
    learning_rate: float = 2e-3,
) -> TopKSae:
    """Train a TopK sparse autoencoder on the cells of a tap.

    Adam; the learning rate is constant for seven tenths of the steps, then falls to 0 in a line. Directions start at
    cells that differ, the encoder at their transpose. After each step the directions are put back to length 1. A unit
    that has not been active for 50 steps starts anew, except in the last three tenths.

    Args:
        maps: ``[row, filter, row, col]`` of the tap on training photos; a tensor or a memory map.
        units: number of units, at most the number of cells.
        seed: of the cells, the start and the batches.
        active: k, most units that are active in one cell; a quarter of the units but at most :data:`ACTIVE` by default.
        cells: cells to learn from.
        steps: training steps.
        batch: cells per step.
        learning_rate: Adam's, for cells of variance 1 per filter.

    Raises:
        InputError: NaN or infinity, zeros only, more units than cells, ``active`` outside 1 to ``units``, or a loss
            that is not finite.
    """
    count = max(1, min(ACTIVE, units // 4)) if active is None else active
    if not 1 <= count <= max(1, units):
        raise InputError(expected(f"active between 1 and units = {units}", active, "Choose fewer active units"))
    if steps < 1 or batch < 1:
        raise InputError(expected("at least 1 step and 1 cell per batch", f"{steps} and {batch}", "Ask for more"))
    sample = sample_cells(maps, units, seed=seed, cells=cells)
    generator = torch.Generator().manual_seed(seed)
    non_negative = not bool((sample < 0).any())
    mean = sample.mean(0)
    scale = (sample - mean).square().mean().sqrt()
    if not float(scale) > 0:
        raise InputError(expected("cells that differ", "one value everywhere", "Tap another layer"))
    sample = (sample - mean) / scale
    start = spread_directions(sample, units, generator)
    encoder, decoder = start.clone(), start.clone()
    bias, offset = start.new_zeros(units), start.new_zeros(sample.shape[1])
    for learned in (encoder, decoder, bias, offset):
        learned.requires_grad = True
    optimiser = torch.optim.Adam([encoder, decoder, bias, offset], lr=learning_rate)
    silent = torch.zeros(units, dtype=torch.int64, device=start.device)
    history: list[float] = []
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = learning_rate * min(1.0, (steps - step) / (steps * (1 - _STEADY_SHARE)))
        rows = torch.randint(len(sample), (min(batch, len(sample)),), generator=generator).to(start.device)
        x = sample[rows]
        before = torch.addmm(bias, x - offset, encoder.T)
        codes = _largest(before, count)
        left = x - torch.addmm(offset, codes, decoder)
        error = left.square().sum() / x.square().sum()
        silent = torch.where((codes.detach() > 0).any(0), 0, silent + 1)
        if not bool(torch.isfinite(error.detach())):
            raise InputError(expected("a finite loss", float(error.detach()), "Lower the learning rate"))
        optimiser.zero_grad()
        error.backward()
        optimiser.step()
        with torch.no_grad():
            decoder /= decoder.norm(dim=1, keepdim=True)
            dead = silent >= _DEAD_AFTER
            if step < steps * _STEADY_SHARE and bool(dead.any()):
                _start_anew(dead, left.detach(), (encoder, decoder, bias), optimiser, generator)
                silent[dead] = 0
        if step % _LOGGED == 0 or step == steps - 1:
            history.append(float(error.detach()))
    with torch.no_grad():
        found = TopKSae(
            tuple(history),
            encoder.detach(),
            bias.detach() * scale,
            decoder.detach(),
            offset.detach() * scale + mean,
            torch.tensor(count),
            torch.tensor(non_negative),
            torch.zeros(units),
        )
        original = sample.mul_(scale).add_(mean)
        answers = sum((found.encode(part) > 0).sum(0) for part in original.split(batch))
    return TopKSae(**{**vars(found), "answering": answers / len(original)})


@torch.no_grad()
def _start_anew(
    dead: Tensor,
    left: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    optimiser: torch.optim.Adam,
    generator: torch.Generator,
) -> None:
    """Point units that are never active at what the others left over of cells, drawn in proportion to how much that is.

    The encoder becomes the same direction and the bias 0; Adam forgets what it knew of these units.
    """
    share = left.square().sum(1)
    if not float(share.sum()) > 0:
        return
    drawn = torch.multinomial(share.cpu(), int(dead.sum()), replacement=True, generator=generator).to(left.device)
    direction = left[drawn] / left[drawn].norm(dim=1, keepdim=True)
    encoder, decoder, bias = weights
    encoder[dead], decoder[dead], bias[dead] = direction, direction, torch.zeros_like(bias[dead])
    for weight in weights:
        for moment in ("exp_avg", "exp_avg_sq"):
            optimiser.state[weight][moment][dead] = 0
