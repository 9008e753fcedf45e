"""Performers by name: networks, their weights and the preprocessing that belongs to them.

A performer is written as one string:

========================================  ===========================================================
``torchvision:resnet18``                  torchvision's network with its default weights
``torchvision:vgg16@IMAGENET1K_V1``       the same with a named set of weights
``torchvision:resnet18@my.safetensors``   weights from a file (``.safetensors``, ``.pt``, ``.pth``)
``torchvision:resnet18@random:0``         random weights from seed 0; for tests and null models
``timm:convnext_tiny``                    timm's network (extra ``zoo``)
``partlens:flower-demo@my.safetensors``   the demo's network
``package.module:factory``                your own callable that returns a module or a `Performer`
``package.module:factory@my.safetensors`` the same with weights from a file; a callable with a parameter
                                          ``weights`` gets what stands after ``@`` and loads it itself
========================================  ===========================================================
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import nn

from partlens.errors import InputError, InputTypeError, PartlensError, WeightsError, expected, first_line, nearest
from partlens.network.borrowed import unwrapped
from partlens.network.flower_network import FLOWER_DEMO, flower_network, flower_preprocessing
from partlens.network.performer import Performer, module_of, weights_sha256
from partlens.network.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from partlens.network.weights import (
    OUTPUT_LAYER,
    check_finite,
    is_file,
    load_into,
    no_download,
    output_count,
    read_weights,
    seed_of,
    seeded,
    with_outputs,
)


def _number_in(value: Any, default: int) -> int:
    return int(value[0] if isinstance(value, (list, tuple)) else value) if value is not None else default


def _torchvision_preprocessing(weights: Any) -> Preprocessing:
    """Read torchvision's ``ImageClassification`` preset."""
    preset = weights.transforms()
    crop = _number_in(getattr(preset, "crop_size", None), 224)
    name = getattr(getattr(preset, "interpolation", None), "value", "bilinear")
    return Preprocessing(
        size_px=(crop, crop),
        resize="crop",
        resize_px=max(_number_in(getattr(preset, "resize_size", None), 256), crop),
        mean=_three(getattr(preset, "mean", IMAGENET_MEAN)),
        std=_three(getattr(preset, "std", IMAGENET_STD)),
        interpolation="bicubic" if name == "bicubic" else "bilinear",
    )


def _three(values: Sequence[float]) -> tuple[float, float, float]:
    return float(values[0]), float(values[1]), float(values[2])


__all__ = ["Performer", "load_performer", "module_of", "weights_sha256"]


@dataclass
class _Loaded:
    module: nn.Module
    preprocessing: Preprocessing
    class_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    untrained_layers: tuple[str, ...] = ()


def _load_torchvision(name: str, weights: str | None, spec: str) -> _Loaded:
    import torchvision

    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        raise InputError(
            expected("the name of a torchvision classifier", name, f"Nearest: {', '.join(nearest(name, names))}")
        )
    enum = torchvision.models.get_model_weights(name)
    default = getattr(enum, "DEFAULT", None)
    preprocessing = _torchvision_preprocessing(default) if default is not None else Preprocessing(resize_px=256)
    classes = tuple(default.meta["categories"]) if default is not None and "categories" in default.meta else None

    def build(**options: Any) -> nn.Module:
        if name in {"googlenet", "inception_v3"}:
            options = {"init_weights": False, "aux_logits": False, **options}
        return cast("nn.Module", torchvision.models.get_model(name, weights=None, **options))

    if weights is not None and weights.startswith("random:"):
        seed = seed_of(weights, spec)
        return _Loaded(seeded(build, seed), preprocessing, None, (f"random weights, seed {seed}",))
    if weights is None or not is_file(weights):
        chosen = default
        if weights is not None and weights != "DEFAULT":
            members = list(enum.__members__)
            if weights not in members:
                raise InputError(
                    expected(
                        f"weights of {name} among {', '.join(members)}",
                        weights,
                        "Choose one, or give the path of a file",
                    )
                )
            chosen = enum[weights]
        if chosen is None:
            raise WeightsError(
                expected(f"published weights of {name}", "none", f"Give a file: {name}@weights.safetensors")
            )
        try:
            module = torchvision.models.get_model(name, weights=chosen, progress=False)
        except (OSError, RuntimeError) as error:
            raise no_download(spec, error) from error
        return _Loaded(module, _torchvision_preprocessing(chosen), tuple(chosen.meta.get("categories", ())) or None)
    state, metadata = read_weights(Path(weights))
    options: dict[str, Any] = {}
    if name in {"googlenet", "inception_v3"} and any(n.startswith(("aux", "AuxLogits")) for n in state):
        options["aux_logits"] = True
    module = seeded(lambda: build(**options), 0)
    if (outputs := output_count(module.state_dict(), state)) is not None:
        module = seeded(lambda: build(num_classes=outputs, **options), 0)
    load_into(module, state, Path(weights).name)
    preprocessing = Preprocessing.from_metadata(metadata) or preprocessing
    if (named := class_names_of(metadata, outputs, Path(weights).name)) is not None:
        return _Loaded(module, preprocessing, named)
    return _Loaded(
        module,
        preprocessing,
        classes if outputs is None else None,
        ("class names assumed to be torchvision's ImageNet list",) if outputs is None and classes else (),
    )


