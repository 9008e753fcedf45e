"""The command line, generated: one sub-command per verb, its options from the function's signature and docstring.

Exit codes: 0 done; 1 an error that partlens found, one sentence on standard error (``--debug`` shows the traceback);
2 wrong usage; 130 stopped by Ctrl-C (run the same command again to go on).
"""

from __future__ import annotations

import argparse
import functools
import importlib
import inspect
import json
import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_origin, get_type_hints

from partlens import __version__
from partlens.errors import PartlensError, nearest

_WORDS: dict[str, Any] = {"str": str, "int": int, "float": float, "bool": bool, "None": type(None), "Path": str}
_LISTS = ("list[", "Sequence[", "tuple[")


@dataclass(frozen=True)
class Command:
    """One verb of the command line.

    Attributes:
        function: ``module:name`` of the function; its module imports no tensor library when it is read.
        summary: one line for the overview.
        show: ``module:name`` of what prints the result for a person; without it the result is printed as it is.
    """

    function: str
    summary: str
    show: str | None = None


COMMANDS: dict[str, Command] = {
    "demo": Command(
        "partlens.verbs.demo:demo",
        "make flowers, train a network on them, explain it, write the page: everything in a few minutes",
    ),
    "layers": Command(
        "partlens.verbs.runs:layers",
        "list the layers of a model that can be explained",
        "partlens.verbs.printed:print_layers",
    ),
    "data check": Command(
        "partlens.data.check:check_data",
        "say what a folder or table of photos holds, and what is wrong with it",
        "partlens.verbs.printed:print_check",
    ),
    "fit-explainer": Command(
        "partlens.verbs.fit_explainer:fit_explainer",
        "learn an explainer of one layer of a model from a folder of photos",
        "partlens.verbs.printed:print_path",
    ),
    "evaluate": Command(
        "partlens.verbs.evaluate:evaluate",
        "measure a finished run on photos that were not used in the fit",
        "partlens.verbs.printed:print_scores",
    ),
    "parts": Command(
        "partlens.verbs.parts:parts",
        "find the part of every filter of an explainer, what each part adds, and pictures to name it by",
        "partlens.verbs.printed:print_parts",
    ),
    "select-features": Command(
        "partlens.verbs.select_features:select_features",
        "find the few filters that indicate each class, and what they respond to",
        "partlens.verbs.printed:print_path",
    ),
    "explain": Command(
        "partlens.verbs.explain:explain",
        "show for images what each part adds, which relevant filters decided, and where each of them acted",
        "partlens.verbs.printed:print_paths",
    ),
    "report": Command("partlens.verbs.runs:report", "write the page of a run"),
}


