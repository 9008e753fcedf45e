"""The command line, generated: one sub-command per verb, its options from the function's signature and docstring.

Exit codes: 0 done; 1 an error that partlens found, one sentence on standard error (``--debug`` shows the traceback);
2 wrong usage; 130 stopped by Ctrl-C (run the same command again to go on).
"""

from __future__ import annotations

import argparse
import ast
import codecs
import functools
import importlib
import inspect
import io
import json
import operator
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_origin, get_type_hints

from partlens import __version__
from partlens.errors import PartlensError, failed, nearest

_WORDS: dict[str, Any] = {"str": str, "int": int, "float": float, "bool": bool, "None": type(None), "Path": str}
_PLAINER = str.maketrans(
    {"→": "->", "–": "-", "−": "-", "²": "2", "·": "*", "≥": ">=", "≤": "<=", "×": "x", "…": "..."}
)
_BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
_LISTS = ("list[", "Sequence[", "tuple[")
_NO_MEMORY = re.compile("can't allocate memory|out of memory", re.IGNORECASE)  # how torch says it


@dataclass(frozen=True)
class Command:
    """One verb of the command line.

    Attributes:
        function: ``module:name`` of the function; its module imports no tensor library when it is read.
        summary: one line for the overview.
        show: ``module:name`` of what prints the result for a person; without it the result is printed as it is.
        settings: for a parameter that takes settings, ``module:name`` of their class; each field is an option.
    """

    function: str
    summary: str
    show: str | None = None
    settings: Mapping[str, str] = field(default_factory=dict)


_COMPUTE, _DEVICE = "partlens.shards:Compute", "partlens.shards:Device"
COMMANDS: dict[str, Command] = {
    "demo": Command(
        "partlens.verbs.demo:demo",
        "make flowers, train a network on them, inspect and explain it, write the page: everything in a few minutes",
    ),
    "inspect": Command(
        "partlens.verbs.inspection:inspect",
        "tell what a network knows each category by: its parts, texture, or something beside the object",
        "partlens.verbs.printed:print_verdicts",
        {"config": "partlens.object_parts.inspection:InspectConfig", "compute": _COMPUTE},
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
        {"config": "partlens.explainer.config:ExplainerConfig", "compute": _COMPUTE},
    ),
    "evaluate": Command(
        "partlens.verbs.evaluate:evaluate",
        "measure a finished run on photos that were not used in the fit",
        "partlens.verbs.printed:print_scores",
        {"occlusion": "partlens.attribution.record:OcclusionConfig", "compute": _DEVICE},
    ),
    "parts": Command(
        "partlens.verbs.parts:parts",
        "find the part of every filter of an explainer, what each part adds, and pictures to name it by",
        "partlens.verbs.printed:print_parts",
        {"config": "partlens.object_parts.record:PartsConfig", "compute": _DEVICE},
    ),
    "select-features": Command(
        "partlens.verbs.select_features:select_features",
        "find the few filters that indicate each class, and what they respond to",
        "partlens.verbs.printed:print_path",
        {"descriptor": "partlens.selection.record:DescriptorConfig", "compute": _COMPUTE},
    ),
    "explain": Command(
        "partlens.verbs.explain:explain",
        "show for images what each part adds, which relevant filters decided, and where each of them acted",
        "partlens.verbs.printed:print_path",
        {"config": "partlens.attribution.record:ExplanationConfig", "compute": _DEVICE},
    ),
    "report": Command("partlens.verbs.runs:report", "write the page of a run"),
}


