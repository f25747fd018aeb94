"""log p_M of given tokens for many hidden states, and how sure p_M is, in equal batches."""

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mlp_memory.memory.mlp import Memory
from mlp_memory.parallel.sharding import place_whole_batch
from mlp_memory.training.sparse_head import Spread, label_and_spread


def memory_scores(
    memory: Memory,
    h_NxD: np.ndarray,
    labels_N: np.ndarray,
    mesh: Mesh,
    dtype: Any = jnp.float32,
    batch: int = 4096,
) -> tuple[np.ndarray, Spread]:
    """log p_M(label) for each state, [N] float32, and the distribution's `Spread`.

    Args:
      memory: the model.
      h_NxD: its inputs.
      labels_N: token ids.
      mesh: devices; a batch is split over them.
      dtype: of the computation.
      batch: rows at once.
    """
    graphdef, params = nnx.split(memory)
    split = mesh.shape["slice"] * mesh.shape["data"] * mesh.shape["fsdp"]
    batch = -(-batch // split) * split

    @functools.partial(jax.jit, out_shardings=NamedSharding(mesh, P()))
    def score(params: nnx.State, arrays: dict[str, jax.Array]) -> tuple[jax.Array, Spread]:
        model = nnx.merge(graphdef, params)
        hidden_NxD = model(arrays["h"], dtype=dtype)
        return label_and_spread(hidden_NxD, model.head_kernel(), arrays["labels"], mesh)

    none = np.zeros(0, np.float32)
    found = [(none, Spread(none, none))]
    for start in range(0, len(h_NxD), batch):
        h, labels = h_NxD[start : start + batch], labels_N[start : start + batch]
        pad = batch - len(h)
        arrays = {"h": np.pad(h, ((0, pad), (0, 0))), "labels": np.pad(labels, (0, pad))}
        scores = score(params, place_whole_batch(arrays, mesh))
        found.append(jax.tree.map(operator.itemgetter(slice(len(h))), jax.tree.map(np.asarray, scores)))
    return jax.tree.map(lambda *parts: np.concatenate(parts), *found)


def memory_log_probs(*args: Any, **settings: Any) -> np.ndarray:
    """log p_M(label) for each state, [N] float32. Args as `memory_scores`'."""
    return memory_scores(*args, **settings)[0]
