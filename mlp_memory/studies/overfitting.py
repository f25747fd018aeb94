"""What the overfitting study found: train and test losses over epochs, and whose test loss rises."""

from typing import Any, NamedTuple

import numpy as np

from mlp_memory import artifacts
from mlp_memory.evaluation.sections import Claim, Findings, Plot, Section, Series, Table
from mlp_memory.statistics import resampled_means
from mlp_memory.studies.curves import FOLDER, SAMPLES, Check, read_curve
from mlp_memory.studies.fit import Bounds, verdict
from mlp_memory.studies.results import Difference, figure
from mlp_memory.studies.sizes import cost
from mlp_memory.studies.study import Study
from mlp_memory.studies.variants import CURVE

_MEMORY, _RIVALS = "memory", ("decoder", "memory_ce")
_MIXED = "_with_decoder"


class Curve(NamedTuple):
    """A variant's checks, and which of its models is looked at: "alone" or "mixture"."""

    title: str
    checks: list[Check]
    model: str = "alone"

    @property
    def best(self) -> Check:
        """The check of this model's least validation loss."""
        return min(self.checks, key=lambda check: check.validation[self.model])

    def rise(self) -> tuple[np.ndarray, np.ndarray]:
        """Test nats of each unit at the last check less those at the best, summed, and the unit's tokens."""
        last, best = self.checks[-1].samples["test"], self.best.samples["test"]
        return last[self.model] - best[self.model], last["tokens"]

    def mean(self, check: Check, sample: str) -> float:
        """Nats per token."""
        part = check.samples[sample]
        return float(part[self.model].sum() / part["tokens"].sum())


def rise(curve: Curve, rival: Curve | None, samples: int) -> Difference:
    """Nats per test token that a curve rises from its best check to its last, less its rival's rise.

    The interval is over the test's units, the same for both, by resampling them.
    """
    sums_U, tokens_U = curve.rise()
    if rival is not None:
        sums_U = sums_U - rival.rise()[0]
    means_S = _resampled(sums_U, tokens_U, samples)
    return Difference(float(sums_U.sum() / tokens_U.sum()), Bounds.of(means_S))


def _resampled(sums_U: np.ndarray, tokens_U: np.ndarray, samples: int) -> np.ndarray:
    """Means per token over resamples of units, each given by its sum and its tokens."""
    units = np.arange(len(sums_U))
    # A unit's mean stands for each of its tokens: units and their weights are then those of the rows.
    rows_N = np.repeat(sums_U / tokens_U, tokens_U)
    return resampled_means(rows_N[None], np.repeat(units, tokens_U), samples)[:, 0]


def conclude(study: Study) -> tuple[dict[str, Any], Findings]:
    """The numbers and the findings, all curves made."""
    samples = study.recipe.evaluate.bootstrap
    curves = {}
    for name, variant in study.variants.items():
        curves[name] = Curve(str(variant.value), read_curve(study.job(variant)))
        if variant.kind == CURVE:
            title = f"{variant.value}, with decoder"
            curves[f"{name}{_MIXED}"] = Curve(title, curves[name].checks, "mixture")
    rises = {name: rise(curve, None, samples) for name, curve in curves.items()}
    gaps = {name: rise(curves[_MEMORY], curves[name], samples) for name in _RIVALS}
    numbers = {
        "study": "overfitting",
        "variants": {name: _numbers(study, name, curves) for name in study.variants},
        "rises": {name: found.to_json() for name, found in rises.items()},
        "memory_rise_less": {name: found.to_json() for name, found in gaps.items()},
    }
    last = curves[_MEMORY].checks[-1]
    tokens_U = last.samples["test"]["tokens"]
    size = f"{last.epochs:.3g} epochs; {tokens_U.sum():,} test tokens of {len(tokens_U)} documents or blocks"
    claims = [
        Claim(
            f"As epochs grow, the memory's test loss rises less than that of {words}",
            paper,
            f"{rises[_MEMORY].nats:+.4f} nats from best check to last; it: {rises[name].nats:+.4f}",
            f"difference {gaps[name]}",
            verdict(gaps[name].bounds),
            size,
            study.command,
        )
        for name, words, paper in (
            ("decoder", "a decoder of as many parameters as decoder and memory", ""),
            ("memory_ce", "a memory trained on next tokens alone (α = 0)", ""),
        )
    ]
    plots = tuple(_plot(curves, sample) for sample in SAMPLES)
    section = Section("Study: overfitting", (_SETTING,), (_table(study, curves, rises),), plots)
    return numbers, Findings(tuple(claims), (section,))


_SETTING = (
    "Each is trained at a constant rate, the memories on the finished decoder's states, the decoder from "
    "scratch; losses are the true next tokens', at the same rows each time. A rise is the test loss at the "
    "last check less that at the check where the same model's validation loss is least, with 95 % over the "
    "test's documents. Every training has one seed."
)


def _numbers(study: Study, name: str, curves: dict[str, Curve]) -> dict[str, Any]:
    variant = study.variants[name]
    both = [curve for curve in (curves[name], curves.get(f"{name}{_MIXED}")) if curve]
    checks = [
        {
            "step": check.step,
            "epochs": check.epochs,
            "lambda": check.weight,
            "validation": check.validation,
            **{sample: {curve.model: curve.mean(check, sample) for curve in both} for sample in SAMPLES},
        }
        for check in curves[name].checks
    ]
    trained = cost(study.configs[name], variant.kind == CURVE)
    return {
        "value": variant.value,
        "bindings": list(variant.bindings),
        "parameters": {"base": trained.decoder, "memory": trained.memory},
        "training_flops": artifacts.require(study.job(variant).workdir / FOLDER, "study").facts[
            "train_flops"
        ],
        "best_step": {curve.model: curve.best.step for curve in both},
        "checks": checks,
    }


def _table(study: Study, curves: dict[str, Curve], rises: dict[str, Difference]) -> Table:
    columns = (
        "trained",
        "parameters",
        "epochs",
        "best epoch",
        "train at best",
        "test at best",
        "train at last",
        "test at last",
        "rise (95 %)",
    )
    rows = []
    for name, curve in curves.items():
        best, last = curve.best, curve.checks[-1]
        trained = cost(study.configs[name.removesuffix(_MIXED)], name != "decoder")
        losses = [f"{curve.mean(check, sample):.4f}" for check in (best, last) for sample in SAMPLES]
        count = figure(trained.memory or trained.decoder)
        cells = (curve.title, count, f"{last.epochs:.3g}", f"{best.epochs:.3g}", *losses, str(rises[name]))
        rows.append(cells)
    notes = (
        "Losses in nats per token, of what is trained alone or mixed with its decoder by the check's own λ; "
        "parameters of what is trained.",
    )
    return Table("Overfitting: losses as epochs grow", columns, tuple(rows), notes)


def _plot(curves: dict[str, Curve], sample: str) -> Plot:
    series = []
    for curve in curves.values():
        x_N = tuple(check.epochs for check in curve.checks)
        series.append(Series(curve.title, x_N, tuple(curve.mean(check, sample) for check in curve.checks)))
    return Plot(f"Loss on {sample} as epochs grow", "epochs", "nats per token", tuple(series))
