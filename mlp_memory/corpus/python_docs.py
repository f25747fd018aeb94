"""The documentation inside every CPython, one document per topic and per module.

Topics of `help()` come from `pydoc_data.topics`. Pure Python modules are parsed, never
imported, so that no import has side effects; modules compiled into the interpreter or
shipped as extensions have no source; `compiled_docs` imports them in a fresh interpreter.
"""

import ast
import functools
import json
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from mlp_memory.artifacts import UserError
from mlp_memory.corpus import compiled_docs

# Tests, demos, jokes; modules that print, open a browser or set up the terminal when imported;
# topics are read from pydoc_data directly.
_SKIPPED = frozenset(
    ("test", "tests", "idlelib", "lib2to3", "turtledemo", "pydoc_data", "antigravity", "this", "readline")
)


@functools.cache
def documents() -> tuple[str, ...]:
    """Every document: topics by name, then modules by dotted name.

    The texts depend on the version and build of Python alone.

    Raises:
      UserError: this Python lacks its topics or cannot start another.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UserError(
            f"{sys.executable} has no pydoc_data.topics: use another Python, or source 'jsonl' or 'text'"
        ) from error
    sections = [_printable(topics[name]) for name in sorted(topics)]
    modules = _compiled_modules()
    modules.update((name, list(_from_source(name, path))) for name, path in _source_modules())
    for name in sorted(modules):
        if parts := modules[name]:
            sections.append(_printable("\n\n\n".join(f"{title}\n\n{text}" for title, text in parts) + "\n"))
    return tuple(sections)


def _is_public(name: str) -> bool:
    return not name.startswith("_") and not name.startswith("xx") and name not in _SKIPPED


def _source_modules() -> Iterator[tuple[str, Path]]:
    """Dotted name and file of each public standard library module written in Python."""
    root = Path(sysconfig.get_path("stdlib"))
    for top in sorted(filter(_is_public, sys.stdlib_module_names)):
        if (root / f"{top}.py").is_file():
            yield top, root / f"{top}.py"
        for path in sorted((root / top).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            if parts[-1] == "__init__":
                parts = parts[:-1]
            if all(map(_is_public, parts)):
                yield ".".join(parts), path


def _compiled_modules() -> dict[str, list[tuple[str, str]]]:
    """Headings and docstrings of each public module that is built in or an extension file."""
    names = sorted(filter(_is_public, sys.stdlib_module_names))
    command = [sys.executable, "-I", "-S", compiled_docs.__file__, *names]
    try:
        output = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        why = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
        raise UserError(
            f"{sys.executable or 'this Python'} cannot list its documentation ({why}): "
            "use another Python, or source 'jsonl' or 'text'"
        ) from error
    return {name: [tuple(pair) for pair in pairs] for name, pairs in json.loads(output).items()}


def _from_source(name: str, path: Path) -> Iterator[tuple[str, str]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in somebody else's strings
        tree = ast.parse(path.read_bytes())
    if text := ast.get_docstring(tree):
        yield name, text
    yield from _from_body(name, tree.body)


def _from_body(prefix: str, body: list[ast.stmt]) -> Iterator[tuple[str, str]]:
    """Docstrings of the public classes, their methods and the functions of a body."""
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if node.name.startswith("_"):
                continue
            name = f"{prefix}.{node.name}"
            if text := ast.get_docstring(node):
                yield name, text
            if isinstance(node, ast.ClassDef):
                yield from _from_body(name, node.body)
        elif isinstance(node, ast.If | ast.Try | ast.With):  # definitions for one platform or version
            for field in ("body", "orelse", "finalbody"):
                yield from _from_body(prefix, getattr(node, field, []))
            for handler in getattr(node, "handlers", []):
                yield from _from_body(prefix, handler.body)


def _printable(text: str) -> str:
    """Text without lone surrogates, which UTF-8 cannot hold and docstrings may."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
