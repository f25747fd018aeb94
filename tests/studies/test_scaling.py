import numpy as np
import pytest

from mlp_memory.artifacts import Directory
from mlp_memory.evaluation.sections import Findings
from mlp_memory.studies import scaling
from mlp_memory.studies.fit import PowerLaw
from mlp_memory.studies.results import Outcome
from mlp_memory.studies.study import Study


@pytest.fixture
def study(recipe) -> Study:
    return Study("scaling", [recipe], ["study.sizes = ((1, 16), (1, 32), (2, 32))"], Directory("/nowhere"))


@pytest.fixture
def outcomes_of(study, rng):
    """(law with memory, law alone) -> outcomes on random documents whose means are these laws'."""
    ids_N = np.repeat(np.arange(40), rng.integers(2, 6, 40))
    noise_N = rng.normal(0, 1, len(ids_N))
    noise_N -= noise_N.mean()

    def make(memory: PowerLaw, alone: PowerLaw) -> list[Outcome]:
        found = []
        for variant in study.variants.values():
            with_memory = variant.kind == "memory"
            parameters = 1_000_000 * 4**variant.pair
            law = memory if with_memory else alone
            nll_N = law.log_perplexity(parameters) + noise_N
            names = ("base", "base_plus_memory") if with_memory else ("base",)
            counts = (
                {"base": parameters // 2, "memory": parameters // 2} if with_memory else {"base": parameters}
            )
            test = {
                "perplexity": {name: float(np.exp(nll_N.mean())) for name in names},
                "interval": {name: [1.0, 2.0] for name in names},
                "interval_method": "bootstrap over 40 documents",
                "scored_tokens": len(nll_N),
            }
            numbers = {
                "test": test,
                "parameters": counts,
                "training_flops": {name: 100 * count for name, count in counts.items()},
                "datastore_flops": {"embed": 1, "exact_search": 2},
                "lambda": 0.4 if with_memory else None,
            }
            found.append(Outcome(variant, numbers, dict.fromkeys(names, nll_N), ids_N))
        return found

    return make


def laws(ratio: float, crossing: float) -> tuple[PowerLaw, PowerLaw]:
    """With memory and alone, that many times as steep and equal at that many parameters."""
    alone = PowerLaw(-20.0, -0.2)
    gamma = alone.gamma * ratio
    return PowerLaw(
        alone.gamma * (np.log(crossing) + alone.log_beta) / gamma - np.log(crossing), gamma
    ), alone


@pytest.mark.parametrize(
    ("ratio", "crossing", "held"),
    [
        (1.3, 3e6, ["yes", "yes", "yes"]),  # the largest size lies beyond the crossing
        (1.3, 3e8, ["no", "yes", "yes"]),  # all lie before it
        (0.7, 3e6, ["no", "no", "no"]),
    ],
)
def test_claims_follow_the_laws_that_gave_the_figures(ratio, crossing, held, study, outcomes_of, monkeypatch):
    made = outcomes_of(*laws(ratio, crossing))
    monkeypatch.setattr(scaling, "outcomes", lambda study: made)
    numbers, findings = scaling.conclude(study)
    assert [claim.held for claim in findings.claims] == held
    assert numbers["fit"]["ratio"] == pytest.approx(ratio, rel=1e-6)
    if ratio > 1:
        assert numbers["fit"]["crossing"] == pytest.approx(crossing, rel=1e-3)
    else:
        assert numbers["fit"]["crossing_share"] == 0
    (section,) = findings.sections
    assert [series.name for series in section.plots[0].series] == [
        "decoder + memory",
        "decoder alone",
        "decoder + memory, fit",
        "decoder alone, fit",
    ]
    fit, points = section.plots[0].series[2], section.plots[0].series[0]
    nearest = int(np.argmin(np.abs(np.log(fit.x_N) - np.log(points.x_N[1]))))
    assert fit.y_N[nearest] == pytest.approx(points.y_N[1], rel=0.05)
    assert "parameters within 0.0%, training FLOPs within 0.0%" in section.tables[0].notes[0]
    assert Findings.from_json(findings.to_json()) == findings
