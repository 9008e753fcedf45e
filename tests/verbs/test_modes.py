"""A verb computes the same whatever modes of torch and NumPy its caller is in."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import torch

from partlens import guided_backprop, load_performer, mu_lasso
from partlens.errors import InputError
from partlens.verbs.runs import verb

MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "another default device": lambda: torch.device("meta"),
    "NumPy's warnings as errors": lambda: np.errstate(all="raise"),
}


def computed() -> tuple[bool, torch.dtype, str, float]:
    """What depends on modes: gradients, the type of a product, where tensors are made, values too small for a type."""
    weight = torch.ones(2, 2, requires_grad=True)
    product = weight @ torch.ones(2, 2)
    return product.requires_grad, product.dtype, str(product.device), float(np.float32(1e-30).astype(np.float16))


@pytest.mark.parametrize("mode", MODES)
def test_a_verb_leaves_the_modes_of_its_caller_and_hands_them_back(mode: str) -> None:
    usual = computed()
    with MODES[mode]():
        assert verb(computed)() == usual
        try:
            assert computed() != usual
        except FloatingPointError:
            assert mode.startswith("NumPy")
    assert computed() == usual


@pytest.mark.parametrize("mode", MODES)
def test_what_is_no_verb_computes_the_same_in_the_modes_of_its_caller(mode: str) -> None:
    pixels, labels = torch.rand(1, 3, 112, 112), torch.eye(2).repeat(6, 1)

    def found() -> tuple[torch.Tensor, ...]:
        performer = load_performer("partlens:flower-demo@random:0")
        weight = next(performer.module.parameters())
        return weight, guided_backprop(performer, pixels, 0), mu_lasso(labels + 0.1, labels, 1.0).weights

    usual = found()
    with MODES[mode]():
        there = found()
    assert all(torch.equal(one, other) and not other.is_inference() for one, other in zip(usual, there, strict=True))


def test_weights_that_learn_in_autocast_are_not_those_that_the_callers_autocast_keeps() -> None:
    @verb
    def steps() -> list[float]:
        weight, found = torch.ones(1, 1, requires_grad=True), []
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                found.append((torch.ones(1, 1) @ weight).item())
            weight.data += 1
        return found

    with torch.autocast("cpu", torch.bfloat16):
        assert steps() == [1, 2]


def test_another_default_type_of_all_threads_is_refused_with_the_remedy() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(InputError, match=r"got torch.float64. Call torch.set_default_dtype\(torch.float32\)"):
            verb(computed)()
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_performer_reads_its_own_structure_on_its_own_device_whatever_the_default_is() -> None:
    maps = torch.rand(2, 64, 14, 14, generator=torch.Generator().manual_seed(0))

    def known() -> tuple[object, ...]:
        performer = load_performer("partlens:flower-demo@random:0")
        with torch.device("meta") if there else torch.device("cpu"):
            (scores,) = performer.upper("relu4")(maps)
            return performer.layers, performer.tap, performer.outputs, scores.tolist()

    there = False
    usual = known()
    there = True
    assert known() == usual
