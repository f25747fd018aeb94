"""How a memory is trained on after documents were added or deleted."""

import dataclasses

from mlp_memory.settings import check_choice, check_number, check_whole


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
      memory: "trained_on" is the base's, trained on at the chosen rows. "from_scratch" makes index, teachers
        and memory anew of all documents that are left; only tokens and keys are taken over, and nothing of
        the above is used. It costs a distillation, and has never seen what was deleted: training on
        takes away little of that (docs/results.md). "auto" is "from_scratch" where documents are deleted.
    """

    affected: float = 0.25
    replay: float = 0.25
    probe_rows: int = 4096
    probe_neighbours: int = 16
    passes: float = 0.0
    learning_rate: float = 0.0
    warmup: int = 20
    evaluations: int = 2
    memory: str = "auto"

    def __post_init__(self):
        check_whole(self, {"probe_rows": 1, "probe_neighbours": 1, "warmup": 0, "evaluations": 1})
        check_choice(self, {"memory": ("auto", "trained_on", "from_scratch")})
        any_size = (0.0, float("inf"))
        check_number(self, dict.fromkeys(("affected", "replay", "passes", "learning_rate"), any_size))
