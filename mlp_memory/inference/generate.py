"""Continues a prompt token by token."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from mlp_memory.artifacts import UserError
from mlp_memory.inference.next_token import Predictor


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """How tokens are drawn.

    Attributes:
      max_tokens: most tokens to add.
      temperature: 0 takes the most likely token each time.
      top_k: draw among this many most likely tokens; 0 for all.
      top_p: draw among the fewest tokens that hold this much probability.
      seed: of the draws.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if self.max_tokens < 1 or self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise UserError(
                f"generate: max_tokens = {self.max_tokens} must be 1 or more, temperature = "
                f"{self.temperature} and top_k = {self.top_k} 0 or more, top_p = {self.top_p} in (0, 1]"
            )


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
