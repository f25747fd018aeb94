"""Docstrings of the standard library's compiled modules, as JSON on standard output.

`python_docs` runs this file in an interpreter of its own: a debugger, a test runner or a
library may have replaced functions of `sys` and `builtins` in this one, and the corpus
must not depend on that. It therefore imports the standard library alone.
"""

import importlib
import importlib.machinery
import importlib.util
import inspect
import json
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType


def main() -> None:
    """Prints {module: [[dotted name, docstring], ...]} for the candidates in argv[1:]."""
    warnings.simplefilter("ignore")  # deprecated modules are documentation too
    found = {name: list(_sections(name)) for name in sys.argv[1:] if _is_compiled(name)}
    print(json.dumps({name: sections for name, sections in found.items() if sections}))


def _is_compiled(name: str) -> bool:
    if name in sys.builtin_module_names:
        return True
    spec = importlib.util.find_spec(name)
    return spec is not None and isinstance(spec.loader, importlib.machinery.ExtensionFileLoader)


def _sections(name: str) -> Iterator[tuple[str, str]]:
    try:
        module = importlib.import_module(name)
    except ImportError:  # its shared library is not installed: it has no documentation here
        return
    if text := inspect.getdoc(module):
        yield name, text
    yield from _members(name, module)


def _members(prefix: str, owner: object) -> Iterator[tuple[str, str]]:
    for name, value in sorted(vars(owner).items()):
        if name.startswith("_"):
            continue
        if isinstance(owner, ModuleType):
            # What a module imports from another is documented there.
            if getattr(value, "__module__", None) != owner.__name__:
                continue
            if not (inspect.isclass(value) or inspect.isroutine(value)):
                continue
        elif not (inspect.isroutine(value) or inspect.isdatadescriptor(value)):
            continue
        # The object's own docstring: inspect.getdoc would repeat the base class's in each subclass.
        text = getattr(value, "__doc__", None)
        if isinstance(text, str) and text:
            yield f"{prefix}.{name}", inspect.cleandoc(text)
        if inspect.isclass(value):
            yield from _members(f"{prefix}.{name}", value)


if __name__ == "__main__":
    main()
