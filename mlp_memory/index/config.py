"""What a user may choose about the index."""

import dataclasses

from mlp_memory.artifacts import UserError


@dataclasses.dataclass(frozen=True)
class IndexConfig:
    """How keys are sharded, hashed and searched.

    Attributes:
      shards: row ranges, each with an index of its own. Building one needs about 9·d bytes
        of memory per row of the shard, searching 4·d bytes per row of all of them.
      leaves: partitions of one shard's k-means tree; 0 = the square root of its rows.
      leaves_to_search: partitions a query visits; 0 = the fewest that reach `target_recall`.
      dimensions_per_block: key dimensions that share one 4-bit code.
      reorder: candidates whose distance is computed in full; 0 = the fewest multiple of k
        that reaches `target_recall`.
      target_recall: recall@k that the two chosen parameters must reach on the sample.
      recall_sample: rows sampled to measure recall.
      sample_seed: seed of that sample.
    """

    shards: int = 1
    leaves: int = 0
    leaves_to_search: int = 0
    dimensions_per_block: int = 2
    reorder: int = 0
    target_recall: float = 0.95
    recall_sample: int = 1000
    sample_seed: int = 0

    def __post_init__(self) -> None:
        least = {"shards": 1, "leaves": 0, "leaves_to_search": 0, "dimensions_per_block": 1, "reorder": 0}
        for name, low in {**least, "recall_sample": 1, "sample_seed": 0}.items():
            if getattr(self, name) < low:
                raise UserError(f"index.{name} = {getattr(self, name)}: give {low} or more")
        if not 0 < self.target_recall <= 1:
            raise UserError(f"index.target_recall = {self.target_recall}: give a value in (0, 1]")
