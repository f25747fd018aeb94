"""Tasks in which one of several given texts is taken: HaluEval, TruthfulQA MC, FACTOR, StrategyQA."""

from mlp_memory.evaluation.harness import prompts
from mlp_memory.evaluation.harness.examples import Example, Task, Unusable, text_of
from mlp_memory.evaluation.harness.rows import Row


def _pair(row: Row, context: str, right: str, hallucinated: str) -> Example:
    if right == hallucinated:
        raise Unusable("both answers are the same")
    return Example(row.where, context, (f" {right}", f" {hallucinated}"), (0,))


def _halueval_qa(row: Row) -> Example:
    fields = {name: text_of(row, name) for name in ("knowledge", "question")}
    right, wrong = (
        text_of(row, f"{kind}_answer", empty="empty answer") for kind in ("right", "hallucinated")
    )
    return _pair(row, prompts.HALUEVAL_QA.format(**fields), right, wrong)


def _halueval_qa_judge(row: Row) -> Example:
    """One answer of the two, by a hash of the question, so that about half are hallucinated."""
    pair = _halueval_qa(row)
    hallucinated = int(pair.key[-1], 16) % 2
    answer = pair.choices[hallucinated].removeprefix(" ")
    context = prompts.HALUEVAL_QA_JUDGE.format(question=text_of(row, "question"), answer=answer)
    return Example(row.where, context, prompts.JUDGEMENTS, (1 - hallucinated,))


def _halueval_dialogue(row: Row) -> Example:
    fields = {"knowledge": text_of(row, "knowledge"), "dialogue": text_of(row, "dialogue_history")}
    right, wrong = (
        text_of(row, f"{kind}_response", empty="empty answer") for kind in ("right", "hallucinated")
    )
    return _pair(row, prompts.HALUEVAL_DIALOGUE.format(**fields), right, wrong)


def _halueval_summarization(row: Row) -> Example:
    context = prompts.HALUEVAL_SUMMARIZATION.format(document=text_of(row, "document"))
    right, wrong = (
        text_of(row, f"{kind}_summary", empty="empty answer") for kind in ("right", "hallucinated")
    )
    return _pair(row, context, right, wrong)


def _halueval_general(row: Row) -> Example:
    label = text_of(row, "hallucination", empty="empty label").lower()
    if label not in ("yes", "no"):
        raise Unusable(f"label outside the set: {label[:40]!r}")
    fields = {
        "query": text_of(row, "user_query"),
        "response": text_of(row, "chatgpt_response", empty="empty answer"),
    }
    context = prompts.HALUEVAL_GENERAL.format(**fields)
    return Example(row.where, context, prompts.JUDGEMENTS, (("yes", "no").index(label),))


def _truthfulqa_mc(row: Row) -> Example:
    """MC2's answers, and after them those that MC1 alone has."""
    question = text_of(row, "question")
    targets = {}
    for name in ("mc1_targets", "mc2_targets"):
        found = row.fields.get(name)
        if not isinstance(found, dict):
            raise Unusable(f"missing field {name!r}")
        if not all(str(answer).strip() for answer in found):
            raise Unusable("empty answer")
        if not set(found.values()) <= {0, 1}:
            raise Unusable(f"label outside the set in {name!r}")
        targets[name] = {answer.strip(): int(label) for answer, label in found.items()}
        if set(targets[name].values()) != {0, 1}:
            raise Unusable(f"{name!r} needs right and wrong answers")
    mc1, mc2 = targets["mc1_targets"], targets["mc2_targets"]
    answers = list(dict.fromkeys((*mc2, *mc1)))
    if any(mc1.get(answer, label) != label for answer, label in mc2.items()):
        raise Unusable("an answer is right in one list and wrong in the other")
    right = tuple(i for i, answer in enumerate(answers) if {**mc1, **mc2}[answer])
    compared = [tuple(i for i, answer in enumerate(answers) if answer in of) for of in (mc1, mc2)]
    context = prompts.TRUTHFULQA.format(question=question)
    return Example(row.where, context, tuple(f" {answer}" for answer in answers), right, *compared)


