"""Tasks in which an answer is generated: open questions, TruthfulQA."""

from collections.abc import Callable

from mlp_memory.evaluation.harness import prompts
from mlp_memory.evaluation.harness.examples import Example, Task, Unusable, text_of, texts_of
from mlp_memory.evaluation.harness.rows import Row

_MEASURES = (
    "of a greedy answer, up to the end of its line, to questions asked without a text that has the answer: "
    "exact_match, f1 (of words) and contains (a right answer stands in it), all after SQuAD's normalisation, "
    "the best over the right answers"
)
_STOP = ("\n",)


def _open_question(row: Row, question: str, answers: tuple[str, ...]) -> Example:
    asked = question.strip().rstrip("?").rstrip()
    if not asked:
        raise Unusable("empty question")
    # The first letter large: some sets write questions in small letters throughout.
    context = prompts.QUESTION.format(question=asked[0].upper() + asked[1:])
    return Example(row.where, context, answers=answers, shot=f" {answers[0]}")


def _with_answers(*names: str, question: str = "question") -> Callable[[Row], Example]:
    def make(row: Row) -> Example:
        name = next((name for name in names if name in row.fields), None)
        if name is None:
            raise Unusable(f"missing field {names[0]!r}")
        return _open_question(row, text_of(row, question), texts_of(row, name, row.fields[name]))

    return make


def _triviaqa(row: Row) -> Example:
    """Question and Answer as published, or question and answer as in the `datasets` library."""
    answer = row.fields.get("Answer", row.fields.get("answer"))
    if not isinstance(answer, dict):
        raise Unusable("missing field 'Answer'")
    value = answer.get("Value", answer.get("value", ""))
    aliases = answer.get("Aliases", answer.get("aliases", []))
    if not isinstance(value, str) or not isinstance(aliases, list):
        raise Unusable("field 'Answer' is not text")
    return _open_question(
        row, text_of(row, "Question", "question"), texts_of(row, "Answer", [value, *aliases])
    )


def _truthfulqa(row: Row) -> Example:
    """Answers end in a full stop and "I have no comment." is right, as in lm-eval's task."""

    def answers(name: str) -> tuple[str, ...]:
        texts = texts_of(row, name, text_of(row, name, empty="empty answer").split(";"))
        return tuple(dict.fromkeys(text if text.endswith(".") else f"{text}." for text in texts))

    right = dict.fromkeys((*answers("Correct Answers"), "I have no comment."))
    context = prompts.TRUTHFULQA.format(question=text_of(row, "Question"))
    return Example(row.where, context, answers=tuple(right), wrong=answers("Incorrect Answers"))


def _questions(
    name: str, title: str, make: Callable[[Row], Example], test: tuple[str, ...], validation: tuple[str, ...]
) -> Task:
    return Task(name, title, _MEASURES, make, test, validation, (), "generate", _STOP, True)


TASKS = (
    _questions(
        "nq_open",
        "NQ-open",
        _with_answers("answer"),
        ("qa/NQ-open.dev.jsonl", "qa/NQ-open.efficientqa.dev.1.1.jsonl"),
        ("qa/NQ-open.train.jsonl",),
    ),
    _questions(
        "webquestions",
        "WebQuestions",
        _with_answers("answers", question="qText"),
        ("qa/webquestions_test.json",),
        ("qa/webquestions_trainmodel.json",),
    ),
    _questions(
        "triviaqa",
        "TriviaQA",
        _triviaqa,
        ("qa/unfiltered-web-dev.json", "qa/triviaqa_dev.json", "qa/triviaqa_dev.jsonl"),
        ("qa/unfiltered-web-train.json", "qa/triviaqa_train.json", "qa/triviaqa_train.jsonl"),
    ),
    _questions(
        "hotpotqa",
        "HotpotQA",
        _with_answers("answer"),
        ("qa/hotpot_dev_v1_simplified.json", "qa/hotpot_dev_distractor_v1.json"),
        ("qa/hotpot_train_v1.1.json",),
    ),
    Task(
        "truthfulqa_generation",
        "TruthfulQA generation",
        "of a greedy answer, lm-eval's figures: whether it is nearer a right answer than a wrong one by BLEU "
        "or ROUGE (acc), how near it comes to a right one (max), and by how much nearer (diff)",
        _truthfulqa,
        test=("truthfulqa/TruthfulQA.csv",),
        scoring="generate",
        stop=("\n\n", "\nQ:"),
    ),
)
