import numpy as np
import pytest

from mlp_memory.artifacts import UserError
from mlp_memory.inference.config import GenerateConfig
from mlp_memory.inference.generate import Steps, generate
from mlp_memory.inference.prompts import fitted, packed, unpadded
from mlp_memory.inference.sampling import Filters

NO_END = -1


def continued(mixture, prompts, config, eos=NO_END, **stops):
    texts = [[] for _ in prompts]
    for found in generate(Steps(mixture, Filters.of(config)), prompts, eos, config, **stops):
        for row, token in found:
            texts[row].append(token)
    return texts


def test_a_ragged_batch_says_token_for_token_what_uncached_unbatched_decoding_says(
    make_mixture, decoder_config, prompts, plain
):
    mixture, config = make_mixture(decoder_config), GenerateConfig(max_tokens=9)
    for prompt, found in zip(prompts, continued(mixture, prompts, config)):
        tokens = list(prompt)
        for token in found:
            said = plain(mixture, tokens)
            best = np.sort(said)[::-1]
            assert said[token] == best[0] or best[0] - said[token] < 1e-5  # a tie to rounding
            tokens.append(token)
        assert len(found) == 9


def test_the_decoder_alone_decodes_by_the_same_steps(make_mixture, decoders, prompts, plain):
    mixture = make_mixture(decoders["mistral"], memory=False)
    for prompt, found in zip(prompts, continued(mixture, prompts, GenerateConfig(max_tokens=4))):
        tokens = list(prompt)
        for token in found:
            assert token == plain(mixture, tokens).argmax()
            tokens.append(token)


def test_padding_on_either_side_gives_the_same_prompts(prompts, rng):
    width = max(map(len, prompts)) + 3
    left, right = (np.zeros((len(prompts), width), int) for _ in range(2))
    left_mask, right_mask = np.zeros_like(left), np.zeros_like(left)
    for row, prompt in enumerate(prompts):
        left[row, width - len(prompt) :], left_mask[row, width - len(prompt) :] = prompt, 1
        right[row, : len(prompt)], right_mask[row, : len(prompt)] = prompt, 1
    left[left_mask == 0] = rng.integers(1, 30)
    assert unpadded(left, left_mask) == unpadded(right, right_mask) == prompts
    tokens_BxT, lengths_B = packed(prompts)
    assert [row[:n].tolist() for row, n in zip(tokens_BxT, lengths_B)] == prompts
    assert tokens_BxT.shape[1] % 64 == 0


def test_a_rows_draws_do_not_depend_on_the_rows_beside_it_and_repeat_by_their_seed(
    make_mixture, decoders, prompts, rng
):
    mixture, seed = make_mixture(decoders["llama"]), int(rng.integers(1000))
    config = GenerateConfig(max_tokens=8, temperature=1.3, top_k=20, top_p=0.9, seed=seed)
    found = continued(mixture, prompts, config)
    assert found == continued(mixture, prompts, config)
    assert found[:2] == continued(mixture, prompts[:2], config)
    assert found != continued(mixture, prompts, GenerateConfig(max_tokens=8, temperature=1.3, seed=seed + 1))


def test_draws_follow_the_mixture(make_mixture, decoders, plain, rng):
    mixture, prompt, draws = make_mixture(decoders["gpt2"]), rng.integers(0, 37, 5).tolist(), 8192
    config = GenerateConfig(max_tokens=1, temperature=1.0, seed=int(rng.integers(1 << 30)))
    found = continued(mixture, [prompt] * draws, config)
    counts = np.bincount([tokens[0] for tokens in found], minlength=37)
    expected = np.exp(plain(mixture, prompt)) * draws
    likely = expected > 5
    rest = [counts[~likely].sum(), expected[~likely].sum()]
    chi2 = ((counts - expected) ** 2 / expected)[likely].sum() + (rest[0] - rest[1]) ** 2 / max(rest[1], 1)
    # Chi-squared of n degrees: mean n, deviation sqrt(2 n); six deviations beyond is one run in millions.
    n = likely.sum()
    assert chi2 < n + 6 * np.sqrt(2 * n) + 10
    # The same counts are far from the decoder's own distribution: the memory is in it.
    alone = mixture.next_token({**mixture.parameters, "weight": 0.0}, *_last(mixture, prompt)).mixture_NxV[0]
    far = np.exp(np.asarray(alone, np.float64)) * draws
    assert ((counts - far) ** 2 / far)[likely].sum() > 3 * (n + 6 * np.sqrt(2 * n) + 10)


def _last(mixture, prompt):
    hidden, tapped = mixture.read(mixture.parameters, np.array([prompt]))
    return hidden[:, -1], tapped[:, -1]


def test_a_row_ends_at_the_end_of_its_document_or_where_it_is_told_and_the_others_go_on(
    make_mixture, decoders, prompts
):
    mixture, config = make_mixture(decoders["llama"]), GenerateConfig(max_tokens=12)
    whole = continued(mixture, prompts, config)
    eos = whole[0][3]
    ended = continued(mixture, prompts, config, eos)
    for found, tokens in zip(ended, whole):
        assert found == tokens[: tokens.index(eos) if eos in tokens else len(tokens)]
    told = []
    found = continued(
        mixture,
        prompts,
        config,
        stops=lambda row, tokens: told.append((row, len(tokens))) or len(tokens) > row,
    )
    assert found == [tokens[: row + 1] for row, tokens in enumerate(whole)]
    assert told == [(0, 1), (1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (3, 2), (2, 3), (3, 3), (3, 4)]


def test_a_penalty_makes_a_rows_tokens_rarer_in_that_row_alone(make_mixture, decoders, plain, prompts):
    mixture = make_mixture(decoders["llama"])
    config = GenerateConfig(max_tokens=6, repetition_penalty=1.7)
    for prompt, found in zip(prompts, continued(mixture, prompts, config)):
        tokens = list(prompt)
        for token in found:
            said = plain(mixture, tokens)
            said[list(set(tokens))] *= 1.7
            assert token == said.argmax()
            tokens.append(token)


def test_a_prompt_is_cut_to_what_can_be_read_and_continued(decoders):
    learned, rotary = decoders["gpt2"], decoders["llama"]  # 24 positions; as many as wanted
    prompt = list(range(30))
    assert fitted(prompt, GenerateConfig(max_tokens=20), learned) == [26, 27, 28, 29]
    assert fitted(prompt, GenerateConfig(max_tokens=20), rotary) == prompt
    assert fitted(prompt, GenerateConfig(context=3), rotary) == [27, 28, 29]
    with pytest.raises(UserError, match="max_tokens = 24: the decoder has 24 positions"):
        fitted(prompt, GenerateConfig(max_tokens=24), learned)
    with pytest.raises(UserError, match="empty prompt"):
        fitted([], GenerateConfig(), rotary)


@pytest.mark.parametrize(
    "impossible",
    [
        {"max_tokens": 0},
        {"max_tokens": 2.5},
        {"temperature": -1.0},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": 1.0},
        {"min_p": -0.1},
        {"repetition_penalty": 0.0},
        {"seed": -1},
        {"beams": 0},
        {"beams": 2, "temperature": 1.0},
        {"beams": 2, "stop": "end"},
        {"stop": ("",)},
        {"context": -1},
    ],
    ids=str,
)
def test_impossible_settings_are_refused(impossible):
    with pytest.raises(UserError):
        GenerateConfig(**impossible)
