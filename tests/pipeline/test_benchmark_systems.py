import numpy as np
import pytest

from mlp_memory.artifacts import Directory
from mlp_memory.evaluation.harness.models import Models, SystemAt
from mlp_memory.evaluation.harness.names import SYSTEMS
from mlp_memory.job import Job
from mlp_memory.language_model import language_model
from mlp_memory.recipes import load_config

PAIRS = [("ab cde", " fgh"), ("ab cde", " fgi abc"), ("", "pol"), (" ".join(["mno"] * 12), " abc")]
PROMPTS = ["ab cde f", "gh"]


@pytest.fixture(scope="module")
def job(small_run):
    workdir = Directory(small_run)
    return Job(workdir, load_config([], [], workdir))


@pytest.fixture(scope="module")
def models(job):
    return Models(job, SYSTEMS, 32, 128, 2)


@pytest.mark.parametrize(
    ("system", "model", "weight"),
    [
        ("base", "base", 0.0),
        ("base_plus_memory", "base_plus_memory", 0.3),
        ("base_plus_memory_gated", "base_plus_memory", "gate"),
        ("joint", "joint", 0.6),
        ("joint_gated", "joint", "gate"),
        ("knn_lm_exact", "knn_lm_exact", 0.4),
    ],
)
def test_a_system_scores_and_continues_as_its_language_model(models, job, system, model, weight):
    alone, found = language_model(job, model, weight), SystemAt(models, system, weight)
    assert found.generate(PROMPTS, ("x",), 6) == alone.generate(PROMPTS, stop="x", max_tokens=6)
    if model != "knn_lm_exact":  # which scores nothing alone
        wanted = [(one.log_prob, one.greedy) for one in alone.log_likelihoods(PAIRS)]
        scored = found.log_likelihoods(PAIRS)
        np.testing.assert_allclose([a for a, _ in scored], [b for b, _ in wanted], atol=1e-3)


def test_searches_mix_into_the_decoder_more_with_each_lambda(models):
    base = [log_prob for log_prob, _ in SystemAt(models, "base").log_likelihoods(PAIRS)]
    for system in ("knn_lm_exact", "knn_lm_scann"):
        scored = models.score("base", PAIRS)
        np.testing.assert_allclose(scored.at(system, 0.0)[0], base, atol=1e-4)
        mixed = np.array([scored.at(system, weight)[0] for weight in (0.0, 0.01)])
        assert np.isfinite(mixed).all()
        assert (mixed[1] != mixed[0]).all()
