"""The network under study: a performer knows itself."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor, nn

from partlens.errors import InputError, InputTypeError, LayerError, expected, nearest, usual_modes
from partlens.network.borrowed import borrowed, hooked, like_weights, unwrapped
from partlens.network.classes import Match, match
from partlens.network.layers import Found, LayerInfo, Layers
from partlens.network.layout import BATCH_UNKNOWN, WHOLE, Layout, own_name, tap_layout
from partlens.network.outputs import Outputs, made_images, outputs_of
from partlens.network.preprocessing import Preprocessing
from partlens.network.receptive_field import ReceptiveField, spread_evenly
from partlens.network.upper import OUTPUT, LaidOut, Upper
from partlens.network.watched import place_of, three_images
from partlens.run import Precision


@dataclass(frozen=True)
class Performer:
    """The network under study with all that belongs to it.

    What follows from the network (layers, chosen layers) is computed when it is first asked for, and once.

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
        precision: in which passes that only read compute (`partlens.network.precision`).
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
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        given: object = self.preprocessing
        if not isinstance(given, Preprocessing):
            rule = "preprocessing as a partlens.Preprocessing"
            raise InputTypeError(expected(rule, type(given).__name__, "Write its sizes, mean and standard deviation"))

    @property
    def spec(self) -> str | None:
        """The name that loads the same again; ``None`` for a network object or another preprocessing."""
        return self.loaded_as[0] if self.loaded_as is not None and self.loaded_as[1] == self.preprocessing else None

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next((value.device for value in self.module.parameters()), torch.device("cpu"))

    @functools.cached_property
    def _known(self) -> Layers:
        return Layers(unwrapped(self.module), self.preprocessing.channels, self.preprocessing.size_px)

    @property
    def found(self) -> tuple[Found, ...]:
        """Every layer that can be read, as it was found in a pass."""
        return self._known.found

    @functools.cached_property
    def layers(self) -> tuple[LayerInfo, ...]:
        """Every layer that can be read, in execution order.

        Raises:
            LayerError: the network does not accept its input size or channels.
        """
        return self._known.listed(self.default_tap or self._known.default())

    @functools.cached_property
    def tap(self) -> str:
        """The layer to explain when none is named: `default_tap`, else what `partlens.network.layers` chooses.

        Raises:
            LayerError: no layer has maps larger than 1x1 that everything passes, with two layers after it.
        """
        chosen = self.default_tap or self._known.default()
        if chosen is not None:
            return chosen
        rule = f"a layer of {type(unwrapped(self.module)).__name__} with maps larger than 1x1 and two layers after it"
        raise LayerError(expected(rule, *self.without_layers("Use a larger input")))

    def without_layers(self, remedy: str) -> tuple[str, str]:
        """Say why no layer of the network can be used, and what to do."""
        reasons = Counter(layer.reason or "too few layers after it" for layer in self.layers)
        why = "; ".join(f"{count} {reason}" for reason, count in reasons.most_common(3)) or "only functions, no modules"
        if BATCH_UNKNOWN in reasons:
            remedy = "Write its forward for a batch of images"
        return (
            f"none among {len(self.layers)} layers ({why})",
            f"{remedy}, or explain a part of the network that has one",
        )

    def layout(self, tap: str) -> Layout:
        """Return where a tap's own output has its filters and places.

        Raises:
            LayerError: an unknown layer, or one whose layout is not known.
        """
        if tap not in self._read:
            self._read[tap] = tap_layout(unwrapped(self.module), self._layouts, tap)
        return self._read[tap]

    @functools.cached_property
    def _read(self) -> dict[str, Layout]:
        """Layouts that were asked for: a pass asks for those of all its layers batch by batch."""
        return {}

    @functools.cached_property
    def _layouts(self) -> dict[str, Layout | str]:
        return {one.name: one.layout for one in self.found}

    def whole(self, tap: str) -> str:
        """Return the name under which a tap is read for `upper`.

        It is the tap itself, but for a layer of tokens some of which have no place, such as a class token: as
        ``NAME:whole`` its maps have further rows below the others that hold these.
        """
        return f"{tap}:{WHOLE}" if ":" not in tap and self.layout(tap).beside else tap

    def lowest(self, tap: str) -> float:
        """Return the smallest value that a layer gave for made images."""
        return self._known.lowest(tap)

    def cut_points(self) -> list[str]:
        """Return the layers through which everything passes, in execution order."""
        return self._known.cut_points

    def layer(self, tap: str) -> LayerInfo:
        """Return what is known of a tap, refusing layers without maps.

        Raises:
            LayerError: an unknown layer (with the nearest names), one without maps, or one whose maps have a
                single cell.
        """
        maps = {layer.name: layer for layer in self.layers if layer.has_maps}
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
        """Return what the cells of a tap see (`partlens.network.receptive_field.receptive_fields`).

        Where the operations do not tell (attention), the cells are spread evenly over the image and may see all of it.
        """
        name = own_name(tap)
        found = self._known.field(name)
        if found is not None and 0 not in found.stride_px:
            return found
        cells = next((layer.shape[1:] for layer in self.layers if layer.name == name and layer.has_places), None)
        if cells is not None:
            return spread_evenly((cells[0], cells[1]), self.preprocessing.size_px)
        if found is None:
            rule = f"{name} to have cells whose receptive field is known"
            raise LayerError(expected(rule, "operations on the way whose field is not", "Choose a layer before them"))
        return found

    def targets(self, tap: str) -> tuple[str, ...]:
        """Choose the layers by whose values a reconstruction is judged (`partlens.network.layers.Layers.targets`)."""
        if tap not in self._layouts:
            raise self._without_maps(tap, [layer.name for layer in self.layers if layer.has_maps])
        return tuple(map(self.whole, self._known.targets(tap)))

    @usual_modes()
    def upper(self, tap: str, targets: Sequence[str] = ("output",)) -> nn.Module:
        """Copy the performer's own layers from a tap to later layers, to run them on maps that were changed.

        The module takes maps of the tap, ``[image, filter, row, col]``, as `partlens.network.taps.forward_taps` gives
        them under the name `whole` of the tap, and returns a tuple with one entry per target: maps or vectors as the
        target's name reads them, and for ``"output"`` what the network returns. Maps that were not changed give the
        network's own values. Its parameters are copies with ``requires_grad`` on, in eval mode, in the network's type
        and on its device; the performer is not touched.

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
        inner = self._cut(own_name(tap), [own_name(name) for name in targets])
        source, *others = (self._cut_layout(name) for name in (tap, *targets))
        if all(layout.kind in {"maps", "vectors"} for layout in (source, *others)):
            return inner
        whole = [name.endswith(f":{WHOLE}") for name in targets]
        return LaidOut(inner, source, list(zip(others, whole, strict=True)))

    def _cut_layout(self, name: str) -> Layout:
        """Return the layout of what enters or leaves a cut; what no module gives is handed over as it is."""
        return self.layout(name) if own_name(name) in self._layouts else Layout("vectors")

    def _cut(self, tap: str, targets: Sequence[str]) -> Upper:
        """Copy layers in their own layouts."""
        if not targets:
            raise LayerError(expected("at least one target layer", "none", 'Name one, or "output"'))
        module = unwrapped(self.module)
        self.layout(tap)
        self._known.check_cut(tap, [name for name in targets if name != OUTPUT])
        # The value is put in where it is made: a block around may have made more of it, such as pooled tokens.
        names = (self._known.maker_of(tap), *targets)
        source, *places = (None if name == OUTPUT else place_of(module, name) for name in names)
        assert source is not None
        own = [None if place is None else (place.path, place.call) for place in places]
        images = like_weights(module, three_images(self.preprocessing.channels, self.preprocessing.size_px))
        with borrowed(module, copy_weights=False) as network:
            loops = {place_of(module, name).path: self.layout(name).loop for name in {*names} - {OUTPUT}}
            made = Upper(network, (source.path, source.call), own, images[:2], loops)
        if made.reproduces:
            return made
        if any(map(hooked, module.modules())):
            rule, got = "hooks that read a layer's output alone", f"hooks that read what comes before {tap}"
            raise LayerError(expected(rule, got, "Remove the hooks, or tap an earlier layer"))
        raise self._known.bypassed(tap)

    @functools.cached_property
    @usual_modes()
    def outputs(self) -> Outputs:
        """What its outputs are: how many, of what kind, and which of several tensors.

        Raises:
            InputError: its class names are not as many as its outputs.
            LayerError: it does not take its own preprocessing's input, or its answer has no scores.
        """
        pictures = [Image.fromarray(each) for each in made_images()]
        found = outputs_of(self.module, self.preprocessing(pictures), self.name)
        if self.class_names and len(self.class_names) != found.count:
            rule, got = f"{found.count} class names, one for each output of {self.name}", str(len(self.class_names))
            raise InputError(expected(rule, got, "Give them in the order of the outputs, or none"))
        return found

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
        if name in names:
            return names.index(name)
        if name.isdigit() and int(name) < count:
            return int(name)
        raise InputError(expected(f"a class of {self.name}", name, f"Nearest: {', '.join(nearest(name, names))}"))

    def output_name(self, output: int) -> str:
        """Return what an output is called, its number where it has no name; 1 is the no of a single output."""
        if output == self.outputs.count == 1:
            return f"not {self.output_name(0)}"
        return self.class_names[output] if self.class_names else str(output)

    def computing(self, precision: Precision) -> Performer:
        """Return the performer with another precision of passes that only read; its module is the same."""
        return self._like(precision=precision)

    def taking(self, preprocessing: Preprocessing) -> Performer:
        """Return the performer with another way from files to an input of the same size."""
        return self._like(preprocessing=preprocessing)

    def _like(self, **fields: object) -> Performer:
        """Change fields that nothing computed depends on, and keep what was computed."""
        made = dataclasses.replace(self, **fields)  # type: ignore[arg-type]
        made.__dict__.update({name: known for name, known in self.__dict__.items() if name not in made.__dict__})
        return made

    def on(self, device: torch.device) -> Performer:
        """Return the performer on a device: itself where it is there, else with a copy of its network."""
        if device == self.device:
            return self
        return dataclasses.replace(self, module=copy.deepcopy(self.module).to(device))

    def __getstate__(self) -> dict[str, object]:
        """Give the fields alone: what was computed is computed again by who needs it."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def device_of(name: str | None, here: torch.device | None = None, number: int = 0) -> torch.device:
    """Return the device that a name means.

    Args:
        name: ``cpu``, ``cuda``, ``cuda:1``; ``auto``, a GPU where there is one; ``None``, where the network is.
        here: where the network is; by default on the CPU.
        number: of a worker: where a GPU is meant and none is named, they are taken in turn.

    Raises:
        InputError: no such device, or not on this machine.
    """
    count = torch.cuda.device_count()
    if name is None:
        return here or torch.device("cpu")
    try:
        device = torch.device({"auto": "cuda" if count else "cpu"}.get(name, name))
    except RuntimeError as error:
        raise InputError(expected("a device such as auto, cpu or cuda", name, "Choose auto")) from error
    if device.type not in {"cpu", "cuda"} or (device.type == "cuda" and (device.index or 0) >= count):
        raise InputError(expected("a device that this machine has", name, "Choose auto"))
    return torch.device("cuda", number % count) if device == torch.device("cuda") else device


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
