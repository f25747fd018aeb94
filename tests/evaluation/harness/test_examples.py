import itertools
import json

import pytest

from mlp_memory.artifacts import UserError
from mlp_memory.evaluation.harness.examples import Example, Task, Unusable, load, made, text_of
from mlp_memory.evaluation.harness.names import TASKS as NAMES
from mlp_memory.evaluation.harness.rows import Row
from mlp_memory.evaluation.harness.tasks import TASKS

ONE = {"mc1_targets": {"Yes.": 1, "No.": 0}, "mc2_targets": {"Yes.": 1, "Sure.": 1, "Never.": 0}}

# Of each task a row as published, and of its example the end of the context, the choices or answers, and
# the right one.
ROWS = {
    "sst2": ({"label": "__label__2", "text": "Bad ."}, "Bad . It was", (" terrible", " great"), 0),
    "mr": ({"label": "1", "text": "good ."}, "good . It was", (" terrible", " great"), 1),
    "cr": ({"label": "0", "text": "broke ."}, "broke . It was", (" terrible", " great"), 0),
    "rt": ({"input": "fine .", "output": "positive"}, "fine . It was", (" terrible", " great"), 1),
    "hyp": (
        {"": "0", "text": "They lie.", "id": "0", "label": "1"},
        "They lie.\n neutral or partisan? Answer:",
        (" neutral", " partisan"),
        1,
    ),
    "cb": (
        {"premise": "P.", "hypothesis": "h", "label": "neutral", "idx": 0},
        ' question: Given that "P." Is "h" true, false, or neither?\n answer:',
        (" true", " false", " neither"),
        2,
    ),
    "rte": (
        {"premise": "P.", "hypothesis": "H.", "label": "not_entailment"},
        " P.\n question: H. true or false?\n answer:",
        (" true", " false"),
        1,
    ),
    "agnews": (
        {"Class Index": "4", "Title": "T", "Description": "D."},
        "T\n D. topic:",
        (" world", " sports", " business", " science"),
        3,
    ),
    "yahoo": (
        {"class": "10", "question_title": "Q?", "question_content": "", "best_answer": "A"},
        "title: Q? content:  answer: A topic:",
        None,
        9,
    ),
    "halueval_qa": (
        {"knowledge": "K.", "question": "Q?", "right_answer": "r", "hallucinated_answer": "h"},
        "K.\nQuestion: Q?\nAnswer:",
        (" r", " h"),
        0,
    ),
    "halueval_dialogue": (
        {
            "knowledge": "K.",
            "dialogue_history": "[Human]: Hi",
            "right_response": "r",
            "hallucinated_response": "h",
        },
        "K.\n[Human]: Hi [Assistant]:",
        (" r", " h"),
        0,
    ),
    "halueval_summarization": (
        {"document": "D.", "right_summary": "r", "hallucinated_summary": "h"},
        "D.\n\nSummary:",
        (" r", " h"),
        0,
    ),
    "halueval_general": (
        {"ID": "1", "user_query": "Q", "chatgpt_response": "R", "hallucination": "no"},
        "Query: Q\nResponse: R\nJudgement:",
        (" Yes", " No"),
        1,
    ),
    "truthfulqa_mc": (
        {"question": "Is it?", **ONE},
        "\n\nQ: Is it?\nA:",
        (" Yes.", " Sure.", " Never.", " No."),
        0,
    ),
    "factor_news": (
        {
            "": "0",
            "full_prefix": "It was. ",
            "completion": "c",
            **{f"contradiction_{i}": f"x{i}" for i in range(3)},
        },
        "It was.",
        (" c", " x0", " x1", " x2"),
        0,
    ),
    "strategyqa": (
        {"qid": "1", "question": "Is it?", "answer": False},
        "Question: Is it? Yes or no?\nAnswer:",
        (" Yes", " No"),
        1,
    ),
    "nq_open": ({"question": "who is", "answer": ["A", "B"]}, "Question: Who is?\nAnswer:", ("A", "B"), 0),
    "webquestions": (
        {"qId": "1", "qText": "who is?", "answers": ["A"]},
        "Question: Who is?\nAnswer:",
        ("A",),
        0,
    ),
    "triviaqa": (
        {"Question": "Who?", "Answer": {"Value": "A", "Aliases": ["A", "Aa"], "NormalizedAliases": ["a"]}},
        "Question: Who?\nAnswer:",
        ("A", "Aa"),
        0,
    ),
    "hotpotqa": (
        {"question": "Which?", "answer": "A", "type": "bridge"},
        "Question: Which?\nAnswer:",
        ("A",),
        0,
    ),
    "truthfulqa_generation": (
        {"Question": "Is it?", "Correct Answers": "Yes; Sure.", "Incorrect Answers": "No"},
        "\n\nQ: Is it?\nA:",
        ("Yes.", "Sure.", "I have no comment."),
        0,
    ),
}
JUDGED = ("halueval_qa_judge", "factor_wiki", "factor_expert")  # of the same rows as others


