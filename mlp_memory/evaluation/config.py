"""What is evaluated."""

import dataclasses

from mlp_memory.artifacts import runtime
from mlp_memory.settings import check_whole


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Held-out perplexity and samples.

    Attributes:
      max_rows: rows scored per split, in stretches spread evenly over it; 0 for all.
      samples: contexts for which the report shows what each system predicts.
      bootstrap: resamples behind the intervals.
      chunk_rows: rows scored and saved at a time.
    """

    max_rows: int = 0
    samples: int = 8
    bootstrap: int = 1000
    chunk_rows: int = runtime(8192)

    def __post_init__(self):
        check_whole(self, {"max_rows": 0, "samples": 0, "bootstrap": 1, "chunk_rows": 1})
