"""What the pipeline's own results say of the paper's claims."""

import pytest

from mlp_memory.evaluation.claims import measured_claims


def results_of(low: float, high: float, share: tuple[float, float] | None = (0.9, 1.1)) -> dict:
    pairs = (
        "base_plus_memory - base",
        "base_plus_memory - decoder_equal_params",
        "joint - base_plus_memory",
    )
    return {
        "schema": 1,
        "test": {
            "perplexity": {
                "base": 50.0,
                "knn_lm_exact": 40.0,
                "base_plus_memory": 41.0,
                "joint": 39.0,
                "decoder_equal_params": 44.0,
            },
            "details": {"base": {"scored_tokens": 1234, "interval_method": "bootstrap over 37 documents"}},
            "differences": {pair: {"nats": (low + high) / 2, "interval": [low, high]} for pair in pairs},
            "gain_recovered": {"of": "knn_lm_exact", "share": 0.97, "interval": share and list(share)},
        },
        "parameters": {"base": 2_000_000, "memory": 3_000_000},
        "training_flops": {"joint": 5e13},
        "corpus": {"train": {"tokens": 400_000}},
    }


@pytest.mark.parametrize(
    ("low", "high", "held"),
    [
        (-0.2, -0.1, "yes"),
        (0.1, 0.2, "no"),
        (-0.1, 0.1, "unclear"),
        (0.0, 0.0, "unclear"),
        (-0.1, -0.1, "unclear"),
    ],
)
def test_a_lower_perplexity_is_decided_by_the_paired_interval(low: float, high: float, held: str) -> None:
    claims = measured_claims(results_of(low, high))
    assert len(claims) == 4
    assert [claim.held for i, claim in enumerate(claims) if i != 1] == [held] * 3
    assert claims[0].ours == "50.00 → 41.00"
    assert claims[2].ours == "44.00 → 41.00"
    assert claims[3].ours == "41.00 → 39.00"


@pytest.mark.parametrize(
    ("share", "held"),
    [
        ((0.9, 1.2), "yes"),
        ((0.85, 0.9), "yes"),
        ((0.5, 0.8), "no"),
        ((0.8, 0.9), "unclear"),
        (None, "unclear"),
    ],
)
def test_the_share_of_the_gain_is_held_against_the_papers(share: tuple | None, held: str) -> None:
    claim = measured_claims(results_of(-0.2, -0.1, share))[1]
    assert claim.held == held
    assert claim.ours == "97%"
    assert (claim.interval == "") == (share is None)


def test_every_claim_says_its_size_and_the_papers_figure_and_a_command() -> None:
    for claim in measured_claims(results_of(-0.2, -0.1)):
        assert claim.size.startswith(
            "2.00 M decoder, 3.00 M memory, 400 k train tokens, 1,234 test tokens (bootst"
        )
        assert claim.command.startswith("python -m mlp_memory run")
    paper = [claim.paper for claim in measured_claims(results_of(-0.2, -0.1))]
    for text, figure in zip(paper, ("10.42 → 9.58", "85%", "10.16 → 9.58", "no figure")):
        assert figure in text
    assert "5.00 × 10¹³ FLOPs of training more" in measured_claims(results_of(-0.2, -0.1))[3].size


def test_what_was_not_scored_is_not_claimed_and_what_has_no_interval_is_unclear() -> None:
    results = results_of(-0.2, -0.1)
    for system in ("joint", "decoder_equal_params"):
        del results["test"]["perplexity"][system]
    del results["test"]["gain_recovered"], results["test"]["differences"], results["parameters"]
    (claim,) = measured_claims(results)
    assert claim.held == "unclear"
    assert claim.interval == ""
    assert measured_claims({"schema": 1, "test": {"perplexity": {}}}) == ()