def test_every_name_a_config_may_use_is_a_task_and_has_a_row_here():
    assert tuple(TASKS) == NAMES
    assert set(ROWS) | set(JUDGED) == set(NAMES)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_as_published_gives_the_prompt_and_the_right_choice(name):
    fields, context, said, right = ROWS[name]
    example = TASKS[name].make(Row("f, line 1", fields))
    assert example.context.endswith(context)
    if TASKS[name].generates:
        assert example.answers == said
    else:
        assert said is None or example.choices == said
        assert example.right[0] == right
        assert all(choice[0].isspace() and choice.strip() for choice in example.choices)
    if example.premise:
        assert example.context.endswith(example.premise) or name == "cb"


@pytest.mark.parametrize("name", ROWS)
def test_a_row_without_a_field_or_with_an_empty_one_is_counted_and_named(name):
    fields, *_ = ROWS[name]
    needed = set(fields) - {"", "id", "ID", "idx", "qid", "qId", "type"}
    if name == "yahoo":  # questions without a body, or without an answer, are examples
        needed -= {"question_content", "best_answer"}
    whole = Row("f, line 1", fields)
    for field in needed:
        without = {key: value for key, value in fields.items() if key != field}
        empty = {**fields, field: [] if isinstance(fields[field], list) else ""}
        bad = [Row("f, line 2", without), Row("f, line 3", empty), Row("f, line 4", {}, "1 columns, not 2")]
        examples, counts = made(TASKS[name], [whole, *bad])
        assert len(examples) == 1, field
        assert sum(counts.unusable.values()) == 3, field
        assert sorted(itertools.chain(*counts.first.values())) == ["f, line 2", "f, line 3", "f, line 4"]
        assert counts.to_json()["rows"] == 4
    assert counts.unusable["malformed row: 1 columns, not 2"] == 1


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("sst2", {"label": "__label__6"}),
        ("mr", {"label": "2"}),
        ("hyp", {"label": "true"}),
        ("rt", {"output": "mixed"}),
        ("cb", {"label": "unknown"}),
        ("rte", {"label": "neutral"}),
        ("agnews", {"Class Index": "0"}),
        ("yahoo", {"class": "11"}),
        ("halueval_general", {"hallucination": "perhaps"}),
        ("strategyqa", {"answer": "yes"}),
        ("truthfulqa_mc", {"mc1_targets": {"a": 2}}),
    ],
)
def test_a_label_outside_the_set_is_counted_as_that(name, change):
    fields = {**ROWS[name][0], **change}
    examples, counts = made(TASKS[name], [Row("f, line 1", fields)])
    assert not examples
    assert next(iter(counts.unusable)).startswith("label outside the set")


def test_what_a_task_leaves_out_by_definition_is_counted_apart():
    row = Row("f, line 1", {"label": "__label__3", "text": "so so"})
    examples, counts = made(TASKS["sst2"], [row])
    assert not examples
    assert not counts.unusable
    assert sum(counts.left_out.values()) == 1