def _load_timm(name: str, weights: str | None, spec: str) -> _Loaded:
    try:
        import timm
        import timm.data
    except ImportError as error:
        raise InputError(
            expected("the package timm for this performer", "not installed", "Run: pip install 'partlens[zoo]'")
        ) from error
    if not timm.is_model(name.partition(".")[0]):
        raise InputError(
            expected("the name of a timm network", name, f"Nearest: {', '.join(nearest(name, timm.list_models()))}")
        )
    metadata: dict[str, str] = {}
    outputs: int | None = None
    notes: tuple[str, ...] = ()
    if weights is not None and weights.startswith("random:"):
        seed = seed_of(weights, spec)
        module = seeded(lambda: cast("nn.Module", timm.create_model(name, pretrained=False)), seed)
        notes = (f"random weights, seed {seed}",)
    elif weights is not None and is_file(weights):
        state, metadata = read_weights(Path(weights))
        module = seeded(lambda: cast("nn.Module", timm.create_model(name, pretrained=False)), 0)
        if (outputs := output_count(module.state_dict(), state)) is not None:
            module = seeded(lambda: cast("nn.Module", timm.create_model(name, num_classes=outputs)), 0)
        load_into(module, state, Path(weights).name)
    else:
        full = name if weights in {None, "DEFAULT"} else f"{name}.{weights}"
        try:
            module = timm.create_model(full, pretrained=True)
        except Exception as error:  # the hub's client has its own error types
            raise no_download(spec, error) from error
    config = timm.data.resolve_model_data_config(module)
    rows, cols = (int(v) for v in config["input_size"][1:])
    preprocessing = Preprocessing.from_metadata(metadata) or Preprocessing(
        size_px=(rows, cols),
        resize="crop",
        resize_px=max(rows, cols, math.floor(max(rows, cols) / float(config.get("crop_pct") or 1.0))),
        mean=_three(config["mean"]),
        std=_three(config["std"]),
        interpolation="bicubic" if config.get("interpolation") == "bicubic" else "bilinear",
    )
    return _Loaded(module, preprocessing, class_names_of(metadata, outputs, str(weights)), notes)


def own_weights(spec: str, weights: str | None) -> str:
    """Insist on a file or a seed for a network without published weights.

    Raises:
        WeightsError: neither.
    """
    if weights is None or not (weights.startswith("random:") or is_file(weights)):
        body = spec.partition("@")[0]
        remedy = f"Write {body}@weights.safetensors, or @random:0 for random weights"
        raise WeightsError(expected(f"a weights file for {body}", weights or "none", remedy))
    return weights


def class_names_of(metadata: Mapping[str, str], outputs: int | None, where: str) -> tuple[str, ...] | None:
    """Read ``class_names`` of a header, a JSON list with one name per output (``None``: as many as the network has)."""
    text = metadata.get("class_names")
    if text is None:
        return None
    try:
        names = json.loads(text)
    except json.JSONDecodeError:
        names = None
    listed_names = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not listed_names or (outputs is not None and len(names) != outputs):
        count = "" if outputs is None else f"{outputs} "
        raise WeightsError(
            expected(f"{count}class names as a JSON list in the header of {where}", text, "Correct the header")
        )
    return tuple(names)


def _load_own(name: str, weights: str | None, spec: str) -> _Loaded:
    """Load the demo's network; its classes and input stand in the file's header."""
    if name != FLOWER_DEMO:
        raise InputError(
            expected(f"partlens:{FLOWER_DEMO}", f"partlens:{name}", "Choose it, or package.module:factory")
        )
    weights = own_weights(spec, weights)
    if weights.startswith("random:"):
        seed = seed_of(weights, spec)
        module = seeded(lambda: flower_network(6), seed)
        return _Loaded(module, flower_preprocessing(), None, (f"random weights, seed {seed}",))
    state, metadata = read_weights(Path(weights))
    outputs = int(state["classes.bias"].shape[0]) if "classes.bias" in state else 6
    module = seeded(lambda: flower_network(outputs), 0)
    load_into(module, state, Path(weights).name)
    preprocessing = Preprocessing.from_metadata(metadata) or flower_preprocessing()
    return _Loaded(module, preprocessing, class_names_of(metadata, outputs, Path(weights).name))


