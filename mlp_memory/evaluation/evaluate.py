"""From scored rows to results.json: λ and τ chosen on validation, everything reported on test."""

from typing import Any

import numpy as np

from mlp_memory.statistics import (
    bootstrap_interval,
    bootstrap_mean,
    gain_interval,
    gain_recovered,
    perplexity,
)
from mlp_memory.targets.interpolation import best_lambda, lambda_grid, mixture_nll, mixture_rows

_MIXTURES = {
    "knn_lm_exact": ("base", "knn_lm_exact"),
    "knn_lm_scann": ("base", "knn_lm_scann"),
    "base_plus_memory": ("base", "base_memory"),
    "base_plus_memory_gated": ("base", "base_memory", "base_gate"),
    "joint": ("joint", "joint_memory"),
    "joint_gated": ("joint", "joint_memory", "joint_gate"),
}
"""System -> the arrays it interpolates: language model, memory or kNN, and λ where a gate gives it."""

_ALONE = ("base", "decoder_equal_params")

Scored = dict[str, np.ndarray]


def summarize(
    splits: dict[str, Scored],
    documents: dict[str, np.ndarray],
    words: dict[str, int],
    temperatures: tuple[float, ...],
    k: int,
    bootstrap: int,
) -> dict[str, Any]:
    """Perplexities of every system that was scored, on every split; λ and τ chosen on "validation".

    Args:
      splits: per split the arrays of `score.score_split`, nats, one row per scored token.
      documents: per split the document of each scored token.
      words: per split the words that the scored tokens spell (`stage.words_of`).
      temperatures: τ of the columns of the kNN-LM arrays.
      k: neighbours of kNN-LM.
      bootstrap: resamples of the intervals.

    Returns:
      The "validation" and "test" parts of results.json and "lambda_curves".
    """
    choices = {
        name: _choose(splits["validation"], name, temperatures) for name in _systems(splits["validation"])
    }
    results: dict[str, Any] = {"lambda_curves": {"validation": {"lambdas": lambda_grid().tolist()}}}
    curves = results["lambda_curves"]["validation"]
    for name, (weight, column) in choices.items():
        if name in _MIXTURES and weight is not None:
            base, other = _parts(splits["validation"], name, column)
            curves[name] = np.exp(mixture_nll(base, other, lambda_grid())).tolist()
    for split, scored in splits.items():
        nll = {name: _rows(scored, name, *choices[name]) for name in choices}
        weights = {name: _weight(scored, name, choices[name][0]) for name in choices}
        results[split] = {
            "perplexity": {name: perplexity(n.sum(), len(n)) for name, n in nll.items()},
            "details": {
                name: _details(n, documents[split], words[split], choices[name], temperatures, k, bootstrap)
                | {"mean_lambda": float(np.mean(weights[name], dtype=np.float64))}
                for name, n in nll.items()
            },
            "differences": {
                f"{name} - {other}": _difference(nll[name], nll[other], documents[split], bootstrap)
                for name, other in _compared(list(nll))
            },
        }
        if "knn_lm_exact" in nll:
            three = [nll[name] for name in ("base", "knn_lm_exact", "base_plus_memory")]
            interval = gain_interval(*three, documents[split], samples=bootstrap)
            results[split]["gain_recovered"] = {
                "of": "knn_lm_exact",
                "share": gain_recovered(*(nll_N.mean() for nll_N in three)),
                "interval": interval and list(interval),
            }
    return results


def _systems(scored: Scored) -> list[str]:
    order = ["base", *_MIXTURES, "decoder_equal_params"]
    return [n for n in order if all(part in scored for part in _MIXTURES.get(n, (n,)))]


def _compared(names: list[str]) -> list[tuple[str, str]]:
    """The pairs of systems whose difference says what a step was worth."""
    pairs = [(name, "base") for name in names if name != "base"]
    fixed = [("joint", "base_plus_memory"), ("base_plus_memory", "decoder_equal_params")]
    fixed += [(f"{name}_gated", name) for name in ("base_plus_memory", "joint")]
    return pairs + [pair for pair in fixed if set(pair) <= set(names)]


def _difference(
    nll_N: np.ndarray, other_N: np.ndarray, documents_N: np.ndarray, bootstrap: int
) -> dict[str, Any]:
    """Mean nats per token that one system has more than the other on the same tokens."""
    interval = bootstrap_mean(nll_N - other_N, documents_N, samples=bootstrap)
    return {"nats": float((nll_N - other_N).mean()), "interval": [interval.low, interval.high]}


def _parts(scored: Scored, name: str, column: int | None) -> tuple[np.ndarray, np.ndarray]:
    base, other = (scored[part] for part in _MIXTURES[name][:2])
    return base, other if column is None else other[:, column]


def _choose(scored: Scored, name: str, temperatures: tuple[float, ...]) -> tuple[float | None, int | None]:
    """λ, None where a gate gives it, and for kNN-LM the column of τ, with the least validation loss."""
    if name in _ALONE:
        return 0.0, None
    if len(_MIXTURES[name]) > 2:
        return None, None
    if not name.startswith("knn_lm"):
        return best_lambda(*_parts(scored, name, None))[0], None
    found = [best_lambda(*_parts(scored, name, column)) for column in range(len(temperatures))]
    column = int(np.argmin([nll for _, nll in found]))
    return found[column][0], column


def _weight(scored: Scored, name: str, weight: float | None) -> float | np.ndarray:
    """λ of all rows, or of each."""
    return scored[_MIXTURES[name][2]] if weight is None else weight


def _rows(scored: Scored, name: str, weight: float | None, column: int | None) -> np.ndarray:
    """Nats per scored token, float64."""
    if name in _ALONE:
        return -scored[name].astype(np.float64)
    return mixture_rows(*_parts(scored, name, column), _weight(scored, name, weight))


def _details(
    nll_N: np.ndarray,
    documents_N: np.ndarray,
    words: int,
    choice: tuple[float | None, int | None],
    temperatures: tuple[float, ...],
    k: int,
    bootstrap: int,
) -> dict[str, Any]:
    interval = bootstrap_interval(nll_N, documents_N, samples=bootstrap)
    weight, column = choice
    return {
        "lambda": weight,
        "tau": None if column is None else temperatures[column],
        "k": None if column is None else k,
        "scored_tokens": len(nll_N),
        "per_token": perplexity(nll_N.sum(), len(nll_N)),
        "per_word": perplexity(nll_N.sum(), words),
        "words": words,
        "interval": [interval.low, interval.high],
        "interval_method": interval.method,
    }
