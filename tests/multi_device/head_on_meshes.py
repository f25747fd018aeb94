"""A program: the sparse head on meshes of this process's eight devices, next to the dense formula.

python head_on_meshes.py SEED: a JSON line for each mesh and chunk with the largest differences.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from mlp_memory.parallel.config import MeshConfig
from mlp_memory.parallel.mesh import make_mesh
from mlp_memory.training.sparse_head import divergence, label_and_spread, label_log_prob, sparse_cross_entropy

MESHES = [MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(slice=2, fsdp=2, tensor=2), MeshConfig(tensor=8)]


def main() -> None:
    rng = np.random.default_rng(int(sys.argv[1]))
    n, d, v, m = 8 * int(rng.integers(2, 9)), 2 * int(rng.integers(1, 9)), 8 * int(rng.integers(1, 9)), 5
    hidden, kernel = rng.normal(size=(n, d)).astype(np.float32), rng.normal(size=(d, v)).astype(np.float32)
    ids, weights = rng.integers(0, v, (n, m)), rng.random((n, m)).astype(np.float32)
    ids[:, -1], weights[rng.random((n, m)) < 0.3], weights[0] = ids[:, 0], 0, 0
    pull = rng.normal(size=n).astype(np.float32)
    start, start_kernel = (x + rng.normal(size=x.shape).astype(np.float32) for x in (hidden, kernel))

    def dense(hidden: jax.Array, kernel: jax.Array) -> tuple[jax.Array, ...]:
        log_p, log_start = jax.nn.log_softmax(hidden @ kernel), jax.nn.log_softmax(start @ start_kernel)
        apart = (jnp.exp(log_start) * (log_start - log_p)).sum(1) * weights[:, 1]
        summed = -(jnp.take_along_axis(log_p, ids, axis=1) * weights).sum()
        return summed, log_p[jnp.arange(n), ids[:, 0]] * pull, apart

    p = jax.nn.softmax(hidden @ kernel)
    spread = np.stack([-(p * jnp.log(p)).sum(1), jnp.log(p).max(1)])

    for config in MESHES:
        mesh = make_mesh(config)
        # All tokens of a device at once; chunks that do not divide them; one token.
        for chunk in (None, 3 * v // mesh.shape["tensor"] + 1, 1):

            def sparse(
                hidden: jax.Array,
                kernel: jax.Array,
                mesh: jax.sharding.Mesh = mesh,
                chunk: int | None = chunk,
            ) -> tuple[jax.Array, ...]:
                summed = sparse_cross_entropy(hidden, kernel, ids, weights, mesh, chunk)
                labels = label_log_prob(hidden, kernel, ids[:, 0], mesh, chunk) * pull
                return (
                    summed,
                    labels,
                    divergence(start, start_kernel, hidden, kernel, weights[:, 1], mesh, chunk),
                )

            figures = {"mesh": str(config), "chunk": chunk}
            told = jax.jit(lambda h, w, m=mesh, c=chunk: label_and_spread(h, w, ids[:, 0], m, c)[1])
            figures["spread"] = float(abs(np.stack(told(hidden, kernel)) - spread).max())
            for which, name in enumerate(("summed", "labels", "divergence")):
                found, wanted = (
                    jax.jit(jax.value_and_grad(lambda *x, f=f, i=which: f(*x)[i].sum(), (0, 1)))(
                        hidden, kernel
                    )
                    for f in (sparse, dense)
                )
                # A sum is as exact as what it adds up, which may cancel.
                terms = abs(dense(hidden, kernel)[which]).sum()
                value = float(abs(found[0] - wanted[0]) / terms)
                pairs = zip(found[1], wanted[1])
                figures[name] = max(value, *(float(abs(a - b).max() / abs(b).max()) for a, b in pairs))
            print(json.dumps(figures))


if __name__ == "__main__":
    main()
