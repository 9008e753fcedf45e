"""Count the measures of the product's size and shape: ``python tests/architecture/measures.py [FOLDER]``."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

ROOT = Path(__file__).parents[2]
PRODUCT = ROOT / "src" / "partlens"
TEMPLATES = {".html", ".jinja", ".j2", ".css", ".js"}
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_BRANCHES = (ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.Assert, ast.match_case)
_RECORDS = {"NamedTuple", "Value", "Settings", "Record", "BaseModel", "TypedDict"}


@dataclass(frozen=True)
class Measures:
    """What is counted over one package; each field's text is its row's name."""

    lines: int  # all text lines, templates included
    files: int  # Python files
    functions: int
    long_functions: int  # signature and body, docstring apart, over 40 lines
    complex_functions: int  # cyclomatic complexity over 10
    mean_complexity: float
    record_classes: int  # dataclasses, pydantic models, named tuples
    record_fields: int
    many_parameters: int  # functions with 8 parameters or more
    public_names: int  # functions and classes of modules without a leading underscore
    inner_imports: int  # import statements inside functions
    import_cycles: int  # groups of modules that import one another, imports for the type checker apart
    tests_per_line: float  # lines of tests per line, templates included
    comment_share: float  # lines that are a comment, of all Python lines


def complexity(function: ast.AST) -> int:
    """McCabe's number of one function, nested functions apart: branches, loops, handlers, ``and``/``or``, ``if`` in
    comprehensions, each comprehension.
    """
    total = 1
    for node in _inside(function):
        if isinstance(node, _BRANCHES):
            total += 1
        elif isinstance(node, ast.BoolOp):
            total += len(node.values) - 1
        elif isinstance(node, ast.comprehension):
            total += 1 + len(node.ifs)
    return total


def _inside(function: ast.AST) -> Iterator[ast.AST]:
    """Every node of a function except those of functions and classes inside it."""
    for child in ast.iter_child_nodes(function):
        if not isinstance(child, (*_FUNCTIONS, ast.ClassDef)):
            yield child
            yield from _inside(child)


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function, decorators and docstring apart."""
    first = function.body[0]
    docstring = 0 if ast.get_docstring(function, clean=False) is None else (first.end_lineno or 0) - first.lineno + 1
    return (function.end_lineno or 0) - function.lineno + 1 - docstring


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Parameters, ``self`` and ``cls`` apart."""
    given = function.args
    names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return len(names) - (names[:1] in (["self"], ["cls"])) + (given.vararg is not None) + (given.kwarg is not None)


def _last(node: ast.expr) -> str:
    """The last word of a dotted name, of a call or a subscript too."""
    while isinstance(node, (ast.Call, ast.Subscript)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def record_fields(trees: list[ast.Module]) -> list[int]:
    """The number of fields that each record class names itself; classes that inherit from a record are records."""
    classes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    known = set(_RECORDS)
    while True:
        more = {c.name for c in classes if any(_last(b) in known for b in c.bases)} - known
        if not more:
            break
        known |= more
    found = []
    for node in classes:
        if not (node.name in known or any(_last(d) == "dataclass" for d in node.decorator_list)):
            continue
        own = [s for s in node.body if isinstance(s, ast.AnnAssign) and _last(s.annotation) != "ClassVar"]
        found.append(len(own))
    return found


def public_names(tree: ast.Module) -> int:
    """Functions and classes that a module offers to others."""
    return sum(isinstance(n, (*_FUNCTIONS, ast.ClassDef)) and not n.name.startswith("_") for n in tree.body)


def _is_import(node: ast.AST) -> bool:
    return isinstance(node, (ast.Import, ast.ImportFrom))


def _imports(node: ast.AST) -> set[str]:
    """Names of modules, and of what may be modules, that a module imports, those for the type checker apart."""
    found: set[str] = set()
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            found |= {alias.name for alias in child.names}
        elif isinstance(child, ast.ImportFrom) and child.module:
            found |= {f"{child.module}.{alias.name}" for alias in child.names} | {child.module}
        elif not (isinstance(child, ast.If) and _last(child.test) == "TYPE_CHECKING"):
            found |= _imports(child)
    return found


def cycles(graph: dict[str, set[str]]) -> int:
    """Groups of two or more modules of which each reaches every other."""
    reach = {name: _reached(name, graph) for name in graph}
    groups = {frozenset(b for b in reach[a] if a in reach[b]) for a in graph if a in reach[a]}
    return sum(len(group) > 1 for group in groups)


def _reached(start: str, graph: dict[str, set[str]]) -> set[str]:
    found: set[str] = set()
    waiting = [start]
    while waiting:
        for name in graph[waiting.pop()] - found:
            found.add(name)
            waiting.append(name)
    return found


def _comment_lines(text: str) -> int:
    return sum(line.lstrip().startswith("#") for line in text.splitlines())


def measure(package: Path) -> Measures:
    """Count everything over one package; its tests are in the folder ``tests`` beside ``src``."""
    paths = sorted(package.rglob("*.py"))
    texts = {p: p.read_text(encoding="utf-8") for p in paths}
    trees = {p: ast.parse(text) for p, text in texts.items()}
    functions = [n for tree in trees.values() for n in ast.walk(tree) if isinstance(n, _FUNCTIONS)]
    complexities = [complexity(f) for f in functions]
    records = record_fields(list(trees.values()))
    names = {p: ".".join(p.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__") for p in paths}
    graph = {names[p]: (_imports(tree) & set(names.values())) - {names[p]} for p, tree in trees.items()}
    lines = lines_of(paths) + lines_of([p for p in package.rglob("*") if p.suffix in TEMPLATES])
    tests = lines_of(list((package.parents[1] / "tests").rglob("*.py")))
    return Measures(
        lines=lines,
        files=len(paths),
        functions=len(functions),
        long_functions=sum(code_lines(f) > 40 for f in functions),
        complex_functions=sum(c > 10 for c in complexities),
        mean_complexity=sum(complexities) / len(complexities),
        record_classes=len(records),
        record_fields=sum(records),
        many_parameters=sum(parameters(f) >= 8 for f in functions),
        public_names=sum(public_names(tree) for tree in trees.values()),
        inner_imports=sum(_is_import(n) for f in _outer(functions) for n in ast.walk(f)),
        import_cycles=cycles(graph),
        tests_per_line=tests / lines,
        comment_share=sum(map(_comment_lines, texts.values())) / lines_of(paths),
    )


def _outer(functions: list[ast.FunctionDef | ast.AsyncFunctionDef]) -> list[ast.AST]:
    """Functions that are in no other function, so that nothing is counted twice."""
    inner = {id(n) for f in functions for n in ast.walk(f) if n is not f and isinstance(n, _FUNCTIONS)}
    return [f for f in functions if id(f) not in inner]


def lines_of(paths: list[Path]) -> int:
    """Lines of text files."""
    return sum(len(p.read_text(encoding="utf-8").splitlines()) for p in paths)


def main(folder: Path) -> None:
    """Print the table."""
    found = measure(folder)
    for field in fields(found):
        value = getattr(found, field.name)
        shown = f"{value:,}" if isinstance(value, int) else f"{value:.3f}"
        sys.stdout.write(f"{field.name.replace('_', ' '):20} {shown:>8}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else PRODUCT)