def _factor(row: Row) -> Example:
    if not isinstance(prefix := row.fields.get("full_prefix"), str):
        raise Unusable("missing field 'full_prefix'")
    if not prefix.strip():
        raise Unusable("empty field 'full_prefix'")
    texts = [text_of(row, "completion", empty="empty answer")]
    texts += [text_of(row, f"contradiction_{i}", empty="empty answer") for i in range(3)]
    if texts[0] in texts[1:]:
        raise Unusable("the completion is among the contradictions")
    # Whatever space the prefix ends with belongs to what follows it.
    context = prefix.rstrip()
    space = prefix[len(context) :] or " "
    return Example(row.where, context, tuple(f"{space}{text}" for text in texts), (0,))


def _strategyqa(row: Row) -> Example:
    answer = row.fields.get("answer")
    if not isinstance(answer, bool):
        raise Unusable(
            f"label outside the set: {str(answer)[:40]!r}" if answer is not None else "empty answer"
        )
    context = prompts.STRATEGYQA.format(question=text_of(row, "question"))
    return Example(row.where, context, prompts.STRATEGYQA_ANSWERS, (0 if answer else 1,))


def _factor_task(name: str, title: str) -> Task:
    return Task(
        name,
        title,
        "accuracy: the completion has a higher log-likelihood per token than each of three contradictions",
        _factor,
        test=(f"factor/{name.removeprefix('factor_')}_factor.csv",),
        scoring="likelihood_per_token",
    )


# Hallucinated texts are longer: the plain likelihood is against them, whatever they say.
_PAIRS = (
    "acc: after {}, the right {} has a higher log-likelihood per token than the hallucinated one; "
    "acc_likelihood: a higher log-likelihood, which favours the shorter text"
)
_JUDGED = "accuracy of Yes or No to whether {} is hallucinated"

TASKS = (
    Task(
        "halueval_qa",
        "HaluEval qa",
        _PAIRS.format("knowledge and question", "answer"),
        _halueval_qa,
        test=("halueval/qa_data.json",),
        scoring="likelihood_per_token",
    ),
    Task(
        "halueval_qa_judge",
        "HaluEval qa, judged",
        _JUDGED.format("an answer, the right or the hallucinated one by a hash,"),
        _halueval_qa_judge,
        test=("halueval/qa_data.json",),
    ),
    Task(
        "halueval_dialogue",
        "HaluEval dialogue",
        _PAIRS.format("knowledge and history", "response"),
        _halueval_dialogue,
        test=("halueval/dialogue_data.json",),
        scoring="likelihood_per_token",
    ),
    Task(
        "halueval_summarization",
        "HaluEval summarization",
        _PAIRS.format("the document", "summary"),
        _halueval_summarization,
        test=("halueval/summarization_data.json",),
        scoring="likelihood_per_token",
    ),
    Task(
        "halueval_general",
        "HaluEval general",
        _JUDGED.format("a chat model's response"),
        _halueval_general,
        test=("halueval/general_data.json",),
    ),
    Task(
        "truthfulqa_mc",
        "TruthfulQA MC",
        "mc1: the likeliest of MC1's answers is the right one; mc2: the share of MC2's right answers in the "
        "probability of all, as lm-eval computes both",
        _truthfulqa_mc,
        test=("truthfulqa/mc_task.json",),
    ),
    _factor_task("factor_news", "FACTOR news"),
    _factor_task("factor_wiki", "FACTOR wiki"),
    _factor_task("factor_expert", "FACTOR expert"),
    Task(
        "strategyqa",
        "StrategyQA",
        "accuracy of Yes or No, from the question alone and without demonstrations",
        _strategyqa,
        test=("strategyqa/dev.json", "strategyqa/train.json"),
    ),
)
