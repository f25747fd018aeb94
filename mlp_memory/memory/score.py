"""log p_M of given tokens for many hidden states, in equal batches."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mlp_memory.memory.mlp import Memory
from mlp_memory.parallel.sharding import place_whole_batch
from mlp_memory.training.sparse_head import label_log_prob


def memory_log_probs(
    memory: Memory,
    h_NxD: np.ndarray,
    labels_N: np.ndarray,
    mesh: Mesh,
    dtype: Any = jnp.float32,
    batch: int = 4096,
) -> np.ndarray:
    """log p_M(label) for each state, [N] float32.

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
    def score(params: nnx.State, arrays: dict[str, jax.Array]) -> jax.Array:
        model = nnx.merge(graphdef, params)
        hidden_NxD = model(arrays["h"], dtype=dtype)
        return label_log_prob(hidden_NxD, model.head_kernel(), arrays["labels"], mesh)

    found = []
    for start in range(0, len(h_NxD), batch):
        h, labels = h_NxD[start : start + batch], labels_N[start : start + batch]
        pad = batch - len(h)
        arrays = {"h": np.pad(h, ((0, pad), (0, 0))), "labels": np.pad(labels, (0, pad))}
        found.append(np.asarray(score(params, place_whole_batch(arrays, mesh)))[: batch - pad])
    return np.concatenate(found) if found else np.zeros(0, np.float32)
