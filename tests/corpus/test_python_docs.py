import ast
import hashlib
import inspect
import math
import subprocess
import sys
import textwrap
from pydoc_data.topics import topics

from mlp_memory.corpus import python_docs


def by_title() -> dict[str, str]:
    return {text.split("\n", 1)[0]: text for text in python_docs.documents()}


def test_every_topic_and_known_modules_are_documents():
    texts = set(python_docs.documents())
    assert set(topics.values()) <= texts
    assert {"json", "builtins", "math", "itertools", "asyncio.events", "xml.dom.minidom"} <= by_title().keys()


def test_public_docstrings_are_in_and_private_ones_are_not():
    documents = by_title()
    assert f"math.gcd\n\n{inspect.getdoc(math.gcd)}" in documents["math"]
    assert f"builtins.str.upper\n\n{inspect.getdoc(str.upper)}" in documents["builtins"]
    import textwrap as module

    assert f"textwrap.TextWrapper.fill\n\n{inspect.getdoc(module.TextWrapper.fill)}" in documents["textwrap"]
    assert inspect.getdoc(module.TextWrapper._wrap_chunks) not in documents["textwrap"]


def test_tests_jokes_and_private_modules_are_left_out():
    for title in by_title():
        parts = title.split(".")
        assert not {"test", "tests", "idlelib", "lib2to3", "turtledemo", "antigravity", "this"} & set(
            parts
        ), title
        assert not parts[0].startswith("_"), title


def test_definitions_under_conditions_are_found_and_nested_functions_are_not():
    source = """
    if True:
        def first():
            "one"
            def inner():
                "no"
    else:
        class Second:
            "two"
            async def method(self):
                "three"
            def _hidden(self):
                "no"
    try:
        import absent
    except ImportError:
        def third(): "four"
    """
    found = list(python_docs._from_body("m", ast.parse(textwrap.dedent(source)).body))
    assert found == [
        ("m.first", "one"),
        ("m.Second", "two"),
        ("m.Second.method", "three"),
        ("m.third", "four"),
    ]


def test_the_size_is_what_the_demo_counts_on():
    documents = python_docs.documents()
    assert len(documents) > 400
    assert 1_500_000 < sum(len(text.encode()) for text in documents) < 3_000_000
    assert all(documents)


def test_another_process_reads_the_same_documents_without_printing():
    code = (
        "import hashlib, sys; from mlp_memory.corpus.python_docs import documents;"
        "sys.stdout.write(hashlib.sha256(repr(documents()).encode()).hexdigest())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == hashlib.sha256(repr(python_docs.documents()).encode()).hexdigest()
    assert result.stderr == ""
