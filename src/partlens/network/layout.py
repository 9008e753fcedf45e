"""Where a tensor of a network has its filters and its places.

=================  ==================================================================================
``maps``           ``[image, filter, row, col]``: convolutional networks
``channels last``  ``[image, row, col, filter]``: Swin, the inner layers of ConvNeXt
``tokens``         ``[image, token, filter]``: a grid of tokens, row by row, with others before or after
``vectors``        ``[image, filter]``: fully connected layers
=================  ==================================================================================

All of partlens works on maps. `Layout.to_maps` is applied where a layer is read, `Layout.from_maps` where maps go back
into a network. Which layout a tensor has is inferred from the calls of one watched pass (`layouts_of`): from the widths
of the modules that made it and that read it, from the grids that convolutions have, and, for tokens, from those that do
not depend on the image and from where a changed place is found again. A tensor that stays unclear is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd, _AvgPoolNd, _MaxPoolNd

from partlens.errors import LayerError, expected, nearest
from partlens.network.watched import IMAGES, Call, changed_place, place_of

Kind = Literal["maps", "channels last", "tokens", "vectors"]

WHOLE = "whole"
"""The key of a tap, ``NAME:whole``, that reads its maps with further rows, which hold the tokens beside the grid."""


def own_name(tap: str) -> str:
    """Return the layer's name without ``:whole``."""
    return tap.removesuffix(f":{WHOLE}")


_POOLINGS = (_AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd, _AvgPoolNd, _MaxPoolNd, nn.Upsample, nn.PixelShuffle)
_CHANNELS_FIRST = (_ConvNd, _BatchNorm, _InstanceNorm, nn.GroupNorm, *_POOLINGS, nn.Dropout2d, nn.LocalResponseNorm)


@dataclass(frozen=True)
class Layout:
    """The layout of a layer's output."""

    kind: Kind  # see the top of this module
    grid: tuple[int, int] = (0, 0)  # rows and columns of the tokens that have a place
    before: int = 0  # tokens before these, such as a class token
    after: int = 0  # tokens after them
    loop: int = 0  # how often the layer is called for each image, where the network runs its images one by one; else 0

    @property
    def beside(self) -> int:
        """How many tokens have no place."""
        return self.before + self.after

    @property
    def name(self) -> str:
        """How `layers` calls it."""
        extra = f" + {self.beside}" if self.beside else ""
        return f"{self.grid[0]}x{self.grid[1]}{extra} tokens" if self.kind == "tokens" else self.kind

    @property
    def spare_rows(self) -> int:
        """How many rows below the maps hold the tokens without a place, where these are read, too."""
        return math.ceil(self.beside / self.grid[1]) if self.beside else 0

    def to_maps(self, values: Tensor, *, whole: bool = False) -> Tensor:
        """Return a layer's output as maps, ``[image, filter, row, col]``; vectors stay vectors.

        With ``whole``, the tokens beside the grid follow as cells of further rows, filled up with zeros.
        """
        if self.kind == "channels last":
            return values.movedim(-1, 1)
        if self.kind != "tokens":
            return values
        end = self.before + self.grid[0] * self.grid[1]
        if values.ndim != 3 or values.shape[1] != end + self.after:
            rule = f"tokens (image, {end + self.after}, filter)"
            raise LayerError(expected(rule, f"shape {tuple(values.shape)}", "Use photos of the network's input size"))
        maps: Tensor = values[:, self.before : end].transpose(1, 2).unflatten(2, self.grid)
        if not whole or not self.beside:
            return maps
        others = torch.cat([values[:, : self.before], values[:, end:]], 1).transpose(1, 2)
        spare = self.spare_rows
        filled = F.pad(others, (0, spare * self.grid[1] - self.beside)).unflatten(2, (spare, self.grid[1]))
        return torch.cat([maps, filled], 2)

    def from_maps(self, maps: Tensor) -> Tensor:
        """Return the layer's own output from maps, those with ``whole`` where tokens are beside the grid.

        Raises:
            LayerError: maps without the tokens beside the grid.

        Example:
            >>> layout = Layout("tokens", (2, 3), before=1)
            >>> values = torch.rand(1, 7, 5)
            >>> bool((layout.from_maps(layout.to_maps(values, whole=True)) == values).all())
            True
        """
        if self.kind == "channels last":
            return maps.movedim(1, -1)
        if self.kind != "tokens":
            return maps
        rows, cols = self.grid
        if tuple(maps.shape[2:]) != (rows + self.spare_rows, cols):
            rule = f"maps of {rows}x{cols} cells" + (f" with {self.beside} tokens beside them" if self.beside else "")
            raise LayerError(expected(rule, f"shape {tuple(maps.shape)}", "Read the layer as NAME:whole"))
        cells = maps.flatten(2).transpose(1, 2)
        placed, others = cells[:, : rows * cols], cells[:, rows * cols : rows * cols + self.beside]
        return torch.cat([others[:, : self.before], placed, others[:, self.before :]], 1)


