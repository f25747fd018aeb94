"""How a model is trained: the settings that every training stage shares."""

import dataclasses

from mlp_memory.artifacts import UserError, runtime
from mlp_memory.settings import check_choice, check_number, check_positive, check_whole


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """AdamW with warm-up and decay over a fixed number of steps.

    Attributes:
      steps: optimizer steps.
      batch_size: sequences (language modelling) or blocks of rows (distillation) per
        step, over all devices.
      accumulate: parts a step's batch is computed in, one after the other.
      learning_rate: peak; reached after `warmup` steps.
      decay: "cosine", "linear" or "constant" from the peak to `final_ratio` times it.
      clip: largest global gradient norm; 0 for none.
      weight_decay: on matrices only.
      eval_every: steps between validations; each validation is a checkpoint, and the
        checkpoint with the lowest validation loss is the result.
      eval_rows: about so many validation rows, spread evenly, are scored each time; 0 for all.
      remat: "none", "dots" or "full"; trades memory for time.
      dtype: of the computation: "auto" (bfloat16 on accelerators, float32 on CPU).
      log_every: steps between lines in metrics.jsonl.
      keep: checkpoints kept for resuming, beside the best.
      read_threads: that read batches ahead, one each; more for a bucket far away.
    """

    steps: int = 1000
    batch_size: int = 16
    accumulate: int = 1
    learning_rate: float = 1e-3
    warmup: int = 100
    decay: str = "cosine"
    final_ratio: float = 0.1
    weight_decay: float = 0.0
    clip: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    seed: int = 0
    eval_every: int = 100
    eval_rows: int = 16384
    dtype: str = "auto"
    remat: str = runtime("none")
    log_every: int = runtime(10)
    keep: int = runtime(1)
    read_threads: int = runtime(4)

    def __post_init__(self):
        positive = ("batch_size", "accumulate", "eval_every", "log_every", "keep", "read_threads")
        check_whole(self, dict.fromkeys(positive, 1))
        check_whole(self, dict.fromkeys(("steps", "warmup", "seed", "eval_rows"), 0))
        check_positive(self, "learning_rate", "epsilon")
        unit, any_size = (0.0, 1.0), (0.0, float("inf"))
        check_number(self, {"beta1": unit, "beta2": unit, "clip": any_size, "weight_decay": any_size})
        check_number(self, {"final_ratio": any_size})
        check_choice(
            self,
            {
                "decay": ("cosine", "linear", "constant"),
                "dtype": ("auto", "float32", "bfloat16"),
                "remat": ("none", "dots", "full"),
            },
        )
        if self.batch_size % self.accumulate:
            raise UserError(
                f"batch_size = {self.batch_size} does not divide by accumulate = {self.accumulate}"
            )