def _found(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


class _Annotation(NamedTuple):
    """What the command line makes of one parameter: a kind, whether it repeats, or a class of settings."""

    kind: Any
    several: bool
    settings: type | None


def _pieces(text: str) -> list[str]:
    """Split an annotation at the bars outside brackets."""
    found, depth, start = [], 0, 0
    for place, sign in enumerate(text):
        depth += (sign == "[") - (sign == "]")
        if sign == "|" and depth == 0:
            found.append(text[start:place].strip())
            start = place + 1
    return [*found, text[start:].strip()]


def _read(annotation: str, module: Mapping[str, Any]) -> _Annotation:
    """Keep of an annotation what can be typed in a shell: words, numbers, choices, lists of words, settings."""
    kinds: list[Any] = []
    several, settings = False, None
    for piece in _pieces(annotation):
        if piece in _WORDS:
            kinds.append(_WORDS[piece])
        elif piece.startswith(_LISTS):
            several = True
        elif isinstance(known := module.get(piece), type):
            settings = known
        elif get_origin(known) is Literal:
            kinds.append(known)
        elif piece.startswith("Mapping["):
            kinds.append(dict[str, Any])
    if settings is not None:
        return _Annotation(None, several=False, settings=settings)
    if several:
        kinds = [list[str], *(kind for kind in kinds if kind is type(None))]
    return _Annotation(functools.reduce(operator.or_, kinds) if kinds else str, several, None)


def _described(function: Any, section: str) -> dict[str, str]:
    """Return the first sentence that a docstring says of each argument or attribute."""
    from docstring_parser import parse

    texts = {p.arg_name: p.description or "" for p in parse(function.__doc__ or "").params if p.args[0] == section}
    return {name: " ".join(text.split()).replace("``", "").replace("%", "%%") for name, text in texts.items()}


def _group(settings: type) -> str:
    return settings.__name__.removesuffix("Config").lower()


def _add_settings(parser: Any, settings: type) -> None:
    """Add an option per field; what is not given stays the verb's choice."""
    texts = _described(settings, "attribute")
    for name, kind in get_type_hints(settings).items():
        if name in texts:
            parser.add_argument(f"--{_group(settings)}.{name}", type=kind, default=argparse.SUPPRESS, help=texts[name])


class _Plan(NamedTuple):
    parser: Any
    function: Callable[..., Any]
    parameters: Mapping[str, inspect.Parameter]
    settings: Mapping[str, type]
    progress: bool
    annotations: Mapping[str, _Annotation]


def _plan(program: str, name: str, command: Command) -> _Plan:
    """Build the parser of a verb from its signature and docstring."""
    from jsonargparse import ArgumentParser

    function = _found(command.function)
    module = vars(sys.modules[function.__module__])
    parser = ArgumentParser(prog=f"{program} {name}", description=command.summary, exit_on_error=True)
    texts = _described(function, "param")
    parameters = dict(inspect.signature(function).parameters)
    progress = parameters.pop("progress", None) is not None
    settings: dict[str, type] = {}
    annotations = {p: _read(str(parameter.annotation), module) for p, parameter in parameters.items()}
    parser.add_argument("--config", action="config", help="YAML file with any of the options")
    for parameter in parameters.values():
        kind, several, of_settings = annotations[parameter.name]
        text = texts.get(parameter.name, "")
        if of_settings is not None:
            settings[parameter.name] = of_settings
            _add_settings(parser, of_settings)
            continue
        required = parameter.default is inspect.Parameter.empty
        default = None if required else parameter.default
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            many = ("+" if required else "*") if several else (None if required else "?")
            extra = {} if many is None else {"nargs": many}
            word = str if several else kind
            parser.add_argument(
                parameter.name, type=word, help=text, **extra, **({} if required else {"default": default})
            )
        else:
            option = f"--{parameter.name.replace('_', '-')}"
            if kind is bool and default is False:
                parser.add_argument(option, action="store_true", help=text)
            elif several:
                parser.add_argument(option, type=kind, nargs="+", default=default, help=text, required=required)
            else:
                parser.add_argument(option, type=kind, default=default, help=text, required=required)
    if command.show is not None:
        parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return _Plan(parser, function, parameters, settings, progress, annotations)


def _plain(value: Any) -> Any:
    """Turn what a verb returned into what JSON can hold."""
    from partlens.records import plain

    return plain(value)


def _call(program: str, name: str, command: Command, arguments: Sequence[str]) -> None:
    """Parse the options, call the verb, print its result."""
    plan = _plan(program, name, command)
    options = plan.parser.parse_args(list(arguments))
    given = {n: getattr(options, n.replace("-", "_")) for n in plan.parameters if n not in plan.settings}
    for parameter, settings in plan.settings.items():
        changed = vars(options).get(_group(settings))
        given[parameter] = {} if changed is None else dict(vars(changed))
    if plan.progress:
        from partlens.progress import Progress

        given["progress"] = Progress.terminal()
    positional = [
        given.pop(n)
        for n, p in plan.parameters.items()
        if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD and n in given
    ]
    result = plan.function(*positional, **given)
    if command.show is None:
        sys.stdout.write(f"{result}\n")
    elif options.json:
        sys.stdout.write(json.dumps(_plain(result), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    else:
        _found(command.show)(result)


def _overview(program: str, about: str, commands: Mapping[str, Command]) -> str:
    width = max(map(len, commands))
    lines = "\n".join(f"  {name.ljust(width)}  {command.summary}" for name, command in commands.items())
    return (
        f"usage: {program} [--version] [--debug] COMMAND ...\n\n{about}\n\ncommands:\n{lines}\n\n"
        f"'{program} COMMAND --help' shows the options of a command. --debug shows tracebacks.\n"
    )


def _named(arguments: Sequence[str], commands: Mapping[str, Command]) -> tuple[str, list[str]]:
    """Return the command, of one word or two, and what follows it."""
    for words in (2, 1):
        name = " ".join(arguments[:words])
        if name in commands:
            return name, list(arguments[words:])
    return arguments[0], list(arguments[1:])


def run(program: str, about: str, commands: Mapping[str, Command], given: Sequence[str]) -> int:
    """Run one command of a program.

    Args:
        program: its name, for texts.
        about: one sentence for the overview.
        commands: by name.
        given: the arguments without the program's name.

    Returns:
        The exit code.
    """
    debug = "--debug" in given
    given = [a for a in given if a != "--debug"]
    if not given or given[0] in {"-h", "--help", "help"}:
        sys.stdout.write(_overview(program, about, commands))
        return 0 if given else 2
    if given[0] == "--version":
        sys.stdout.write(f"partlens {__version__}\n")
        return 0
    name, rest = _named(given, commands)
    if name not in commands:
        sys.stderr.write(
            f"{program}: unknown command {name!r}; did you mean {nearest(name, commands)[0]}? "
            f"'{program} --help' lists all\n"
        )
        return 2
    try:
        _call(program, name, commands[name], rest)
    except PartlensError as error:
        if debug:
            raise
        sys.stderr.write(f"{program}: {' '.join(str(error).split())}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write(f"{program}: stopped; what is done is kept, run the same command again to go on\n")
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
    about = "Open a trained vision network: which object parts a layer encodes, and how much they explain."
    return run("partlens", about, COMMANDS, sys.argv[1:] if arguments is None else arguments)


def program() -> None:
    """Entry point of the installed command."""
    raise SystemExit(main())