def _found(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def _pieces(text: str) -> list[str]:
    """Split an annotation at the bars outside brackets."""
    rest, found = ast.parse(text, mode="eval").body, list[str]()
    while isinstance(rest, ast.BinOp):
        found.append(ast.unparse(rest.right))
        rest = rest.left
    return [ast.unparse(rest), *found[::-1]]


def _kind(annotation: str, module: Mapping[str, Any]) -> tuple[Any, bool]:
    """Keep of an annotation what can be typed in a shell, and tell whether several values are taken.

    Annotations are read as text: to resolve them all would import the tensor library before it is needed.
    """
    kinds: list[Any] = []
    several = False
    for piece in _pieces(annotation):
        if piece in _WORDS:
            kinds.append(_WORDS[piece])
        elif piece.startswith(_LISTS):
            several = True
        elif get_origin(known := module.get(piece)) is Literal:
            kinds.append(known)
        elif piece.startswith("Mapping["):
            kinds.append(dict[str, Any])
    return str if several or not kinds else functools.reduce(operator.or_, kinds), several


def _described(documented: Any) -> dict[str, str]:
    """Return what a docstring says of each argument or attribute, as plain text for the help."""
    from docstring_parser import DocstringStyle, parse

    texts = {p.arg_name: p.description or "" for p in parse(documented.__doc__ or "", DocstringStyle.GOOGLE).params}
    plain = {name: re.sub(r":\w+:`~?([\w.]*\.)?(\w+)`", r"\2", text) for name, text in texts.items()}
    return {name: " ".join(text.replace("``", "").split()) for name, text in plain.items()}


def _group(settings: type) -> str:
    return settings.__name__.removesuffix("Config").lower()


def _prefix(settings: type) -> str:
    return "" if getattr(settings, "FLAT", False) else f"{_group(settings)}."


def _defaults(settings: Any, name: str) -> str:
    """Say the range of a field and its default, by preset where these differ."""
    presets = getattr(settings, "PRESETS", ("",))
    values = {preset: getattr(settings.preset(preset) if preset else settings(), name) for preset in presets}
    first = next(iter(values.values()))
    others = [f"{preset}: {value}" for preset, value in values.items() if value != first]
    known = settings.model_json_schema()["properties"][name]
    bounds = [f"{words} {known[sign]:g}; " for sign, words in _BOUNDS.items() if sign in known]
    return f" ({''.join(bounds)}default: {'; '.join([str(first), *others])})"


def _add_settings(parser: Any, settings: Any, *, typed: bool) -> None:
    """Add an option per field, of its type or of any; a field that is not given stays the verb's choice."""
    group = parser.add_argument_group(f"{_group(settings)} options")
    # A field that is inherited is described where it is declared.
    texts = {name: text for kind in reversed(settings.__mro__) for name, text in _described(kind).items()}
    for name in settings.model_fields:
        kind, text = get_type_hints(settings)[name] if typed else Any, texts[name] + _defaults(settings, name)
        group.add_argument(f"--{_prefix(settings)}{name}", type=kind, default=argparse.SUPPRESS, help=text)


def _changed(settings: Any, options: Any) -> dict[str, Any]:
    """Return the fields that were given."""
    group = options if not _prefix(settings) else vars(options).get(_group(settings), argparse.Namespace())
    return {name: value for name, value in vars(group).items() if name in settings.model_fields}


def _add_parameter(parser: Any, parameter: inspect.Parameter, module: Mapping[str, Any], text: str) -> None:
    kind, several = _kind(str(parameter.annotation), module)
    required = parameter.default is inspect.Parameter.empty
    default = list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
    options: dict[str, Any] = {"help": text} | ({} if required else {"default": default})
    if not _is_option(parameter):
        many = {(True, True): "+", (True, False): "*", (False, False): "?"}.get((several, required))
        parser.add_argument(parameter.name, type=kind, nargs=many, **options)
        return
    option = f"--{parameter.name.replace('_', '-')}"
    if kind is bool and parameter.default is False:
        parser.add_argument(option, action="store_true", help=text)
    else:
        parser.add_argument(option, type=kind, required=required, nargs="+" if several else None, **options)


class _Plan(NamedTuple):
    parser: Any
    function: Callable[..., Any]
    parameters: Mapping[str, inspect.Parameter]
    settings: Mapping[str, Any]


def _is_option(parameter: inspect.Parameter) -> bool:
    return parameter.kind is inspect.Parameter.KEYWORD_ONLY


def _plan(program: str, name: str, command: Command, *, typed: bool = True) -> _Plan:
    """Build the parser of a verb from its signature and docstring; it raises its errors where fields are typed."""
    from jsonargparse import ArgumentParser

    function = _found(command.function)
    signature = inspect.signature(function).parameters
    # A function cannot be typed in a shell.
    parameters = {n: p for n, p in signature.items() if not str(p.annotation).startswith("PlaceSource")}
    shown = [p for p in parameters.values() if p.name != "progress" and p.name not in command.settings]
    required = sorted((p for p in shown if p.default is p.empty), key=_is_option)
    words = [f"--{p.name} {p.name.upper()}" if _is_option(p) else p.name.upper() for p in required]
    usage = " ".join([program, name, *words, "[options]"])
    about: dict[str, Any] = {"usage": usage, "description": command.summary, "print_config": None}
    parser = ArgumentParser(prog=f"{program} {name}", exit_on_error=not typed, **about)
    texts = _described(function)
    parser.add_argument("--config", action="config", help="YAML file with any of the options")
    for parameter in shown:
        _add_parameter(parser, parameter, vars(sys.modules[function.__module__]), texts.get(parameter.name, ""))
    if command.show is not None:
        parser.add_argument("--json", action="store_true", help="print the result as JSON")
    settings = {parameter: _found(target) for parameter, target in command.settings.items()}
    for kind in settings.values():
        _add_settings(parser, kind, typed=typed)
    return _Plan(parser, function, parameters, settings)


def _refuse_short(plan: _Plan, arguments: Sequence[str]) -> None:
    """Tell the whole name of an option that is given without its group."""
    whole = {name: f"--{_prefix(kind)}{name}" for kind in plan.settings.values() for name in kind.model_fields}
    for option in (each.partition("=")[0] for each in arguments if each.startswith("--")):
        field = option[2:].replace("-", "_")
        if whole.get(field, option) != option:
            plan.parser.error(f"unknown option {option}; did you mean {whole[field]}?")


def _call(program: str, name: str, command: Command, arguments: Sequence[str]) -> None:
    """Parse the options, call the verb, print its result."""
    plan = _plan(program, name, command)
    try:
        options = plan.parser.parse_args(list(arguments))
    except argparse.ArgumentError:
        plan = _plan(program, name, command, typed=False)  # of a wrong value the settings say it more plainly
        _refuse_short(plan, arguments)
        options = plan.parser.parse_args(list(arguments))
    given = {n: getattr(options, n) for n in plan.parameters if n != "progress" and n not in plan.settings}
    given |= {parameter: _changed(settings, options) for parameter, settings in plan.settings.items()}
    if "progress" in plan.parameters:
        from partlens.progress import Progress

        given["progress"] = Progress.terminal()
    result = plan.function(**given)
    if os.environ.get("RANK", "0") != "0":
        return  # of several processes that torchrun started the first one speaks
    if command.show is None:
        sys.stdout.write(f"{result}\n")
    elif options.json:
        _print_json(result)
    else:
        _found(command.show)(result)


def _print_json(result: Any) -> None:
    from partlens.records import plain

    # Escapes of JSON where a console lacks a sign: names stay what they are.
    escaped = not (sys.stdout.encoding or "").lower().startswith("utf")
    sys.stdout.write(json.dumps(plain(result), indent=2, ensure_ascii=escaped, allow_nan=False) + "\n")


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


def _plainer(error: UnicodeError) -> tuple[str, int]:
    """Replace a sign that a console lacks by its like in ASCII, else by its escape."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    signs = error.object[error.start : error.end].translate(_PLAINER)
    return signs.encode("ascii", "backslashreplace").decode("ascii"), error.end


def _print_on_any_console() -> None:
    """Let no sign that the console's encoding lacks end a command whose work is done."""
    codecs.register_error("partlens.plainer", _plainer)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="partlens.plainer")


