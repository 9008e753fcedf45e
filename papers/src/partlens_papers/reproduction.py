"""The verb reproduce: the papers' tables, made from data, each beside its baselines and the published figures."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from partlens.errors import InputError, RunError, expected, listed
from partlens.progress import Progress

if TYPE_CHECKING:
    from torch import nn

    from partlens.data.images import ImageSet
    from partlens.network.zoo import Performer

Table = Literal["flowers", "removal", "sanity", "instability", "p", "errors", "interpretable-cnn", "rivals"]
_PERTURBED = 40  # flowers per fold whose pixels are inserted and deleted, by far the costliest score
TABLES: tuple[str, ...] = get_args(Table)
SWEEPS = TABLES[3:]
"""Tables over performers, categories and seeds, made of jobs that run here, in several processes or on a cluster."""


def reproduce(
    table: Table,
    *,
    out: str | Path,
    model: str | nn.Module | Performer | None = None,
    data: str | Path | ImageSet | None = None,
    set_name: str = "flowers-single-6c",
    images_per_class: int = 1000,
    config: Mapping[str, Any] | None = None,
    seed: int = 0,
    performers: Mapping[str, str] | None = None,
    categories: Sequence[str] = (),
    seeds: int = 3,
    tap: str | None = None,
    preset: str = "partlens",
    background: str | Path | None = None,
    joint: bool = False,
    workers: int = 0,
    cluster: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Make one of the papers' tables; interrupted, it goes on with what is missing.

    Args:
        table: ``flowers``: heat maps against masks on generated flowers, by a network that is trained here;
            ``removal``: what a class loses without its relevant features; ``sanity``: whether explanations depend on
            class and weights; ``instability``, ``p``, ``errors``, ``interpretable-cnn``, ``rivals``: see
            :mod:`partlens_papers.tables.explainer_tables`.
        out: folder for results and everything that is made on the way.
        model: the performer; for ``flowers`` one that was trained on the same set before, trained here when left out.
        data: its photos, for ``removal`` and ``sanity``. Digits: ``mnist.npz`` with ``x_train``, ``y_train``,
            ``x_test`` and ``y_test``, for which the LeNet is trained when no model is given.
        set_name: ``flowers-single-6c`` or ``flowers-double-12c``, for ``flowers``.
        images_per_class: flowers of each class, for ``flowers``.
        config: fields of :class:`~partlens_papers.removal.plan.RemovalConfig` or
            :class:`~partlens_papers.sanity.bench.SanityConfig`; the settings of a
            :class:`~partlens_papers.tables.explainer_tables.TablePlan`.
        seed: of everything; the first one of several.
        performers: label to model, or to ``train:MODEL``, which is trained on each category first.
        categories: which; those with landmarks when left out.
        seeds: explainers of each category.
        tap: layer to explain; the preset's choice when left out.
        preset: ``partlens``, ``held``, ``candidates`` or ``paper``.
        background: photos that count as background, beside those of ``data``.
        joint: all categories in one performer and one explainer, for ``instability``, ``p`` and ``errors``.
        workers: processes that do jobs; 0 does them in this one.
        cluster: address of a dask scheduler whose workers see the same files.
        progress: how to show progress; silent when left out.

    Returns:
        The content of the result file.

    Raises:
        InputError: an unknown table, or data without a model.
    """
    if table in SWEEPS:
        from partlens_papers.tables.explainer_tables import TablePlan, explainer_table
        from partlens_papers.tables.sweep import Executor

        if not isinstance(data, (str, Path)):
            rule = "photos as a folder or table, which every process can open"
            raise InputError(expected(rule, "none" if data is None else type(data).__name__, "Give --data"))
        plan = TablePlan(
            table,
            str(data),
            dict(performers or {}),
            tuple(categories),
            seeds,
            seed,
            tap,
            preset,
            None if background is None else str(background),
            dict(config or {}),
            joint,
        )
        return explainer_table(plan, out, executor=Executor(workers, cluster), progress=progress)
    if table == "flowers":
        from partlens.verbs.runs import loaded
        from partlens_papers.flowers.baselines import BASELINES
        from partlens_papers.flowers.benchmark import flower_benchmark
        from partlens_papers.flowers.methods import relevant_feature_methods, smoothed_baselines

        return flower_benchmark(
            out,
            set_name=set_name,
            images_per_class=images_per_class,
            methods={**BASELINES, **smoothed_baselines()},
            ours=relevant_feature_methods(),
            performer=None if model is None else loaded(model),
            perturbed=_PERTURBED,
            seed=seed,
            progress=progress,
        )
    settings = {"seed": seed, **(config or {})}
    if table == "removal":
        from partlens_papers.removal.feature_removal import feature_removal

        if data is None:
            raise InputError(expected("data to remove features on", "none", "Give --data"))
        if model is None and str(data).endswith(".npz"):
            from partlens_papers.removal.digits import digit_set, train_digits

            images = digit_set(str(data))
            network, _ = train_digits(images, Path(out) / "lenet.safetensors", seed=seed, progress=progress)
            return feature_removal(network, images, out, config=settings, progress=progress)
        if model is None:
            raise InputError(expected("a model to remove features from", "none", "Give --model"))
        return feature_removal(model, data, out, config=settings, progress=progress)
    if table == "sanity":
        from partlens_papers.sanity.checks import sanity_checks

        return sanity_checks(out, model=model, data=data, config=settings, progress=progress)
    raise InputError(expected(f"a table among {', '.join(TABLES)}", table, "Choose one of them"))


def result_lines(table: str, result: Mapping[str, Any]) -> list[str]:
    """Return a result as Markdown lines."""
    if table in SWEEPS:
        from partlens_papers.tables.tables_page import table_lines

        return table_lines(result)
    if table == "flowers":
        from partlens_papers.flowers.benchmark import benchmark_table

        return benchmark_table(result)
    if table == "removal":
        from partlens_papers.removal.removal_tables import curve_table
        from partlens_papers.removal.removal_tables import table as removal_table

        return [*removal_table([result]), "", *curve_table(result)]
    from partlens_papers.sanity.sanity_tables import tables

    return tables(result)


def print_result(result: Mapping[str, Any]) -> None:
    """Print a table as Markdown, and refuse a sweep whose jobs did not all finish.

    Raises:
        RunError: some jobs have no result.
    """
    sys.stdout.write("\n".join(result_lines(result["table"], result)) + "\n")
    if result.get("status") == "incomplete":
        failed = [job["key"] for job in result["jobs"] if job["status"] != "finished"]
        rule, remedy = "a result of every job", "Correct what it says and run the same command again"
        raise RunError(expected(rule, f"none of {listed(failed)}", remedy))
