"""How a memory is trained on after documents were added or deleted."""

import dataclasses

from mlp_memory.settings import check_number, check_whole


@dataclasses.dataclass(frozen=True)
class UpdateConfig:
    """Which rows an update trains the memory on, and how.

    Attributes:
      affected: old rows per changed row (added or deleted) that get a new teacher because they lie
        nearest to changed ones.
      replay: old rows per changed row that are drawn at random, so that nothing else is forgotten.
      probe_rows: changed rows whose neighbours say which old rows are affected, spread evenly.
      probe_neighbours: neighbours of each.
      passes: times that each chosen row is trained on; 0 is as often as distillation read its rows.
      learning_rate: peak; 0 is an eighth of distillation's, which changes old rows least and learns new
        ones as well (docs/results.md).
      warmup: steps up to it.
      evaluations: validations on the way; each is a checkpoint, from which a killed run goes on.
      from_scratch: index, teachers and memory are made anew of the documents that are left, and nothing of
        the above is used: only tokens and keys are taken over. The memory has then never seen what was
        deleted, at the price of a distillation.
    """

    affected: float = 0.25
    replay: float = 0.25
    probe_rows: int = 4096
    probe_neighbours: int = 16
    passes: float = 0.0
    learning_rate: float = 0.0
    warmup: int = 20
    evaluations: int = 2
    from_scratch: bool = False

    def __post_init__(self):
        check_whole(self, {"probe_rows": 1, "probe_neighbours": 1, "warmup": 0, "evaluations": 1})
        any_size = (0.0, float("inf"))
        check_number(self, dict.fromkeys(("affected", "replay", "passes", "learning_rate"), any_size))
