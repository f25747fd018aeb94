import dataclasses
import itertools

import numpy as np
import pytest

from mlp_memory.inference.beam import BeamSearch
from mlp_memory.inference.config import GenerateConfig
from mlp_memory.inference.sampling import Filters


def search(mixture, prompts, eos, config):
    return BeamSearch(mixture, Filters.of(config), config.beams)(prompts, eos, config)


def slow_beam(mixture, plain, prompt, eos, config):
    """One prompt, no cache: every hypothesis is read anew at every step."""
    growing, finished = [([], 0.0)], []
    for _ in range(config.max_tokens):
        choices = []
        for tokens, score in growing:
            said = plain(mixture, prompt + tokens)
            choices += [(score + said[t], [*tokens, t]) for t in range(len(said))]
        choices.sort(key=lambda choice: -choice[0])
        finished += [
            (score / len(tokens) ** config.length_penalty, tokens[:-1])
            for score, tokens in choices[: config.beams]
            if tokens[-1] == eos
        ]
        growing = [(tokens, score) for score, tokens in choices if tokens[-1] != eos][: config.beams]
    finished += [(score / len(tokens) ** config.length_penalty, tokens) for tokens, score in growing]
    return sorted(finished, key=lambda found: -found[0])[: config.beams]


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 1.7])
def test_beams_are_those_of_the_slow_search(make_mixture, decoders, prompts, plain, rng, length_penalty):
    mixture = make_mixture(decoders["llama"])
    config = GenerateConfig(max_tokens=5, beams=3, length_penalty=length_penalty)
    eos = int(np.argsort(-plain(mixture, prompts[0]))[2])  # likely enough to end some hypotheses
    for prompt, found in zip(prompts, search(mixture, prompts, eos, config)):
        expected = slow_beam(mixture, plain, prompt, eos, config)
        np.testing.assert_allclose([h.score for h in found], [score for score, _ in expected], atol=1e-4)
        assert [h.tokens for h in found] == [tokens for _, tokens in expected]


def test_as_many_beams_as_texts_find_the_likeliest_text(make_mixture, decoders, plain, rng):
    mixture = make_mixture(dataclasses.replace(decoders["llama"], vocab_size=6))
    prompt, config = (
        rng.integers(0, 6, 4).tolist(),
        GenerateConfig(max_tokens=2, beams=36, length_penalty=0.0),
    )
    best = max(
        itertools.product(range(6), repeat=2),
        key=lambda text: plain(mixture, prompt)[text[0]] + plain(mixture, [*prompt, text[0]])[text[1]],
    )
    assert search(mixture, [prompt], -1, config)[0][0].tokens == list(best)
