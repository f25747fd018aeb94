"""What a study measured: each variant's numbers, differences on the same tokens, tables for a terminal."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mlp_memory import artifacts
from mlp_memory.artifacts import UserError
from mlp_memory.decoder.config import DecoderConfig
from mlp_memory.evaluation.sections import Claim, Table
from mlp_memory.statistics import bootstrap_interval, bootstrap_mean, perplexity
from mlp_memory.studies.fit import Bounds
from mlp_memory.studies.measure import HELD_OUT, read_measured
from mlp_memory.studies.sizes import datastore_flops
from mlp_memory.studies.study import Study, is_decoder
from mlp_memory.studies.variants import MIXER, Variant
from mlp_memory.targets.interpolation import best_lambda, mixture_rows

DASH = "–"
_TARGETS = ("k", "temperature", "recall", "mean_support", "mean_kept_mass")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A variant's measured rows.

    Attributes:
      variant: which.
      numbers: its part of results.json.
      nll: nats of each scored token of the test split by system, float64; "base", and with a memory
        "memory" and "base_plus_memory".
      documents_N: the document of each.
    """

    variant: Variant
    numbers: dict[str, Any]
    nll: dict[str, np.ndarray]
    documents_N: np.ndarray

    @property
    def nll_N(self) -> np.ndarray:
        """Of the system that the variant is about."""
        return self.nll["base" if is_decoder(self.variant) else "base_plus_memory"]

    @property
    def perplexity(self) -> float:
        return perplexity(self.nll_N.sum(), len(self.nll_N))

    @property
    def interval(self) -> tuple[float, float]:
        """95 % of the perplexity, over documents."""
        system = "base" if is_decoder(self.variant) else "base_plus_memory"
        return tuple(self.numbers["test"]["interval"][system])

    @property
    def parameters(self) -> int:
        return sum(self.numbers["parameters"].values())

    @property
    def train_flops(self) -> int:
        return sum(self.numbers["training_flops"].values())


def outcomes(study: Study) -> list[Outcome]:
    """Of the variants that are measured, in order.

    Raises:
      UserError: something is missing, or variants were scored on different rows.
    """
    found = [_outcome(study, variant) for variant in study.variants.values()]
    for outcome in found[1:]:
        if not np.array_equal(outcome.documents_N, found[0].documents_N):
            raise UserError(f"{outcome.variant.name} was scored on other rows than {found[0].variant.name}")
    return found


def _outcome(study: Study, variant: Variant) -> Outcome:
    job, samples = study.job(variant), study.recipe.evaluate.bootstrap
    measured = {split: read_measured(job, split) for split in HELD_OUT}
    validation, weight, numbers = measured["validation"].log_probs, None, {}
    if "base_memory" in validation:
        weight = best_lambda(validation["base"], validation["base_memory"])[0]
    nll = {}
    for split, (log_probs, documents_N) in measured.items():
        nll = {"base": -log_probs["base"].astype(np.float64)}
        if weight is not None:
            nll["memory"] = -log_probs["base_memory"].astype(np.float64)
            nll["base_plus_memory"] = mixture_rows(log_probs["base"], log_probs["base_memory"], weight)
        intervals = {name: bootstrap_interval(n, documents_N, samples=samples) for name, n in nll.items()}
        numbers[split] = {
            "perplexity": {name: perplexity(n.sum(), len(n)) for name, n in nll.items()},
            "interval": {name: [found.low, found.high] for name, found in intervals.items()},
            "interval_method": intervals["base"].method,
            "scored_tokens": len(documents_N),
        }
    manifests = {
        name: artifacts.require(job.workdir / folder, "study")
        for name, folder in (("base", "decoder"), ("memory", "mixer" if variant.kind == MIXER else "memory"))
        if name in nll
    }
    numbers |= {
        "value": variant.value,
        "bindings": list(variant.bindings),
        "lambda": weight,
        "parameters": {name: made.facts["parameters"] for name, made in manifests.items()},
        "training_flops": {name: made.facts.get("train_flops", 0) for name, made in manifests.items()},
        "shapes": {name: made.facts["model"] for name, made in manifests.items()},
    }
    if weight is not None:
        facts, embed = artifacts.require(job.workdir / "targets", "retrieve").facts, job.config.embed
        numbers["teacher"] = {name: facts[name] for name in _TARGETS if name in facts}
        shape, rows = DecoderConfig(**numbers["shapes"]["base"]), len(job.stream("train"))
        numbers["datastore_flops"] = datastore_flops(shape, rows, embed.context, embed.stride)
    return Outcome(variant, numbers, nll, measured["test"].documents_N)


@dataclasses.dataclass(frozen=True)
class Difference:
    """Mean nats per token that one has more than another on the same tokens, and 95 % over documents."""

    nats: float
    bounds: Bounds

    def to_json(self) -> dict[str, Any]:
        return {"nats": self.nats, "interval": list(self.bounds)}

    def __str__(self) -> str:
        return f"{self.nats:+.4f} ({self.bounds.low:+.4f} … {self.bounds.high:+.4f})"


def difference(one: Outcome, other: Outcome, samples: int) -> Difference:
    """Of two variants' systems on the test split."""
    gap_N = one.nll_N - other.nll_N
    found = bootstrap_mean(gap_N, one.documents_N, samples=samples)
    return Difference(float(gap_N.mean()), Bounds(found.low, found.high))


def figure(value: float | None) -> str:
    """A count or FLOPs in three digits: 1.31 M, 7.4 T."""
    if value is None:
        return DASH
    for power, unit in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(value) >= 10**power:
            return f"{value / 10**power:.3g} {unit}"
    return f"{value:g}"


def interval_text(low: float, high: float, form: str = ".2f") -> str:
    """An interval's two ends."""
    return f"{low:{form}} … {high:{form}}" if math.isfinite(low + high) else DASH


def text_table(table: Table) -> str:
    """A table for a terminal, its title above and its notes below."""
    lines = [table.columns, *table.rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(table.columns))]

    def line(cells: Sequence[str]) -> str:
        return "  ".join(
            cell.ljust(width) if n == 0 else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(cells, widths))
        )

    shown = [line(cells).rstrip() for cells in lines]
    rule = "-" * max(map(len, shown))
    return "\n".join([table.title, rule, shown[0], rule, *shown[1:], rule, *table.notes])


def text_claims(claims: Sequence[Claim]) -> str:
    """Claims for a terminal."""
    lines = []
    for claim in claims:
        lines.append(f"{claim.held:>7}  {claim.claim}")
        for name in ("paper", "ours", "interval", "size"):
            if value := getattr(claim, name):
                lines.append(f"{'':9}{name}: {value}")
    return "\n".join(lines)


def size_text(found: Sequence[Outcome]) -> str:
    """What a claim was measured on."""
    low, high = (figure(end(o.parameters for o in found)) for end in (min, max))
    parameters = low if low == high else f"{low} to {high}"
    test = found[0].numbers["test"]
    return f"{parameters} parameters; {test['scored_tokens']:,} test tokens, {test['interval_method']}"
