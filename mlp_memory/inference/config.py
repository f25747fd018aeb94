"""How text is continued."""

import dataclasses

from mlp_memory.artifacts import UserError
from mlp_memory.settings import check_number, check_positive, check_whole

WITHOUT_SEARCH = ("base", "base_plus_memory", "joint")
MODELS = (*WITHOUT_SEARCH, "knn_lm_exact", "knn_lm_scann")
"""What can be continued: the decoder alone, with its memory, trained on under it, with its datastore."""


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """How text is continued.

    Each filter works on what the one before has left, in this order: repetition_penalty, temperature,
    top_k, top_p, min_p.

    Attributes:
      max_tokens: most tokens to add.
      temperature: 0 takes the most likely token each time.
      top_k: draw among this many most likely tokens; 0 for all.
      top_p: draw among the fewest tokens that hold this much probability.
      min_p: draw among tokens at least this many times as likely as the likeliest.
      repetition_penalty: log-probabilities of tokens that the text already has are multiplied by this;
        above 1 they become less likely.
      seed: of the draws. A row's draws depend on its seed and place in the batch, not on the other rows.
      beams: hypotheses of beam search; 1 for none. It takes the most likely texts and draws nothing.
      length_penalty: a hypothesis of n tokens is ranked by its log-probability divided by n to this power.
      stop: texts that end the continuation; they are left out of it.
      context: tokens of the prompt that are read, its last; 0 for as many as the decoder can.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    beams: int = 1
    length_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    context: int = 0

    def __post_init__(self):
        check_whole(self, {"max_tokens": 1, "top_k": 0, "seed": 0, "beams": 1, "context": 0})
        check_number(self, {"temperature": (0.0, float("inf")), "min_p": (0.0, 1.0)})
        check_number(self, {"length_penalty": (0.0, float("inf"))})
        check_positive(self, "repetition_penalty")
        if not isinstance(self.top_p, int | float) or not 0 < self.top_p <= 1:
            raise UserError(f"generate.top_p = {self.top_p!r} must lie in (0, 1]")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if not all(isinstance(text, str) and text for text in stop):
            raise UserError(f"generate.stop = {self.stop!r}: give texts")
        object.__setattr__(self, "stop", stop)
        if self.beams > 1 and (self.temperature > 0 or self.stop):
            raise UserError(
                f"generate.beams = {self.beams} draws nothing and knows no stop texts: leave temperature 0 "
                "and stop out"
            )
