"""What a user may choose about the index."""

import dataclasses

from mlp_memory.artifacts import UserError

BACKENDS = ("scann", "exact")
REORDER_DTYPES = {"float32": 4, "bfloat16": 2, "int8": 1}
"""Bytes of a number."""


@dataclasses.dataclass(frozen=True)
class IndexConfig:
    """How keys are sharded, coded and searched; 0 leaves a choice to the index stage.

    Attributes:
      backend: "scann", approximate search on the host; or "exact", brute force on the mesh,
        which keeps no files of its own.
      shards: row ranges, each with an index of its own, one in memory at a time; 0 = the
        fewest whose keys fit `shard_gigabytes`. Searching one needs 1.5 times its keys at most.
      shard_gigabytes: 10^9 bytes of float32 keys in one shard, where `shards` is 0.
      leaves: partitions of the k-means tree of a shard.
      leaves_to_search: partitions a query visits in a shard.
      dimensions_per_block: key dimensions that share one 4-bit code.
      reorder: candidates of a shard whose distance is computed in full.
      reorder_dtype: of the keys that a shard keeps for that: "float32", "bfloat16" or "int8".
        Rounded ones take a half or a quarter of disk and memory; their distances are the
        rounded keys'. Shards of few rows, searched by brute force, keep float32.
      target_recall: recall@k, less 1.96 standard errors, that the choices must reach on the sample.
        A little above the certificate's goals, retrieve.goal_recall and goal_tv: at 0.963 total
        variation to the exact teacher was 0.016 (docs/results.md).
      recall_sample: rows sampled to measure recall.
      sample_seed: seed of the samples.
      approximate_recall: with "exact", the recall goal of `jax.lax.approx_max_k`; 0 = none, all
        neighbours are found.
    """

    backend: str = "scann"
    shards: int = 0
    shard_gigabytes: float = 2.0
    leaves: int = 0
    leaves_to_search: int = 0
    dimensions_per_block: int = 0
    reorder: int = 0
    reorder_dtype: str = "float32"
    target_recall: float = 0.96
    recall_sample: int = 1000
    sample_seed: int = 0
    approximate_recall: float = 0.0

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise UserError(f"index.backend = {self.backend!r}: give one of {', '.join(map(repr, BACKENDS))}")
        if self.reorder_dtype not in REORDER_DTYPES:
            words = ", ".join(map(repr, REORDER_DTYPES))
            raise UserError(f"index.reorder_dtype = {self.reorder_dtype!r}: give one of {words}")
        chosen = ("shards", "leaves", "leaves_to_search", "dimensions_per_block", "reorder", "sample_seed")
        for name, low in {**dict.fromkeys(chosen, 0), "recall_sample": 1}.items():
            if getattr(self, name) < low:
                raise UserError(f"index.{name} = {getattr(self, name)}: give {low} or more")
        if not self.shard_gigabytes > 0:
            raise UserError(f"index.shard_gigabytes = {self.shard_gigabytes}: give more than 0")
        if not 0 < self.target_recall <= 1:
            raise UserError(f"index.target_recall = {self.target_recall}: give a value in (0, 1]")
        if not 0 <= self.approximate_recall < 1:
            raise UserError(f"index.approximate_recall = {self.approximate_recall}: give a value in [0, 1)")
