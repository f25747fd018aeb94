import numpy as np
import pytest

from mlp_memory.evaluation.harness.examples import Example
from mlp_memory.evaluation.harness.metrics import answer_metrics, choice_metrics


def example(**fields):
    return Example("", "", **{"choices": (" a", " bb", " c"), "right": (1,), **fields})


def test_the_likeliest_choice_is_found_by_each_scoring():
    log_prob, premise, tokens = [-1.0, -2.0, -3.0], [-0.5, -4.0, -3.0], [1, 4, 1]
    found = {
        scoring: choice_metrics(example(), log_prob, premise, tokens, scoring)["acc"]
        for scoring in ("likelihood", "likelihood_per_byte", "likelihood_per_token", "pmi")
    }
    # By byte −1, −1, −3: a tie; by token −1, −0.5, −3; by PMI −0.5, 2, 0.
    assert found == {"likelihood": 0, "likelihood_per_byte": 0, "likelihood_per_token": 1, "pmi": 1}
    both = choice_metrics(example(), log_prob, premise, tokens, "likelihood")
    assert both == {"acc": 0.0, "acc_pmi": 1.0}
    assert choice_metrics(example(), log_prob, None, tokens, "likelihood") == {"acc": 0.0}


def test_a_tie_with_a_wrong_choice_takes_none_and_with_a_right_one_is_none():
    assert choice_metrics(example(), [-1.0, -1.0, -2.0], None, [1, 1, 1], "likelihood")["acc"] == 0
    tied = choice_metrics(example(right=(0, 1)), [-1.0, -1.0, -2.0], None, [1, 1, 1], "likelihood")
    assert tied["acc"] == 1


def test_mc2_is_the_right_answers_share_and_mc1_compares_its_own_answers_only(rng):
    log_prob = rng.normal(size=5) * 3 - 40
    of = example(choices=tuple(f" {c}" for c in "abcde"), right=(0, 1), mc1=(0, 4), mc2=(0, 1, 2, 3))
    found = choice_metrics(of, log_prob, None, [1] * 5, "likelihood")
    p = np.exp(log_prob)
    assert found["mc2"] == pytest.approx((p[0] + p[1]) / p[:4].sum())
    assert found["mc1"] == float(log_prob[0] > log_prob[4])


@pytest.mark.parametrize(
    ("said", "answers", "wanted"),
    [
        (" The Beatles.", ["Beatles"], (1, 1, 1)),
        ("It was the Beatles, in 1963", ["Rolling Stones", "beatles"], (0, 1 / 3, 1)),
        ("Beat", ["Beatles"], (0, 0, 0)),
        ("", ["A"], (0, 0, 0)),
        ("a", ["The"], (0, 0, 0)),
        ("the A!", ["A"], (0, 2 / 3, 1)),
        ("...", ["?"], (0, 0, 0)),
        ("New York City", ["York"], (0, 0.5, 1)),
    ],
)
def test_answers_are_compared_as_squad_does(said, answers, wanted):
    found = answer_metrics(said, answers)
    assert tuple(found[name] for name in ("exact_match", "f1", "contains")) == pytest.approx(wanted)
