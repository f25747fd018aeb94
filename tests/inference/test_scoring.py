import numpy as np

from mlp_memory.inference.scoring import Scorer


def test_scores_are_the_log_probabilities_of_plain_reading_whatever_the_batch(
    make_mixture, decoder_config, plain, rng
):
    mixture = make_mixture(decoder_config)
    sequences = [rng.integers(0, 37, n).tolist() for n in (1, 2, 9, 13, 5)]
    for sequence, found in zip(sequences, Scorer(mixture, 16, batch=2)(sequences)):
        said = [plain(mixture, sequence[:n]) for n in range(1, len(sequence))]
        expected = np.array([log_prob[token] for log_prob, token in zip(said, sequence[1:])])
        np.testing.assert_allclose(found.log_prob_T, expected, atol=1e-4)
        likeliest = [log_prob.argmax() == token for log_prob, token in zip(said, sequence[1:])]
        assert found.likeliest_T.tolist() == likeliest


def test_what_is_longer_than_the_context_is_read_through_windows_that_overlap_by_half(
    make_mixture, decoders, plain, rng
):
    mixture, sequence = make_mixture(decoders["llama"]), rng.integers(0, 37, 23).tolist()
    found = Scorer(mixture, 8, batch=3)([sequence])[0]
    for t in range(22):
        start = 0 if t < 8 else (t - 8) // 4 * 4 + 4
        expected = plain(mixture, sequence[start : t + 1])[sequence[t + 1]]
        np.testing.assert_allclose(found.log_prob_T[t], expected, atol=1e-4)
