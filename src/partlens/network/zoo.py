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
                                          ``weights`` gets what follows ``@`` and loads it itself
========================================  ===========================================================
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from torch import nn

from partlens.errors import (
    InputError,
    InputTypeError,
    PartlensError,
    WeightsError,
    checked,
    expected,
    first_line,
    nearest,
    printable,
    usual_modes,
)
from partlens.network.borrowed import unwrapped
from partlens.network.fitting import FLOWER_DEMO, flower_network, flower_preprocessing
from partlens.network.performer import Performer, weights_sha256
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

_USUAL = Preprocessing(resize_px=256)
_IMAGENET_OUTPUTS = 1000
_FLOWER_OUTPUTS = 6
_WITH_AUX = frozenset(("googlenet", "inception_v3"))
_TRANSFORMED = (
    "transform_input is on, as in torchvision's published network; for one that was trained without, give the network "
    "itself"
)

_Build = Callable[[int | None], nn.Module]


def _performer(
    module: nn.Module, preprocessing: Preprocessing, class_names: tuple[str, ...] | None = None, *notes: str
) -> Performer:
    """Return a performer whose name and hash follow in `load_performer`."""
    return Performer(module, "", preprocessing, "", class_names=class_names, notes=notes)


def _drawn(build: _Build, preprocessing: Preprocessing, weights: str, spec: str) -> Performer:
    """Build a network with random weights, named ``random:SEED``."""
    seed = seed_of(weights, spec)
    return _performer(seeded(lambda: build(None), seed), preprocessing, None, f"random weights, seed {seed}")


def _filled(build: _Build, preprocessing: Preprocessing, usual: int, weights: str) -> tuple[Performer, int | None]:
    """Build a network with as many outputs as a file has weights for, and fill it.

    ``usual`` is the number of outputs of ``build(None)``; the number that is returned is ``None`` for it.
    """
    path = Path(weights)
    state, metadata = read_weights(path)
    module = seeded(lambda: build(None), 0)
    if (outputs := output_count(module.state_dict(), state)) is not None:
        module = seeded(lambda: build(outputs), 0)
    load_into(module, state, path.name)
    names = class_names_of(metadata, outputs or usual, path.name)
    return _performer(module, Preprocessing.from_metadata(metadata) or preprocessing, names), outputs


def _preset_of(weights: Any) -> Preprocessing:
    """Read torchvision's ``ImageClassification`` preset; ImageNet's usual without weights."""
    if weights is None:
        return _USUAL
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


def _number_in(value: Any, default: int) -> int:
    return int(value[0] if isinstance(value, (list, tuple)) else value) if value is not None else default


def _three(values: Sequence[float]) -> tuple[float, float, float]:
    return float(values[0]), float(values[1]), float(values[2])


def _of_file(enum: Any, weights: str | None) -> tuple[Any, str]:
    """Return the published weights whose preprocessing goes with a file: of the same file name, else the default ones.

    The text says so where the published ones differ in their preprocessing.
    """
    default = getattr(enum, "DEFAULT", None)
    if weights is None or default is None:
        return default, ""
    own = next((each for each in enum if each.url.rpartition("/")[2] == Path(weights).name), None)
    if own is not None or len({repr(_preset_of(each)) for each in enum}) == 1:
        return own or default, ""
    return default, f"preprocessing assumed to be that of {default.name}: the file does not say which weights it holds"


def _aux_and_transform(weights: Path) -> tuple[bool, bool]:
    """Whether a file of GoogLeNet or Inception holds auxiliary classifiers, and whether the input is transformed.

    The published networks transform torchvision's input to another scale; a header that says its own input means no
    such network.
    """
    state, header = read_weights(weights)
    with_aux = any(step.startswith(("aux", "AuxLogits")) for name in state for step in name.split("."))
    return with_aux, "input" not in header


def _load_torchvision(name: str, weights: str | None, spec: str) -> Performer:
    from torchvision import models  # two seconds of CPU that only its own networks cost

    names = models.list_models(module=models)
    if name not in names:
        raise InputError(
            expected("the name of a torchvision classifier", name, f"Nearest: {', '.join(nearest(name, names))}")
        )
    enum = models.get_model_weights(name)
    default, doubt = _of_file(enum, weights)
    preprocessing = _preset_of(default)
    with_aux = transformed = False

    def build(outputs: int | None) -> nn.Module:
        options: dict[str, Any] = {}
        if name in _WITH_AUX:
            options = {"init_weights": False, "aux_logits": with_aux, "transform_input": transformed}
        if outputs is not None:
            options["num_classes"] = outputs
        return cast("nn.Module", models.get_model(name, weights=None, **options))

    if weights is not None and weights.startswith("random:"):
        return _drawn(build, preprocessing, weights, spec)
    if weights is not None and is_file(weights):
        if name in _WITH_AUX:
            with_aux, transformed = _aux_and_transform(Path(weights))
        filled, outputs = _filled(build, preprocessing, _IMAGENET_OUTPUTS, weights)
        said = (_TRANSFORMED if transformed else "", doubt if filled.preprocessing == preprocessing else "")
        assumed = getattr(default, "meta", {}).get("categories") if outputs is None else None
        return _with_names(dataclasses.replace(filled, notes=tuple(filter(None, said))), assumed)
    return _published(name, enum, weights, spec)


