"""What the scaling study found: both families' power laws, their exponents' ratio and where they cross."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mlp_memory.evaluation.sections import Claim, Findings, Plot, Section, Series, Table
from mlp_memory.statistics import resampled_means
from mlp_memory.studies.fit import Bounds, PowerLaw, crossing_bounds, fit, log_crossing, verdict
from mlp_memory.studies.results import (
    DASH,
    Outcome,
    difference,
    figure,
    interval_text,
    outcomes,
    size_text,
)
from mlp_memory.studies.study import Study
from mlp_memory.studies.variants import MEMORY

_FEWEST = 3  # sizes behind a fit that says anything
_REACH = 1000.0
_SURE = 0.95


def conclude(study: Study) -> tuple[dict[str, Any], Findings]:
    """The numbers and the findings, all variants measured."""
    found, samples = outcomes(study), study.recipe.evaluate.bootstrap
    memory = [o for o in found if o.variant.kind == MEMORY]
    alone = [o for o in found if o.variant.kind != MEMORY]
    gaps = [difference(one, other, samples) for one, other in zip(memory, alone)]
    numbers: dict[str, Any] = {
        "study": "scaling",
        "variants": {o.variant.name: o.numbers for o in found},
        "pairs": [
            {"memory": one.variant.name, "decoder": other.variant.name, "difference": gap.to_json()}
            for one, other, gap in zip(memory, alone, gaps)
        ],
    }
    claims = []
    largest = max(range(len(memory)), key=lambda n: memory[n].parameters)
    one, other, gap = memory[largest], alone[largest], gaps[largest]
    claims.append(
        Claim(
            "At equal parameters and training FLOPs, decoder and memory beat a decoder alone (largest size)",
            "9.58 with memory (1.55 B), 10.16 for GPT2-xl (1.56 B), WikiText-103; not at equal FLOPs",
            f"{one.perplexity:.2f} with memory, {other.perplexity:.2f} alone",
            f"{gap} nats",
            verdict(gap.bounds),
            size_text([one]),
            study.command,
        )
    )
    fits = None
    if len(memory) >= _FEWEST:
        fits = fitted(
            [o.parameters for o in memory],
            np.stack([o.nll_N for o in memory]),
            [o.parameters for o in alone],
            np.stack([o.nll_N for o in alone]),
            one.documents_N,
            samples,
        )
        numbers["fit"] = fits
        claims += _fit_claims(fits, size_text(found), study.command)
    tables = [_table(memory, alone, gaps), *([_fit_table(fits)] if fits else [])]
    section = Section("Study: scaling", (_SETTING,), tuple(tables), (_plot(memory, alone, fits),))
    return numbers, Findings(tuple(claims), (section,))


_SETTING = (
    "Pairs on one corpus: a decoder with memory, and a decoder alone of as many parameters, whose steps "
    "make its training FLOPs those of decoder and memory together (the datastore's apart). PPL = (β·N)^γ by "
    "least squares in logarithms; intervals are 95 % over the test's documents, drawn alike for all sizes. "
    "They leave out the chance of a training's one seed and how well a power law fits."
)


def fitted(
    memory_P: Sequence[int],
    memory_PxN: np.ndarray,
    alone_P: Sequence[int],
    alone_PxN: np.ndarray,
    documents_N: np.ndarray,
    samples: int,
) -> dict[str, Any]:
    """Both families' laws with intervals, as plain numbers.

    Args:
      memory_P, alone_P: parameters of each size.
      memory_PxN, alone_PxN: nats of each scored token under each size.
      documents_N: the document of each token.
      samples: of the bootstrap.
    """
    sizes = len(memory_P)
    means_SxJ = resampled_means(np.concatenate([memory_PxN, alone_PxN]), documents_N, samples)
    nats = {"memory": memory_PxN.mean(1), "decoder": alone_PxN.mean(1)}
    draws = {"memory": means_SxJ[:, :sizes], "decoder": means_SxJ[:, sizes:]}
    counts = {"memory": np.array(memory_P, float), "decoder": np.array(alone_P, float)}
    laws = {name: fit(counts[name], nats[name]) for name in nats}
    drawn = {name: fit(counts[name], draws[name]) for name in nats}
    families = {}
    for name, law in laws.items():
        residual_P = nats[name] - law.log_perplexity(counts[name])
        families[name] = {
            "parameters": counts[name].tolist(),
            "perplexity": np.exp(nats[name]).tolist(),
            "gamma": float(law.gamma),
            "gamma_interval": list(Bounds.of(drawn[name].gamma)),
            "log_beta": _finite(law.log_beta),
            "largest_residual_nats": float(np.abs(residual_P).max()),
        }
    ratio_S = drawn["memory"].gamma / drawn["decoder"].gamma
    without = [
        {name: float(_without(counts[name], nats[name], size).gamma) for name in nats}
        for size in range(sizes)
    ]
    low, high = min(map(min, counts.values())), max(map(max, counts.values()))
    with np.errstate(over="ignore"):  # nearly parallel curves may cross anywhere
        crossing = np.exp(float(log_crossing(laws["decoder"], laws["memory"])))
    share, bounds = crossing_bounds(drawn["decoder"], drawn["memory"], low / _REACH, high * _REACH)
    return {
        "sizes": sizes,
        "families": families,
        "ratio": float(laws["memory"].gamma / laws["decoder"].gamma),
        "ratio_interval": list(Bounds.of(ratio_S)),
        "gamma_difference": float(laws["memory"].gamma - laws["decoder"].gamma),
        "gamma_difference_interval": list(Bounds.of(drawn["memory"].gamma - drawn["decoder"].gamma)),
        "gamma_difference_without_one_size": [g["memory"] - g["decoder"] for g in without],
        "crossing": _finite(crossing),
        "crossing_share": share,
        "crossing_interval": None if bounds is None else list(bounds),
    }


def _without(parameters_P: np.ndarray, nats_P: np.ndarray, size: int) -> PowerLaw:
    return fit(np.delete(parameters_P, size), np.delete(nats_P, size))


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def steeper(fits: dict[str, Any]) -> str:
    """Whether perplexity falls faster with a memory: by the interval, and by every fit without one size."""
    held = verdict(Bounds(*fits["gamma_difference_interval"]))
    signs = {np.sign(value) for value in fits["gamma_difference_without_one_size"]}
    agreed = signs == {-1.0 if held == "yes" else 1.0}
    return held if agreed else "unclear"


def crosses(fits: dict[str, Any]) -> str:
    """Whether the memory's curve passes below the decoder's as N grows: by the share of resamples."""
    share = fits["crossing_share"]
    return "yes" if share >= _SURE else "no" if share <= 1 - _SURE else "unclear"


def _fit_claims(fits: dict[str, Any], size: str, command: str) -> list[Claim]:
    gamma = {name: family["gamma"] for name, family in fits["families"].items()}
    crossing, bounds = fits["crossing"], fits["crossing_interval"]
    share = f"in {fits['crossing_share']:.0%} of resamples"
    return [
        Claim(
            "Perplexity falls faster with parameters where part of them is a memory",
            "γ −0.168 against −0.143 (ratio 1.17) on WikiText-103, −0.268 against −0.216 (1.24) on Web",
            f"γ {gamma['memory']:.3f} against {gamma['decoder']:.3f}, ratio {fits['ratio']:.2f}",
            f"ratio {interval_text(*fits['ratio_interval'])}",
            steeper(fits),
            f"{fits['sizes']} sizes, {size}",
            command,
        ),
        Claim(
            "The two curves cross, and beyond that a memory is the better use of parameters",
            "by its fits at 0.7 to 0.9 B parameters",
            f"fits cross at {figure(crossing)} parameters" if crossing else "fits do not cross",
            f"{figure(bounds[0])} … {figure(bounds[1])} parameters, {share}" if bounds else share,
            crosses(fits),
            f"{fits['sizes']} sizes, {size}",
            command,
        ),
    ]


def _table(memory: Sequence[Outcome], alone: Sequence[Outcome], gaps: Sequence[Any]) -> Table:
    columns = (
        "system",
        "parameters",
        "training FLOPs",
        "datastore FLOPs",
        "λ",
        "perplexity",
        "95 %",
        "nats to peer",
    )
    rows = []
    for one, other, gap in zip(memory, alone, gaps):
        base = one.numbers["test"]
        store = one.numbers["datastore_flops"]
        flops, parameters = one.numbers["training_flops"], one.numbers["parameters"]
        rows.append(
            (
                f"{one.variant.value.removesuffix(' + memory')}, no memory",
                figure(parameters["base"]),
                figure(flops["base"]),
                DASH,
                DASH,
                f"{base['perplexity']['base']:.2f}",
                interval_text(*base["interval"]["base"]),
                DASH,
            )
        )
        for outcome, datastore, last in ((one, figure(sum(store.values())), str(gap)), (other, DASH, DASH)):
            weight = outcome.numbers["lambda"]
            rows.append(
                (
                    str(outcome.variant.value),
                    figure(outcome.parameters),
                    figure(outcome.train_flops),
                    datastore,
                    DASH if weight is None else f"{weight:.3g}",
                    f"{outcome.perplexity:.2f}",
                    interval_text(*outcome.interval),
                    last,
                )
            )
    worst = max(abs(other.parameters / one.parameters - 1) for one, other in zip(memory, alone))
    flops = max(abs(other.train_flops / one.train_flops - 1) for one, other in zip(memory, alone))
    notes = (
        f"Matched in each pair: parameters within {worst:.1%}, training FLOPs within {flops:.1%}.",
        "Datastore FLOPs: embed's forward passes and every row's exact search; approximate search does less.",
    )
    return Table("Scaling: pairs of equal parameters and training FLOPs, test", columns, tuple(rows), notes)


def _fit_table(fits: dict[str, Any]) -> Table:
    rows = []
    for name, family in fits["families"].items():
        beta = family["log_beta"]
        rows.append(
            (
                {"memory": "decoder + memory", "decoder": "decoder alone"}[name],
                f"{family['gamma']:.4f}",
                interval_text(*family["gamma_interval"], ".4f"),
                DASH if beta is None else f"{np.exp(beta):.3g}",
                f"{family['largest_residual_nats']:.4f}",
            )
        )
    gaps = ", ".join(f"{value:+.4f}" for value in fits["gamma_difference_without_one_size"])
    low, high = fits["gamma_difference_interval"]
    notes = (
        f"γ with memory less γ alone: {fits['gamma_difference']:+.4f} ({low:+.4f} … {high:+.4f}); "
        f"each size left out in turn: {gaps}.",
    )
    columns = ("family", "γ", "95 %", "β (N in parameters)", "largest residual, nats")
    return Table(f"PPL = (β·N)^γ over {fits['sizes']} sizes", columns, tuple(rows), notes)


def _plot(memory: Sequence[Outcome], alone: Sequence[Outcome], fits: dict[str, Any] | None) -> Plot:
    series = []
    for name, family in (("decoder + memory", memory), ("decoder alone", alone)):
        ordered = sorted(family, key=lambda o: o.parameters)
        low_N, high_N = zip(*(o.interval for o in ordered))
        x_N, y_N = zip(*((float(o.parameters), o.perplexity) for o in ordered))
        series.append(Series(name, x_N, y_N, low_N, high_N, line=fits is None))
    if fits:
        ends = [value for family in fits["families"].values() for value in family["parameters"]]
        x_N = np.geomspace(min(ends) / 1.5, max(ends) * 1.5, 20)
        for name, key in (("decoder + memory, fit", "memory"), ("decoder alone, fit", "decoder")):
            family = fits["families"][key]
            if family["log_beta"] is not None:
                law = PowerLaw(family["log_beta"], family["gamma"])
                y_N = np.exp(law.log_perplexity(x_N))
                series.append(Series(name, tuple(x_N.tolist()), tuple(y_N.tolist())))
    return Plot(
        "Perplexity at equal parameters and training FLOPs",
        "parameters",
        "perplexity on test",
        tuple(series),
        log_x=True,
        log_y=True,
        notes=("Bands are 95 % over documents.",),
    )
