"""Weights: read from a file without running its code, checked, and filled into a network; or drawn from a seed."""

from __future__ import annotations

import copy
import json
import pickle
import string
from collections import ChainMap, Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from partlens.data.files import foreign_kind
from partlens.errors import InputError, LayerError, WeightsError, expected, first_line, listed

OUTPUT_LAYER = "output_layer"
"""Entry of a safetensors header: which layer was replaced to change the number of outputs."""

_FILE_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".tar", ".pkl")
_WRAPPERS = ("state_dict", "model_state_dict", "model")


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a weights file, or the index of its pieces: float32 tensors by name and the header, without running code."""
    if not path.is_file():
        raise WeightsError(expected(f"a weights file {path}", "nothing there", "Check the path after @"))
    if path.name.endswith(".safetensors.index.json"):
        return _joined(path)
    with path.open("rb") as file:
        start = file.read(64)
    is_text = not start.translate(None, string.printable.encode())
    if foreign := foreign_kind(start) or (("a text", "Download the file itself") if is_text else None):
        raise WeightsError(expected(f"the weights in {path.name}", *foreign))
    # What is in a file counts, not its ending: a safetensors header begins with its length and a brace.
    is_safe = (path.suffix.lower() == ".safetensors" or start[8:9] == b"{") and not start.startswith(b"PK")
    content, metadata = (_safetensors if is_safe else _pickled)(path)
    content = _unwrapped_state(content, path.name)
    return {str(n): v.float() if v.is_floating_point() else v for n, v in content.items()}, metadata


def _joined(index: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the pieces of a file that an index names; they lie beside it."""
    try:
        names = sorted({Path(name).name for name in json.loads(index.read_text("utf-8"))["weight_map"].values()})
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        rule = f"a weight_map (tensors and their files) in {index.name}"
        raise WeightsError(expected(rule, first_line(error), "Download it again")) from error
    pieces = [read_weights(index.parent / name)[0] for name in names]
    return dict(ChainMap(*pieces)), {}


def _is_state(content: Any) -> bool:
    return isinstance(content, Mapping) and bool(content) and all(isinstance(v, Tensor) for v in content.values())


def _unwrapped_state(content: Any, where: str, depth: int = 3) -> Mapping[str, Tensor]:
    """Find the names and tensors of a network in what a training saved: a usual entry, or the only one that fits."""
    if _is_state(content):
        return cast("Mapping[str, Tensor]", content)
    rule, remedy = f"a state dict (names and tensors) in {where}", "Save module.state_dict() as safetensors"
    if not isinstance(content, Mapping) or not depth:
        raise WeightsError(expected(rule, type(content).__name__, remedy))
    usual = [name for name in _WRAPPERS if isinstance(content.get(name), Mapping) and content[name]]
    fitting = usual[:1] or [name for name, value in content.items() if _is_state(value)]
    if len(fitting) == 1:  # but two networks, such as weights and their moving average, leave a doubt
        state = _unwrapped_state(content[fitting[0]], where, depth - 1)
        fitting += [n for n, v in content.items() if n != fitting[0] and _is_state(v) and len(v) >= len(state)]
    if len(fitting) != 1:
        got = f"several: {listed(fitting)}" if fitting else f"the entries {listed(list(map(str, content)))}"
        raise WeightsError(expected(rule, got, "Save the one that is meant, as safetensors"))
    return state