def _with_names(performer: Performer, assumed: Sequence[str] | None) -> Performer:
    """Name the outputs of a network whose file does not."""
    if performer.class_names is not None or assumed is None:
        return performer
    notes = ("class names assumed to be torchvision's ImageNet list", *performer.notes)
    return dataclasses.replace(performer, class_names=tuple(assumed), notes=notes)


def _published(name: str, enum: Any, weights: str | None, spec: str) -> Performer:
    """Load a network of torchvision with weights that torchvision publishes."""
    from torchvision import models

    members, default = enum.__members__, getattr(enum, "DEFAULT", None)
    if weights not in {None, "DEFAULT", *members}:
        rule = f"weights of {name} among {', '.join(members)}"
        raise InputError(expected(rule, str(weights), "Choose one, or give the path of a file"))
    chosen = enum[weights] if weights in members else default
    if chosen is None:
        raise WeightsError(expected(f"published weights of {name}", "none", f"Give a file: {name}@weights.safetensors"))
    try:
        module = models.get_model(name, weights=chosen, progress=False)
    except (OSError, RuntimeError) as error:
        raise no_download(spec, error) from error
    return _performer(module, _preset_of(chosen), tuple(chosen.meta.get("categories", ())) or None)


def _load_timm(name: str, weights: str | None, spec: str) -> Performer:
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

    def build(outputs: int | None) -> nn.Module:
        options = {} if outputs is None else {"num_classes": outputs}
        return cast("nn.Module", timm.create_model(name, pretrained=False, **options))

    def preprocessing_of(module: nn.Module) -> Preprocessing:
        config = timm.data.resolve_model_data_config(module)
        rows, cols = (int(v) for v in config["input_size"][1:])
        return Preprocessing(
            size_px=(rows, cols),
            resize="crop",
            resize_px=max(rows, cols, math.floor(max(rows, cols) / float(config.get("crop_pct") or 1.0))),
            mean=_three(config["mean"]),
            std=_three(config["std"]),
            interpolation="bicubic" if config.get("interpolation") == "bicubic" else "bilinear",
        )

    if weights is not None and (weights.startswith("random:") or is_file(weights)):
        usual: Any = seeded(lambda: build(None), 0)
        if is_file(weights):
            return _filled(build, preprocessing_of(usual), usual.num_classes, weights)[0]
        return _drawn(build, preprocessing_of(usual), weights, spec)
    full = name if weights in {None, "DEFAULT"} else f"{name}.{weights}"
    try:
        module = timm.create_model(full, pretrained=True)
    except Exception as error:  # the hub's client has its own error types
        raise no_download(spec, error) from error
    return _performer(module, preprocessing_of(module))


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
    """Read ``class_names`` of a header, a JSON list with one name per output (``None``: any number of names)."""
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


def _load_own(name: str, weights: str | None, spec: str) -> Performer:
    """Load the demo's network; the file's header names its classes and its input."""
    if name != FLOWER_DEMO:
        raise InputError(
            expected(f"partlens:{FLOWER_DEMO}", f"partlens:{name}", "Choose it, or package.module:factory")
        )
    weights = own_weights(spec, weights)

    def build(outputs: int | None) -> nn.Module:
        return flower_network(_FLOWER_OUTPUTS if outputs is None else outputs)

    if weights.startswith("random:"):
        return _drawn(build, flower_preprocessing(), weights, spec)
    return _filled(build, flower_preprocessing(), _FLOWER_OUTPUTS, weights)[0]


def _made(found: Any, weights: str | None, spec: str) -> tuple[nn.Module | Performer, str | None]:
    """Return what a factory gives, and the weights that it has not taken itself."""
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
        rule = f"{spec} to give a torch.nn.Module or a Performer"
        raise InputTypeError(expected(rule, type(made).__name__, "Return the network from it"))
    return made, weights


def _load_factory(source: str, name: str, weights: str | None, spec: str) -> Performer:
    """Call a factory; weights that it does not take itself are filled into a copy of what it made."""
    try:
        found = getattr(importlib.import_module(source), name)
    except (ImportError, AttributeError) as error:
        rule = "torchvision:NAME, timm:NAME, partlens:NAME or package.module:factory"
        remedy = "Check the spelling, and that Python can import the package (PYTHONPATH)"
        raise InputError(expected(rule, f"{spec} ({error})", remedy)) from error
    made, weights = _made(found, weights, spec)
    if weights is not None and weights.startswith("random:"):
        remedy = "Leave it out: a network of your own has the weights that it is made with"
        raise WeightsError(expected(f"a weights file for {spec.partition('@')[0]}", weights, remedy))
    if isinstance(made, nn.Module):
        performer = _with_weights(made, weights, _USUAL)
    elif weights is None:
        return made
    else:  # what the header says of inputs and outputs goes with the weights
        filled = _with_weights(made.module, weights, made.preprocessing)
        names = filled.class_names or made.class_names
        performer = dataclasses.replace(filled, default_tap=made.default_tap, class_names=names)
    return performer