def run(program: str, about: str, commands: Mapping[str, Command], given: Sequence[str]) -> int:
    """Run the command that arguments name and return the exit code; ``about`` is a sentence for the overview."""
    _print_on_any_console()
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
    return _code_of(program, lambda: _call(program, name, commands[name], rest), debug=debug)


def _code_of(program: str, work: Callable[[], None], *, debug: bool) -> int:
    """Do the work; say in one line what ends it, and return the exit code."""
    try:
        work()
    except KeyboardInterrupt:
        sys.stderr.write(f"{program}: stopped; what is done is kept, run the same command again to go on\n")
        return 130
    except BrokenPipeError:
        # The reader of our output (head, less) has gone; that is its choice, not an error.
        sys.stderr.close()
    except (PartlensError, MemoryError, OSError, RuntimeError) as error:
        said = " ".join(str(error).split()) if isinstance(error, PartlensError) else _said_by_the_machine(error)
        if debug or said is None:
            raise
        sys.stderr.write(f"{program}: {said}\n")
        return 1
    return 0


def _said_by_the_machine(error: MemoryError | OSError | RuntimeError) -> str | None:
    """Put into a sentence what the operating system refuses; ``None`` for errors that are a program's own."""
    if isinstance(error, OSError):
        where = f" with {error.filename}" if error.filename else ""
        remedy = "What is done is kept; put this right and run the same command again"
        return failed(f"go on{where}", error, remedy)
    if isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)):
        remedy = "Close other programs, or take fewer photos, smaller batches or a smaller network"
        return failed("go on", "not enough memory", remedy)
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; by default those of the process.

    Returns:
        The exit code.
    """
    about = "Open a trained vision network: which object parts a layer encodes, and how much they explain."
    return run("partlens", about, COMMANDS, sys.argv[1:] if arguments is None else arguments)


def program() -> None:
    """Run the command line and leave the process with its exit code."""
    raise SystemExit(main())
