"""How a model is trained: the settings that every training stage shares."""

import dataclasses

from mlp_memory.artifacts import UserError, runtime


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

    def __post_init__(self):
        for name in ("batch_size", "accumulate", "eval_every", "log_every", "keep"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)!r} must be a positive whole number")
        if not isinstance(self.steps, int) or self.steps < 0:
            raise UserError(f"steps = {self.steps!r} must be a whole number, 0 or more")
        if self.batch_size % self.accumulate:
            raise UserError(
                f"batch_size = {self.batch_size} does not divide by accumulate = {self.accumulate}"
            )
        for name, choices in (
            ("decay", ("cosine", "linear", "constant")),
            ("dtype", ("auto", "float32", "bfloat16")),
            ("remat", ("none", "dots", "full")),
        ):
            if getattr(self, name) not in choices:
                raise UserError(f"{name} = {getattr(self, name)!r}: use one of {', '.join(choices)}")
        if self.learning_rate <= 0 or self.warmup < 0:
            raise UserError(
                f"learning_rate = {self.learning_rate} must be above 0 and warmup = {self.warmup} not below"
            )
