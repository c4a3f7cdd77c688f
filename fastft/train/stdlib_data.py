"""The default data set: the documented functions of the Python standard library that is running.

An example is a function's source without its docstring, and the docstring. It needs no download,
is real text, and everyone who runs Python may use it. The same Python gives the same examples in
the same order."""

from __future__ import annotations

import ast
import copy
import hashlib
import io
import sysconfig
import textwrap
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fastft.errors import DataError

__all__ = ["PROMPT", "StdlibItem", "messages_of", "split_items", "stdlib_items"]

PROMPT = "Write the docstring of this Python function.\n\n```python\n{source}\n```"

# Not library code (tests, demos, vendored wheels), generated for one machine, or packages that
# newer Pythons dropped or distributions split off: without them the set is alike everywhere.
SKIPPED_FOLDERS = frozenset(
    [
        "test",
        "tests",
        "idle_test",
        "site-packages",
        "dist-packages",
        "__pycache__",
        "turtledemo",
        "_bundled",
        "lib-dynload",
        "idlelib",
        "lib2to3",
        "distutils",
        "pydoc_data",
    ]
)
SKIPPED_PREFIXES = ("config-", "_sysconfigdata", "__phello__")

# "Return self." and its like teach nothing.
MIN_DOCSTRING = 20

# Where each split ends, in parts of a hundred.
SPLIT_ENDS = {"train": 80, "validation": 90, "test": 100}


@dataclass(frozen=True)
class StdlibItem:
    """One documented function: ``module`` is its dotted module, ``name`` its name in it."""

    module: str
    name: str
    source: str
    docstring: str


def split_items(items: list[StdlibItem]) -> dict[str, list[StdlibItem]]:
    """``train``, ``validation`` and ``test``, close to 80/10/10 of the examples. Whole modules are
    dealt out in the order of the hash of their names, so no module is on two sides; within a
    split the order of ``items`` is kept."""
    sizes = Counter(item.module for item in items)
    side: dict[str, str] = {}
    dealt = 0
    for module in sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest()):
        # Judged by its middle, a large module goes where most of it belongs.
        share = 100 * (dealt + sizes[module] / 2) / len(items)
        dealt += sizes[module]
        side[module] = next(name for name, end in SPLIT_ENDS.items() if share <= end)
    splits: dict[str, list[StdlibItem]] = {name: [] for name in SPLIT_ENDS}
    for item in items:
        splits[side[item.module]].append(item)
    return splits


def messages_of(item: StdlibItem) -> list[dict[str, str]]:
    """The example as a conversation."""
    return [
        {"role": "user", "content": PROMPT.format(source=item.source)},
        {"role": "assistant", "content": item.docstring},
    ]


def stdlib_items(root: str | Path | None = None) -> list[StdlibItem]:
    """All examples, in the order of file path and line. Two functions with the same source or the
    same docstring are one example: the first."""
    folder = Path(root or sysconfig.get_paths()["stdlib"])
    items: list[StdlibItem] = []
    sources: set[str] = set()
    docstrings: set[str] = set()
    for path in _files(folder):
        for item in _functions(path, _module_name(path, folder)):
            if item.source in sources or item.docstring in docstrings:
                continue
            sources.add(item.source)
            docstrings.add(item.docstring)
            items.append(item)
    if not items:
        raise DataError(
            "python-stdlib",
            str(folder),
            expected="the sources of the Python standard library",
            got="no documented function",
            remedy="Some distributions ship bytecode only: give a data file with 'data:'.",
        )
    return items


def _files(folder: Path) -> list[Path]:
    def wanted(path: Path) -> bool:
        parts = path.relative_to(folder).parts
        return not any(
            part in SKIPPED_FOLDERS or part.startswith(SKIPPED_PREFIXES) for part in parts
        )

    return sorted(filter(wanted, folder.rglob("*.py")), key=lambda p: p.as_posix())


def _module_name(path: Path, folder: Path) -> str:
    parts = list(path.relative_to(folder).with_suffix("").parts)
    if parts[-1] == "__init__" and len(parts) > 1:
        parts.pop()
    return ".".join(parts)


def _functions(path: Path, module: str) -> Iterator[StdlibItem]:
    try:
        with tokenize.open(path) as file:
            text = file.read()
        tree = ast.parse(text)
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return  # a few files of the library are broken on purpose
    # Only at line feeds, as the parser counts: str.splitlines takes a form feed for an end too.
    lines = io.StringIO(text, newline="").readlines()
    for name, node in _walk(tree, ""):
        docstring = ast.get_docstring(node)
        # A function that is only its docstring has nothing to be read.
        if docstring is None or len(docstring) < MIN_DOCSTRING or len(node.body) < 2:
            continue
        yield StdlibItem(module, name, _without_docstring(node, lines), docstring)


FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


def _walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, FunctionNode]]:
    """Functions in source order, each with its qualified name."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, FunctionNode | ast.ClassDef):
            name = f"{prefix}{child.name}"
            if not isinstance(child, ast.ClassDef):
                yield name, child
            yield from _walk(child, f"{name}.")
        else:
            yield from _walk(child, prefix)


def _without_docstring(node: FunctionNode, lines: list[str]) -> str:
    """The function's own text, comments kept, without the docstring's lines."""
    doc, rest = node.body[0], node.body[1]
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    last, doc_last = node.end_lineno or node.lineno, doc.end_lineno or doc.lineno
    kept = lines[first - 1 : doc.lineno - 1] + lines[doc_last:last]
    source = textwrap.dedent("".join(kept)).strip("\n")
    # `def f(): "doc"; return 1` shares its lines, and a text that starts at column 0 stops the
    # dedent: there the source is written anew from the tree.
    if doc.lineno > node.lineno and rest.lineno > doc_last and source[:1] not in (" ", "\t"):
        return source
    bare = copy.copy(node)
    bare.body = node.body[1:]
    return ast.unparse(bare)
