"""The product stays small: each measure keeps its bound, and bounds that are not yet the wanted ones only improve."""

from __future__ import annotations

import ast
import importlib.util
import sys
import textwrap
from dataclasses import fields
from pathlib import Path

import pytest

_SPEC = importlib.util.spec_from_file_location("measures", Path(__file__).with_name("measures.py"))
measures = importlib.util.module_from_spec(_SPEC)
sys.modules["measures"] = measures
_SPEC.loader.exec_module(measures)

AT_LEAST = {"tests_per_line", "comment_share"}
WANTED = {
    "lines": 23_000,
    "files": 110,
    "long_functions": 12,
    "complex_functions": 40,
    "mean_complexity": 3.3,
    "record_classes": 100,
    "record_fields": 550,
    "many_parameters": 15,
    "public_names": 420,
    "inner_imports": 80,
    "import_cycles": 0,
    "tests_per_line": 0.7,
    "comment_share": 0.03,
}
# What is not as wanted: the number reached, which no change may worsen. The wanted ones are those of the house before
# networks of any layout, inspections and sealed files came into it. Delete a line when its bound is met.
REACHED: dict[str, float] = {
    "lines": 29_618,
    "files": 126,
    "mean_complexity": 3.7532,
    "record_classes": 215,
    "record_fields": 1_113,
    "public_names": 604,
    "comment_share": 0.0091,
}


@pytest.fixture(scope="module")
def found():
    return measures.measure(measures.PRODUCT)


@pytest.mark.parametrize("name", WANTED)
def test_measure_keeps_its_bound(found, name: str) -> None:
    value, bound = getattr(found, name), REACHED.get(name, WANTED[name])
    if name in AT_LEAST:
        assert value >= bound
    else:
        assert value <= bound


def test_every_measure_has_a_bound() -> None:
    assert {f.name for f in fields(measures.Measures)} == {*WANTED, "functions"}


def _function(text: str) -> ast.FunctionDef:
    return ast.parse(textwrap.dedent(text)).body[0]


def test_complexity_counts_branches_of_the_function_alone() -> None:
    f = _function("""
        def f(a, b):
            if a and b or a:                 # 1 + 2
                return [x for x in a if x]   # 2
            for _ in b:                      # 1
                pass
            else:
                while a: pass                # 1
            def inner():
                if a: pass
            try:
                return a if b else 0         # 1
            except KeyError:                 # 1
                return None
        """)
    assert measures.complexity(f) == 10


def test_code_lines_do_not_count_the_docstring() -> None:
    f = _function('''
        def f(
            a,
        ):
            """One.

            Two.
            """
            return a
        ''')
    assert measures.code_lines(f) == 4
    assert measures.parameters(_function("def f(self, a, /, b, *c, d=1, **e): pass")) == 5


def test_records_are_found_through_their_bases() -> None:
    tree = ast.parse(
        textwrap.dedent("""
        class A(Record):
            FILE: ClassVar[str]
            a: int
        class B(A):
            b: int
            c: int = 0
        @dataclass(frozen=True)
        class C:
            d: int
        class D(NamedTuple):
            e: int
        class E:
            f: int
        """)
    )
    assert measures.record_fields([tree]) == [1, 2, 1, 1]


def test_cycles_are_counted_once_each() -> None:
    assert measures.cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": {"f"}, "f": {"e"}}) == 2
    tree = ast.parse("import a\nif TYPE_CHECKING:\n    import b\ndef f():\n    from c import d\n")
    assert measures._imports(tree) == {"a", "c", "c.d"}
