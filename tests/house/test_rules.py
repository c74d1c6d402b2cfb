"""Each rule finds what it is there to find, and nothing else: small sources, right and wrong."""

from __future__ import annotations

import pytest

from tests.house import rules
from tests.house.rules import Source


def source(text: str, path: str = "ops/a.py") -> Source:
    return Source.parse(path, text)


def lines(count: int) -> str:
    return "x = 1\n" * count


def function(count: int) -> str:
    return "def f():\n" + "    x = 1\n" * (count - 1)


@pytest.mark.parametrize(("size", "found"), [(400, []), (401, ["ops/a.py: 401 lines, 400 allowed"])])
def test_long_files(size, found):
    assert rules.long_files([source(lines(size))], 400) == found


@pytest.mark.parametrize(("size", "found"), [(60, []), (61, ["ops/a.py:1 f: 61 lines, 60 allowed"])])
def test_long_functions(size, found):
    assert rules.long_functions([source(function(size))], 60) == found


def test_long_functions_sees_methods_and_inner_functions():
    text = "class C:\n    def m(self):\n        async def inner():\n" + "            x = 1\n" * 3
    assert len(rules.long_functions([source(text)], 3)) == 2


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("", ["ops/a.py: no module docstring"]),
        ("'''A.'''\ndef f(): pass", ["ops/a.py:2 f: no docstring"]),
        ("'''A.'''\nclass C:\n    '''C.'''\n    def m(self): pass", ["ops/a.py:4 C.m: no docstring"]),
        ("'''A.'''\nif True:\n    def f(): pass", ["ops/a.py:3 f: no docstring"]),
        ("'''A.'''\ndef _f(): pass\nclass _C:\n    def m(self): pass", []),
        ("'''A.'''\nclass C:\n    '''C.'''\n    def __len__(self): return 1", []),
        ("'''A.'''\nclass C:\n    '''C.'''\n    @typing.override\n    def m(self): pass", []),
        ("'''A.'''\nclass C:\n    '''C.'''\n    @m.setter\n    def m(self, v): pass", []),
        ("'''A.'''\ndef f():\n    '''F.'''\n    def inner(): pass", []),
    ],
)
def test_undocumented(text, missing):
    assert rules.undocumented([source(text)]) == missing


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("def f(a, *b, c, **d): pass", ["ops/a.py:1 f: no type for a, c, b, d, the result"]),
        ("def f(a: int) -> None: pass", []),
        ("class C:\n    def __init__(self, a): pass", ["ops/a.py:2 C.__init__: no type for a, the result"]),
        ("class C:\n    @classmethod\n    def m(cls) -> int: return 1", []),
        ("class C:\n    @staticmethod\n    def m(a) -> int: return 1", ["ops/a.py:3 C.m: no type for a"]),
        ("def _f(a): pass", []),
    ],
)
def test_unannotated(text, missing):
    assert rules.unannotated([source(text)]) == missing


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("try:\n    f()\nexcept Exception:\n    pass", 1),
        ("try:\n    f()\nexcept:\n    ...", 1),
        ("for x in y:\n    try:\n        f()\n    except (ValueError, BaseException):\n        continue", 1),
        ("with contextlib.suppress(Exception):\n    f()", 1),
        ("with suppress(KeyError):\n    f()", 0),
        ("try:\n    f()\nexcept KeyError:\n    pass", 0),
        ("try:\n    f()\nexcept Exception as e:\n    raise Wrong() from e", 0),
    ],
)
def test_swallowed_exceptions(text, found):
    assert len(rules.swallowed_exceptions([source(text)])) == found


@pytest.mark.parametrize("word", ["TO" + "DO", "FIX" + "ME", "XX" + "X", "HA" + "CK"])
def test_unfinished_marks(word):
    assert rules.unfinished_marks([source(f"x = 1  # {word}: later")]) == [f"ops/a.py:1 x = 1  # {word}: later"]
    assert rules.unfinished_marks([source(f"x{word.lower()}y = 'M{word}S'")]) == []


def test_import_cycle_is_found_through_relative_imports():
    cycle = rules.import_cycle(
        [source("from .b import f", "p/a.py"), source("from p import c", "p/b.py"), source("import p.a", "p/c.py")]
    )
    assert cycle is not None
    assert set(cycle.split(" -> ")) == {"p.a", "p.b", "p.c"}


def test_import_cycle_with_its_own_package_is_found():
    assert rules.import_cycle([source("from .a import f", "p/__init__.py"), source("from p import g", "p/a.py")])


@pytest.mark.parametrize(
    "text",
    [
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p.b import B",
        "def f():\n    from p.b import B",
        "import json",
    ],
)
def test_imports_that_make_no_cycle(text):
    assert rules.import_cycle([source(text, "p/a.py"), source("from p.a import f", "p/b.py")]) is None


def test_read_sources_gives_module_names(tmp_path):
    (tmp_path / "ops" / "eager").mkdir(parents=True)
    for name in ("ops/__init__.py", "ops/eager/__init__.py", "ops/eager/norm.py"):
        (tmp_path / name).write_text("", encoding="utf-8")
    found = rules.read_sources(tmp_path, ["ops", "benchmarks"])
    assert [one.module for one in found] == ["ops", "ops.eager", "ops.eager.norm"]
    assert [one.package for one in found] == ["ops", "ops.eager", "ops.eager"]