def _with_weights(module: nn.Module, weights: str | None, preprocessing: Preprocessing) -> Performer:
    """Return a performer of a module; where weights are given, of a copy that holds them."""
    module = unwrapped(module)
    if weights is None:
        return _performer(module, preprocessing)
    path = Path(weights)
    state, metadata = read_weights(path)
    outputs = output_count(module.state_dict(), state)
    module = copy.deepcopy(module)
    if outputs is not None and OUTPUT_LAYER in metadata:
        with_outputs(module, metadata[OUTPUT_LAYER], outputs)
    load_into(module, state, path.name)
    names = class_names_of(metadata, outputs, path.name)
    return _performer(module, Preprocessing.from_metadata(metadata) or preprocessing, names)


@usual_modes()
@checked
def load_performer(
    model: str | nn.Module | Performer,
    preprocessing: Preprocessing | Mapping[str, Any] | None = None,
    weights: str | Path | None = None,
) -> Performer:
    """Load the network to be explained.

    Args:
        model: its name (see the top of this module), the network itself, or a performer.
        preprocessing: how images become its input, also as the dictionary of :meth:`Preprocessing.to_dict`; when
            ``None``, what the weights say, else ImageNet's usual.
        weights: what would otherwise follow ``@``: a file, the name of a set of weights, or ``random:SEED``.
            With a module as ``model``, a file to load into a copy of it.

    Returns:
        The performer in eval mode (a module that you pass in is left in the mode it has).

    Raises:
        InputError: an unknown name, with the nearest ones.
        InputTypeError: something that is not a readable module (TorchScript, ``torch.compile``), or a preprocessing of
            another kind.
        WeightsError: weights that are absent, not finite, do not fit or are not safe to open.

    Example:
        >>> performer = load_performer("partlens:flower-demo@random:0")
        >>> performer.preprocessing.size_px, performer.tap
        ((112, 112), 'relu5')
    """
    wanted, prepared = None if weights is None else str(weights), _prepared(preprocessing)
    if isinstance(model, Performer):
        return model if prepared is None else dataclasses.replace(model, preprocessing=prepared)
    if not isinstance(model, str):
        return _finished(_with_weights(model, wanted, _USUAL), type(unwrapped(model)).__name__, prepared)
    body, _, tail = model.partition("@")
    source, _, name = body.partition(":")
    wanted = wanted or tail or None
    if "" in {source, name}:
        rule = "a performer such as torchvision:resnet18 or package.module:factory"
        raise InputError(expected(rule, model, "Write the source, a colon and the name"))
    loaders = {"torchvision": _load_torchvision, "timm": _load_timm, "partlens": _load_own}
    loader = loaders.get(source, functools.partial(_load_factory, source))
    performer = loader(name, wanted, model)
    performer.module.eval()
    label, again = _labels(body, wanted)
    named = performer.name or label if wanted is None else label
    return dataclasses.replace(_finished(performer, named, prepared), loaded_as=(again, performer.preprocessing))


def _prepared(given: object) -> Preprocessing | None:
    """Check a preprocessing that was given, and read one that is a dictionary."""
    if given is None or isinstance(given, Preprocessing):
        return given
    if isinstance(given, Mapping):
        return Preprocessing(**given)
    rule = "preprocessing as a partlens.Preprocessing, which also says where pixels go"
    remedy = "Write its sizes, mean and std: partlens.Preprocessing(size_px=(224, 224), resize_px=256)"
    raise InputTypeError(expected(rule, type(given).__name__, remedy))


def _labels(body: str, weights: str | None) -> tuple[str, str]:
    """Return the name to show, with the file's name alone, and the one that loads the same from any folder."""
    if weights is None:
        return body, body
    path = Path(weights)
    shown, again = (path.name, path.resolve()) if is_file(weights) else (weights, weights)
    return printable(f"{body}@{shown}"), printable(f"{body}@{again}")


def _finished(performer: Performer, name: str, preprocessing: Preprocessing | None) -> Performer:
    """Name a performer, check its weights and hash them where its maker has not."""
    check_finite(performer.module.state_dict(), name)
    digest = performer.weights_sha256 or weights_sha256(performer.module)
    return dataclasses.replace(
        performer, name=name, preprocessing=preprocessing or performer.preprocessing, weights_sha256=digest
    )
