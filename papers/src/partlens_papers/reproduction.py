"""The verbs ``reproduce flowers``, ``reproduce removal`` and ``reproduce sanity``, and how every table is printed."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partlens.errors import InputError, RunError, expected, listed
from partlens.progress import Progress
from partlens_papers.flowers.benchmark import FlowersConfig, benchmark_table, flower_benchmark
from partlens_papers.removal.feature_removal import feature_removal
from partlens_papers.removal.plan import RemovalConfig
from partlens_papers.removal.removal_tables import removal_lines
from partlens_papers.sanity.bench import SanityConfig
from partlens_papers.sanity.checks import CHECKS, sanity_checks
from partlens_papers.sanity.sanity_tables import sanity_lines
from partlens_papers.tables.blocks import TableRecord

if TYPE_CHECKING:
    from torch import nn

    from partlens.data.images import ImageSet
    from partlens.network.performer import Performer


def reproduce_flowers(
    *,
    out: str | Path,
    model: str | nn.Module | Performer | None = None,
    flowers: FlowersConfig | Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure heat maps against masks on generated flowers: ours, other methods, and maps that know nothing.

    Args:
        out: folder for the network, the scores and ``benchmark.json``.
        model: a network that was trained on the same set before; trained here by default.
        flowers: the set and how much is measured.
        progress: how to show progress; silent by default.

    Returns:
        The content of ``benchmark.json``; see :func:`~partlens_papers.flowers.benchmark.flower_benchmark`.
    """
    from partlens.verbs.runs import loaded
    from partlens_papers.flowers.baselines import BASELINES
    from partlens_papers.flowers.methods import relevant_feature_methods, smoothed_baselines

    return flower_benchmark(
        out,
        config=flowers,
        methods={**BASELINES, **smoothed_baselines()},
        ours=relevant_feature_methods(),
        performer=None if model is None else loaded(model),
        progress=progress,
    )


def reproduce_removal(
    data: str | Path | ImageSet,
    *,
    out: str | Path,
    model: str | nn.Module | Performer | None = None,
    removal: RemovalConfig | Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure what a class loses without its relevant features, and without as many others.

    Args:
        data: photos, or digits: ``mnist.npz`` with ``x_train, y_train, x_test, y_test``.
        out: folder for ``removal.json``.
        model: the performer; for digits, by default the LeNet, trained here.
        removal: how it is measured.
        progress: how to show progress; silent by default.

    Returns:
        The content of ``removal.json``; see :func:`~partlens_papers.removal.feature_removal.feature_removal`.

    Raises:
        InputError: photos without a model.
    """
    from partlens_papers.removal.digits import digit_set, train_digits

    if model is None and str(data).endswith(".npz"):
        images = digit_set(str(data))
        seed = int(dict(removal or {}).get("seed", 0))
        network, _ = train_digits(images, Path(out) / "lenet.safetensors", seed=seed, progress=progress)
        return feature_removal(network, images, out, config=removal, progress=progress)
    if model is None:
        raise InputError(expected("a model to remove features from", "none", "Give --model"))
    return feature_removal(model, data, out, config=removal, progress=progress)


def reproduce_sanity(
    *,
    out: str | Path,
    model: str | nn.Module | Performer | None = None,
    data: str | Path | ImageSet | None = None,
    checks: Sequence[str] = CHECKS,
    sanity: SanityConfig | Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Check that explanations depend on the class and on the weights.

    Args:
        out: folder for ``sanity.json`` and the networks trained here.
        model: the performer; by default the flower benchmark's network, trained here.
        data: its photos; by default generated flowers.
        checks: which of classes, layers, cue and labels.
        sanity: how much is measured.
        progress: how to show progress; silent by default.

    Returns:
        The content of ``sanity.json``; see :func:`~partlens_papers.sanity.checks.sanity_checks`.
    """
    return sanity_checks(out, model=model, data=data, checks=checks, config=sanity, progress=progress)


def _print(lines: Sequence[str]) -> None:
    sys.stdout.write("\n".join(lines) + "\n")


def print_flowers(result: Mapping[str, Any]) -> None:
    """Print the flower benchmark as Markdown."""
    _print(benchmark_table(result))


def print_removal(result: Mapping[str, Any]) -> None:
    """Print a removal experiment as Markdown."""
    _print(removal_lines(result))


def print_sanity(result: Mapping[str, Any]) -> None:
    """Print the sanity checks as Markdown."""
    _print(sanity_lines(result))


def print_table(record: TableRecord) -> None:
    """Print a table as Markdown, and refuse one whose jobs did not all finish.

    Raises:
        RunError: some jobs have no result.
    """
    from partlens_papers.tables.page import missing, table_lines

    _print(table_lines(record))
    if failed := missing(record):
        rule, remedy = "a result of every job", "Correct what it says and run the same command again"
        raise RunError(expected(rule, f"none of {listed(list(failed))}", remedy))
