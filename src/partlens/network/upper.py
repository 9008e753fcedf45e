"""The layers of a performer above a tap as a module of their own, where a copy of the graph is not enough."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from partlens.network.graph import copied, learnable
from partlens.network.layout import Layout
from partlens.network.outputs import entries_of
from partlens.network.watched import read_entry

OUTPUT = "output"
_CLOSE = 1e-3


class LaidOut(nn.Module):
    """Layers that take and give maps, around layers of other layouts.

    Args:
        inner: takes the source's own output and returns a tuple of the targets' own outputs.
        source: layout of the source.
        targets: layout of each target, and whether the tokens beside the grid are wanted, too.
    """

    def __init__(self, inner: nn.Module, source: Layout, targets: Sequence[tuple[Layout, bool]]) -> None:
        super().__init__()
        self.inner, self.source, self.targets = inner, source, tuple(targets)

    def forward(self, maps: Tensor) -> tuple[Any, ...]:
        """Return the targets' values for the source's maps."""
        found = self.inner(self.source.from_maps(maps))
        return tuple(
            layout.to_maps(value, whole=whole) if isinstance(value, Tensor) else value
            for value, (layout, whole) in zip(found, self.targets, strict=True)
        )


class Rerun(nn.Module):
    """A copy of a whole network that is run on a blank image, with what is given in the place of one layer's output.

    So a network without a graph is cut. What is below the layer runs in vain, and its weights never change. It equals
    the network's own layers only where everything passes that layer.

    Args:
        network: it is copied.
        source: module path and number of the call whose output is replaced.
        targets: of each target the same, ``None`` for what the network returns.
        blank: an image.
        loops: of a module that the network calls image by image, how often for each (`Layout.loop`).
    """

    blank: Tensor

    def __init__(
        self,
        network: nn.Module,
        source: tuple[str, int],
        targets: Sequence[tuple[str, int] | None],
        blank: Tensor,
        loops: Mapping[str, int],
    ) -> None:
        super().__init__()
        self.network = learnable(copied(network, network))
        self.source_place, self.target_places, self.loops = source, tuple(targets), loops
        self.register_buffer("blank", blank, persistent=False)

    def forward(self, given: Tensor) -> tuple[Any, ...]:
        """Return the targets' own values, with ``given`` in the place of the source's output."""
        answer, found = self._run(self.blank.to(given).expand(len(given), -1, -1, -1), given)
        return tuple(answer if place is None else found[place] for place in self.target_places)

    @torch.no_grad()
    def reproduces(self, images: Tensor) -> bool:
        """Whether the source's own output gives the network's own values."""
        answer, found = self._run(images)
        again = self(found[self.source_place])
        own = [answer if place is None else found[place] for place in self.target_places]
        return all(_alike(one, other) for one, other in zip(own, again, strict=True))

    def _run(self, images: Tensor, given: Tensor | None = None) -> tuple[Any, dict[tuple[str, int], Tensor]]:
        """Run the network, note what source and targets give, and put ``given`` into the source's place."""
        found: dict[tuple[str, int], list[Tensor]] = {}
        calls: Counter[str] = Counter()
        wanted = {self.source_place, *(place for place in self.target_places if place is not None)}

        def hook_of(path: str) -> Any:
            def hook(_module: nn.Module, _inputs: Any, answer: Any) -> Any:
                image, call = divmod(calls[path], self.loops[path]) if self.loops.get(path) else (0, calls[path])
                place = (path, call)
                calls[path] += 1
                if place in wanted:
                    value = read_entry(answer)
                    assert value is not None  # the layer was read when it was chosen
                    found.setdefault(place, []).append(value.clone())
                if place == self.source_place and given is not None:
                    return _with_entry(answer, (given[image : image + 1] if self.loops.get(path) else given).clone())
                return None

            return hook

        with contextlib.ExitStack() as hooks:
            for path in {path for path, _ in wanted}:
                hooks.callback(self.network.get_submodule(path).register_forward_hook(hook_of(path)).remove)
            answer = self.network(images)
        return answer, {place: torch.cat(pieces) for place, pieces in found.items()}


def _alike(one: Any, other: Any) -> bool:
    """Whether two answers have the same values, up to rounding."""
    pairs = [({"": answer} if isinstance(answer, Tensor) else entries_of(answer)) for answer in (one, other)]
    return pairs[0].keys() == pairs[1].keys() and all(
        bool(torch.allclose(value, pairs[1][name], rtol=_CLOSE, atol=_CLOSE * float(value.abs().max())))
        for name, value in pairs[0].items()
        if value.is_floating_point() and value.numel()
    )


def _with_entry(answer: Any, value: Tensor) -> Any:
    """Return a module's answer with another tensor in the place of the one that a tap reads."""
    read = read_entry(answer)
    if read is answer:
        return value
    if isinstance(answer, Mapping):
        changed = copy.copy(answer)
        for key in [key for key, entry in answer.items() if entry is read]:
            changed[key] = value  # type: ignore[index]
        return changed
    entries = [value if entry is read else entry for entry in answer]
    return type(answer)(*entries) if hasattr(answer, "_fields") else type(answer)(entries)
