"""The rules of the house over source files: each takes sources and gives a line a violation, ``path:line what``."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef


@dataclass(frozen=True)
class Source:
    """One parsed Python file; ``path`` is relative to the repository and uses forward slashes."""

    path: str
    text: str
    tree: ast.Module

    @classmethod
    def parse(cls, path: str, text: str) -> Source:
        """Parse the text of a file."""
        return cls(path, text, ast.parse(text, filename=path))

    @property
    def module(self) -> str:
        """The dotted name: ``ops.eager`` for ``ops/eager/__init__.py``."""
        return self.path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")

    @property
    def package(self) -> str:
        """The package that relative imports start from."""
        return self.module if self.path.endswith("__init__.py") else self.module.rpartition(".")[0]


def read_sources(root: Path, folders: Iterable[str]) -> list[Source]:
    """Every Python file under the folders of ``root`` that exist, sorted by path."""
    files = sorted(file for folder in folders for file in (root / folder).rglob("*.py"))
    return [Source.parse(file.relative_to(root).as_posix(), file.read_text(encoding="utf-8")) for file in files]


def long_files(sources: Sequence[Source], limit: int) -> list[str]:
    """Files of more than ``limit`` lines."""
    sizes = [(source.path, len(source.text.splitlines())) for source in sources]
    return [f"{path}: {size} lines, {limit} allowed" for path, size in sizes if size > limit]


def long_functions(sources: Sequence[Source], limit: int) -> list[str]:
    """Functions of more than ``limit`` lines, from ``def`` (decorators apart) to the last line."""
    found = []
    for source in sources:
        for node in ast.walk(source.tree):
            if isinstance(node, Function):
                size = (node.end_lineno or node.lineno) - node.lineno + 1
                if size > limit:
                    found.append(f"{source.path}:{node.lineno} {node.name}: {size} lines, {limit} allowed")
    return found


def public_definitions(body: Sequence[ast.stmt], owner: str = "") -> Iterator[tuple[str, Definition]]:
    """Classes, functions and methods reachable without a leading underscore; dunder methods included."""
    for node in body:
        if isinstance(node, Definition) and (not node.name.startswith("_") or is_dunder(node.name)):
            name = f"{owner}{node.name}"
            yield name, node
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node.body, f"{name}.")
        elif isinstance(node, ast.If | ast.Try):
            yield from public_definitions(
                [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)], owner
            )


def is_dunder(name: str) -> bool:
    """Whether Python, not us, gave the method its name and meaning."""
    return name.startswith("__") and name.endswith("__")


def needs_no_docstring(node: Definition) -> bool:
    """Dunder methods, overrides, overloads and setters: what they do is said elsewhere."""
    decorators = {ast.unparse(decorator).rpartition(".")[2] for decorator in node.decorator_list}
    return is_dunder(node.name) or bool(decorators & {"override", "overload", "setter", "deleter"})


def undocumented(sources: Sequence[Source]) -> list[str]:
    """Modules, public classes, functions and methods without a docstring."""
    found = [f"{source.path}: no module docstring" for source in sources if not ast.get_docstring(source.tree)]
    for source in sources:
        for name, node in public_definitions(source.tree.body):
            if not needs_no_docstring(node) and not ast.get_docstring(node):
                found.append(f"{source.path}:{node.lineno} {name}: no docstring")
    return found


def unannotated(sources: Sequence[Source]) -> list[str]:
    """Public functions and methods with an argument or a result that has no type."""
    found = []
    for source in sources:
        for name, node in public_definitions(source.tree.body):
            if not isinstance(node, Function):
                continue
            names = [argument.arg for argument in arguments_of(node, method="." in name) if argument.annotation is None]
            if node.returns is None:
                names.append("the result")
            if names:
                found.append(f"{source.path}:{node.lineno} {name}: no type for {', '.join(names)}")
    return found


def arguments_of(node: Function, method: bool) -> list[ast.arg]:
    """All the arguments that need a type: without ``self`` or ``cls``."""
    given = node.args
    positional = [*given.posonlyargs, *given.args]
    static = any(ast.unparse(decorator) == "staticmethod" for decorator in node.decorator_list)
    if method and not static:
        positional = positional[1:]
    return [*positional, *given.kwonlyargs, *[extra for extra in (given.vararg, given.kwarg) if extra is not None]]


def swallowed_exceptions(sources: Sequence[Source]) -> list[str]:
    """Handlers of everything (bare, Exception, BaseException) that do nothing with it."""
    found = []
    for source in sources:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.ExceptHandler) and catches_all(node) and all(map(does_nothing, node.body)):
                found.append(f"{source.path}:{node.lineno} an exception is swallowed")
            if isinstance(node, ast.With) and any(suppresses_all(item.context_expr) for item in node.items):
                found.append(f"{source.path}:{node.lineno} an exception is suppressed")
    return found


def catches_all(handler: ast.ExceptHandler) -> bool:
    """Whether the handler takes every exception."""
    caught = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(kind is None or ast.unparse(kind) in ("Exception", "BaseException") for kind in caught)


def does_nothing(statement: ast.stmt) -> bool:
    """``pass``, ``continue``, ``...`` and a string alone."""
    constant = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return constant or isinstance(statement, ast.Pass | ast.Continue)


def suppresses_all(expression: ast.expr) -> bool:
    """``contextlib.suppress(Exception)`` and the like."""
    if not isinstance(expression, ast.Call) or ast.unparse(expression.func).rpartition(".")[2] != "suppress":
        return False
    return any(ast.unparse(argument) in ("Exception", "BaseException") for argument in expression.args)


def unfinished_marks(sources: Sequence[Source]) -> list[str]:
    """Notes that say the work is not done."""
    marks = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X", "HA" + "CK")) + r")\b")
    return [
        f"{source.path}:{number} {line.strip()[:80]}"
        for source in sources
        for number, line in enumerate(source.text.splitlines(), start=1)
        if marks.search(line)
    ]


def imports_at_start(source: Source, known: set[str]) -> set[str]:
    """The known modules that importing this one imports by name; imports inside functions do not count."""
    found: set[str] = set()
    pending: list[ast.AST] = list(source.tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = absolute_base(source, node)
            found.update(f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
        elif not isinstance(node, Function):
            pending += ast.iter_child_nodes(node)
    return (found & known) - {source.module}


def absolute_base(source: Source, node: ast.ImportFrom) -> str:
    """The module that a ``from`` import names, relative dots resolved."""
    if not node.level:
        return node.module or ""
    parts = source.package.split(".")
    parts = parts[: len(parts) - node.level + 1]
    return ".".join([*parts, *([node.module] if node.module else [])])


def import_cycle(sources: Sequence[Source]) -> str | None:
    """One cycle of imports as ``a -> b -> a``, or None."""
    known = {source.module for source in sources}
    graph = {source.module: imports_at_start(source, known) for source in sources}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return " -> ".join(reversed(error.args[1]))
    return None
