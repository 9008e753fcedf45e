"""captum's own tests of guided backpropagation and deconvolution, run on partlens through an adapter.

The adapter has captum's classes and arguments; what is computed is `partlens.guided_backprop` alone. Several inputs are
joined along the channels and taken apart again inside a module, since partlens explains one image.

    uv run python papers/studies/captum_tests.py CHECKOUT/tests/attr

CHECKOUT is one of captum's repository: its test files are read from there, never copied here. captum itself (dev group)
brings the tests' networks. A file without tests is an error.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import sys
import unittest
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from captum.attr._core import guided_backprop_deconvnet
from captum.attr._core.neuron import neuron_guided_backprop_deconvnet
from torch import Tensor, nn

from partlens.attribution.backprop import guided_backprop
from partlens.attribution.rules import Rule

FILES = ("test_guided_backprop.py", "test_deconvolution.py")
RESULT = Path(__file__).with_suffix(".json")


class _Joined(nn.Module):
    """A network of several images that takes them as channels of one."""

    def __init__(self, network: nn.Module, channels: Sequence[int], more: Any) -> None:
        super().__init__()
        self.network, self.channels = network, list(channels)
        self.more = () if more is None else more if isinstance(more, tuple) else (more,)

    def forward(self, images: Tensor) -> Any:
        return self.network(*images.split(self.channels, dim=1), *self.more)


class _Adapter:
    """captum's way of asking; ``rule`` is set by the classes below."""

    rule: Rule

    def __init__(self, model: nn.Module, layer: nn.Module | None = None) -> None:
        self.model, self.layer = model, layer

    @property
    def multiplies_by_inputs(self) -> bool:
        return False

    def _asked(self, inputs: Tensor | tuple[Tensor, ...], more: Any, **of: Any) -> Any:
        images = inputs if isinstance(inputs, tuple) else (inputs,)
        joined = _Joined(self.model, [image.shape[1] for image in images], more)
        if self.layer is not None:
            of["layer"] = next(path for path, module in joined.named_modules() if module is self.layer)
        found = guided_backprop(joined, torch.cat(images, 1), rule=self.rule, fix_strides=False, start="ones", **of)
        if self.layer is not None:
            found = found.sum(1)  # the filters that are asked for
        pieces = found.split(joined.channels, dim=1)
        return pieces if isinstance(inputs, tuple) else pieces[0]


class _OfScore(_Adapter):
    def attribute(self, inputs: Any, target: int | None = None, additional_forward_args: Any = None) -> Any:
        return self._asked(inputs, additional_forward_args, target=target)


class _OfNeuron(_Adapter):
    def attribute(self, inputs: Any, neuron_selector: Any, additional_forward_args: Any = None) -> Any:
        (chosen,) = neuron_selector if isinstance(neuron_selector, tuple) else (neuron_selector,)
        filters = list(range(chosen.start, chosen.stop, chosen.step)) if isinstance(chosen, slice) else [chosen]
        return self._asked(inputs, additional_forward_args, filters=filters)


def adapted(base: type[_Adapter], rule: Rule) -> type[_Adapter]:
    """Return an adapter of one rule."""
    return type(f"Partlens{rule.title()}", (base,), {"rule": rule})


def put_in_place() -> None:
    """Give captum's names to the adapters."""
    vars(guided_backprop_deconvnet).update(
        GuidedBackprop=adapted(_OfScore, "guided"), Deconvolution=adapted(_OfScore, "deconvnet")
    )
    vars(neuron_guided_backprop_deconvnet).update(
        NeuronGuidedBackprop=adapted(_OfNeuron, "guided"), NeuronDeconvolution=adapted(_OfNeuron, "deconvnet")
    )


def run(file: Path) -> dict[str, Any]:
    """Run the tests of one file; return which passed and which failed, and why."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tests = list(unittest.defaultTestLoader.loadTestsFromModule(module))
    cases = [case for suite in tests for case in suite]  # type: ignore[union-attr]
    if not cases:
        raise SystemExit(f"{file} holds no tests")
    ran = unittest.TextTestRunner(stream=io.StringIO()).run(unittest.TestSuite(cases))
    wrong = {case.id().rpartition(".")[2]: text.strip().splitlines()[-1] for case, text in ran.failures + ran.errors}
    names = [case.id().rpartition(".")[2] for case in cases]
    return {
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "passed": [name for name in names if name not in wrong],
        "failed": wrong,
    }


def main() -> None:
    """Run both files and write what came of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="captum's folder tests/attr")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    put_in_place()
    found = {name: run(args.folder / name) for name in FILES}
    versions = {name: importlib.metadata.version(name) for name in ("captum", "torch")}
    args.out.write_text(json.dumps({"versions": versions, "files": found}, indent=1) + "\n")
    for name, of in found.items():
        print(f"{name}: {len(of['passed'])} of {len(of['passed']) + len(of['failed'])} pass")
        for test, why in of["failed"].items():
            print(f"  {test}: {why}")
    if any(of["failed"] for of in found.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
