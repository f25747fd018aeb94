"""The contenders of distill.py: training steps on the same rows from the same parameters."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np

ALPHA = 0.5


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is trained, and on how much: N rows of a step, d, V, m; `parts` as `accumulate`."""

    style: str
    dim: int
    layers: int
    ffn: int
    vocab: int
    m: int
    rows: int
    dtype: str
    remat: str
    parts: int

    def flops(self) -> float:
        """Of a step: 6 per weight of a product and row; what is computed again does not count."""
        blocks = self.layers * self.dim * self.ffn * (2 if self.style == "gpt2" else 3)
        return 6.0 * self.rows * (blocks + self.dim * self.vocab)


def make_data(sizes: Sizes, seed: int = 0) -> dict[str, np.ndarray]:
    """States [N, D], teachers [N, m] whose tokens differ, and next tokens [N]."""
    rng, (n, m, v) = np.random.default_rng(seed), (sizes.rows, sizes.m, sizes.vocab)
    probs_NxM = rng.exponential(size=(n, m)) ** 3
    # Different tokens: a random start, steps that add up to less than V.
    steps_NxM = rng.integers(1, max(v // m, 2), (n, m))
    return {
        "h": rng.normal(size=(n, sizes.dim)).astype(np.float32),
        "token_ids": ((rng.integers(0, v, (n, 1)) + steps_NxM.cumsum(1)) % v).astype(np.int32),
        "probs": (probs_NxM / probs_NxM.sum(1, keepdims=True)).astype(np.float32),
        "labels": rng.integers(0, v, n).astype(np.int32),
        "weight": np.ones(n, np.float32),
    }


class JaxStep:
    """This project's training step, with its own loss or the dense one."""

    def __init__(self, sizes: Sizes, loss: str):
        import jax
        import jax.numpy as jnp

        from mlp_memory.memory.config import DistillConfig, MemoryConfig
        from mlp_memory.memory.distill import distill_task
        from mlp_memory.memory.mlp import Memory
        from mlp_memory.memory.states import StoredStates
        from mlp_memory.parallel.config import MeshConfig
        from mlp_memory.parallel.mesh import make_mesh
        from mlp_memory.training.loop import Run

        shape = MemoryConfig(sizes.style, sizes.layers, sizes.dim, sizes.ffn).resolved(sizes.dim, sizes.vocab)
        config = DistillConfig(
            steps=1000,
            batch_size=sizes.rows,
            accumulate=sizes.parts,
            block_rows=1,
            alpha=ALPHA,
            dtype=sizes.dtype,
            remat=sizes.remat,
        )
        dtype = jnp.dtype(sizes.dtype)

        def dense_loss(model: Memory, frozen: Any, batch: dict[str, jax.Array], *_: jax.Array) -> jax.Array:
            hidden_NxD = model(batch["h"], dtype=dtype, remat=sizes.remat)
            kernel_DxV = model.head_kernel().astype(dtype)
            z_NxV = jnp.matmul(hidden_NxD, kernel_DxV, preferred_element_type=jnp.float32)
            rows_N = jnp.arange(len(z_NxV))
            t_NxV = jnp.zeros_like(z_NxV)
            t_NxV = t_NxV.at[rows_N[:, None], batch["token_ids"]].add(ALPHA * batch["probs"])
            t_NxV = t_NxV.at[rows_N, batch["labels"]].add(1 - ALPHA)
            return -(t_NxV * jax.nn.log_softmax(z_NxV)).sum()

        self.mesh = make_mesh(MeshConfig())
        states = StoredStates(jax.ShapeDtypeStruct((0, sizes.dim), jnp.float32))
        self.task = distill_task(shape, config, states, self.mesh)
        if loss == "dense":
            self.task = dataclasses.replace(self.task, loss=dense_loss)
        self.run = Run(self.task, config, self.mesh)
        self.state, self.taken = self.run.initial_state(), 0

    def parameters(self) -> dict[str, np.ndarray]:
        return _by_name(self.state["params"])

    def load(self, parameters: dict[str, np.ndarray]) -> None:
        import jax
        from flax import nnx

        tree = nnx.traversals.unflatten_mapping({tuple(k.split(".")): v for k, v in parameters.items()})
        self.state["params"] = jax.device_put(tree, self.run.shardings["params"])

    def place(self, data: dict[str, np.ndarray]) -> None:
        from mlp_memory.parallel.sharding import place_batch

        self.batch = place_batch({k: v for k, v in data.items() if k != "rows"}, self.mesh)

    def loss_and_gradients(self) -> tuple[float, dict[str, np.ndarray]]:
        """Of the mean over rows."""
        import jax

        def loss(params: Any) -> jax.Array:
            total = self.task.loss(self.run.model(params), None, self.batch, jax.random.key(0), 0)
            return total / self.batch["labels"].size

        value, gradients = jax.jit(jax.value_and_grad(loss))(self.state["params"])
        return float(value), _by_name(gradients)

    def step(self) -> float:
        self.state, figures = self.run.step(self.state, None, self.batch, np.uint32(self.taken))
        self.taken += 1
        return float(figures["loss"])


def _by_name(tree: Any) -> dict[str, np.ndarray]:
    from flax import nnx

    return {".".join(path): np.asarray(x) for path, x in nnx.traversals.flatten_mapping(tree).items()}


class TorchStep:
    """The dense formulation in PyTorch.

    Args:
      sizes: what is trained.
      twice: KL divergence and cross-entropy each with a log-softmax of its own, as their calls have
        it; else one for both.
    """

    def __init__(self, sizes: Sizes, twice: bool):
        import torch

        self.torch, self.twice = torch, twice
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = getattr(torch, sizes.dtype)
        nn, gpt2, d = torch.nn, sizes.style == "gpt2", sizes.dim
        norm = (lambda: nn.LayerNorm(d, 1e-5)) if gpt2 else (lambda: nn.RMSNorm(d, 1e-5))

        class Block(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.norm = norm()
                self.gate = None if gpt2 else nn.Linear(d, sizes.ffn, bias=False)
                self.up = nn.Linear(d, sizes.ffn, bias=gpt2)
                self.down = nn.Linear(sizes.ffn, d, bias=gpt2)

            def forward(self, x: Any) -> Any:
                y = self.norm(x)
                up = self.up(y)
                if self.gate is None:
                    return x + self.down(nn.functional.gelu(up, approximate="tanh"))
                return x + self.down(nn.functional.silu(self.gate(y)) * up)

        self.blocks = nn.Sequential(*(Block() for _ in range(sizes.layers)))
        self.norm, self.head = norm(), nn.Linear(d, sizes.vocab, bias=False)
        self.model = nn.Sequential(self.blocks, self.norm, self.head).to(self.device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0
        )

    def _counterparts(self, name: str) -> list[Any]:
        """torch's parameters for one of this project's: one, or one a layer."""
        *path, leaf = name.split(".")
        if not path:
            return [self.head.weight]
        leaf = "bias" if leaf == "bias" else "weight"
        if path == ["norm"]:
            return [getattr(self.norm, leaf)]
        return [getattr(getattr(block, path[-1]), leaf) for block in self.blocks]

    def load(self, parameters: dict[str, np.ndarray]) -> None:
        self.names = list(parameters)
        with self.torch.no_grad():
            for name, value in parameters.items():
                layers = value if name.startswith("blocks") else [value]
                for mine, layer in zip(self._counterparts(name), layers):
                    mine.copy_(self.torch.from_numpy(np.ascontiguousarray(layer.T)))

    def place(self, data: dict[str, np.ndarray]) -> None:
        self.data = {name: self.torch.from_numpy(values).to(self.device) for name, values in data.items()}
        self.data |= {name: self.data[name].long() for name in ("token_ids", "labels")}

    def _loss(self) -> Any:
        torch, data = self.torch, self.data
        f = torch.nn.functional
        with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
            logits_NxV = self.model(data["h"])
        logits_NxV = logits_NxV.float()
        log_p_NxV = f.log_softmax(logits_NxV, dim=-1)
        teacher_NxV = torch.zeros_like(log_p_NxV).scatter_add_(1, data["token_ids"], data["probs"])
        kl = f.kl_div(log_p_NxV, teacher_NxV, reduction="batchmean")
        if self.twice:
            return ALPHA * kl + (1 - ALPHA) * f.cross_entropy(logits_NxV, data["labels"])
        return ALPHA * kl + (1 - ALPHA) * f.nll_loss(log_p_NxV, data["labels"])

    def loss_and_gradients(self) -> tuple[float, dict[str, np.ndarray]]:
        """Of the mean over rows; the loss as a cross-entropy, which is more than KL by α·H(teacher)."""
        loss = self._loss()
        loss.backward()
        p = self.data["probs"].double()
        entropy = -self.torch.special.xlogy(p, p).sum().item() / len(p)
        found = {}
        for name in self.names:
            layers = [mine.grad.float().cpu().numpy().T for mine in self._counterparts(name)]
            found[name] = np.stack(layers) if name.startswith("blocks") else layers[0]
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item() + ALPHA * entropy, found

    def step(self) -> float:
        loss = self._loss()
        loss.backward()
        self.torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    """‖found − wanted‖ / ‖wanted‖."""
    norm = np.linalg.norm(wanted.astype(np.float64))
    return float(np.linalg.norm(found.astype(np.float64) - wanted) / max(norm, 1e-30))


def peak_bytes() -> int:
    """The largest resident size this process has had; on a GPU, its own memory's."""
    if "jax" in sys.modules:
        import jax

        if jax.default_backend() != "cpu":
            return jax.devices()[0].memory_stats()["peak_bytes_in_use"]
    elif sys.modules["torch"].cuda.is_available():
        return sys.modules["torch"].cuda.max_memory_allocated()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM")
