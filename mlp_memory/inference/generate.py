"""Continues a prompt token by token."""

from collections.abc import Iterator

import numpy as np

from mlp_memory.inference.config import GenerateConfig
from mlp_memory.inference.next_token import Predictor


def sampling_probs(log_prob_V: np.ndarray, config: GenerateConfig) -> np.ndarray:
    """The distribution that is drawn from, [V] float64: tempered, cut to top-k and top-p.

    Temperature 0 puts all mass on the most likely token (the smallest id of equals).
    """
    if config.temperature == 0:
        probs = np.zeros(len(log_prob_V))
        probs[int(np.argmax(log_prob_V))] = 1.0
        return probs
    z = log_prob_V.astype(np.float64) / config.temperature
    probs = np.exp(z - z.max())
    order = np.argsort(-probs, kind="stable")
    keep = np.ones(len(probs), bool)
    if config.top_k:
        keep[order[config.top_k :]] = False
    cumulative = np.cumsum(probs[order] / probs.sum())
    # The token that crosses top_p stays: at least one token always does.
    keep[order[1:][cumulative[:-1] >= config.top_p]] = False
    probs = np.where(keep, probs, 0)
    return probs / probs.sum()


def generate(predictor: Predictor, prompt: list[int], eos: int, config: GenerateConfig) -> Iterator[int]:
    """Token ids after the prompt, until `eos` (not yielded) or `max_tokens`."""
    rng = np.random.default_rng(config.seed)
    tokens = list(prompt)
    for _ in range(config.max_tokens):
        probs = sampling_probs(predictor(tokens).mixture_V, config)
        token = int(rng.choice(len(probs), p=probs))
        if token == eos:
            return
        tokens.append(token)
        yield token
