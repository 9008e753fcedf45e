"""What a network's outputs are, known once and for every verb: which tensor, how many, and of what kind.

The kind is read from the operation that autograd records last, where it records one, else from the values on made
images. Verbs go on with *scores*, whatever the kind: their softmax, or logistic function, is the probability. So the
decision of a single output lies at a score of 0, a probability of a half, and nothing behind this module asks again.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from partlens.errors import LayerError, expected, first_line, listed
from partlens.network.borrowed import borrowed, like_weights

Kind = Literal["logits", "softmax", "log-softmax", "sigmoid", "log-sigmoid"]

_SINGLE: dict[str, Kind] = {
    "SoftmaxBackward": "softmax",
    "LogSoftmaxBackward": "log-softmax",
    "SigmoidBackward": "sigmoid",
    "HardsigmoidBackward": "sigmoid",
    "LogSigmoidBackward": "log-sigmoid",
}
# Operations that hand on values as they are, and those that join or scale what they get.
_AS_IS = re.compile(
    r"(View|UnsafeView|ReshapeAlias|Squeeze|Unsqueeze|T|Transpose|Permute|Expand|Clone|ToCopy|Alias|BackwardHookFunction)"
    r"Backward"
)
_JOINING = re.compile(
    r"(Add|Sub|Rsub|Mul|Div|Mean|Sum|Cat|Stack|Exp|Log|Clamp|ClampMin|ClampMax|Slice|Select|Index|IndexSelect|Neg)Backward"
)
_CLOSE = 1e-3
_STEADY = 0.01  # sums in another order change less, in half precision, too
_TINY = torch.finfo(torch.float32).tiny
_MADE = 4  # images that the kind is read from, where no operation tells it

_WORDS: dict[Kind, str] = {
    "logits": "",
    "softmax": "the outputs are probabilities that add up to 1; scores are their logarithms",
    "log-softmax": "the outputs are logarithms of probabilities",
    "sigmoid": "each output is a probability of its own; scores are log-odds",
    "log-sigmoid": "each output is the logarithm of a probability of its own; scores are log-odds",
}


def entries_of(answer: Any) -> dict[str, Tensor]:
    """Return the tensors of an answer: of a dictionary, dataclass or named tuple by name, else by number."""
    entries: dict[str, Any] = {}
    if isinstance(answer, Mapping):
        entries = {str(key): value for key, value in answer.items()}
    elif dataclasses.is_dataclass(answer):
        entries = {field.name: getattr(answer, field.name) for field in dataclasses.fields(answer)}
    elif isinstance(answer, (list, tuple)):
        entries = {str(place): value for place, value in enumerate(answer)}
        names = getattr(answer, "_fields", None)
        entries = dict(zip(names, answer, strict=True)) if names else entries
    return {name: value for name, value in entries.items() if isinstance(value, Tensor)}


def _rows(value: Tensor, images: int) -> Tensor | None:
    """Return a tensor as scores (image, output), ``None`` where it cannot be one."""
    if not value.is_floating_point():
        return None
    if value.ndim >= 2:
        one_cell = value.ndim == 2 or (value.ndim == 4 and tuple(value.shape[2:]) == (1, 1))
        return value.flatten(1) if one_cell and len(value) == images else None
    if value.ndim == 1 and len(value) == images:  # one output, whose axis the network has squeezed away
        return value[:, None]
    return value.reshape(1, -1) if images == 1 else None  # the axis of a single image, squeezed away


def class_scores(answer: Any, images: int) -> Float[Tensor, "image output"]:
    """Choose the scores in what a network returns for a number of images.

    The tensor itself; else what is called ``logits``; else the only tensor that could be scores. Maps of a single cell
    count as scores, and an axis that ``squeeze()`` has taken away is put back.

    Raises:
        LayerError: nothing that could be scores, or more than one thing.

    Example:
        >>> tuple(class_scores({"features": torch.rand(2, 8, 3, 3), "scores": torch.rand(2, 5, 1, 1)}, 2).shape)
        (2, 5)
    """
    entries = {"": answer} if isinstance(answer, Tensor) else entries_of(answer)
    if "logits" in entries:
        entries = {"logits": entries["logits"]}
    found = {name: rows for name, value in entries.items() if (rows := _rows(value, images)) is not None}
    if len(found) > 1:  # vectors of one number an image are losses or weights beside scores
        found = {name: rows for name, rows in found.items() if entries[name].ndim > 1} or found
    if len(found) == 1:
        return next(iter(found.values()))
    shapes = [f"{name} {tuple(value.shape)}".strip() for name, value in entries.items()]
    rule = "class scores with axes image, output" if not found else "one tensor of class scores, or one called logits"
    remedy = "Wrap the network so that it returns the scores alone; for maps of a layer, name the layer and filters"
    raise LayerError(expected(rule, f"{type(answer).__name__} {listed(shapes)}".strip(), remedy))


@dataclass(frozen=True)
class Outputs:
    """What a network's outputs are."""

    kind: Kind  # what the numbers are
    count: int  # how many there are
    inferred: bool = False  # whether the kind was read from values, since no operation tells it
    # by how much scores of an image differ when it is given alone and with others, as a share of the score
    unsteady: float = 0.0

    @property
    def independent(self) -> bool:
        """Whether each output is a yes or no of its own."""
        return self.count == 1 or self.kind in {"sigmoid", "log-sigmoid"}

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of results must know."""
        said = _WORDS[self.kind]
        if self.inferred:
            said = said or "the outputs are taken for scores before a softmax"
            said += " (by their values: the network's last operation does not tell)"
        chance = (
            f"the same image gets scores that differ by {self.unsteady:.0%}, alone and with others: the network draws "
            "at random, or images of a batch act on one another, and numbers move as much"
        )
        return tuple(note for note in (said, chance if self.unsteady > _STEADY else "") if note)

    def scores(self, answer: Any, images: int) -> Float[Tensor, "image output"]:
        """Choose the scores in an answer of the network (`class_scores`) and return logits, logarithms or log-odds."""
        values = class_scores(answer, images)
        if self.kind in {"logits", "log-softmax"}:
            return values
        if self.kind == "softmax":
            return values.clamp(min=_TINY).log()
        chance = values.exp() if self.kind == "log-sigmoid" else values
        # Where the network has rounded a probability to 0 or 1, its odds are the largest that it can tell.
        chance = chance.clamp(_TINY, 1 - torch.finfo(chance.dtype).eps / 2)
        return chance.log() - torch.log1p(-chance)

    def probabilities(self, scores: Tensor) -> Float[Tensor, "image output"]:
        """Return the probabilities that scores mean, in double precision.

        Example:
            >>> Outputs("logits", 2).probabilities(torch.zeros(1, 2)).tolist()
            [[0.5, 0.5]]
        """
        values = scores.double()
        return values.sigmoid() if self.independent else values.softmax(1)

    def decisions(self, scores: Float[Tensor, "image output"]) -> Float[Tensor, "image decision"]:
        """Return scores of which the largest is the decision: those of the outputs; of a single one its yes and its no.

        Example:
            >>> Outputs("logits", 1).decisions(torch.tensor([[-2.0]])).tolist()
            [[-2.0, 2.0]]
        """
        return torch.cat([scores, -scores], 1) if self.count == 1 else scores

    def doubt(self, answers: Float[Tensor, "image output"]) -> str:
        """Say what speaks against the kind in scores of photos; nothing where nothing does."""
        if self.kind != "logits" or len(answers) < _MADE:
            return ""
        if (seen := _by_values(answers)) is None:
            return ""
        return f"on these photos {_WORDS[seen].partition(';')[0]}, though the network's last operation gives scores"


def _last_operations(value: Tensor) -> tuple[set[str], bool]:
    """Return the operations that made a tensor, and whether others joined or scaled what they gave."""
    waiting, ends, joined = [value.grad_fn], set[str](), False
    while waiting:
        node = waiting.pop()
        if node is None:
            continue  # a constant
        kind = re.sub(r"\d+$", "", str(node.name()).rpartition("::")[2])
        if _unit_clamp(node, kind):
            ends.add("HardsigmoidBackward")
        elif _AS_IS.fullmatch(kind) or _JOINING.fullmatch(kind):
            joined = joined or _JOINING.fullmatch(kind) is not None
            waiting += [behind for behind, _ in node.next_functions]
        else:
            ends.add(kind)
    return ends, joined


def _unit_clamp(node: Any, kind: str) -> bool:
    """Whether an operation cuts values to 0 … 1."""
    names = {"ClampBackward": ("min", "max"), "HardtanhBackward": ("min_val", "max_val")}.get(kind)
    if names is None:
        return False
    return tuple(getattr(node, f"_saved_{name}") for name in names) == (0, 1)


def _by_values(values: Tensor) -> Kind | None:
    """Return the kind that values are of, where they can hardly be logits: several outputs that add up."""
    values = values.double()
    if values.shape[1] < 2:
        return None
    if float(values.min()) >= 0 and bool(((values.sum(1) - 1).abs() < _CLOSE).all()):
        return "softmax"
    if float(values.max()) <= 0 and bool((values.logsumexp(1).abs() < _CLOSE).all()):
        return "log-softmax"
    return None


def _kind_of(values: Tensor) -> tuple[Kind, bool]:
    """Return the kind of scores that were recorded, and whether it is inferred from their values."""
    ends, joined = _last_operations(values)
    known = {_SINGLE[end] for end in ends if end in _SINGLE}
    whole = _by_values(values.detach())
    single = next(iter(known)) if len(ends) == 1 and known and not joined else None
    if single is not None and (single not in {"softmax", "log-softmax"} or single == whole):
        return single, False
    if whole is not None:
        return whole, True
    inside = bool(((values >= 0) & (values <= 1)).all())
    # Means of probabilities, one less a probability, some of several: what is made of probabilities alone.
    if inside and (len(known) == len(ends) > 0 or not ends):
        return "sigmoid", True
    return "logits", len(known) == len(ends) > 0


def outputs_of(module: nn.Module, example: Float[Tensor, "image channel row col"], name: str) -> Outputs:
    """Run a network on made images and say what its outputs are; the network is borrowed.

    Raises:
        LayerError: it does not take the images, or its answer has no scores, or more than one tensor that could be.
    """
    ready = like_weights(module, example)
    with torch.inference_mode(mode=False), borrowed(module, copy_weights=False) as network, torch.enable_grad():
        one, several = (
            class_scores(_answer(network, part.detach().clone().requires_grad_().clone(), name), len(part))
            for part in (ready[:1], ready)
        )
        if one.shape[1] != several.shape[1]:
            rule = f"as many outputs of {name} for one image as for {len(ready)}"
            got = f"{one.shape[1]} and {several.shape[1]}"
            remedy = "Write squeeze((2, 3)) or flatten(1) instead of squeeze(), which takes away the image axis, too"
            raise LayerError(expected(rule, got, remedy))
        kind, inferred = _kind_of(several)
        alone, among = one.detach(), several[:1].detach()
        unsteady = float((alone - among).norm() / torch.maximum(alone.norm(), among.norm()).clamp(min=_TINY))
    return Outputs(kind, several.shape[1], inferred, unsteady)


def _answer(network: nn.Module, images: Tensor, name: str) -> Any:
    try:
        with warnings.catch_warnings(action="ignore"):  # asking for a value, a network is told that gradients are on
            return network(images)
    except Exception as error:  # a network may raise anything
        rule = f"{name} to take images of shape {tuple(images.shape)}"
        remedy = (
            "Correct its preprocessing, as with Preprocessing(channels=1); wrap a network of other inputs in one that "
            "takes the images alone"
        )
        raise LayerError(expected(rule, first_line(error).rstrip("."), remedy)) from error


def made_images() -> Iterator[Any]:
    """Return made photos, from dark to bright and from smooth to noisy, as arrays of 8-bit colours."""
    draws = torch.Generator().manual_seed(0)
    for place in range(_MADE):
        cells = 2 ** (place + 1)
        coarse = torch.rand(1, 3, cells, cells, generator=draws) * 255 * (place + 1) / _MADE
        yield nn.functional.interpolate(coarse, size=(64, 64))[0].permute(1, 2, 0).byte().numpy()