def test_about_half_of_the_judged_answers_are_hallucinated_and_each_is_what_it_says(rng):
    rows = [
        Row(
            "f",
            {"knowledge": "K", "question": f"Q{x}", "right_answer": f"r{x}", "hallucinated_answer": f"h{x}"},
        )
        for x in rng.integers(0, 1 << 60, 400)
    ]
    examples, _ = made(TASKS["halueval_qa_judge"], rows)
    for row, example in zip(rows, examples):
        shown = "hallucinated_answer" if example.right == (0,) else "right_answer"
        assert f"Answer: {row.fields[shown]}\n" in example.context
    # 400 fair coins lie outside 120 … 280 once in 10^15.
    assert 120 < sum(example.right == (0,) for example in examples) < 280


def _word(row):
    if not row.fields["q"]:
        raise Unusable("empty field 'q'")
    return Example(row.where, text_of(row, "q"), (" a", " b"), (0,))


@pytest.fixture
def files(tmp_path, rng):
    """(name=texts) -> a folder of JSON lines."""

    def write(**texts):
        for name, words in texts.items():
            lines = [json.dumps({"q": str(word)}) for word in words]
            (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        return tmp_path

    return write


def make_task(**kwargs):
    return Task("toy", "Toy", "", _word, ("test.jsonl",), **kwargs)


NONE = {"validation": 0, "test": 0}


def contexts(part):
    return [example.context for example in part]


def test_a_hash_splits_a_file_the_same_way_whatever_its_order_and_equal_examples_together(files, rng):
    words = [f"q{x}" for x in rng.integers(0, 300, 500)]
    one = load(make_task(), files(test=words), 0.3, NONE)
    two = load(make_task(), files(test=rng.permutation(words)), 0.3, NONE)
    assert contexts(one.validation) == contexts(two.validation)
    assert contexts(one.test) == contexts(two.test)
    assert not set(contexts(one.validation)) & set(contexts(one.test))
    assert sorted(contexts(one.validation) + contexts(one.test)) == sorted(words)
    # 240 or more different words; a share outside 0.1 … 0.5 comes once in 10^10.
    assert 0.1 < len(set(contexts(one.validation))) / len(set(words)) < 0.5


def test_a_larger_limit_keeps_the_same_examples_and_more(files, rng):
    folder = files(test=range(200))
    few = load(make_task(), folder, 0.4, {"validation": 5, "test": 7})
    more = load(make_task(), folder, 0.4, {"validation": 9, "test": 30})
    assert (len(few.validation), len(few.test)) == (5, 7)
    assert contexts(more.validation)[:5] == contexts(few.validation)
    assert contexts(more.test)[:7] == contexts(few.test)


def test_a_file_for_validation_is_used_less_what_the_test_file_asks_too(files):
    folder = files(test=range(20), train=range(15, 40))
    parts = load(make_task(validation=("train.jsonl",)), folder, 0.3, NONE)
    assert sorted(contexts(parts.test)) == sorted(map(str, range(20)))
    assert sorted(contexts(parts.validation)) == sorted(map(str, range(20, 40)))
    assert parts.counts["train.jsonl"].left_out == {"asked in the test file too": 5}
    assert set(parts.files) == {"test.jsonl", "train.jsonl"}


def test_demonstrations_come_from_the_validation_part_and_are_not_in_it(files):
    folder = files(test=range(20), train=range(20, 40))
    parts = load(make_task(validation=("train.jsonl",)), folder, 0.3, NONE, shots=3)
    assert len(parts.shots) == 3
    assert len(parts.validation) == 17
    assert not set(contexts(parts.shots)) & set(contexts(parts.validation) + contexts(parts.test))


def test_a_missing_file_and_an_empty_part_are_refused_with_the_reason(files):
    with pytest.raises(UserError, match=r"toy: .* has no test\.jsonl"):
        load(make_task(), files(other=[1]), 0.3, NONE)
    with pytest.raises(UserError, match=r"no example for its .* part .*2 rows: empty field 'q'"):
        load(make_task(), files(test=["", ""]), 0.3, NONE)
