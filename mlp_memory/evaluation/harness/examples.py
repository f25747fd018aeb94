"""Examples of tasks, and what is counted of the rows that give none."""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from mlp_memory.artifacts import UserError, digest
from mlp_memory.corpus.documents import file_sha256
from mlp_memory.evaluation.harness.rows import Row, find, read

_NAMED = 5


@dataclasses.dataclass(frozen=True)
class Example:
    """One question of a task.

    Attributes:
      where: file and line.
      context: text before what is scored or generated.
      choices: continuations of which one is taken, each with the space before it; () where text is generated.
      right: indices of the right ones.
      mc1, mc2: indices of the choices that MC1 and MC2 compare; () where the task is not TruthfulQA's.
      premise: the domain premise, the context that PMI scoring compares with.
      answers: of a generated text the right ones.
      wrong: of a generated text wrong ones, where the task has some.
      shot: a demonstration's text after the context, where the task has demonstrations.
    """

    where: str
    context: str
    choices: tuple[str, ...] = ()
    right: tuple[int, ...] = ()
    mc1: tuple[int, ...] = ()
    mc2: tuple[int, ...] = ()
    premise: str = ""
    answers: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()
    shot: str = ""

    @property
    def key(self) -> str:
        """16 hex digits of what is asked, whatever file it comes from."""
        return digest("\0".join((self.context, *self.choices)).encode())


class Unusable(Exception):
    """Why a row gives no example; `by_definition` where the task leaves such rows out."""

    def __init__(self, reason: str, by_definition: bool = False):
        super().__init__(reason)
        self.by_definition = by_definition


@dataclasses.dataclass
class Counts:
    """Rows read, examples got, and the others by reason, the first of each named."""

    rows: int = 0
    examples: int = 0
    unusable: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    left_out: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    first: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    def note(self, row: Row, reason: str, by_definition: bool) -> None:
        """Counts a row that gave no example."""
        (self.left_out if by_definition else self.unusable)[reason] += 1
        if len(named := self.first.setdefault(reason, [])) < _NAMED:
            named.append(row.where)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        fields = {"unusable": dict(self.unusable), "left_out": dict(self.left_out)}
        return {"rows": self.rows, "examples": self.examples, **fields, "first": self.first}


@dataclasses.dataclass(frozen=True)
class Task:
    """A task of local files.

    Attributes:
      name: in the config.
      title: for people.
      measures: what the figure is, in a sentence.
      make: a row's example; raises `Unusable`.
      test: candidates for the file that is reported on, below the data folder.
      validation: for the file that λ is chosen on; () where both are parts of one file.
      columns: of a table without a head.
      scoring: how a choice is found ("likelihood", ...), or "generate".
      stop: texts that end a generated answer.
      demonstrations: whether `benchmark.shots` examples go before a question.
    """

    name: str
    title: str
    measures: str
    make: Callable[[Row], Example]
    test: tuple[str, ...]
    validation: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    scoring: str = "likelihood"
    stop: tuple[str, ...] = ()
    demonstrations: bool = False

    @property
    def generates(self) -> bool:
        return self.scoring == "generate"


@dataclasses.dataclass
class Parts:
    """Examples that λ is chosen on, and those that are reported.

    Attributes:
      validation, test: of the task.
      shots: demonstrations, in neither.
      split: how they were told apart.
      counts: of each file's rows, by name.
      files: sha256 of each, by name.
    """

    validation: list[Example]
    test: list[Example]
    shots: list[Example]
    split: str
    counts: dict[str, Counts]
    files: dict[str, str]


def load(task: Task, folder: Path, fraction: float, limits: Mapping[str, int], shots: int = 0) -> Parts:
    """A task's examples in two parts.

    Where a task has a file for validation, that is its part; else examples fall to the parts by a hash of
    what they ask, equal ones to the same part. What a limit keeps is drawn by that hash too, so that a larger
    limit keeps the same and more. An example of the validation file that is asked in the test file as well is
    left out of validation.

    Args:
      task: whose.
      folder: of the data.
      fraction: of the validation part.
      limits: most examples of "validation" and "test"; 0 for all.
      shots: demonstrations, taken from the validation part.

    Raises:
      UserError: a file is missing or damaged, or a part is empty.
    """
    test, found = _examples(task, folder, task.test)
    counts, files = {found.name: test[1]}, {found.name: file_sha256(found)}
    examples = test[0]
    own = find(folder, task.validation) if task.validation else None
    if own is not None:
        (validation, counts[own.name]), _ = _examples(task, folder, task.validation)
        files[own.name] = file_sha256(own)
        asked = {example.key for example in examples}
        kept = [example for example in validation if example.key not in asked]
        if len(kept) < len(validation):
            counts[own.name].left_out["asked in the test file too"] = len(validation) - len(kept)
        validation, split = kept, f"validation: {own.name}; test: {found.name}"
    else:
        chosen = {e.key for e in examples if int(e.key, 16) < fraction * 16**16}
        validation = [e for e in examples if e.key in chosen]
        examples = [e for e in examples if e.key not in chosen]
        split = f"{found.name} by a hash of each example, {fraction:g} of it validation"
    validation, examples = (sorted(part, key=lambda e: (e.key, e.where)) for part in (validation, examples))
    demonstrations, validation = validation[:shots], validation[shots:]
    for part, left in (("validation", validation), ("test", examples)):
        if not left:
            why = sum((count.unusable + count.left_out for count in counts.values()), collections.Counter())
            reason = "".join(f"; {n} rows: {reason}" for reason, n in why.most_common(1))
            raise UserError(f"{task.name}: no example for its {part} part in {folder}{reason}: give more")
    cut = {
        part: left[: limits[part] or None] for part, left in (("validation", validation), ("test", examples))
    }
    return Parts(cut["validation"], cut["test"], demonstrations, split, counts, files)


def _examples(task: Task, folder: Path, names: tuple[str, ...]) -> tuple[tuple[list[Example], Counts], Path]:
    path = find(folder, names)
    if path is None:
        raise UserError(
            f"{task.name}: {folder} has no {' or '.join(names)}: set benchmark.data to the folder above"
        )
    return made(task, read(path, task.columns)), path


def made(task: Task, rows: Iterable[Row]) -> tuple[list[Example], Counts]:
    """The examples of rows, and the count of all."""
    examples, counts = [], Counts()
    for row in rows:
        counts.rows += 1
        try:
            if row.fault:
                raise Unusable(f"malformed row: {row.fault}")
            examples.append(task.make(row))
        except Unusable as unusable:
            counts.note(row, str(unusable), unusable.by_definition)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            counts.note(row, f"malformed row: {type(error).__name__}", False)
    counts.examples = len(examples)
    return examples, counts


def text_of(row: Row, *names: str, empty: str = "") -> str:
    """The first of the fields that is there, stripped.

    Raises:
      Unusable: none is, it is no text, or it is empty (`empty` says what to call that).
    """
    name = next((name for name in names if name in row.fields), None)
    if name is None:
        raise Unusable(f"missing field {names[0]!r}")
    value = row.fields[name]
    if not isinstance(value, str):
        raise Unusable(f"field {name!r} is not text")
    if not value.strip():
        raise Unusable(empty or f"empty field {name!r}")
    return value.strip()


def texts_of(row: Row, name: str, value: Any) -> tuple[str, ...]:
    """Answers, one or a list, stripped, each once.

    Raises:
      Unusable: there is none but empty ones.
    """
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        raise Unusable(f"field {name!r} is not text or texts")
    kept = tuple(dict.fromkeys(v.strip() for v in values if v.strip()))
    if not kept:
        raise Unusable("empty answer")
    return kept
