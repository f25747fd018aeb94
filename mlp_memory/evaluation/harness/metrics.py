"""What an example scores, from the log-likelihoods of its choices or from a generated answer."""

import collections
import re
import string
from collections.abc import Sequence

import numpy as np

from mlp_memory.evaluation.harness.examples import Example

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def choice_metrics(
    example: Example,
    log_prob_C: Sequence[float],
    premise_C: Sequence[float] | None,
    tokens_C: Sequence[int],
    scoring: str,
) -> dict[str, float]:
    """Whether a right choice is taken ("acc"); by the plain likelihood and PMI as well, where these differ.

    A choice is taken where it scores higher than every wrong one; a tie takes none. An example with `mc1`
    gives "mc1", which compares these choices only, and "mc2", the share of the right choices in the
    probability of those of `mc2`.

    Args:
      example: its choices and which are right.
      log_prob_C: log-likelihood of each choice after the context, nats.
      premise_C: and after the domain premise; None where it was not scored.
      tokens_C: tokens of each choice.
      scoring: "likelihood", "likelihood_per_byte", "likelihood_per_token" or "pmi".
    """
    log_prob_C = np.asarray(log_prob_C, np.float64)
    scores = {"likelihood": log_prob_C}
    # Less the space before it, as lm-eval counts.
    scores["likelihood_per_byte"] = log_prob_C / [len(choice.strip().encode()) for choice in example.choices]
    scores["likelihood_per_token"] = log_prob_C / np.maximum(tokens_C, 1)
    if premise_C is not None:
        scores["pmi"] = log_prob_C - np.asarray(premise_C, np.float64)
    if example.mc1:
        shares_C = np.exp(log_prob_C - log_prob_C.max())
        right = [i for i in example.mc2 if i in example.right]
        mc2 = float(shares_C[right].sum() / shares_C[list(example.mc2)].sum())
        return {"mc1": _taken(scores[scoring], example.right, example.mc1), "mc2": mc2}
    every = range(len(example.choices))
    found = {"acc": _taken(scores[scoring], example.right, every)}
    for name in ("likelihood", "pmi"):
        if name in scores and name != scoring:
            found[f"acc_{name}"] = _taken(scores[name], example.right, every)
    return found


def _taken(score_C: np.ndarray, right: Sequence[int], compared: Sequence[int]) -> float:
    """1 where the best of the right choices beats every wrong one."""
    best = max(score_C[i] for i in compared if i in right)
    return float(all(best > score_C[i] for i in compared if i not in right))


def answer_metrics(text: str, answers: Sequence[str]) -> dict[str, float]:
    """How a generated answer agrees with the right ones, after SQuAD's normalisation, each 0 to 1.

    Returns:
      exact_match: it is one of them. f1: of words, the best over them. contains: one of them stands in it,
      as whole words. An empty text agrees with none.
    """
    said, right = _words(text), [_words(answer) for answer in answers]
    return {
        "exact_match": float(any(said == words for words in right if words)),
        "f1": max(_f1(said, words) for words in right),
        "contains": float(any(_stands_in(words, said) for words in right if words)),
    }


def _words(text: str) -> list[str]:
    """Small letters, no punctuation, no articles unless there is nothing else."""
    plain = text.lower().translate(_PUNCTUATION)
    return _ARTICLES.sub(" ", plain).split() or plain.split()


def _f1(said: list[str], right: list[str]) -> float:
    if not said or not right:
        return 0.0
    shared = sum((collections.Counter(said) & collections.Counter(right)).values())
    return 2 * shared / (len(said) + len(right))


def _stands_in(words: list[str], text: list[str]) -> bool:
    return any(text[at : at + len(words)] == words for at in range(len(text) - len(words) + 1))
