"""What the paper claims and the pipeline's own evaluation can speak to, decided by intervals.

A pure function of results.json: the figures of the paper stand beside those measured, at whatever
size that was. Benchmarks and studies write claims of their own (`sections.Findings`).
"""

from collections.abc import Mapping
from typing import Any

from mlp_memory.evaluation.sections import Claim
from mlp_memory.evaluation.table import format_count, format_figure, format_flops, is_number, split_figures

PAPER_SHARE = 0.85
"""Of kNN-LM's gain, what the paper's memory has (PAPER.md: 10.42 -> 9.58 of 9.43)."""

_COMMAND = "python -m mlp_memory run --workdir=NEW --gin_file=WORKDIR/config.gin"


def measured_claims(results: Mapping[str, Any], split: str = "test") -> tuple[Claim, ...]:
    """The claims for which both systems were scored; "unclear" where an interval does not decide.

    Args:
      results: what results.json holds.
      split: whose figures.

    Raises:
      UserError: `results` has another schema or no such split.
    """
    figures = split_figures(results, split)
    size = _size(results, figures, split)
    compared = [
        (
            "The memory lowers the decoder's perplexity.",
            "10.42 → 9.58 (GPT2-large, 774 M, with a memory of 774 M; WikiText-103)",
            "base_plus_memory",
            "base",
            size,
        ),
        (
            "Decoder and memory together beat one decoder of as many parameters.",
            "10.16 → 9.58 (GPT2-xl, 1.5 B, against 774 M + 774 M; WikiText-103)",
            "base_plus_memory",
            "decoder_equal_params",
            size,
        ),
        (
            "Training the decoder on, with the memory frozen, lowers it further.",
            "claimed, no figure",
            "joint",
            "base_plus_memory",
            size + _more_training(results),
        ),
    ]
    claims = [_compared(figures, *claim) for claim in compared]
    claims.insert(1, _recovered(figures, size))
    return tuple(claim for claim in claims if claim is not None)


def _compared(
    figures: Mapping[str, Any], claim: str, paper: str, better: str, worse: str, size: str
) -> Claim | None:
    """The claim that one system has a lower perplexity than another, by their paired difference."""
    values = figures["perplexity"]
    if not (is_number(values.get(better)) and is_number(values.get(worse))):
        return None
    difference = (figures.get("differences") or {}).get(f"{better} - {worse}") or {}
    low, high = difference.get("interval") or (None, None)
    decided = _decides(low, high)
    return Claim(
        claim=claim,
        paper=paper,
        ours=f"{format_figure(values[worse])} → {format_figure(values[better])}",
        interval=f"{low:+.4f} … {high:+.4f} nats a token, on the same tokens" if decided else "",
        held="unclear" if not decided or low <= 0 <= high else "yes" if high < 0 else "no",
        size=size,
        command=_COMMAND,
    )


def _recovered(figures: Mapping[str, Any], size: str) -> Claim | None:
    gain = figures.get("gain_recovered") or {}
    if "of" not in gain:
        return None
    share, (low, high) = gain.get("share"), gain.get("interval") or (None, None)
    decided = _decides(low, high)
    held = "unclear"
    if decided and low >= PAPER_SHARE:
        held = "yes"
    elif decided and high < PAPER_SHARE:
        held = "no"
    return Claim(
        claim=f"The memory has {PAPER_SHARE:.0%} or more of kNN-LM's gain in log perplexity, without search.",
        paper="about 85% (10.42 → 9.58, kNN-LM 9.43; GPT2-large, WikiText-103)",
        ours=f"{share:.0%}" if is_number(share) else "kNN-LM gains nothing here",
        interval=f"{low:.0%} … {high:.0%}" if decided else "",
        held=held,
        size=size,
        command=_COMMAND,
    )


def _decides(low: Any, high: Any) -> bool:
    """Whether these are an interval; of a text too short to resample, both ends are the figure itself."""
    return is_number(low) and is_number(high) and low < high


def _size(results: Mapping[str, Any], figures: Mapping[str, Any], split: str) -> str:
    counts, corpus = results.get("parameters") or {}, results.get("corpus") or {}
    parts = [
        f"{format_count(counts[name])} {what}"
        for name, what in (("base", "decoder"), ("memory", "memory"))
        if is_number(counts.get(name))
    ]
    tokens = corpus["train"].get("tokens") if isinstance(corpus.get("train"), Mapping) else None
    parts += [f"{format_count(tokens)} train tokens"] if is_number(tokens) else []
    base = (figures.get("details") or {}).get("base") or {}
    if is_number(scored := base.get("scored_tokens")):
        method = base.get("interval_method")
        parts.append(f"{format_count(scored)} {split} tokens" + (f" ({method})" if method else ""))
    return ", ".join(parts)


def _more_training(results: Mapping[str, Any]) -> str:
    flops = results.get("training_flops") or {}
    return f"; {format_flops(flops['joint'])} FLOPs of training more" if is_number(flops.get("joint")) else ""
