"""The nine classification tasks, their labels spelt by words of the prompts."""

from collections.abc import Callable

from mlp_memory.evaluation.harness.examples import Example, Task, Unusable, text_of
from mlp_memory.evaluation.harness.prompts import LABELLED
from mlp_memory.evaluation.harness.rows import Row

_SST_CLASSES = {"__label__1": 0, "__label__2": 0, "__label__4": 1, "__label__5": 1}
_MEASURES = "accuracy: the label whose word is the likeliest is the right one"


def _labelled(name: str, row: Row, label: int, **fields: str) -> Example:
    prompt = LABELLED[name]
    context = prompt.context.format(**fields)
    return Example(row.where, context, prompt.words, (label,), premise=prompt.premise)


def _label(row: Row, name: str, labels: tuple[str, ...]) -> int:
    """The place of the row's label among the known ones."""
    if name not in row.fields:
        raise Unusable(f"missing field {name!r}")
    value = str(row.fields[name]).strip()
    if value not in labels:
        raise Unusable(f"label outside the set: {value[:40]!r}")
    return labels.index(value)


def _sst2(row: Row) -> Example:
    label = text_of(row, "label")
    if label == "__label__3":
        raise Unusable("class 3 of 5, which SST-2 leaves out", by_definition=True)
    if label not in _SST_CLASSES:
        raise Unusable(f"label outside the set: {label[:40]!r}")
    return _labelled("sst2", row, _SST_CLASSES[label], text=text_of(row, "text"))


def _text_and_number(name: str) -> Callable[[Row], Example]:
    def make(row: Row) -> Example:
        return _labelled(name, row, _label(row, "label", ("0", "1")), text=text_of(row, "text"))

    return make


def _rt(row: Row) -> Example:
    label = _label(row, "output", ("negative", "positive"))
    return _labelled("rt", row, label, text=text_of(row, "input"))


def _pair(name: str, labels: tuple[str, ...]) -> Callable[[Row], Example]:
    def make(row: Row) -> Example:
        texts = {field: text_of(row, field) for field in ("premise", "hypothesis")}
        return _labelled(name, row, _label(row, "label", labels), **texts)

    return make


def _agnews(row: Row) -> Example:
    label = _label(row, "Class Index", ("1", "2", "3", "4"))
    texts = {"title": text_of(row, "Title"), "description": text_of(row, "Description")}
    return _labelled("agnews", row, label, **texts)


def _yahoo(row: Row) -> Example:
    """The ten classes from 1 in the table as published, from 0 under "topic" in JSON."""
    counted = ("topic", tuple(map(str, range(10)))) if "topic" in row.fields else None
    label = _label(row, *(counted or ("class", tuple(map(str, range(1, 11))))))
    texts = {"title": text_of(row, "question_title")}
    # Questions without a body, or without an answer, are whole examples of this set.
    for field, name in (("content", "question_content"), ("answer", "best_answer")):
        value = row.fields.get(name, "")
        if not isinstance(value, str):
            raise Unusable(f"field {name!r} is not text")
        texts[field] = value.strip()
    return _labelled("yahoo", row, label, **texts)


TASKS = (
    Task(
        "sst2",
        "SST-2",
        _MEASURES,
        _sst2,
        test=("sst2/test.tsv",),
        validation=("sst2/dev.tsv",),
        columns=("label", "text"),
    ),
    Task(
        "mr",
        "MR",
        _MEASURES,
        _text_and_number("mr"),
        test=("mr/test.csv",),
        validation=("mr/train.csv",),
        columns=("label", "text"),
    ),
    Task(
        "cr",
        "CR",
        _MEASURES,
        _text_and_number("cr"),
        test=("cr/test.csv",),
        validation=("cr/train.csv",),
        columns=("label", "text"),
    ),
    Task("rt", "RT", _MEASURES, _rt, test=("rt/test.jsonl",), validation=("rt/train.jsonl",)),
    Task(
        "hyp",
        "HYP",
        _MEASURES,
        _text_and_number("hyp"),
        test=("hyp/test.csv", "hyp/dev.csv"),
        validation=("hyp/train.csv",),
    ),
    Task(
        "cb",
        "CB",
        _MEASURES,
        _pair("cb", ("entailment", "contradiction", "neutral")),
        test=("cb/dev.jsonl",),
        validation=("cb/train.jsonl",),
    ),
    Task(
        "rte",
        "RTE",
        _MEASURES,
        _pair("rte", ("entailment", "not_entailment")),
        test=("rte/val.jsonl", "rte/dev.jsonl"),
        validation=("rte/train.jsonl",),
    ),
    Task(
        "agnews",
        "AG News",
        _MEASURES,
        _agnews,
        test=("agnews/test.csv",),
        validation=("agnews/train.csv",),
    ),
    Task(
        "yahoo",
        "Yahoo",
        _MEASURES,
        _yahoo,
        test=("yahoo/test.csv", "yahoo/test.jsonl"),
        validation=("yahoo/train.csv", "yahoo/train.jsonl"),
        columns=("class", "question_title", "question_content", "best_answer"),
    ),
)
