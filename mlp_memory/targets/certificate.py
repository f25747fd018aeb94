"""The certificate: how far the teacher that is written may be from the exact one.

A random sample of rows is searched exactly as well. `certify_search` compares what both
searches would teach, before the search of all rows; `check_goal` refuses what is too far off;
`complete` adds what is known once everything is written. Plain JSON, in WORKDIR/targets.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from mlp_memory.artifacts import UserError
from mlp_memory.index.neighbors import hits
from mlp_memory.targets.config import RetrieveConfig
from mlp_memory.targets.divergence import SKEW, divergence
from mlp_memory.targets.knn import knn_distribution
from mlp_memory.targets.temperature import median_spread

NAME = "certificate.json"
SCHEMA = 1

Lists = tuple[np.ndarray, np.ndarray]
"""Neighbour lists: rows_Qxk int64, -1 where there is none, and sqdist_Qxk float32, inf there."""

_RESAMPLES = 1000
_LEVEL = 0.95
_PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
_DIGITS = 6
_MASS_BINS = 1000
# Told apart from the seed with which the index chose its own settings: on the rows that they
# were chosen for, they look better than they are.
_STREAM_OF_SEEDS = 0x7EAC4


class Stream(Protocol):
    """What the sample is drawn from: `corpus.stream.TokenStream`."""

    bounds_D1: np.ndarray


def draw_sample(stream: Stream, config: RetrieveConfig) -> np.ndarray:
    """`certificate_rows` rows that have a next token, drawn without replacement: int64, ascending.

    All of them where there are fewer; fewer where documents have been deleted. Memory: 16 bytes
    per document.
    """
    last_D = stream.bounds_D1[1:] - 1
    documents = len(last_D)
    scored = int(stream.bounds_D1[-1]) - documents
    rng = np.random.default_rng([_STREAM_OF_SEEDS, config.certificate_seed])
    rank_Q = rng.choice(scored, size=min(config.certificate_rows, scored), replace=False, shuffle=False)
    rank_Q = np.sort(rank_Q.astype(np.int64))
    # Row of a rank: as many documents' last rows come before it as end at or below it.
    return rank_Q + np.searchsorted(last_D - np.arange(documents), rank_Q, side="right")


def certify_search(
    found: Lists,
    exact: Lists,
    labels_N: np.ndarray,
    tau: float,
    config: RetrieveConfig,
    *,
    choice: Mapping[str, Any],
    candidates: int,
    shards: Sequence[tuple[int, int]],
    scored_rows: int,
    approximate_recall: float | None = None,
) -> dict[str, Any]:
    """The certificate as far as it concerns search: the index's lists against exact search's.

    Each figure is the mean over the sample, a 95 % interval (percentile bootstrap over rows, 1000
    resamples, fixed seed: the sample is drawn at random from the rows it speaks for) and
    percentiles over rows. Per shard, recall is the share of the sample's exact neighbours in the
    shard's rows that were found. Distances of teachers from the exact one (divergence.py), all k
    neighbours and no cut: `search` has the index's neighbours, likewise uncut; `as_written` has
    what distillation will read, cut to top_m, in float16, renormalised.

    Args:
      found: lists of the sample from the index, after exclusion, k long.
      exact: of the same rows from exact search, after the same exclusion.
      labels_N: int32 next token of every row of the stream.
      tau: the temperature.
      config: k, top_m, sample and goals.
      choice: how the temperature was chosen (the targets' `temperature_choice`).
      candidates: asked of either search, before exclusion.
      shards: first row of each index shard and one past its last.
      scored_rows: rows with a next token that the sample was drawn from.
      approximate_recall: the goal that the exact backend's `approx_max_k` was given; None where
        there is none. The exact search that it is held against never approximates.

    Raises:
      ValueError: the lists differ in shape, or there are none.
    """
    (found_rows, _), (exact_rows, _) = found, exact
    if found_rows.shape != exact_rows.shape or not len(found_rows):
        raise ValueError(f"lists {found_rows.shape} and {exact_rows.shape} must be alike and not empty")
    there_Qxk, hit_Qxk = exact_rows >= 0, hits(found_rows, exact_rows)
    draws_SxQ = _draws(len(found_rows), config.certificate_seed)
    certificate = {
        "schema": SCHEMA,
        "sample": {
            "rows": len(found_rows),
            "of": scored_rows,
            "seed": config.certificate_seed,
            "interval": f"{_LEVEL:.0%}, percentile bootstrap over rows, {_RESAMPLES} resamples",
        },
        "teacher": {
            "k": config.k,
            "top_m": min(config.top_m, config.k),
            "temperature": tau,
            "temperature_choice": {n: choice[n] for n in ("how", "lambda", "median_spread") if n in choice},
        },
        "exclusion": {
            "window": config.exclude_window,
            "document": config.exclude_document,
            "context": config.exclude_context,
            "candidates": candidates,
        },
        "index": {"approximate_recall": approximate_recall},
        "skew": SKEW,
        "recall": _recall(there_Qxk, hit_Qxk, draws_SxQ),
        **_distances(found, tau, exact, tau, labels_N, config, draws_SxQ),
        "shards": [_shard(rows, exact_rows, there_Qxk, hit_Qxk, draws_SxQ) for rows in shards],
    }
    return certificate | {"goal": _goal(certificate, config)}


def certify_store(
    found: Lists, exact: Lists, states: Lists, labels_N: np.ndarray, tau: float, config: RetrieveConfig
) -> dict[str, Any]:
    """How far the teacher is from the one that the hidden states themselves give, all in all.

    For keys that keep less than the decoder gave: rounded, or of fewer dimensions. Figures are
    those of `certify_search`, against exact search over the hidden states. Their distances have
    another scale, so there the temperature is τ times the ratio of median spreads.

    Args:
      found: lists of the sample from the index.
      exact: from exact search over the keys.
      states: from exact search over the hidden states.
      labels_N, tau, config: as for `certify_search`.
    """
    there_Qxk, draws_SxQ = states[0] >= 0, _draws(len(found[0]), config.certificate_seed)
    states_tau = tau * median_spread(states[1]) / median_spread(exact[1])
    return {
        "states_temperature": states_tau,
        "recall": _recall(there_Qxk, hits(found[0], states[0]), draws_SxQ),
        **_distances(found, tau, states, states_tau, labels_N, config, draws_SxQ),
    }


def check_goal(certificate: Mapping[str, Any], config: RetrieveConfig) -> None:
    """Refuses a teacher that is certainly below the goal, unless `accept_below_goal`.

    Certainly: the whole interval of recall lies below `goal_recall`, or that of the search's
    total variation above `goal_tv`. What is accepted all the same is said on stderr.

    Raises:
      UserError: it is below the goal.
    """
    goal = _goal(certificate, config)
    if goal["met"]:
        return
    figures = []
    if goal["recall_missed"]:
        what = f"recall@{certificate['teacher']['k']} is {_with_interval(certificate['recall'])}"
        figures.append(f"{what}, below retrieve.goal_recall = {config.goal_recall:g}")
    if goal["tv_missed"]:
        what = f"total variation to the exact teacher is {_with_interval(certificate['search']['tv'])}"
        figures.append(f"{what}, above retrieve.goal_tv = {config.goal_tv:g}")
    text = "; ".join(figures)
    if not config.accept_below_goal:
        raise UserError(
            f"{text}: raise index.target_recall and run index again, or give "
            "retrieve.accept_below_goal = True"
        )
    print(f"retrieve: {text}; accepted", file=sys.stderr)


def complete(
    certificate: Mapping[str, Any],
    blocks: Iterable[tuple[np.ndarray, np.ndarray]],
    audit: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The certificate with what only the finished targets tell.

    Args:
      certificate: of `certify_search`.
      blocks: kept_mass float32 and neighbours int of all rows with a next token, in blocks, so
        that they need not fit into memory. Percentiles are rounded down to a thousandth.
      audit: of `overlap.audit`; None where it was switched off.
    """
    k = certificate["teacher"]["k"]
    bins = np.zeros(_MASS_BINS + 1, np.int64)
    rows = fewer = none = 0
    mass = 0.0
    for kept_mass_B, neighbours_B in blocks:
        rows += len(neighbours_B)
        fewer += int((neighbours_B < k).sum())
        none += int((neighbours_B == 0).sum())
        mass += float(kept_mass_B.sum(dtype=np.float64))
        # A rounding error below a whole thousandth is not a thousandth less.
        place_B = np.floor(kept_mass_B.astype(np.float64) * _MASS_BINS + 1e-3).astype(np.int64)
        bins += np.bincount(np.clip(place_B, 0, _MASS_BINS), minlength=_MASS_BINS + 1)
    below = np.cumsum(bins)
    return {
        **certificate,
        "kept_mass": {
            "mean": _round(mass / rows) if rows else None,
            "percentiles": {
                str(p): _round(np.searchsorted(below, p / 100 * (rows - 1), side="right") / _MASS_BINS)
                for p in _PERCENTILES
            }
            if rows
            else {},
        },
        "rows": {
            "rows": rows,
            "fewer_than_k": fewer,
            "share_fewer_than_k": _round(fewer / max(rows, 1)),
            "without_neighbours": none,
        },
        "overlap": audit,
    }


def certificate_lines(certificate: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The certificate for people: what was measured, and what came out. Parts may be absent."""
    teacher, sample, goal = certificate["teacher"], certificate["sample"], certificate["goal"]
    recall, search, written = (certificate[name] for name in ("recall", "search", "as_written"))
    worst = f", 5 % of rows below {recall['percentiles']['5']:.3f}" if recall["percentiles"] else ""
    lines = [
        ("goal", _goal_text(goal)),
        (f"recall@{teacher['k']}", _with_interval(recall) + worst),
        ("total variation, search alone", _with_interval(search["tv"])),
        ("skew divergence, search alone", _divergence_text(search)),
        ("total variation, as written", _with_interval(written["tv"])),
        ("skew divergence, as written", _divergence_text(written)),
    ]
    if store := certificate.get("store"):
        lines += [
            ("recall, against hidden states", _with_interval(store["recall"])),
            ("total variation, against hidden states", _with_interval(store["search"]["tv"])),
        ]
    shards = [s["recall"]["mean"] for s in certificate["shards"] if s["recall"]["mean"] is not None]
    if len(certificate["shards"]) > 1 and shards:
        count = len(certificate["shards"])
        lines.append(("recall by shard", f"{min(shards):.3f} … {max(shards):.3f} over {count} shards"))
    if (goal_given := certificate["index"]["approximate_recall"]) is not None:
        lines.append(("index", f"approximate top k on the mesh, with a recall of {goal_given:g} as its goal"))
    if kept := certificate.get("kept_mass", {}).get("percentiles"):
        mean = certificate["kept_mass"]["mean"]
        text = f"{mean:.3f} in the mean, 5 % of rows below {kept['5']:.3f}"
        lines.append((f"mass that the top {teacher['top_m']} keep", text))
    if rows := certificate.get("rows"):
        fewer = f"{rows['fewer_than_k']:,} of {rows['rows']:,}, {rows['without_neighbours']:,} without any"
        lines.append((f"rows with fewer than {teacher['k']} neighbours", fewer))
    lines.append(("temperature", f"τ = {teacher['temperature']:.4g}, {teacher['temperature_choice']['how']}"))
    lines.append(("no neighbours are", _exclusion_text(certificate["exclusion"])))
    lines += _overlap_lines(certificate.get("overlap"))
    drawn = f"{sample['rows']:,} of {sample['of']:,} rows, seed {sample['seed']}"
    return [*lines, ("sample", f"{drawn}; intervals: {sample['interval']}")]


def certificate_table(certificate: Mapping[str, Any]) -> str:
    """The certificate for a terminal, a line a measure; ends in a newline."""
    lines = certificate_lines(certificate)
    width = max(len(label) for label, _ in lines)
    return "How good is the teacher\n" + "".join(f"  {label.ljust(width)}  {text}\n" for label, text in lines)


def _recall(there_Qxk: np.ndarray, hit_Qxk: np.ndarray, draws_SxQ: np.ndarray) -> dict[str, Any]:
    wanted_Q = there_Qxk.sum(axis=1)
    return _figure(hit_Qxk.sum(axis=1) / np.maximum(wanted_Q, 1), draws_SxQ, wanted_Q > 0)


def _distances(
    found: Lists,
    tau: float,
    truth: Lists,
    truth_tau: float,
    labels_N: np.ndarray,
    config: RetrieveConfig,
    draws_SxQ: np.ndarray,
) -> dict[str, Any]:
    """`search` and `as_written`: how far what is found is from the truth, as a teacher."""
    whole = knn_distribution(*truth, labels_N[truth[0]], truth_tau, config.k)
    parts = {}
    for name, top_m, dtype in (("search", config.k, np.float32), ("as_written", config.top_m, np.float16)):
        got = knn_distribution(*found, labels_N[found[0]], tau, min(top_m, config.k))
        off = divergence(whole.token_ids_QxM, whole.probs_QxM, got.token_ids_QxM, got.probs_QxM.astype(dtype))
        parts[name] = {
            "tv": _figure(off.tv_Q, draws_SxQ),
            "skew_kl": _figure(off.skew_kl_Q, draws_SxQ),
            "kl_infinite_share": _round(off.infinite_Q.mean()),
        }
    return parts


def _draws(rows: int, seed: int) -> np.ndarray:
    """How often each row of the sample is in each of the bootstrap's resamples."""
    rng = np.random.default_rng([_STREAM_OF_SEEDS, seed, rows])
    return rng.multinomial(rows, np.full(rows, 1 / rows), size=_RESAMPLES).astype(np.int32)


def _figure(value_Q: np.ndarray, draws_SxQ: np.ndarray, weight_Q: np.ndarray | None = None) -> dict[str, Any]:
    """Mean of the values, each weighted, its interval, and percentiles of those with any weight."""
    weight_Q = np.ones(len(value_Q)) if weight_Q is None else weight_Q.astype(np.float64)
    if not weight_Q.sum() > 0:
        return {"mean": None, "interval": None, "percentiles": {}}
    weighted_Q = value_Q * weight_Q
    # Row by row and not `@`: BLAS adds in an order that depends on its thread count.
    sums = np.array([((d * weighted_Q).sum(), (d * weight_Q).sum()) for d in draws_SxQ])
    sums = sums[sums[:, 1] > 0]
    low, high = np.quantile(sums[:, 0] / sums[:, 1], [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    percentiles = np.percentile(value_Q[weight_Q > 0], _PERCENTILES)
    return {
        "mean": _round(weighted_Q.sum() / weight_Q.sum()),
        "interval": [_round(low), _round(high)],
        "percentiles": {str(p): _round(v) for p, v in zip(_PERCENTILES, percentiles)},
    }


def _shard(
    rows: tuple[int, int],
    exact_rows: np.ndarray,
    there_Qxk: np.ndarray,
    hit_Qxk: np.ndarray,
    draws_SxQ: np.ndarray,
) -> dict[str, Any]:
    inside_Qxk = there_Qxk & (exact_rows >= rows[0]) & (exact_rows < rows[1])
    wanted_Q = inside_Qxk.sum(axis=1)
    share_Q = (hit_Qxk & inside_Qxk).sum(axis=1) / np.maximum(wanted_Q, 1)
    return {
        "rows": [int(rows[0]), int(rows[1])],
        "exact_neighbours": int(wanted_Q.sum()),
        "recall": _figure(share_Q, draws_SxQ, wanted_Q),
    }


def _goal(certificate: Mapping[str, Any], config: RetrieveConfig) -> dict[str, Any]:
    recall, tv = certificate["recall"]["interval"], certificate["search"]["tv"]["interval"]
    missed = {
        "recall_missed": recall is not None and recall[1] < config.goal_recall,
        "tv_missed": tv is not None and tv[0] > config.goal_tv,
    }
    goals = {"recall": config.goal_recall, "tv": config.goal_tv}
    return {**goals, **missed, "met": not any(missed.values())}


def _round(value: float) -> float:
    return round(float(value), _DIGITS)


def _with_interval(figure: Mapping[str, Any], unit: str = "") -> str:
    if figure["mean"] is None:
        return "–"
    low, high = figure["interval"]
    return f"{figure['mean']:.4f}{unit} (95 %: {low:.4f} … {high:.4f})"


def _divergence_text(part: Mapping[str, Any]) -> str:
    infinite = f"plain KL infinite in {part['kl_infinite_share']:.1%} of rows"
    return f"{_with_interval(part['skew_kl'], ' nats')}; {infinite}"


def _goal_text(goal: Mapping[str, Any]) -> str:
    verdict = "not ruled out" if goal["met"] else "missed, and accepted"
    return f"recall {goal['recall']:g}, total variation {goal['tv']:g}: {verdict}"


def _exclusion_text(exclusion: Mapping[str, Any]) -> str:
    parts = ["the row itself"]
    if exclusion["window"]:
        parts.append(f"rows within {exclusion['window']:,} positions")
    if exclusion["document"]:
        parts.append("rows of its document")
    if exclusion["context"]:
        parts.append(f"rows with its last {exclusion['context']:,} tokens")
    return f"{', '.join(parts)} ({exclusion['candidates']:,} candidates asked for)"


def _overlap_lines(audit: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    if audit is None:
        return [("overlap with held-out text", "not looked for (retrieve.audit_ngram = 0)")]
    lines = []
    for split, found in audit["splits"].items():
        text = f"{found['covered_share']:.2%} of {found['scored']:,} tokens in sequences of {audit['ngram']}"
        copies = f"{found['copy_count']:,} of {found['documents']:,} documents are copies"
        lines.append((f"{split} text also in train", f"{text}; {copies}"))
    repeats = audit["train"]
    text = f"{repeats['copies']:,} of {repeats['documents']:,} ({repeats['copied_share']:.2%} of rows)"
    return [*lines, ("train documents that repeat one", text)]