def tap_layout(module: nn.Module, found: Mapping[str, Layout | str], tap: str) -> Layout:
    """Return the layout of a tap among those of a network's calls.

    Raises:
        LayerError: an unknown layer, or one whose layout is not known.
    """
    name, _, key = tap.partition(":")
    place_of(module, name)  # refuses one that is unknown
    layout = found.get(name)
    if layout is None or key not in {"", WHOLE}:
        return Layout("vectors")  # a layer that is not called, or an entry of several: read as it is
    if isinstance(layout, Layout):
        return layout
    others = [other for other, known in found.items() if isinstance(known, Layout)]
    remedy = f"Choose among {', '.join(nearest(name, others))}" if others else "Choose another network"
    raise LayerError(expected(f"{name} to give maps or vectors", f"a layer of which {layout}", remedy))


BATCH_UNKNOWN = "the first axis is not that of the images"
_MOST_BESIDE = 16  # tokens without a place


def layouts_of(calls: Sequence[Call], size: tuple[int, int]) -> dict[str, Layout | str]:
    """Infer the layout of every call's output, or say why it is not known.

    ``calls`` are those of one watched pass of images of ``size``.
    """
    evidence = _Evidence(calls, size)
    found = {call.name: evidence.layout(call.output) for call in calls}
    looped = ((call.name, found[call.name], call.loop) for call in calls if call.loop)
    return found | {name: replace(known, loop=loop) for name, known, loop in looped if isinstance(known, Layout)}


def _is_leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None


def _axis_of(module: nn.Module, value: Tensor) -> int | None:
    """Return the axis along which a module that made or read a tensor has its filters, where it tells."""
    last = value.ndim - 1
    if isinstance(module, _CHANNELS_FIRST):
        return 1
    if type(module) is nn.LayerNorm or isinstance(module, nn.Linear):
        return last
    if isinstance(module, nn.Softmax):  # of attention the last: its rows and columns are tokens, not places
        return 1 if module.dim is None else module.dim % value.ndim
    if not _is_leaf(module):
        return None
    widths = {len(p) for p in module.parameters(recurse=False) if p.ndim == 1 and len(p) > 1}
    fitting = [axis for axis in (1, last) if value.shape[axis] in widths]
    if len(fitting) == 2:  # a square tensor: norms of maps, often subclasses of LayerNorm, say so themselves
        of_maps = "2d" in type(module).__name__.lower() or getattr(module, "data_format", "") == "channels_first"
        return 1 if of_maps else None
    return fitting[0] if fitting else None


def _leading(alike: Sequence[bool]) -> int:
    """Return how many are alike before the first that is not."""
    return next(i for i, same in enumerate(alike) if not same)