def _load_factory(package: str, name: str, spec: str, weights: str | None) -> tuple[nn.Module | Performer, str | None]:
    """Call a factory; return what it made, and the weights that are still to be loaded."""
    try:
        found = getattr(importlib.import_module(package), name)
    except (ImportError, AttributeError) as error:
        raise InputError(
            expected(
                "torchvision:NAME, timm:NAME, partlens:NAME or package.module:factory",
                f"{spec} ({error})",
                "Check the spelling, and that Python can import the package (PYTHONPATH)",
            )
        ) from error
    try:
        if not callable(found) or isinstance(found, nn.Module):
            made = found
        elif "weights" in inspect.signature(found).parameters:
            made, weights = found(weights=weights), None
        else:
            made = found()
    except PartlensError:
        raise
    except Exception as error:  # a user's code may raise anything
        got = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(expected(f"{spec} to build a network", got, "Correct it; --debug shows where")) from error
    if not isinstance(made, (nn.Module, Performer)):
        raise InputTypeError(
            expected(
                f"{spec} to give a torch.nn.Module or a Performer",
                type(made).__name__,
                "Return the network from it",
            )
        )
    return made, weights


def load_performer(
    spec: str | nn.Module, preprocessing: Preprocessing | None = None, weights: str | Path | None = None
) -> Performer:
    """Load the network to be explained.

    Args:
        spec: its name (see the top of this module), or the network itself.
        preprocessing: how images become its input; when ``None``, what the weights say, else ImageNet's
            usual.
        weights: what else would stand after ``@``: a file, the name of a set of weights, or ``random:SEED``.
            With a module as ``spec``, a file to load into a copy of it.

    Returns:
        The performer in eval mode (a module that you pass in is left in the mode it has).

    Raises:
        InputError: an unknown name, with the nearest ones.
        InputTypeError: something that is not a readable module (TorchScript, ``torch.compile``).
        WeightsError: weights that are absent, not finite, do not fit or are not safe to open.

    Example:
        >>> performer = load_performer("torchvision:squeezenet1_1@random:0")
        >>> performer.preprocessing.size_px
        (224, 224)
    """
    if not isinstance(spec, str):
        module = unwrapped(spec)
        notes: tuple[str, ...] = ()
        loaded = _Loaded(module, Preprocessing(resize_px=256))
        if weights is not None:
            state, metadata = read_weights(Path(weights))
            loaded.module = copy.deepcopy(module)
            outputs = output_count(module.state_dict(), state)
            if outputs is not None and OUTPUT_LAYER in metadata:
                with_outputs(loaded.module, metadata[OUTPUT_LAYER], outputs)
            load_into(loaded.module, state, Path(weights).name)
            loaded.preprocessing = Preprocessing.from_metadata(metadata) or loaded.preprocessing
            loaded.class_names = class_names_of(metadata, outputs, Path(weights).name)
        return _finish(loaded, type(module).__name__, preprocessing, notes)
    body, _, tail = spec.partition("@")
    source, colon, name = body.partition(":")
    wanted = str(weights) if weights is not None else (tail or None)
    if not colon or not source or not name:
        raise InputError(
            expected(
                "a performer such as torchvision:resnet18 or package.module:factory",
                spec,
                "Write the source, a colon and the name",
            )
        )
    label = body + (f"@{Path(wanted).name if is_file(wanted) else wanted}" if wanted else "")
    loaders = {"torchvision": _load_torchvision, "timm": _load_timm, "partlens": _load_own}
    if source in loaders:
        loaded = loaders[source](name, wanted, spec)
        loaded.module.eval()
        return _finish(loaded, label, preprocessing)
    made, wanted = _load_factory(source, name, spec, wanted)
    if isinstance(made, Performer):
        own = made.preprocessing if preprocessing is None else preprocessing
        if wanted is None:
            return dataclasses.replace(made, name=label if tail else made.name, preprocessing=own)
        # The factory's network with other weights; what their header says of inputs and outputs goes with them.
        written = Preprocessing.from_metadata(read_weights(Path(wanted))[1])
        filled = load_performer(made.module, written if preprocessing is None and written else own, Path(wanted))
        filled.module.eval()
        names = filled.class_names or made.class_names
        return dataclasses.replace(filled, name=label, default_tap=made.default_tap, class_names=names)
    performer = load_performer(made, preprocessing, Path(wanted) if wanted else None)
    performer.module.eval()
    return dataclasses.replace(performer, name=label)


def _finish(loaded: _Loaded, name: str, preprocessing: Preprocessing | None, notes: tuple[str, ...] = ()) -> Performer:
    check_finite(loaded.module.state_dict(), name)
    return Performer(
        module=loaded.module,
        name=name,
        preprocessing=preprocessing or loaded.preprocessing,
        weights_sha256=weights_sha256(loaded.module),
        class_names=loaded.class_names,
        notes=loaded.notes + notes,
        untrained_layers=loaded.untrained_layers,
    )
