"""What is evaluated."""

import dataclasses

from mlp_memory.artifacts import later, runtime
from mlp_memory.settings import check_whole


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Held-out perplexity and samples.

    Attributes:
      max_rows: rows scored per split, in stretches spread evenly over it; 0 for all.
      samples: contexts, spread evenly, for which the report shows what each system predicts.
      traces: contexts where the memory changed most, half of them for the better, half for the worse,
        for which it shows the same and the training text behind it.
      bootstrap: resamples behind the intervals.
      chunk_rows: rows scored and saved at a time.
    """

    max_rows: int = 0
    samples: int = 8
    traces: int = later(10)
    bootstrap: int = 1000
    chunk_rows: int = runtime(8192)

    def __post_init__(self):
        check_whole(self, {"max_rows": 0, "samples": 0, "traces": 0, "bootstrap": 1, "chunk_rows": 1})
