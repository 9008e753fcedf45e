"""The command line: one sub-command per verb, options as in the Python functions.

Exit codes: 0 done; 1 an error that partlens found, one sentence on standard error (``--debug`` shows the traceback);
2 wrong usage; 130 stopped by Ctrl-C (run the same command again to go on).
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal

from partlens import __version__
from partlens.printed import print_parts, print_scores
from partlens.vocabulary import PartlensError, RunError, expected, listed

_SUMMARY = {
    "demo": "make flowers, train a network on them, explain it, write the page: everything in a few minutes",
    "layers": "list the layers of a model that can be explained",
    "data": "check a data set: 'partlens data check FOLDER' says what it holds",
    "train-performer": "train a copy of a network for one category of photos or several, as the papers did",
    "fit-explainer": "learn an explainer of one layer of a model from a folder of photos",
    "evaluate": "measure a finished run on photos that were not used in the fit",
    "select-features": "find the few filters that indicate each class, and what they answer to",
    "parts": "find the part of every filter of an explainer, what each part adds, and pictures to name it by",
    "explain": "show for images what each part adds, which relevant filters decided, and where each of them acted",
    "report": "write the page of a run",
    "make-flowers": "write a set of the flower benchmark: images, masks, landmarks, folds",
    "reproduce": "make a table of the papers, beside the printed figures",
}


def _overview() -> str:
    width = max(map(len, _SUMMARY))
    commands = "\n".join(f"  {name.ljust(width)}  {text}" for name, text in _SUMMARY.items())
    return (
        "usage: partlens [--version] [--debug] COMMAND ...\n\n"
        "Open a trained convolutional network: which object parts a layer encodes, and how much they explain.\n\n"
        f"commands:\n{commands}\n\n"
        "'partlens COMMAND --help' shows the options of a command. --debug shows tracebacks.\n"
    )


def _parser(command: str, *, config_file: bool = False) -> Any:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog=f"partlens {command}", description=_SUMMARY[command], exit_on_error=True)
    if config_file:
        parser.add_argument("--config", action="config", help="YAML file with any of the options")
    return parser


def _add_model(parser: Any) -> None:
    parser.add_argument(
        "model",
        type=str,
        help="torchvision:NAME, torchvision:NAME@FILE, timm:NAME, partlens:NAME@FILE, package.module:factory",
    )


def _demo(arguments: Sequence[str]) -> None:
    from partlens.demonstration import DEMO_FLOWERS, demo
    from partlens.progress import Progress

    parser = _parser("demo")
    parser.add_argument("--out", type=str, default="partlens-demo", help="folder for everything that is made")
    parser.add_argument("--flowers", type=int, default=DEMO_FLOWERS, help="number of generated flowers")
    parser.add_argument("--seed", type=int, default=0, help="of the flowers, the network and the explainer")
    options = parser.parse_args(list(arguments))
    page = demo(options.out, flowers=options.flowers, seed=options.seed, progress=Progress.terminal())
    sys.stdout.write(f"{page}\n")


def _layers(arguments: Sequence[str]) -> None:
    parser = _parser("layers")
    _add_model(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(list(arguments))
    from partlens.pipeline import layers

    found = layers(options.model)
    if options.json:
        sys.stdout.write(json.dumps([dataclasses.asdict(layer) for layer in found], indent=2) + "\n")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("", box=None)
    for heading in ("layer", "kind", "filters", "cells", "stride px", "receptive field px"):
        table.add_column(heading, no_wrap=heading in {"layer", "kind"})
    for layer in found:
        field = "whole image" if layer.receptive_field_px is None else str(layer.receptive_field_px)
        stride = "–" if layer.stride_px is None else str(layer.stride_px)
        filters, rows, cols = layer.shape
        mark = "→" if layer.is_default else ""
        table.add_row(mark, layer.name, layer.kind, str(filters), f"{rows}x{cols}", stride, field)
    console = Console()
    if not console.is_terminal:
        console.width = 200  # in a file or a pipe nothing needs to be cut
    console.print(table)
    if any(layer.is_default for layer in found):
        sys.stdout.write("→ is the layer that fit-explainer taps when --tap is left out\n")
    else:
        sys.stdout.write("no layer here suits fit-explainer without --tap\n")


def _data(arguments: Sequence[str]) -> None:
    parser = _parser("data")
    parser.add_argument(
        "task", type=Literal["check", "join"], help="check: what it holds and what is wrong; join: several as one"
    )
    parser.add_argument("data", type=str, help="check: folder or table; join: the JSON file to write")
    parser.add_argument("--whole-photos", action="store_true", help="check: do not cut photos to the objects' boxes")
    parser.add_argument("--json", action="store_true", help="check: print JSON")
    parser.add_argument("--photos", type=str, help="join: the photos to explain, whose parts are used")
    parser.add_argument("--category", type=str, help="join: one category for all of --photos; default: their own")
    parser.add_argument("--landmarks", type=str, default="all", help="join: all of --photos, or those of the paper")
    parser.add_argument("--background", type=str, help="join: whole photos of anything else")
    options = parser.parse_args(list(arguments))
    if options.task == "join":
        _join(options)
        return
    from partlens.data.check import check_data

    found = check_data(options.data, crop=None if options.whole_photos else "box")
    if options.json:
        sys.stdout.write(json.dumps(found.to_dict(), indent=2) + "\n")
    else:
        sys.stdout.write("\n".join(found.lines()) + "\n")


def _join(options: Any) -> None:
    from partlens.data.joined import join_data

    counts = join_data(
        options.data, options.photos, options.background, category=options.category, landmarks=options.landmarks
    )
    sys.stdout.write(f"wrote {options.data}: {listed([f'{n} {name}' for name, n in counts.items()], 8)}\n")


def _train_performer(arguments: Sequence[str]) -> None:
    from partlens.performer.finetune_config import FinetuneConfig
    from partlens.pipeline import read_training, train_performer
    from partlens.pipeline.performer_run import summary
    from partlens.progress import Progress

    parser = _parser("train-performer", config_file=True)
    _add_model(parser)
    parser.add_argument("data", type=str, help="folder of photos (category sub-folders), or a CSV/Parquet table")
    parser.add_argument("--out", type=str, required=True, help="file NAME.safetensors; an unfinished one goes on")
    parser.add_argument("--category", type=str | None, default=None, help="one category against all other photos")
    parser.add_argument("--categories", type=str | None, default=None, help="several: a,b,c or all (but background)")
    parser.add_argument("--against", type=str | None, default=None, help="with --category: others are only a,b,c")
    default = FinetuneConfig()
    for name, kind, text in (
        ("loss", str, "logistic, or softmax for several categories"),
        ("new-layers", str, "drawn anew: auto, last, or fully-connected"),
        ("train-from", str | None, "first layer that is trained; default: all are"),
        ("epochs", int, "passes over the photos"),
        ("epochs-all", int, "further passes in which all layers are trained, at a tenth of the rates"),
        ("batch-size", int, "photos per step"),
        ("learning-rate", float, "of new layers in the first epoch"),
        ("rate-kept", float, "rate of layers with given weights over that of new layers"),
        ("weight-decay", float, "of weights"),
        ("positive-share", float, "with --category: its share of an epoch's photos"),
        ("mirror", bool, "mirror every other photo"),
        ("precision", str, "of the arithmetic: float32 or bfloat16"),
        ("cache-precision", str, "of the cached maps at --train-from: float16 or float32"),
        ("seed", int, "of the new layers, the order, the mirrors and dropout"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=getattr(default, name.replace("-", "_")), help=text)
    parser.add_argument("--device", type=str, default="cpu", help="cpu or cuda")
    parser.add_argument("--keep-cache", action="store_true", help="keep NAME.work with cached maps and checkpoints")
    parser.add_argument("--cache", type=str | None, default=None, help="folder for fixed maps, kept and shared")
    parser.add_argument("--json", action="store_true", help="print what the file's header says")
    options = parser.parse_args(list(arguments))
    fields = {field.name for field in dataclasses.fields(FinetuneConfig)}
    path = train_performer(
        options.model,
        options.data,
        out=options.out,
        category=options.category,
        categories=options.categories,
        against=options.against,
        config={name: value for name, value in vars(options).items() if name in fields},
        device=options.device,
        cache=options.cache,
        keep_cache=options.keep_cache,
        progress=Progress.terminal(),
    )
    found = read_training(path)
    sys.stdout.write(json.dumps(found, indent=2) + "\n" if options.json else f"{path}\n{summary(found)}\n")


def _fit_explainer(arguments: Sequence[str]) -> None:
    from partlens.explainer.config import ExplainerConfig
    from partlens.pipeline import DEFAULT_SEEDS, MOST_BACKGROUND, fit_explainer
    from partlens.progress import Progress

    parser = _parser("fit-explainer", config_file=True)
    _add_model(parser)
    parser.add_argument("data", type=str, help="folder of photos (category sub-folders), or a CSV/Parquet table")
    parser.add_argument("--out", type=str, required=True, help="run directory; an unfinished run in it goes on")
    parser.add_argument("--category", type=str | None, default=None, help="category to explain; default: all photos")
    parser.add_argument("--tap", type=str | None, default=None, help="layer to explain; default: see 'partlens layers'")
    parser.add_argument("--targets", type=list[str] | None, default=None, help="layers to reconstruct, e.g. [a, b]")
    parser.add_argument("--preset", type=str, default="partlens", help="partlens, held, candidates or paper")
    parser.add_argument("--seeds", type=int, default=DEFAULT_SEEDS, help="explainers learned, for the spread of p")
    parser.add_argument("--background", type=int, default=MOST_BACKGROUND, help="most photos of other categories")
    parser.add_argument("--cache", type=str | None, default=None, help="folder for cached maps that runs may share")
    parser.add_argument("--keep-cache", action="store_true", help="keep the cached maps")
    parser.add_argument("--device", type=str, default="cpu", help="cpu, or cuda, where maps and explainer are computed")
    parser.add_class_arguments(ExplainerConfig, "explainer")
    options = _with_preset(parser, arguments, "explainer", ExplainerConfig)
    changes = vars(options.explainer)
    if options.preset == "paper":
        # The papers' eta depends on the network: it is passed on only where somebody gave one.
        parser.set_defaults({"explainer.eta": math.nan})
        if math.isnan(parser.parse_args(list(arguments)).explainer.eta):
            del changes["eta"]
    run = fit_explainer(
        options.model,
        options.data,
        out=options.out,
        category=options.category,
        tap=options.tap,
        targets=options.targets,
        preset=options.preset,
        config=changes,
        seeds=options.seeds,
        background=options.background,
        cache=options.cache,
        keep_cache=options.keep_cache,
        device=options.device,
        progress=Progress.terminal(),
    )
    sys.stdout.write(f"{run.path}\n")


def _preset_in(arguments: Sequence[str]) -> Any:
    """Find the preset in the arguments, for a help text with its defaults."""
    for index, argument in enumerate(arguments):
        if argument.startswith("--preset="):
            return argument.removeprefix("--preset=")
        if argument == "--preset" and index + 1 < len(arguments):
            return arguments[index + 1]
    return "partlens"


def _with_preset(parser: Any, arguments: Sequence[str], group: str, config: Any) -> Any:
    """Parse twice: the preset, from the command line or a file of options, decides the defaults of the others."""

    def parsed(preset: str) -> Any:
        values = config.preset(preset).to_dict()
        parser.set_defaults({f"{group}.{name}": value for name, value in values.items()})
        return parser.parse_args(list(arguments))

    return parsed(parsed(_preset_in(arguments)).preset)


def _evaluate(arguments: Sequence[str]) -> None:
    parser = _parser("evaluate")
    parser.add_argument("run", type=str, help="run directory of fit-explainer")
    parser.add_argument("data", type=str | None, nargs="?", default=None, help="photos; default: those of the fit")
    parser.add_argument("--model", type=str | None, default=None, help="the performer; default: that of the fit")
    parser.add_argument("--split", type=str, default="test", help="split of the photos to measure on")
    parser.add_argument("--seed", type=int, default=0, help="of the nulls and the intervals")
    parser.add_argument("--gallery", type=str, default="quick", help="pictures of filters: quick, full or none")
    parser.add_argument(
        "--fields", type=str, default="occlusion", help="what filters read: by occlusion, or the analytic round field"
    )
    parser.add_argument(
        "--occlusion", type=dict[str, Any] | None, default=None, help="changes, such as --occlusion.stride_px 9"
    )
    parser.add_argument("--json", action="store_true", help="print the evaluation as JSON")
    options = parser.parse_args(list(arguments))
    from partlens.pipeline import evaluate
    from partlens.progress import Progress

    result = evaluate(
        options.run,
        options.data,
        model=options.model,
        split=options.split,
        seed=options.seed,
        gallery=options.gallery,
        fields=options.fields,
        occlusion=options.occlusion,
        progress=Progress.terminal(),
    )
    if options.json:
        shown = {name: value for name, value in result.items() if name != "filters"}
        sys.stdout.write(json.dumps(shown, indent=2, allow_nan=False) + "\n")
    else:
        print_scores(result)


def _select_features(arguments: Sequence[str]) -> None:
    from partlens.pipeline import DEFAULT_MU, select_features
    from partlens.pipeline.selection_run import MOST_PICTURES, TOP_PHOTOS
    from partlens.progress import Progress

    parser = _parser("select-features", config_file=True)
    _add_model(parser)
    parser.add_argument("data", type=str, help="folder of photos (category sub-folders), or a CSV/Parquet table")
    parser.add_argument("--out", type=str, required=True, help="run directory; that of an explainer may be given")
    parser.add_argument("--mu", type=float, default=DEFAULT_MU, help="bound on the sum of a class's weights")
    parser.add_argument("--labels", type=str, default="data", help="data, or predictions: the model's own decisions")
    parser.add_argument("--signed", action="store_true", help="allow negative weights")
    parser.add_argument("--split", type=str, default="train", help="split of the photos to fit on")
    parser.add_argument("--top-photos", type=int, default=TOP_PHOTOS, help="photos averaged in a filter's picture")
    parser.add_argument("--pictures", type=int, default=MOST_PICTURES, help="most filters that get pictures")
    parser.add_argument("--seed", type=int, default=0, help="of the shuffled labels and the random crops")
    parser.add_argument("--keep-cache", action="store_true", help="keep the descriptors of all photos")
    parser.add_argument("--layers", type=str, default="outputs", help="outputs, activations, convolutions, or [a, b]")
    parser.add_argument("--energy", type=str, default="squared", help="squared (authors) or norm")
    parser.add_argument("--layer-normalisation", type=str, default="l1", help="l1 (authors) or none")
    parser.add_argument("--image-normalisation", type=str, default="l2", help="l2 (authors) or none")
    options = parser.parse_args(list(arguments))
    named = options.layers.strip()
    layers = tuple(n.strip() for n in named[1:-1].split(",")) if named.startswith("[") else named
    run = select_features(
        options.model,
        options.data,
        out=options.out,
        mu=options.mu,
        labels=options.labels,
        nonnegative=not options.signed,
        descriptor={
            "layers": layers,
            "energy": options.energy,
            "layer_normalisation": options.layer_normalisation,
            "image_normalisation": options.image_normalisation,
        },
        split=options.split,
        top_photos=options.top_photos,
        pictures=options.pictures,
        seed=options.seed,
        keep_cache=options.keep_cache,
        progress=Progress.terminal(),
    )
    sys.stdout.write(f"{run.path}\n")


def _parts(arguments: Sequence[str]) -> None:
    from partlens.pipeline import parts
    from partlens.progress import Progress

    parser = _parser("parts")
    parser.add_argument("run", type=str, help="run directory of fit-explainer")
    parser.add_argument("--data", type=str | None, default=None, help="photos; default: those of the fit")
    parser.add_argument("--model", type=str | None, default=None, help="the performer; default: that of the fit")
    parser.add_argument("--rule", type=str | None, default=None, help="landmarks, clusters, or auto (the default)")
    parser.add_argument("--rename", type=str, action="append", help='"part 1=head"; alone it only changes names')
    parser.add_argument("--split", type=str, default="test", help="split of the photos to use")
    parser.add_argument("--settings", type=dict | None, default=None, help="fields of PartsConfig, as a mapping")
    parser.add_argument("--json", action="store_true", help="print parts.json")
    options = parser.parse_args(list(arguments))
    found = parts(
        options.run,
        options.data,
        model=options.model,
        rule=options.rule,
        rename=options.rename or (),
        split=options.split,
        config=options.settings,
        progress=Progress.terminal(),
    )
    if options.json:
        sys.stdout.write(json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    else:
        print_parts(found)


def _explain(arguments: Sequence[str]) -> None:
    from partlens.artefacts.explanation import ExplanationConfig
    from partlens.pipeline import explain
    from partlens.progress import Progress

    parser = _parser("explain", config_file=True)
    parser.add_argument("run", type=str, help="run directory of select-features, fit-explainer or both")
    parser.add_argument("images", type=str, nargs="+", help="image files, or folders of them")
    parser.add_argument("--model", type=str | None, default=None, help="the performer; default: that of the run")
    parser.add_argument("--class", dest="classes", type=str, action="append", help="class to explain; may be repeated")
    parser.add_argument("--count", type=int, default=2, help="how many of the most likely classes are explained")
    parser.add_argument("--preset", type=str, default="partlens", help="partlens or paper")
    parser.add_argument("--style", type=str, default="glow", help="colours: glow, or jet as in the authors' figures")
    parser.add_argument("--out", type=str | None, default=None, help="folder; default: RUN/explanations")
    parser.add_class_arguments(ExplanationConfig, "how")
    options = _with_preset(parser, arguments, "how", ExplanationConfig)
    folders = explain(
        options.run,
        options.images,
        model=options.model,
        classes=options.classes,
        count=options.count,
        config=vars(options.how),
        style=options.style,
        out=options.out,
        progress=Progress.terminal(),
    )
    for folder in folders:
        sys.stdout.write(f"{folder}\n")


def _report(arguments: Sequence[str]) -> None:
    parser = _parser("report")
    parser.add_argument("run", type=str, help="run directory")
    parser.add_argument("--out", type=str | None, default=None, help="file to write; default: RUN/report.html")
    options = parser.parse_args(list(arguments))
    from partlens.pipeline import report

    sys.stdout.write(f"{report(options.run, out=options.out)}\n")


def _make_flowers(arguments: Sequence[str]) -> None:
    from partlens.data.flower_sets import FLOWER_SETS, make_flowers
    from partlens.progress import Progress

    parser = _parser("make-flowers")
    parser.add_argument("name", type=str, help=" or ".join(FLOWER_SETS))
    parser.add_argument("--out", type=str, required=True, help="folder; an unfinished one goes on")
    parser.add_argument("--images-per-class", type=int, default=1000, help="flowers of each class")
    parser.add_argument("--size", type=int, default=112, help="side in pixels")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw")
    parser.add_argument("--seed", type=int, default=0, help="of the flowers")
    options = parser.parse_args(list(arguments))
    folder = make_flowers(
        options.name,
        options.out,
        options.images_per_class,
        options.seed,
        options.size,
        workers=options.workers,
        progress=Progress.terminal(),
    )
    sys.stdout.write(f"{folder}\n")


def _reproduce(arguments: Sequence[str]) -> None:
    from partlens.experiments.explainer_tables import performers_of
    from partlens.experiments.reproduction import TABLES, reproduce, result_lines
    from partlens.progress import Progress

    parser = _parser("reproduce", config_file=True)
    parser.add_argument("table", type=str, help=", ".join(TABLES))
    parser.add_argument("--out", type=str, required=True, help="folder for the result; an unfinished one goes on")
    parser.add_argument("--model", type=str | None, default=None, help="the performer; for flowers a trained network")
    parser.add_argument("--data", type=str | None, default=None, help="its photos, or a .npz of digits")
    parser.add_argument("--set", dest="set_name", type=str, default="flowers-single-6c", help="for flowers")
    parser.add_argument("--images-per-class", type=int, default=1000, help="for flowers")
    parser.add_argument("--settings", type=dict | None, default=None, help="fields of the experiment, as a mapping")
    parser.add_argument("--seed", type=int, default=0, help="of everything; the first one of --seeds")
    parser.add_argument("--performers", type=str, nargs="+", default=[], help="LABEL=MODEL or LABEL=train:MODEL")
    parser.add_argument("--categories", type=str, nargs="+", default=[], help="default: all that have landmarks")
    parser.add_argument("--seeds", type=int, default=3, help="explainers of each performer and category")
    parser.add_argument("--tap", type=str | None, default=None, help="layer to explain; default: the preset's")
    parser.add_argument(
        "--preset", type=str, default="partlens", help="partlens, held, candidates, or paper: its tap, targets and eta"
    )
    parser.add_argument("--background", type=str | None, default=None, help="photos that count as background")
    parser.add_argument(
        "--joint", action="store_true", help="all categories in one performer and explainer: the papers' multi-category"
    )
    parser.add_argument("--workers", type=int, default=0, help="processes on this machine that do the jobs")
    parser.add_argument("--cluster", type=str | None, default=None, help="address of a dask scheduler; same files")
    options = parser.parse_args(list(arguments))
    result = reproduce(
        options.table,
        out=options.out,
        model=options.model,
        data=options.data,
        set_name=options.set_name,
        images_per_class=options.images_per_class,
        config=options.settings,
        seed=options.seed,
        performers=performers_of(options.performers),
        categories=options.categories,
        seeds=options.seeds,
        tap=options.tap,
        preset=options.preset,
        background=options.background,
        joint=options.joint,
        workers=options.workers,
        cluster=options.cluster,
        progress=Progress.terminal(),
    )
    sys.stdout.write("\n".join(result_lines(options.table, result)) + "\n")
    if result.get("status") == "incomplete":
        failed = [job["key"] for job in result["jobs"] if job["status"] != "finished"]
        rule, remedy = "a result of every job", "Correct what it says and run the same command again"
        raise RunError(expected(rule, f"none of {listed(failed)}", remedy))


_COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "demo": _demo,
    "layers": _layers,
    "data": _data,
    "train-performer": _train_performer,
    "fit-explainer": _fit_explainer,
    "evaluate": _evaluate,
    "select-features": _select_features,
    "parts": _parts,
    "explain": _explain,
    "report": _report,
    "make-flowers": _make_flowers,
    "reproduce": _reproduce,
}


def _run(command: str, arguments: Sequence[str], *, debug: bool) -> int:
    try:
        _COMMANDS[command](arguments)
    except PartlensError as error:
        if debug:
            raise
        sys.stderr.write(f"partlens: {' '.join(str(error).split())}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("partlens: stopped; what is done is kept, run the same command again to go on\n")
        return 130
    except BrokenPipeError:
        # The reader of our output (head, less) has gone; that is its choice, not an error.
        sys.stderr.close()
        return 0
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; those of the process when left out.

    Returns:
        The exit code.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [a for a in given if a != "--debug"]
    if not given or given[0] in {"-h", "--help", "help"}:
        sys.stdout.write(_overview())
        return 0 if given else 2
    if given[0] == "--version":
        sys.stdout.write(f"partlens {__version__}\n")
        return 0
    command = given[0]
    if command not in _COMMANDS:
        from partlens.vocabulary import nearest

        sys.stderr.write(
            f"partlens: unknown command {command!r}; did you mean {nearest(command, _COMMANDS)[0]}? "
            "'partlens --help' lists all\n"
        )
        return 2
    return _run(command, given[1:], debug=debug)


def program() -> None:
    """Entry point of the installed command."""
    raise SystemExit(main())
