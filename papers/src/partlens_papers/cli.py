"""The command line of the papers' experiments, generated like the product's."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from partlens.cli import Command, run

COMMANDS: dict[str, Command] = {
    "convert": Command(
        "partlens_papers.data.convert:convert",
        "write the tables that partlens reads from CUB-200-2011, ILSVRC Animal-Part, Pascal-Part or Animal-Pose",
        "partlens_papers.data.convert:print_converted",
    ),
    "join": Command(
        "partlens_papers.data.convert:join",
        "write one table of photos and of background from elsewhere",
        "partlens_papers.data.convert:print_converted",
    ),
    "train-performer": Command(
        "partlens_papers.networks.train_performer:train_performer",
        "train a copy of a network for one category of photos or several, as the papers did",
        "partlens_papers.networks.train_performer:print_performer",
        settings={"config": "partlens_papers.networks.finetune_config:FinetuneConfig"},
    ),
    "make-flowers": Command(
        "partlens_papers.flowers.sets:make_flowers",
        "write a set of the flower benchmark: images, masks, landmarks, folds",
    ),
    "reproduce": Command(
        "partlens_papers.tables.sweep:reproduce",
        "make a table of the explainer papers: instability, p, errors, interpretable-cnn or rivals",
        "partlens_papers.reproduction:print_table",
        settings={
            "sweep": "partlens_papers.tables.sweep:SweepConfig",
            "methods": "partlens_papers.tables.sweep:MethodsConfig",
        },
    ),
    "reproduce flowers": Command(
        "partlens_papers.reproduction:reproduce_flowers",
        "measure heat maps against masks on generated flowers",
        "partlens_papers.reproduction:print_flowers",
        settings={"flowers": "partlens_papers.flowers.benchmark:FlowersConfig"},
    ),
    "reproduce removal": Command(
        "partlens_papers.reproduction:reproduce_removal",
        "measure what a class loses without its relevant features",
        "partlens_papers.reproduction:print_removal",
        settings={"removal": "partlens_papers.removal.plan:RemovalConfig"},
    ),
    "reproduce sanity": Command(
        "partlens_papers.reproduction:reproduce_sanity",
        "check that explanations depend on the class and on the weights",
        "partlens_papers.reproduction:print_sanity",
        settings={"sanity": "partlens_papers.sanity.bench:SanityConfig"},
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    about = "Make the papers' tables from data, with the printed figures for comparison."
    return run("partlens-papers", about, COMMANDS, sys.argv[1:] if arguments is None else arguments)


def program() -> None:
    """Entry point of the installed command."""
    raise SystemExit(main())
