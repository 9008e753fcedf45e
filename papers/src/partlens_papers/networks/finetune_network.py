"""The network that is trained for categories: a copy of a performer with new last layers, and the tap it starts at."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from partlens.errors import InputError, LayerError, WeightsError, expected, first_line, listed
from partlens.network.borrowed import random_state_kept
from partlens.network.performer import Performer, module_of
from partlens.network.preprocessing import Preprocessing
from partlens.network.upper import Upper
from partlens.network.watched import paths_of, place_of
from partlens.network.weights import with_outputs
from partlens_papers.networks.finetune_config import FinetuneConfig
from partlens_papers.networks.paper_networks import PaperNet

_DEVIATION = 0.01
_WATCHING = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
)


@dataclass(frozen=True, eq=False)
class Prepared:
    """A copy of a performer that is ready to be trained.

    Attributes:
        module: the copy with its new layers, in eval mode, float32 on the CPU.
        output_layer: the last layer, by name.
        new_layers: layers that were drawn anew, in execution order.
        source: the tap whose output is computed once; ``None`` where all layers are trained.
    """

    module: nn.Module
    output_layer: str
    new_layers: tuple[str, ...]
    source: str | None


def copied(performer: Performer) -> nn.Module:
    """Copy a network without the hooks that watch it and without gradients; float32, CPU, eval."""
    module = module_of(performer)
    memo: dict[int, Any] = {}
    for each in module.modules():
        memo.update({id(each.__dict__[n]): OrderedDict() for n in _WATCHING if n in each.__dict__})
    try:
        copied = copy.deepcopy(module, memo)
    except RuntimeError as error:
        raise LayerError(
            expected(
                f"a network that can be copied, to train {type(module).__name__}",
                first_line(error),
                "Remove weight normalisation first (torch.nn.utils.remove_weight_norm)",
            )
        ) from error
    for parameter in copied.parameters():
        parameter.grad = None
    return copied.cpu().float().eval()


def run_blank(module: nn.Module, size_px: tuple[int, int]) -> Any:
    """Return what a network gives for one input of zeros."""
    with torch.no_grad():
        return module(torch.zeros(1, 3, *size_px))


def _layers_in_order(module: nn.Module, size_px: tuple[int, int]) -> list[str]:
    """Names of the linear layers and convolutions, in the order in which a pass calls them last."""
    called: dict[str, None] = {}
    handles = []
    for name, layer in module.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):

            def note(_layer: nn.Module, _inputs: Any, _output: Any, name: str = name) -> None:
                called.pop(name, None)
                called[name] = None

            handles.append(layer.register_forward_hook(note))
    try:
        run_blank(module, size_px)
    except Exception as error:
        raise LayerError(
            expected(
                f"an input size that {type(module).__name__} accepts",
                f"{size_px[0]}x{size_px[1]} px ({first_line(error)})",
                "Give the preprocessing the network was made for",
            )
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return list(called)


def _closing_layers(module: nn.Module, order: Sequence[str]) -> list[str]:
    """Return the fully connected layers at the end that follow each other (fc6, fc7, fc8), in order."""
    found: list[str] = []
    for name in reversed(order):
        beside = not found or name.rpartition(".")[0] == found[0].rpartition(".")[0]
        if not beside or not isinstance(module.get_submodule(name), nn.Linear):
            break
        found.insert(0, name)
    return found


def fixed_before(performer: Performer, layer: str) -> str:
    """Find the last tap before a layer through which everything passes.

    Args:
        performer: the network; left as it was.
        layer: by name; a block means its first operation.

    Returns:
        The name of the tap.

    Raises:
        LayerError: an unknown layer; one before which there is no such tap.

    Example:
        >>> layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
        >>> fixed_before(Performer(layers, "", Preprocessing(size_px=(4, 4)), ""), "3")
        '2'
    """
    module = module_of(performer)
    place_of(module, layer)  # refuses an unknown name with the nearest ones
    orders = [f.place.order for f in performer.found if f.name == layer or f.name.startswith(f"{layer}.")]
    before = [f for f in performer.found if f.place.cut and f.place.order < min(orders, default=0)]
    taps = [f for f in before if f.name in paths_of(module)]
    if taps:
        return max(taps, key=lambda f: (f.place.order, len(f.name))).name
    raise LayerError(
        expected(
            "a layer with others before it that everything passes",
            layer,
            "Leave train_from out to train all layers, or name a later one",
        )
    )


def prepare_network(performer: Performer, outputs: int, config: FinetuneConfig) -> Prepared:
    """Copy a network and give it new last layers.

    Args:
        performer: the network with the given weights; it is not changed.
        outputs: number of outputs of the copy, at least 1.
        config: which layers are new, and which are trained.

    Returns:
        The copy. New weights are drawn from N(0, 0.01²), biases are 0.

    Raises:
        InputError: no outputs, or no fully connected layers where they are asked for.
        LayerError: ``train_from`` is unknown or comes after a new layer; a network whose last layer does not decide
            the number of outputs.
        WeightsError: a layer without trained weights would not be drawn anew.

    Source:
        CVPR 2018, Sec. 5 (fully connected layers re-initialised); N(0, 0.01²) as in the released code.
    """
    if outputs < 1:
        raise InputError(expected("at least 1 output", outputs, "Name a category"))
    module = copied(performer)
    size_px = performer.preprocessing.size_px
    order = _layers_in_order(module, size_px)
    if not order:
        raise LayerError(
            expected("a network with a linear layer or a convolution", type(module).__name__, "Use another network")
        )
    closing = _closing_layers(module, order)
    if config.new_layers == "fully-connected" and len(closing) < 2:
        raise InputError(
            expected(
                f"several fully connected layers side by side at the end of {performer.name}",
                listed(closing) or "none",
                "Choose new_layers last",
            )
        )
    many = config.new_layers == "fully-connected" or (config.new_layers == "auto" and len(closing) >= 3)
    new = tuple(closing) if many else (order[-1],)
    if left := [name for name in performer.untrained_layers if name not in new]:
        raise WeightsError(
            expected(f"trained weights of {listed(left)}", "none in the file", "Choose new_layers fully-connected")
        )
    with random_state_kept():
        with_outputs(module, order[-1], outputs)
    if isinstance(module, PaperNet):
        module.num_classes = outputs
    generator = torch.Generator().manual_seed(config.seed)
    with torch.no_grad():
        for name in new:
            layer = module.get_submodule(name)
            assert isinstance(layer, (nn.Linear, nn.Conv2d))
            layer.weight.normal_(0, _DEVIATION, generator=generator)
            if layer.bias is not None:
                layer.bias.zero_()
    given = run_blank(module, size_px)
    if not isinstance(given, Tensor) or tuple(given.shape) != (1, outputs):
        shape = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise LayerError(
            expected(
                f"a network whose last layer gives its outputs, (image, {outputs})",
                f"{shape} with {order[-1]} replaced",
                "Wrap the network so that it returns the scores alone",
            )
        )
    if config.train_from is None:
        source = None
    else:
        source = fixed_before(Performer(module, performer.name, performer.preprocessing, ""), config.train_from)
        after = upper(module, source, performer.preprocessing)[1]
        trained = {name.rpartition(".")[0] for name, _ in after.named_parameters()}
        if early := [name for name in new if name not in trained]:
            raise LayerError(
                expected(f"train_from at or before {early[0]}, which is drawn anew", config.train_from, "Start there")
            )
    return Prepared(module, order[-1], new, source)


def upper(module: nn.Module, source: str | None, preprocessing: Preprocessing) -> tuple[nn.Module, nn.Module]:
    """Return what is run in training, and the layers that learn, under the network's names.

    Both are the network itself, or a copy that starts behind a tap.
    """
    if source is None:
        return module, module
    behind = Performer(module, "", preprocessing, "").upper(source)
    assert isinstance(behind, Upper)
    return behind, behind.network
