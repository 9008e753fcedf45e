"""Build an explainer for a performer: find what its layers ask for, copy what it needs."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from partlens.errors import LayerError, expected
from partlens.explainer.config import ExplainerConfig
from partlens.explainer.network import Explainer, ExplainerStructure, dense_weights
from partlens.network.borrowed import random_state_kept
from partlens.network.taps import forward_taps
from partlens.network.zoo import Performer

_FOLLOWS_POOLING = (nn.Linear, nn.ReLU, nn.Dropout, nn.Flatten, nn.Identity, nn.AdaptiveAvgPool2d)


def _replaced_convolution(
    performer: Performer, tap: str, targets: Sequence[str], side: int
) -> tuple[str, str, str | None] | None:
    """Find ``(convolution, activation, pooling)`` after the tap when everything later is fully connected."""
    modules = dict(performer.module.named_modules())
    names = performer.graph.cut_points()
    if tap not in names or targets[-1] not in names:
        return None
    chain = names[names.index(tap) + 1 : names.index(targets[-1]) + 1]
    kinds = [modules.get(name) for name in chain]
    if len(chain) < 3 or not isinstance(kinds[0], nn.Conv2d) or not isinstance(kinds[1], nn.ReLU):
        return None
    conv = kinds[0]
    same = conv.kernel_size == (3, 3) and conv.stride == (1, 1) and conv.padding == (1, 1) and conv.dilation == (1, 1)
    pooling = chain[2] if isinstance(kinds[2], nn.MaxPool2d) else None
    rest = kinds[3 if pooling else 2 :]
    linear = any(isinstance(k, nn.Linear) for k in rest)
    # A flatten written as a function has no module: it is None here and keeps the head fully connected.
    closed = all(k is None or isinstance(k, _FOLLOWS_POOLING) for k in rest)
    return (chain[0], chain[1], pooling) if same and linear and closed and side > 1 else None


def explainer_structure(
    performer: Performer, batch: Tensor, tap: str, targets: Sequence[str] | None = None
) -> ExplainerStructure:
    """Say what an explainer of a layer consists of.

    Args:
        performer: the network under study.
        batch: preprocessed images (image, 3, row, col), at least one; they decide the map size.
        tap: layer to explain; its maps must be non-negative (after a ReLU) and larger than 1x1.
        targets: layers to reconstruct; the two that `partlens.network.layers.default_targets` gives when left out.

    Returns:
        The structure.

    Raises:
        LayerError: the layer is unknown, its maps are 1x1, not maps, or not after a ReLU, or a shortcut goes around.
    """
    chosen = tuple(performer.targets(tap) if targets is None else targets)
    if not chosen:
        raise LayerError(expected("at least one target", "none", "Name a layer after the tap, or leave targets out"))
    _, maps = forward_taps(performer, batch, [tap])
    tapped = maps[tap]
    if tapped.dim() != 4:
        raise LayerError(
            expected(f"maps at {tap}", f"a tensor of shape {tuple(tapped.shape)}", "Tap a convolutional layer")
        )
    rows, cols = int(tapped.shape[2]), int(tapped.shape[3])
    if min(rows, cols) < 2:
        raise LayerError(
            expected(
                f"maps larger than 1x1 at {tap}",
                f"{rows}x{cols}",
                "Tap an earlier layer (see partlens layers)",
            )
        )
    if float(tapped.min()) < 0:
        raise LayerError(
            expected(
                f"maps after a ReLU at {tap}",
                f"values down to {float(tapped.min()):.3g}",
                "Tap an activation (see partlens layers); masks and templates need non-negative maps",
            )
        )
    replaced = _replaced_convolution(performer, tap, chosen, min(rows, cols))
    channels = int(tapped.shape[1])
    performer.graph.cut(tap, chosen)  # refuses targets that are not after the tap, before anything is written
    if replaced is None:
        return ExplainerStructure(tap, chosen, channels, channels, (rows, cols), None, tap)
    name, activation, pooling = replaced
    conv = performer.module.get_submodule(name)
    assert isinstance(conv, nn.Conv2d)
    return ExplainerStructure(
        tap,
        chosen,
        channels,
        conv.out_channels,
        (rows, cols),
        name,
        activation if pooling is None else pooling,
    )


def build_explainer(
    performer: Performer,
    structure: ExplainerStructure,
    config: ExplainerConfig,
    generator: torch.Generator | None = None,
) -> Explainer:
    """Build an explainer whose ordinary track and decoder start as the performer's own layers.

    Args:
        performer: the network under study; it stays as it is.
        structure: from :func:`explainer_structure`.
        config: weights and initialisation.
        generator: draws the interpretable track; seeded by ``config.seed`` when left out.

    Returns:
        The explainer on the CPU in float32.
    """
    draws = torch.Generator().manual_seed(config.seed) if generator is None else generator
    decoder = performer.graph.cut(structure.decoder_from, structure.targets).cpu().float()
    pool: nn.Module | None = None
    ordinary: tuple[Tensor, Tensor] | None = None
    if structure.replaced is not None:
        conv = performer.module.get_submodule(structure.replaced)
        assert isinstance(conv, nn.Conv2d)
        bias = torch.zeros(conv.out_channels) if conv.bias is None else conv.bias.detach().clone()
        ordinary = (dense_weights(conv).float().cpu(), bias.float().cpu())
        layer = performer.module.get_submodule(structure.decoder_from)
        pool = copy.deepcopy(layer).cpu() if isinstance(layer, nn.MaxPool2d) else None
    with random_state_kept():  # torch's own initialisation draws from the global state before ours replaces it
        return Explainer(structure, config, decoder, pool=pool, ordinary=ordinary, generator=draws)


def reference_decoder(performer: Performer, structure: ExplainerStructure) -> nn.Module:
    """Return the performer's own layers from tap to targets, frozen: what the explainer should reproduce."""
    return performer.graph.cut(structure.tap, structure.targets).cpu().float().requires_grad_(requires_grad=False)


def performer_head(performer: Performer, structure: ExplainerStructure) -> nn.Module:
    """Return the performer's layers after the last target, frozen, for feeding the reconstruction back."""
    return performer.graph.cut(structure.targets[-1], ["output"]).cpu().float().requires_grad_(requires_grad=False)