def _named_as(own: Collection[str], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Strip what wrappers of training tools put before all names, where it then fits.

    Args:
        own: the names of the network.
        weights: the tensors of a file.
    """
    # How many states AveragedModel has averaged is no weight.
    weights = {name: value for name, value in weights.items() if name != "n_averaged" or name in own}
    start = "" if all(name in own for name in weights) else _prefix_of_most(own, weights)
    fits = all(name.startswith(start) and name[len(start) :] in own for name in weights)
    return {name[len(start) :] if fits else name: value for name, value in weights.items()}


def _safetensors(path: Path) -> tuple[Any, dict[str, str]]:
    try:
        with safe_open(str(path), "pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}, dict(handle.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        raise WeightsError(expected(f"safetensors in {path.name}", str(error), "Convert the file again")) from error


def _pickled(path: Path) -> tuple[Any, dict[str, str]]:
    try:
        with path.open("rb") as file:  # of a path torch would look at the ending
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        got = "a pickle that would run code when opened, or that is damaged"
        remedy = (
            "Convert its state dict to safetensors where you trust the file: "
            "safetensors.torch.save_file(module.state_dict(), 'weights.safetensors')"
        )
        raise WeightsError(expected(f"only tensors in {path.name}", got, remedy)) from error
    except Exception as error:  # the unpickler raises whatever a text or a damaged file leads to
        rule = f"PyTorch weights in {path.name}"
        raise WeightsError(expected(rule, first_line(error), "Save the state dict again")) from error
    return content, {}


def check_finite(weights: Mapping[str, Tensor], where: str) -> None:
    """Refuse weights that are not numbers."""
    for name, value in weights.items():
        if isinstance(value, Tensor) and value.is_floating_point() and (bad := int((~value.isfinite()).sum())):
            rule, got = f"finite weights in {where}", f"{bad} NaN or infinite values in {name}"
            raise WeightsError(expected(rule, got, "Use weights from a run that did not diverge"))


def load_into(
    module: nn.Module, weights: Mapping[str, Tensor], where: str, may_lack: tuple[str, ...] = ()
) -> tuple[str, ...]:
    """Fill a network strictly; return the names that were absent and allowed to be."""
    own = module.state_dict()
    weights = _named_as(own, weights)
    # Batch counters are bookkeeping that old files lack; everything else must be there.
    lacking = [n for n in own if n not in weights and not n.endswith("num_batches_tracked")]
    absent = tuple(n for n in lacking if n.startswith(may_lack))
    faults = {"missing": [n for n in lacking if n not in absent], "unexpected": [n for n in weights if n not in own]}
    if got := "; ".join(f"{what} {listed(names, 4)}" for what, names in faults.items() if names):
        rule = f"the {len(own)} tensors of {type(module).__name__} in {where}"
        remedy = "Give the weights of this network, or rename them to its layer names"
        if before := _prefix_of_most(own, weights):
            remedy = f"Take {before!r} from the front of the names, delete the others, and save the file again"
        raise WeightsError(expected(rule, got, remedy))
    for name, value in weights.items():
        if value.shape != own[name].shape:
            rule = f"{name} of shape {tuple(own[name].shape)} in {where}"
            raise WeightsError(expected(rule, str(tuple(value.shape)), "Give the weights of this network"))
    check_finite(weights, where)
    module.load_state_dict(dict(weights), strict=False)
    return absent


def with_outputs(module: nn.Module, layer: str, outputs: int) -> None:
    """Put a new last layer with another number of outputs into a network, in place.

    The layer is its last one with weights: linear or a convolution; the new weights are torch's random start.

    Raises:
        LayerError: the layer is missing or of another kind.
    """
    owner, _, name = layer.rpartition(".")
    old = dict(module.named_modules()).get(layer)
    if not isinstance(old, (nn.Linear, nn.Conv2d)) or getattr(old, "groups", 1) != 1:
        got = "none of that name" if old is None else type(old).__name__
        rule = f"{layer} to be a linear layer or a convolution without groups"
        raise LayerError(expected(rule, got, "Use another network"))
    new = copy.deepcopy(old)
    setattr(new, "out_features" if isinstance(old, nn.Linear) else "out_channels", outputs)
    new.weight = nn.Parameter(old.weight.new_empty(outputs, *old.weight.shape[1:]))
    new.bias = None if old.bias is None else nn.Parameter(old.weight.new_empty(outputs))
    new.reset_parameters()
    setattr(module.get_submodule(owner), name, new)


def _prefix_of_most(own: Collection[str], weights: Mapping[str, Tensor]) -> str:
    """Return what stands before most names of a file, where they are the network's without it."""
    starts: Counter[str] = Counter()
    for name in weights:
        steps = name.split(".")
        cuts = (".".join(steps[:cut]) for cut in range(1, len(steps)))
        starts.update(f"{cut}." for cut in cuts if name[len(cut) + 1 :] in own)
    start, times = next(iter(starts.most_common(1)), ("", 0))
    return start if 2 * times > len(own) else ""


def output_count(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> int | None:
    """Number of classes in a file whose only difference is the size of the last layer, and of auxiliary ones."""
    named = _named_as(own, weights)
    changes = {(own[n].shape, v.shape) for n, v in named.items() if n in own and own[n].shape != v.shape}
    counts = {(was[:1], new[:1]) for was, new in changes}
    if len(counts) != 1 or any(not new or was[1:] != new[1:] for was, new in changes):
        return None
    return next(iter(counts))[1][0]


def seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Build a network from a seed, leaving the global random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build()


def seed_of(weights: str, spec: str) -> int:
    """Read SEED of ``random:SEED``."""
    text = weights.partition(":")[2]
    if not text.isdigit():
        raise InputError(expected("a seed such as random:0", spec, "Write a whole number after random:"))
    return int(text)


def is_file(weights: str) -> bool:
    """Say whether a text names a file, rather than published or random weights: it looks so, or there is one."""
    looks_so = "/" in weights or "\\" in weights or weights.lower().endswith(_FILE_SUFFIXES)
    return looks_so or (not weights.startswith("random:") and Path(weights).is_file())


def no_download(name: str, error: Exception) -> WeightsError:
    """Build the error of a failed download, with the remedy."""
    rule, got = f"to download the weights of {name}", f"{type(error).__name__}: {first_line(error)}"
    body = name.partition("@")[0]
    return WeightsError(expected(rule, got, f"Fetch them on a connected machine and give {body}@weights.safetensors"))
