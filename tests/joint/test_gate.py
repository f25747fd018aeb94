"""The gate's λ, its fit and its no-harm rule against slow references."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlp_memory import artifacts
from mlp_memory.artifacts import Directory, UserError
from mlp_memory.joint import gate as module
from mlp_memory.joint.config import GateConfig
from mlp_memory.joint.gate import (
    SIGNALS,
    Gate,
    HeldOut,
    fit_gate,
    gate_facts,
    gate_signals,
    gate_weight,
    harmless,
    load_gate,
)
from mlp_memory.statistics import bootstrap_mean
from mlp_memory.targets.interpolation import mixture_rows
from mlp_memory.training.sparse_head import Spread, label_and_spread, spread_of

CONFIG = GateConfig(bootstrap=200, penalties=(1e-3, 1e-1))


def log_softmax(z_NxV: np.ndarray) -> np.ndarray:
    return (
        z_NxV
        - np.log(np.exp(z_NxV - z_NxV.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - z_NxV.max(-1, keepdims=True)
    )


@pytest.mark.parametrize("chunk", [None, 1, 130])
@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_the_spread_is_that_of_the_whole_distribution(rng, chunk, scale):
    hidden, kernel = rng.normal(size=(23, 6)).astype(np.float32), scale * rng.normal(size=(6, 37))
    labels = rng.integers(0, 37, 23)
    log_p = log_softmax(hidden.astype(np.float64) @ kernel.astype(np.float32).astype(np.float64))
    entropy = -(np.exp(log_p) * log_p).sum(-1)
    found, spread = jax.jit(lambda h, k: label_and_spread(h, k, labels, None, chunk))(
        hidden, kernel.astype(np.float32)
    )
    for told in (spread, spread_of(jnp.float32(log_p))):
        np.testing.assert_allclose(told.entropy_N, entropy, atol=1e-4)
        np.testing.assert_allclose(told.most_N, log_p.max(-1), atol=1e-4)
    np.testing.assert_allclose(found, log_p[np.arange(23), labels], rtol=1e-5, atol=1e-4)


def random_gate(rng, dim: int) -> Gate:
    width = 0.5 + rng.random(4 + dim)
    parts = (rng.normal(size=4 + dim), width, rng.normal(size=4 + dim), rng.normal(), 0.7)
    return Gate(*map(jnp.float32, parts))


def test_lambda_is_the_formula_row_by_row(rng):
    gate, spreads = random_gate(rng, 3), [Spread(*rng.normal(size=(2, 9)).astype(np.float32)) for _ in "ab"]
    taps = rng.normal(size=(9, 3)).astype(np.float32)
    found = jax.jit(gate_weight)(gate, *spreads, taps)
    for n in range(9):
        x = [*(x_N[n] for spread in spreads for x_N in spread), *taps[n]]
        standard = (np.array(x) - gate.center_F) / gate.width_F
        expected = 0.7 / (1 + math.exp(-(standard @ gate.weights_F + gate.bias)))
        assert found[n] == pytest.approx(expected, abs=1e-5)


def test_lambda_never_reaches_one(rng):
    gate = random_gate(rng, 2)._replace(bias=jnp.float32(1e4), share=jnp.float32(1))
    spread = Spread(np.zeros(4, np.float32), np.zeros(4, np.float32))
    assert (gate_weight(gate, spread, spread, np.zeros((4, 2), np.float32)) < 1).all()


def test_the_loss_is_the_mixture_s_and_its_gradient_the_numerical_one(rng):
    n, f = 40, 5
    x, base, memory = rng.normal(size=(n, f)), np.log(rng.random(n)), np.log(rng.random(n))
    weight, w = rng.random(n), rng.normal(size=f + 1)
    loss, slope = module._loss(w, x, base, memory, weight, 0.3)
    lambdas = 1 / (1 + np.exp(-(x @ w[:-1] + w[-1])))
    slow = sum(weight * mixture_rows(base, memory, lambdas)) + 0.15 * sum(w[:-1] ** 2) * sum(weight)
    assert loss == pytest.approx(slow)
    for i in range(f + 1):
        step = np.eye(f + 1)[i] * 1e-5
        ends = [module._loss(w + s * step, x, base, memory, weight, 0.3)[0] for s in (1, -1)]
        assert slope[i] == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-4, abs=1e-4)


def text(rng, documents: int, helps: np.ndarray | None, dim: int = 3) -> HeldOut:
    """Rows where the memory is better if the first coordinate of the state is above 0, or as `helps` says."""
    ids = np.repeat(np.arange(documents), 60)
    taps = rng.normal(size=(len(ids), dim)).astype(np.float32)
    helps = taps[:, 0] > 0 if helps is None else helps
    base = np.full(len(ids), -3.0) + 0.3 * rng.normal(size=len(ids))
    memory = np.where(helps, -1.0, -8.0) + 0.3 * rng.normal(size=len(ids))
    spreads = [Spread(*rng.normal(size=(2, len(ids)))) for _ in range(2)]
    signals = np.array(gate_signals(*spreads, taps))
    return HeldOut(signals, base.astype(np.float32), memory.astype(np.float32), ids)


def of_signals(gate: Gate, signals_NxF: np.ndarray) -> np.ndarray:
    columns = [signals_NxF[:, i] for i in range(len(SIGNALS))]
    return gate_weight(gate, Spread(*columns[:2]), Spread(*columns[2:]), signals_NxF[:, len(SIGNALS) :])


def test_a_gate_learns_where_the_memory_helps_and_a_constant_where_nothing_tells(rng):
    _, facts = fit_gate({"validation": text(rng, 40, None)}, CONFIG)
    told = facts["texts"]["validation"]
    assert facts["signals"][-1] == "state"
    assert told["gate"] < told["fixed"] - 0.3
    assert told["gate"] < told["base"] - 0.3
    blind = text(rng, 40, rng.random(2400) < 0.5)
    gate, facts = fit_gate({"validation": blind}, CONFIG)
    told = facts["texts"]["validation"]
    assert (told["gate"], told["mean_lambda"]) == (told["fixed"], pytest.approx(told["fixed_lambda"]))
    assert facts["signals"] == []
    assert facts["gained"][1] >= 0
    np.testing.assert_array_equal(gate.weights_F, 0)
    signals = rng.normal(size=(9, len(SIGNALS) + 3)).astype(np.float32)
    np.testing.assert_allclose(of_signals(gate, signals), told["fixed_lambda"], rtol=1e-6)


def test_what_is_told_of_a_gate_is_what_fits_to_the_other_documents_give(rng):
    ours = text(rng, 40, None)
    config = dataclasses.replace(CONFIG, penalties=(0.01,), folds=2)
    _, facts = fit_gate({"validation": ours}, config)
    fold_N, slow_N = ours.documents_N % 2, np.zeros(len(ours.base_N))
    for fold in range(2):
        gate, _ = fit_gate({"validation": HeldOut(*(x[fold_N != fold] for x in ours))}, config)
        here_N = fold_N == fold
        slow_N[here_N] = mixture_rows(
            ours.base_N[here_N], ours.memory_N[here_N], of_signals(gate, ours.signals_NxF[here_N])
        )
    # The signals are standardised over all rows there, over the other fold's here.
    assert facts["texts"]["validation"]["gate"] == pytest.approx(slow_N.mean(), abs=0.01)


def test_no_harm_is_done_to_a_guard_that_the_gate_cannot_tell_apart(rng):
    texts = {"validation": text(rng, 40, np.ones(2400, bool)), "guard": text(rng, 40, np.zeros(2400, bool))}
    _, facts = fit_gate(texts, CONFIG)
    assert facts["share"] == 0
    assert facts["harmless_lambda"] == 0
    assert facts["texts"]["guard"]["gate"] == facts["texts"]["guard"]["base"]


def test_a_guard_that_the_state_tells_apart_costs_little(rng):
    texts = {"validation": text(rng, 40, np.ones(2400, bool)), "guard": text(rng, 40, np.zeros(2400, bool))}
    texts["guard"].signals_NxF[:, 5] += 20
    _, facts = fit_gate(texts, dataclasses.replace(CONFIG, penalties=(1e-6,)))
    assert facts["guard_weight"] > 0
    assert facts["share"] > 0.5
    assert facts["texts"]["guard"]["added"][1] <= CONFIG.margin
    inside = facts["texts"]["validation"]
    assert inside["gate"] < inside["base"] - 1


def test_a_guard_that_is_not_harmed_does_not_count_in_the_fit(rng):
    ours, guard = text(rng, 40, None), text(rng, 40, np.ones(2400, bool))
    (alone, _), (guarded, facts) = (
        fit_gate(texts, CONFIG) for texts in ({"validation": ours}, {"validation": ours, "guard": guard})
    )
    assert facts["guard_weight"] == 0
    np.testing.assert_allclose(alone.weights_F, guarded.weights_F, atol=1e-3)


def test_harmless_takes_the_first_candidate_that_the_slow_rule_takes(rng):
    texts = {name: text(rng, 12, rng.random(720) < p) for name, p in (("a", 0.9), ("b", 0.45))}
    candidates = np.arange(10, -1, -1) / 10 * 0.9

    def slow(weight: float) -> bool:
        for t in texts.values():
            added = mixture_rows(t.base_N, t.memory_N, weight) + t.base_N
            high = bootstrap_mean(added, t.documents_N, CONFIG.bootstrap, CONFIG.seed, CONFIG.level).high
            if high > CONFIG.margin:
                return False
        return True

    expected = next((w for w in candidates if slow(w)), 0.0)
    assert harmless(texts, lambda name, weight: weight, candidates, CONFIG) == expected
    assert 0 < expected < 0.9


def test_a_text_too_short_for_folds_is_one_line(rng):
    short = text(rng, 1, None)
    with pytest.raises(UserError, match="guard has 60 rows, too few for two folds"):
        fit_gate({"validation": text(rng, 12, None), "guard": short}, CONFIG)


def test_a_gate_comes_back_from_its_artifact_and_one_of_another_decoder_does_not(tmp_path, rng):
    directory, gate = Directory(tmp_path / "gate"), random_gate(rng, 3)
    manifest = artifacts.begin(directory, "gate", {}, {})
    artifacts.finish(directory, manifest, gate=gate_facts(gate))
    for a, b in zip(load_gate(directory, "gate", 3), gate):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(UserError, match="no gate over 8 finite signals"):
        load_gate(directory, "gate", 4)
    other = Directory(tmp_path / "other")
    artifacts.finish(other, artifacts.begin(other, "gate", {}, {}))
    with pytest.raises(UserError, match="holds no gate"):
        load_gate(other, "gate", 3)


@pytest.mark.parametrize(
    "settings",
    [
        {"penalties": ()},
        {"penalties": (-1.0,)},
        {"folds": 1},
        {"guard_weights": (-1.0,)},
        {"level": 1.0},
        {"margin": -1.0},
        {"rows": -1},
    ],
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        GateConfig(**settings)
