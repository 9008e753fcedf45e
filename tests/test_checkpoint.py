"""A checkpoint is whole after a kill at any moment, and goes on with the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from partlens import checkpoint
from partlens.checkpoint import Checkpoint, moments, restore_moments
from partlens.errors import RunError
from partlens.records import write_tensors


def test_what_is_saved_comes_back_in_its_groups(tmp_path: Path) -> None:
    kept = Checkpoint(tmp_path / "run", "one")
    assert kept.load() is None
    for number in range(3):
        kept.save({"step": number}, network={"a.b": torch.full((2,), number)}, objective={"pull.1": torch.ones(1)})
    found = kept.load()
    assert found is not None
    assert found.values == {"step": 2}
    assert found.tensors["network"]["a.b"].tolist() == [2, 2]
    assert found.tensors["objective"]["pull.1"].tolist() == [1]
    assert found.tensors["optimiser"] == {}
    kept.remove()
    assert not list((tmp_path / "run").iterdir())


def test_a_kill_between_tensors_and_record_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Checkpoint(tmp_path, "one")

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    for number in range(1, 4):
        kept.save({"step": number}, network={"w": torch.full((1,), number)})
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(checkpoint._State, "write", killed)
            kept.save({"step": -1}, network={"w": torch.full((1,), -1)})
        found = kept.load()
        assert found is not None
        assert (found.values["step"], int(found.tensors["network"]["w"])) == (number, number)


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path: Path) -> None:
    Checkpoint(tmp_path, "one").save({}, network={})
    with pytest.raises(RunError, match="checkpoint of this configuration"):
        Checkpoint(tmp_path, "two").load()
    (tmp_path / "checkpoint.json").write_text('{"schema": "partlens.checkpoint/1", "identity": "one"}')
    with pytest.raises(RunError, match=r"checkpoint\.json"):
        Checkpoint(tmp_path, "one").load()


@pytest.mark.parametrize("harm", ["values", "tensors", "no tensors", "other tensors", "no values"])
def test_a_damaged_checkpoint_is_named_with_its_remedy(tmp_path: Path, harm: str) -> None:
    kept = Checkpoint(tmp_path, "one")
    kept.save({"step": 3, "history": [1.5, None]}, network={"w": torch.ones(2)})
    assert kept.load() is not None
    path, tensors = tmp_path / "checkpoint.json", tmp_path / "checkpoint-0.safetensors"
    if harm == "values":
        path.write_text(path.read_text().replace("3", '"three"'))
    elif harm == "no values":
        path.write_text(path.read_text().replace("history", "story"))
    elif harm == "tensors":
        tensors.write_bytes(tensors.read_bytes()[:-4] + b"zzzz")
    elif harm == "other tensors":
        write_tensors(tensors, {"network.w": torch.ones(3)})
    else:
        tensors.unlink()
    with pytest.raises(RunError, match=r"checkpoint.*Delete its folder and run the command again"):
        kept.load()


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_an_optimiser_goes_on_with_its_moments(kind: Any) -> None:
    def stepped(layer: nn.Linear, optimiser: torch.optim.Optimizer) -> torch.Tensor:
        optimiser.zero_grad()
        layer(torch.ones(1, 3)).square().sum().backward()
        optimiser.step()
        return layer.weight.detach().clone()

    options: dict[str, Any] = {"lr": 0.1} | ({"momentum": 0.9} if kind is torch.optim.SGD else {})
    whole, other = nn.Linear(3, 2), nn.Linear(3, 2)
    first = kind(whole.parameters(), **options)
    stepped(whole, first)
    other.load_state_dict(whole.state_dict())
    second = kind(other.parameters(), **options)
    restore_moments(second, moments(first))
    assert torch.equal(stepped(whole, first), stepped(other, second))
