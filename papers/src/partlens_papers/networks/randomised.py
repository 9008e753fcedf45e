"""A network that has lost what some of its layers learned, the null of every claim about what it learned."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

import torch
from torch import nn

from partlens.network.borrowed import borrowed
from partlens.network.performer import Performer, module_of, weights_sha256
from partlens.records import content_hash


def layers_from_top(performer: Performer) -> list[str]:
    """Name the parts of a network with weights, the last to run first.

    Chains (``nn.Sequential``) are taken apart, blocks such as a residual block stay whole.
    """
    module = module_of(performer)
    units: list[str] = []

    def walk(prefix: str, parent: nn.Module) -> None:
        for name, child in parent.named_children():
            path = f"{prefix}{name}"
            if not any(True for _ in child.parameters()):
                continue
            if isinstance(child, nn.Sequential):
                walk(f"{path}.", child)
            else:
                units.append(path)

    walk("", module)
    ran: list[str] = []
    with borrowed(module, copy_weights=False) as network, torch.no_grad():
        handles = [
            network.get_submodule(path).register_forward_hook(lambda *_, path=path: ran.append(path)) for path in units
        ]
        try:
            network(torch.zeros(1, 3, *performer.preprocessing.size_px))
        finally:
            for handle in handles:
                handle.remove()
    return list(dict.fromkeys(reversed(ran)))


def randomised(performer: Performer, layers: Sequence[str], seed: int) -> Performer:
    """Return a copy of a performer in which layers have lost what they learned.

    Weights are drawn anew from a normal distribution around 0 with the standard deviation of the layer's own; biases
    and statistics of normalisations, one value per filter, are shuffled. So signals keep their scale whatever kind of
    network it is, and only what was learned is gone. (The layer's own mean is not kept: where it is below 0, every
    unit of a wide layer would fall silent.)

    Args:
        performer: the network; left as it was.
        layers: paths of the modules.
        seed: of the draws; each layer has its own stream, whatever other layers are listed.

    Returns:
        The copy.
    """
    module = copy.deepcopy(performer.module)
    with torch.no_grad():
        for path in layers:
            text = f"{seed}/{path}"
            generator = torch.Generator().manual_seed(int(content_hash({"layer": text}), 16) % 2**63)
            part = module.get_submodule(path)
            for value in (*part.parameters(), *part.buffers()):
                if value.ndim >= 2:
                    drawn = torch.randn(value.shape, generator=generator)
                    value.copy_((drawn * value.std()).to(value.dtype))
                elif value.ndim == 1:
                    value.copy_(value[torch.randperm(len(value), generator=generator)])
    return dataclasses.replace(performer, module=module, weights_sha256=weights_sha256(module))
