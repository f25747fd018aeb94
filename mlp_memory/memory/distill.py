"""Distillation of the sparse kNN teacher into the memory."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from mlp_memory import artifacts
from mlp_memory.arrays import ArrayReader
from mlp_memory.artifacts import Directory, Manifest, UserError
from mlp_memory.corpus.stream import TokenStream
from mlp_memory.memory.config import DistillConfig, MemoryConfig
from mlp_memory.memory.mlp import Memory
from mlp_memory.memory.score import memory_log_probs
from mlp_memory.memory.states import States
from mlp_memory.targets.interpolation import best_lambda
from mlp_memory.training import checkpoints
from mlp_memory.training.batches import Batches
from mlp_memory.training.loop import Task, compute_dtype, train
from mlp_memory.training.sparse_head import sparse_cross_entropy


@dataclasses.dataclass(frozen=True)
class ValidationRows:
    """Held-out rows: tapped states [N, D], base log p(next) [N] and the next tokens [N]."""

    taps_NxD: np.ndarray
    base_log_prob_N: np.ndarray
    labels_N: np.ndarray


_CHECKED_ROWS, _CHECKED_AT_ONCE = 1 << 22, 1 << 16
"""Rows whose token ids are read through before training; all of them in small corpora."""


class TargetSource:
    """Training elements: blocks of rows with hidden state, teacher and next token.

    Everything keeps the dtype it is stored in: devices convert, and less crosses to them.
    """

    def __init__(self, stream: TokenStream, states: States, targets: Directory, block_rows: int):
        self._stream, self._states, self._block = stream, states, block_rows
        self._ids, self._probs = ArrayReader(targets, "token_ids"), ArrayReader(targets, "probs")
        rows = states.shape[0]
        if not len(stream) == rows == len(self._ids) == len(self._probs):
            raise UserError(
                f"corpus, datastore and targets have {len(stream)}, {rows} and {len(self._ids)} rows: "
                "run embed and retrieve again"
            )
        for start in range(0, min(len(stream), _CHECKED_ROWS), _CHECKED_AT_ONCE):
            highest = int(self._ids[start : min(start + _CHECKED_AT_ONCE, len(stream))].max())
            if highest >= stream.vocab_size:
                raise UserError(
                    f"{targets} names token {highest} of a vocabulary of {stream.vocab_size}: "
                    "run retrieve again"
                )

    def __len__(self) -> int:
        return -(-len(self._stream) // self._block)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        start = index * self._block
        stop = min(start + self._block, len(self._stream))
        element = {
            "token_ids": self._ids[start:stop],
            "probs": self._probs[start:stop],
            "labels": self._stream.labels(start, stop).astype(np.int32),
            "weight": self._stream.has_next(start, stop).astype(np.float32),
        }
        pad = self._block - (stop - start)
        padded = {k: np.pad(v, [(0, pad)] + [(0, 0)] * (v.ndim - 1)) for k, v in element.items()}
        return {**padded, **self._states.block(start, self._block), "rows": np.int64(start)}


def distillation_loss(
    model: Memory,
    batch: dict[str, jax.Array],
    alpha: float,
    key: jax.Array,
    dtype: Any,
    remat: str,
    mesh: Mesh | None = None,
) -> jax.Array:
    """Σ over rows of α·KL(p_kNN ‖ p_M) + (1 − α)·CE(y, p_M) + α·H(p_kNN), nats.

    As one cross-entropy with t = α·p_kNN + (1 − α)·onehot(y) (PAPER.md, 3). A row whose
    neighbours are too few for a distribution is trained on its next token alone.

    Args:
      model: the memory.
      batch: h [..., D], token_ids and probs [..., m], labels and weight [...].
      alpha: weight of the teacher.
      key: dropout seed.
      dtype: of the computation.
      remat: see `scan_blocks`.
      mesh: devices that the batch is split over.
    """
    rows = batch["labels"].size
    hidden_NxD = model(batch["h"].reshape(rows, -1), key, dtype, remat)
    return sparse_cross_entropy(hidden_NxD, model.head_kernel(), *soft_targets(batch, alpha), mesh)


def soft_targets(batch: dict[str, jax.Array], alpha: float) -> tuple[jax.Array, jax.Array]:
    """t = α·p_kNN + (1 − α)·onehot(y) of a batch, row after row: token ids and weights, both [N, m + 1]."""
    names, leading = ("token_ids", "probs", "labels", "weight"), batch["labels"].ndim
    flat = {k: batch[k].reshape(batch["labels"].size, *batch[k].shape[leading:]) for k in names}
    teacher_NxM = alpha * flat["probs"].astype(jnp.float32)
    next_N = 1.0 - teacher_NxM.sum(-1)
    ids_NxM1 = jnp.concatenate([flat["token_ids"].astype(jnp.int32), flat["labels"][:, None]], axis=-1)
    weights_NxM1 = jnp.concatenate([teacher_NxM, next_N[:, None]], axis=-1) * flat["weight"][:, None]
    return ids_NxM1, weights_NxM1


def mixture_figures(base_log_prob_N: np.ndarray, memory_log_prob_N: np.ndarray) -> dict[str, float]:
    """Validation figures of base and memory together, λ at its best."""
    weight, nll = best_lambda(base_log_prob_N, memory_log_prob_N)
    return {
        "validation_loss": nll,
        "validation_perplexity": float(np.exp(nll)),
        "validation_lambda": weight,
    }


def validate(
    validation: ValidationRows, mesh: Mesh, config: DistillConfig
) -> Callable[[Memory], dict[str, float]]:
    """What scores a memory on held-out rows."""
    dtype = compute_dtype(config.dtype)

    def evaluate(model: Memory) -> dict[str, float]:
        log_prob_N = memory_log_probs(model, validation.taps_NxD, validation.labels_N, mesh, dtype)
        return {
            **mixture_figures(validation.base_log_prob_N, log_prob_N),
            "validation_memory_perplexity": float(np.exp(-log_prob_N.astype(np.float64).mean())),
        }

    return evaluate


def batch_shapes(
    config: DistillConfig, states: States, teacher_tokens: int, vocab_size: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """A step's batch as `TargetSource` gives it, less its rows: B blocks of R rows, m teacher tokens each."""
    blocks, rows = config.batch_size, config.block_rows
    small = np.uint16 if vocab_size <= 1 << 16 else np.uint32
    of_a_block = {
        **states.shapes(rows),
        "token_ids": jax.ShapeDtypeStruct((rows, teacher_tokens), small),
        "probs": jax.ShapeDtypeStruct((rows, teacher_tokens), np.float16),
        "labels": jax.ShapeDtypeStruct((rows,), np.int32),
        "weight": jax.ShapeDtypeStruct((rows,), np.float32),
    }
    return {name: jax.ShapeDtypeStruct((blocks, *s.shape), s.dtype) for name, s in of_a_block.items()}


