"""What a network's outputs are: which tensor, of what kind, and what is printed as a probability."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import partlens
from partlens.data.images import ImageSet
from partlens.errors import LayerError
from partlens.explainer.network import explainer_structure, performer_head
from partlens.network.outputs import Outputs
from partlens.network.performer import Performer
from partlens.network.preprocessing import Preprocessing
from partlens.network.taps import forward_taps
from partlens.network.zoo import load_performer

IMAGES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
Pair = namedtuple("Pair", "features logits")  # noqa: PYI024


@dataclasses.dataclass
class Answer:
    loss: Any
    scores: Tensor


class Network(nn.Module):
    """Three outputs, or one; ``end`` says what the network returns of features and scores."""

    def __init__(self, end: Callable[[Tensor, Tensor], Any], outputs: int = 3) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU())
            self.fc = nn.Linear(6, outputs)
            self.fc.weight.data.mul_(4)
        self.end = end

    def forward(self, x: Tensor) -> Any:
        features = self.body(x).mean((2, 3))
        return self.end(features, self.fc(features))


def performer(end: Callable[[Tensor, Tensor], Any], outputs: int = 3) -> Performer:
    return load_performer(Network(end, outputs), preprocessing=Preprocessing(size_px=(16, 16), resize="squash"))


def scores(end: Callable[[Tensor, Tensor], Any], outputs: int = 3) -> Tensor:
    return forward_taps(Network(end, outputs), IMAGES, [])[0]


LOGITS = scores(lambda _, s: s)


def ensemble(_: Tensor, s: Tensor) -> Tensor:
    return torch.stack([s.softmax(1), (s * 2).softmax(1)]).mean(0)


KINDS: dict[str, tuple[Callable[[Tensor, Tensor], Any], int, str, bool]] = {
    "a linear layer": (lambda _, s: s, 3, "logits", False),
    "one linear output": (lambda _, s: s, 1, "logits", False),
    "scaled scores": (lambda _, s: s / 2 + 1, 3, "logits", False),
    "a gate": (lambda _, s: s * torch.sigmoid(s), 3, "logits", False),
    "softmax": (lambda _, s: s.softmax(1), 3, "softmax", False),
    "softmax of a function": (lambda _, s: nn.functional.softmax(s, dim=-1), 3, "softmax", False),
    "softmax on maps": (lambda _, s: s[..., None, None].softmax(1), 3, "softmax", False),
    "scores over their sum": (lambda _, s: s.exp() / s.exp().sum(1, keepdim=True), 3, "softmax", True),
    "an ensemble": (ensemble, 3, "softmax", True),
    "exp of a log-softmax": (lambda _, s: s.log_softmax(1).exp(), 3, "softmax", True),
    "log-softmax": (lambda _, s: s.log_softmax(1), 3, "log-softmax", False),
    "log of a softmax": (lambda _, s: s.softmax(1).log(), 3, "log-softmax", True),
    "sigmoid of one": (lambda _, s: torch.sigmoid(s), 1, "sigmoid", False),
    "sigmoid of one, squeezed": (lambda _, s: torch.sigmoid(s).squeeze(1), 1, "sigmoid", False),
    "sigmoid of several": (lambda _, s: s.sigmoid(), 3, "sigmoid", False),
    "one less a sigmoid": (lambda _, s: 1 - s.sigmoid(), 3, "sigmoid", True),
    "hard sigmoid": (lambda _, s: nn.functional.hardsigmoid(s), 3, "sigmoid", False),
    "clamped to 0 … 1": (lambda _, s: s.clamp(0, 1), 3, "sigmoid", False),
    "log-sigmoid": (lambda _, s: nn.functional.logsigmoid(s), 3, "log-sigmoid", False),
    "no record": (lambda _, s: s.detach().softmax(1), 3, "softmax", True),
    "a sigmoid without record": (lambda _, s: s.detach().sigmoid(), 3, "sigmoid", True),
}


@pytest.mark.parametrize(("end", "count", "kind", "inferred"), KINDS.values(), ids=list(KINDS))
def test_the_kind_is_known(end: Callable[[Tensor, Tensor], Any], count: int, kind: str, inferred: bool) -> None:
    found = performer(end, count).outputs
    assert (found.kind, found.count, found.inferred) == (kind, count, inferred)
    assert bool(found.notes) == (kind != "logits" or inferred)
    assert ("by their values" in "".join(found.notes)) == inferred


@pytest.mark.parametrize(("end", "count"), [(end, count) for end, count, kind, _ in KINDS.values() if kind != "logits"])
def test_what_is_called_a_probability_is_what_the_network_said(
    end: Callable[[Tensor, Tensor], Any], count: int
) -> None:
    found, said = performer(end, count).outputs, scores(end, count).reshape(3, count)
    chance = said.exp() if found.kind in {"log-softmax", "log-sigmoid"} else said
    torch.testing.assert_close(found.probabilities(found.scores(said, 3)).float(), chance, rtol=1e-4, atol=1e-6)


def test_a_probability_of_0_or_1_has_finite_scores() -> None:
    for kind in ("softmax", "sigmoid"):
        outputs = Outputs(kind, 2)
        found = outputs.scores(torch.tensor([[0.0, 1.0]]), 1)
        assert bool(found.isfinite().all())
        torch.testing.assert_close(outputs.probabilities(found).float(), torch.tensor([[0.0, 1.0]]))


def test_a_single_sigmoid_decides_at_a_half() -> None:
    for chance, yes in ((0.2, False), (0.49, False), (0.51, True), (1.0, True), (0.0, False), (2e-23, False)):
        assert bool(Outputs("sigmoid", 1).scores(torch.tensor([[chance]]), 1)[0, 0] > 0) is yes


CHOSEN: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "logits by name": lambda f, s: {"embedding": f, "logits": s},
    "logits of a named tuple": Pair,
    "an ordered dictionary": lambda f, s: OrderedDict(features=f[:, :, None], out=s),
    "the only candidate of a tuple": lambda f, s: (f[:, :, None, None].repeat(1, 1, 2, 2), s),
    "a dataclass": lambda _, s: Answer(None, s),
    "a dataclass with a loss": lambda _, s: Answer(s.sum(), s),
    "a list": lambda _, s: [s],
    "scores beside a number an image": lambda f, s: {"loss": f.sum(1), "scores": s},
    "maps of one cell": lambda _, s: s[..., None, None],
    "logits on maps of one cell": lambda f, s: {"x": f, "logits": s[..., None, None]},
    "squeeze of one image": lambda _, s: s.squeeze(),
}


@pytest.mark.parametrize("end", CHOSEN.values(), ids=list(CHOSEN))
def test_every_verb_takes_the_same_scores(end: Callable[[Tensor, Tensor], Any]) -> None:
    on = performer(end)
    assert on.outputs.count == 3
    torch.testing.assert_close(on.outputs.scores(forward_taps(on, IMAGES, [])[0], 3), LOGITS)
    torch.testing.assert_close(on.outputs.scores(forward_taps(on, IMAGES[:1], [])[0], 1), LOGITS[:1])
    structure = explainer_structure(on, IMAGES, "body.1", ["body.3"])  # what fit-explainer asks for
    maps = forward_taps(on, IMAGES, ["body.3"])[1]["body.3"]
    torch.testing.assert_close(performer_head(on, structure)(maps)[0], LOGITS)
    torch.testing.assert_close(performer_head(on, structure)(maps[:1])[0], LOGITS[:1])
    plain = partlens.guided_backprop(Network(lambda _, s: s), IMAGES, 1)
    torch.testing.assert_close(partlens.guided_backprop(on, IMAGES, 1), plain)


AMBIGUOUS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "features first": lambda *both: both,
    "two heads": lambda _, s: {"colour": s, "shape": s},
    "a dataclass": Answer,
    "maps alone": lambda f, _: f[:, :, None, None].repeat(1, 1, 2, 2),
    "nothing": lambda _f, _s: None,
}


@pytest.mark.parametrize("end", AMBIGUOUS.values(), ids=list(AMBIGUOUS))
def test_an_answer_that_could_be_two_things_is_refused_by_every_verb(
    end: Callable[[Tensor, Tensor], Any], tmp_path: Any
) -> None:
    on = performer(end)
    photos = ImageSet.from_arrays(np.zeros((4, 16, 16, 3), np.uint8), categories=["a", "a", "b", "b"])
    said = r"class scores.*Wrap the network so that it returns the scores alone"
    for verb in (
        lambda: partlens.guided_backprop(on, IMAGES),
        lambda: partlens.select_features(on, photos, out=tmp_path / "s"),
        lambda: partlens.fit_explainer(on, photos, out=tmp_path / "f"),
    ):
        with pytest.raises(LayerError, match=said):
            verb()
    assert not (tmp_path / "s").exists()


def test_shapes_are_named_where_two_things_could_be_the_scores() -> None:
    with pytest.raises(
        LayerError, match=r"one tensor of class scores, or one called logits, got tuple 0 \(1, 6\), 1 \(1, 3\)"
    ):
        _ = performer(lambda *both: both).outputs


def test_a_squeeze_that_changes_the_count_is_named() -> None:
    with pytest.raises(LayerError, match=r"squeeze"):
        _ = performer(lambda f, s: s[0] if len(f) == 1 else s[:, :2]).outputs


def test_a_network_of_other_inputs_is_refused_in_a_sentence(tmp_path: Any) -> None:
    module = nn.Sequential(nn.Conv2d(5, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    on = load_performer(module, preprocessing=Preprocessing(size_px=(16, 16)))
    photos = ImageSet.from_arrays(np.zeros((4, 16, 16, 3), np.uint8), categories=["a", "a", "b", "b"])
    with pytest.raises(LayerError, match=r"to take images of shape \(1, 3, 16, 16\), got .*5 channels"):
        partlens.select_features(on, photos, out=tmp_path / "s")


def test_scores_that_look_like_probabilities_on_the_photos_are_doubted() -> None:
    logits = Outputs("logits", 2)
    assert "add up to 1" in logits.doubt(torch.tensor([[0.2, 0.8]] * 5))
    assert not logits.doubt(torch.tensor([[0.2, 0.9]] * 5))
    assert not Outputs("softmax", 2).doubt(torch.tensor([[0.2, 0.8]] * 5))


def test_the_network_is_as_it_was() -> None:
    module = Network(lambda _, s: s.sigmoid()).train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = torch.get_rng_state()
    _ = load_performer(module, preprocessing=Preprocessing(size_px=(16, 16))).outputs
    assert module.training
    assert all(p.grad is None for p in module.parameters())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


class WritesIntoItsInput(Network):
    def forward(self, x: Tensor) -> Any:
        x -= 0.5  # the copy inside a network's forward that its author saved
        return super().forward(x)


def test_a_network_that_writes_into_its_input_is_taken() -> None:
    writing, plain = (make(lambda _, s: s) for make in (WritesIntoItsInput, Network))
    on = load_performer(writing, preprocessing=Preprocessing(size_px=(16, 16), resize="squash"))
    assert (on.outputs.kind, on.tap) == ("logits", "body.1")
    images = IMAGES.clone()
    torch.testing.assert_close(forward_taps(on, images, [])[0], forward_taps(plain, IMAGES - 0.5, [])[0])
    assert torch.equal(images, IMAGES)


@pytest.mark.parametrize(
    ("end", "unsteady"),
    [
        (lambda _, scores: scores, False),
        (lambda _, scores: nn.functional.dropout(scores, 0.5, training=True), True),
        (lambda _, scores: scores - scores.mean(0), True),
    ],
    ids=["steady", "dropout that never ends", "scores less those of the batch"],
)
def test_scores_that_change_from_call_to_call_are_said(end: Callable[[Tensor, Tensor], Any], unsteady: bool) -> None:
    torch.manual_seed(0)
    performer = Performer(Network(end), "net", Preprocessing(size_px=(16, 16)), weights_sha256="")
    assert any("draws at random" in note for note in performer.outputs.notes) is unsteady
    assert performer.outputs.unsteady <= 2  # a share that can be read, also of scores that are 0 in one of the calls