class _Evidence:
    """What the calls of one pass say of the tensors in it."""

    def __init__(self, calls: Sequence[Call], size: tuple[int, int]) -> None:
        self.size, self.calls = size, calls
        self.axes: dict[int, int] = {}  # of the filters, by tensor
        for call in calls:
            for value in (call.output, *call.given[:1]):
                axis = _axis_of(call.module, value) if value.ndim in {3, 4} else None
                if axis is not None:
                    self.axes.setdefault(id(value), axis)
        # An activation keeps the axes of what it is given. A block mostly does, too, but is asked last.
        self._hand_on(lambda module: _is_leaf(module) and not hasattr(module, "dims"))
        self._hand_on(lambda _: True)
        self.grids = self._grids()
        self.tokens: dict[int, Layout | str] = {}
        for call in calls:
            if call.output.ndim == 3 and len(call.output) == IMAGES and self.axes.get(id(call.output)) != 1:
                self._add_tokens(call)
        self._check_order()

    def _hand_on(self, keeps_axes: Callable[[nn.Module], bool]) -> None:
        """Let what a module was given and what it returned, of one shape, have one axis."""
        for call in (*self.calls, *reversed(self.calls)):
            if call.given and call.given[0].shape == call.output.shape and keeps_axes(call.module):
                for one, two in ((call.given[0], call.output), (call.output, call.given[0])):
                    if id(one) in self.axes:
                        self.axes.setdefault(id(two), self.axes[id(one)])

    def _grids(self) -> set[tuple[int, int]]:
        """Return rows and columns that maps can have: those of convolutions, their halves, and even parts."""
        strides = (s for s in range(1, min(self.size) + 1) if self.size[0] % s == 0 and self.size[1] % s == 0)
        found = {(1, 1), *((self.size[0] // s, self.size[1] // s) for s in strides)}
        tensors = [value for call in self.calls for value in (call.output, *call.given[:1])]
        waiting = [(v.shape[2], v.shape[3]) for v in tensors if v.ndim == 4 and self.axes.get(id(v)) == 1]
        while waiting:
            rows, cols = grid = waiting.pop()
            if min(grid) > 0 and grid not in found:
                waiting += [(rows // 2, cols // 2), (-(-rows // 2), -(-cols // 2))]
            found.add(grid)
        return found

    def _add_tokens(self, call: Call) -> None:
        """Split the tokens at their first appearance, where those without a place do not depend on the image yet."""
        count = call.output.shape[1]
        if count in self.tokens or not call.alike or all(call.alike):
            return
        others = {count - rows * cols: (rows, cols) for rows, cols in self.grids if min(rows, cols) > 1}
        beside = min((k for k in others if 0 <= k <= _MOST_BESIDE), default=None)
        if beside is None:
            self.tokens[count] = f"the {count} tokens fit no grid of places"
            return
        before, after = _leading(call.alike), _leading(call.alike[::-1])
        if before + after != beside or sum(call.alike) != beside:
            self.tokens[count] = f"which {beside} of the {count} tokens have no place cannot be told"
            return
        self.tokens[count] = Layout("tokens", others[beside], before, after)

    def _check_order(self) -> None:
        """Refuse tokens that are not row by row: a changed place of the image is found again at another one."""
        for count, layout in self.tokens.items():
            if not isinstance(layout, Layout):
                continue
            found = [c.changed for c in self.calls if c.output.ndim == 3 and c.output.shape[1] == count]
            inside = [k - layout.before for cells in found for k in cells if k >= layout.before]
            misplaced = sum(not self._is_changed(cell, layout.grid) for cell in inside)
            if 4 * misplaced > len(inside):  # a good order misplaces none
                self.tokens[count] = f"the {count} tokens are not in the order of their places"

    def _is_changed(self, cell: int, grid: tuple[int, int]) -> bool:
        """Whether a cell lies in the changed place or next to it."""
        at = (cell // grid[1], cell % grid[1])
        place = changed_place(self.size)
        strides = [side / cells for side, cells in zip(self.size, grid, strict=True)]
        return all(p.start / s - 2 < a < p.stop / s + 1 for a, p, s in zip(at, place, strides, strict=True))

    def layout(self, value: Tensor) -> Layout | str:
        """Return the layout of a tensor, or why it has none."""
        if value.ndim not in {2, 3, 4}:
            return "the output is neither maps, tokens nor vectors"
        if len(value) != IMAGES:
            return BATCH_UNKNOWN
        if value.ndim == 2:
            return Layout("vectors")
        axis = self.axes.get(id(value))
        return self._of_tokens(value, axis) if value.ndim == 3 else self._of_maps(value, axis)

    def _of_tokens(self, value: Tensor, axis: int | None) -> Layout | str:
        if axis == 1:
            return "filters come before cells that share one axis"
        return self.tokens.get(value.shape[1], "the places of the cells cannot be told")

    def _of_maps(self, value: Tensor, axis: int | None) -> Layout | str:
        first, last = tuple(value.shape[2:]) in self.grids, tuple(value.shape[1:3]) in self.grids
        if axis == 1 or (axis is None and first):
            return Layout("maps")
        if last and axis in {3, None}:
            return Layout("channels last")
        return "rows and columns are no places of the image (windows or attention heads)"