def distill_task(model_config: MemoryConfig, config: DistillConfig, states: States, mesh: Mesh) -> Task:
    """The training of a memory of that shape, resolved, but for its data."""
    dtype = compute_dtype(config.dtype)
    return Task(
        name="distill",
        make_model=lambda rngs: Memory(model_config, rngs),
        loss=lambda model, frozen, batch, key, step: distillation_loss(
            model, {**batch, "h": states.of(frozen, batch)}, config.alpha, key, dtype, config.remat, mesh
        ),
        unit="rows",
        unit_per_step=config.batch_size * config.block_rows,
        frozen=states.frozen,
    )


def distill(
    directory: Directory,
    manifest: Manifest,
    model_config: MemoryConfig,
    config: DistillConfig,
    stream: TokenStream,
    states: States,
    targets: Directory,
    validation: ValidationRows,
    mesh: Mesh,
    observe: Callable[[Memory, int, dict[str, float]], None] | None = None,
) -> Manifest:
    """Trains the memory on hidden states and teachers and publishes it as `directory`.

    Args:
      directory: where the artifact goes.
      manifest: of that artifact, begun.
      model_config: the shape, resolved.
      config: how to train.
      stream, states, targets: what to train on, row by row.
      validation: held-out rows.
      mesh: devices.
      observe: see `Task`.

    Raises:
      UserError: arrays that do not belong together, a loss that is not finite.
    """
    source = TargetSource(stream, states, targets, config.block_rows)
    if states.shape[1] != model_config.input_dim:
        raise UserError(
            f"the datastore's states have {states.shape[1]} dimensions, the memory reads "
            f"{model_config.input_dim}: run embed again"
        )
    if model_config.vocab_size < stream.vocab_size:
        raise UserError(
            f"a memory of {model_config.vocab_size} tokens does not hold the corpus vocabulary of "
            f"{stream.vocab_size}: leave memory.vocab_size 0"
        )
    task = dataclasses.replace(
        distill_task(model_config, config, states, mesh),
        batches=Batches(source, config.batch_size, config.seed, config.read_threads),
        evaluate=validate(validation, mesh, config),
        observe=observe,
    )
    rows = config.steps * task.unit_per_step
    return train(
        task,
        directory,
        manifest,
        config,
        mesh,
        {
            "model": dataclasses.asdict(model_config),
            "train_flops": model_config.train_flops(rows),
            "train_rows": rows,
        },
    )


def load_memory(directory: Directory, mesh: Mesh, stage: str = "distill") -> tuple[Memory, Manifest]:
    """The published memory of an artifact; `stage` is what makes it.

    Raises:
      UserError: missing, unfinished or damaged.
    """
    manifest = artifacts.require(directory, stage)
    config = MemoryConfig(**manifest.facts["model"])
    abstract = nnx.eval_shape(lambda: Memory(config, nnx.Rngs(0)))
    return checkpoints.restore(directory, manifest, abstract, mesh), manifest
