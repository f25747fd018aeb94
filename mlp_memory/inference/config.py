"""How tokens are drawn."""

import dataclasses

from mlp_memory.artifacts import UserError
from mlp_memory.settings import check_number, check_whole


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
        check_whole(self, {"max_tokens": 1, "top_k": 0, "seed": 0})
        check_number(self, {"temperature": (0.0, float("inf"))})
        if not isinstance(self.top_p, int | float) or not 0 < self.top_p <= 1:
            raise UserError(f"generate.top_p = {self.top_p!r} must lie in (0, 1]")
