"""The network under study: a performer knows itself."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor, nn

from partlens.errors import InputError, LayerError, expected, nearest
from partlens.network.borrowed import unwrapped
from partlens.network.classes import Match, match
from partlens.network.graph import Graph, trace
from partlens.network.layers import LayerInfo, default_targets, list_layers
from partlens.network.outputs import Outputs, made_images, outputs_of
from partlens.network.preprocessing import Preprocessing
from partlens.network.receptive_field import ReceptiveField, receptive_field


@dataclass(frozen=True)
class Performer:
    """The network under study with all that belongs to it.

    What follows from the network (graph, layers, chosen layers) is computed when it is first asked for, and once.

    Args:
        module: the network; partlens borrows it and never changes it.
        name: how reports call it.
        preprocessing: how images become its input.
        weights_sha256: hash of its weights and buffers (`weights_sha256`).
        default_tap: the layer to explain when none is named, where its maker says so; otherwise `tap` chooses.
        class_names: names of its outputs, where known.
        notes: what a reader of results must know, such as layers without trained weights.
        untrained_layers: layers that the weights file lacks and that keep their random start.
        loaded_as: the name it was loaded by, and the preprocessing that this name gives.
    """

    module: nn.Module
    name: str
    preprocessing: Preprocessing
    weights_sha256: str
    default_tap: str | None = None
    class_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    untrained_layers: tuple[str, ...] = ()
    loaded_as: tuple[str, Preprocessing] | None = None

    @property
    def spec(self) -> str | None:
        """The name that loads the same again; ``None`` for a network object or another preprocessing."""
        return self.loaded_as[0] if self.loaded_as is not None and self.loaded_as[1] == self.preprocessing else None

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next((value.device for value in self.module.parameters()), torch.device("cpu"))

    @functools.cached_property
    def graph(self) -> Graph:
        """Its graph, traced once.

        Raises:
            LayerError: the network cannot be traced.
        """
        return trace(self.module)

    @functools.cached_property
    def layers(self) -> tuple[LayerInfo, ...]:
        """Every layer that can be read, in execution order.

        Raises:
            LayerError: the network does not accept its input size.
        """
        try:
            graph: Graph | None = self.graph
        except LayerError:  # each layer says so in its reason
            graph = None
        return list_layers(unwrapped(self.module), graph, self.preprocessing.size_px, self.default_tap)

    @functools.cached_property
    def tap(self) -> str:
        """The layer to explain when none is named: `default_tap`, else what `partlens.network.layers` chooses.

        Raises:
            LayerError: no layer has maps larger than 1x1 with two layers after it, or the network cannot be traced.
        """
        if self.default_tap is not None:
            return self.default_tap
        if (chosen := next((layer.name for layer in self.layers if layer.is_default), None)) is not None:
            return chosen
        rule = f"a layer of {type(self.graph.root).__name__} with maps larger than 1x1 and two layers after it"
        raise LayerError(expected(rule, "none", "Name a layer yourself, or use a larger input"))

    def layer(self, tap: str) -> LayerInfo:
        """Return what is known of a tap, refusing layers without maps.

        Raises:
            LayerError: an unknown layer (with the nearest names), one without maps, or one whose maps have a
                single cell.
        """
        maps = {layer.name: layer for layer in self.layers if len(layer.shape) == 3}
        if tap not in maps:
            raise self._without_maps(tap, maps)
        if maps[tap].shape[1:] == (1, 1):
            finer = [layer.name for layer in maps.values() if layer.has_places]
            remedy = f"Choose an earlier layer such as {finer[-1]}" if finer else "Use a larger input"
            rule = f"{tap} to have maps of more than one cell"
            raise LayerError(expected(rule, "1x1 maps, in which nothing has a place", remedy))
        return maps[tap]

    def _without_maps(self, tap: str, maps: Collection[str]) -> LayerError:
        module = unwrapped(self.module)
        known = [name for name, _ in module.named_modules() if name]
        if tap not in {*known, *(layer.name for layer in self.layers)}:
            rule = f"a layer of {type(module).__name__}"
            return LayerError(expected(rule, tap, f"Nearest: {', '.join(nearest(tap, known))}"))
        rule = f"{tap} to give maps (image, filter, row, col)"
        return LayerError(expected(rule, "another output", f"Choose among {', '.join(nearest(tap, maps))}"))

    def field(self, tap: str) -> ReceptiveField:
        """Return what the cells of a tap see (`partlens.network.receptive_field.receptive_field`)."""
        return receptive_field(self.graph, tap, self.preprocessing.size_px)

    def targets(self, tap: str) -> tuple[str, ...]:
        """Choose the layers by whose values a reconstruction is judged (`partlens.network.layers.default_targets`)."""
        return default_targets(self.graph, tap, self.preprocessing.size_px)

    def upper(self, tap: str, targets: Sequence[str] = ("output",)) -> nn.Module:
        """Copy the performer's own layers from a tap to later layers, to run them on maps that were changed.

        The module takes maps of the tap, ``[image, filter, row, col]`` as `partlens.network.taps.forward_taps` gives
        them, and returns a tuple with one entry per target, ``"output"`` being what the network returns. Maps that were
        not changed give the network's own values. Its parameters are copies with ``requires_grad`` on, in eval mode, in
        the network's type and on its device; the performer is not touched.

        Raises:
            LayerError: an unknown layer, a target that is not after the tap, or a tap that a shortcut goes around.

        Example:
            >>> network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)).eval()
            >>> performer = Performer(network, "tiny", Preprocessing(size_px=(4, 4)), weights_sha256="")
            >>> image = torch.ones(1, 3, 4, 4)
            >>> maps = network[:2](image)
            >>> bool((performer.upper("1")(maps)[0] == network(image)).all())
            True
        """
        return self.graph.cut(tap, targets)

    @functools.cached_property
    def outputs(self) -> Outputs:
        """What its outputs are: how many, of what kind, and which of several tensors.

        Raises:
            LayerError: it does not take its own preprocessing's input, or its answer has no scores.
        """
        pictures = [Image.fromarray(each) for each in made_images()]
        return outputs_of(self.module, self.preprocessing(pictures), self.name)

    def matched(self, categories: Sequence[str]) -> Match:
        """Return which outputs categories of photos mean (`partlens.network.classes.match`)."""
        return match(categories, self.class_names, self.outputs.count)

    def output(self, name: str) -> int:
        """Return the number of the output with a name; a number of an output is taken as it is.

        Raises:
            InputError: no output of that name, with the nearest ones.
        """
        count = self.outputs.count
        names = self.class_names or tuple(map(str, range(count)))
        if name in names[:count]:
            return names.index(name)
        if name.isdigit() and int(name) < count:
            return int(name)
        raise InputError(expected(f"a class of {self.name}", name, f"Nearest: {', '.join(nearest(name, names))}"))

    def on(self, device: torch.device) -> Performer:
        """Return the performer on a device: itself on the CPU, else with a copy of its network there."""
        if device.type == "cpu":
            return self
        return dataclasses.replace(self, module=copy.deepcopy(self.module).to(device))


def module_of(performer: Performer | nn.Module) -> nn.Module:
    """Return the readable network of a performer, or of a module that is passed as such.

    Raises:
        InputTypeError: neither, or a compiled network.
    """
    return unwrapped(performer.module if isinstance(performer, Performer) else performer)


def weights_sha256(module: nn.Module) -> str:
    """Hash a network's weights and buffers.

    64 hexadecimal digits over names, types, shapes and bytes, in the order of the state dict; wrappers such as
    ``DataParallel`` and the device do not change them.

    Example:
        >>> a = nn.Linear(2, 2)
        >>> weights_sha256(a) == weights_sha256(copy.deepcopy(a))
        True
    """
    digest = hashlib.sha256()
    for name, value in unwrapped(module).state_dict().items():
        if not isinstance(value, Tensor):
            continue
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()
