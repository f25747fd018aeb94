"""The joint stage: the decoder goes on training on the mixture's likelihood (PAPER.md, 5)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from mlp_memory.artifacts import Directory, Manifest
from mlp_memory.corpus.stream import TokenStream
from mlp_memory.datastore.config import EmbedConfig
from mlp_memory.datastore.embed import row_reader
from mlp_memory.decoder.config import DecoderConfig, Tap
from mlp_memory.decoder.transformer import Decoder
from mlp_memory.decoder.windows import WindowSource, read, spread
from mlp_memory.joint.config import JointConfig
from mlp_memory.memory.distill import mixture_figures
from mlp_memory.memory.mlp import Memory
from mlp_memory.memory.score import memory_log_probs
from mlp_memory.training.batches import Batches
from mlp_memory.training.loop import Task, compute_dtype, train
from mlp_memory.training.sparse_head import label_log_prob


def mixture_log_prob(memory_N: jax.Array, base_N: jax.Array, weight: jax.Array | float) -> jax.Array:
    """log(λ·p_M + (1 − λ)·p_LM) from the two log-probabilities of the same tokens; λ for all or for each."""
    return jnp.logaddexp(jnp.log(weight) + memory_N, jnp.log1p(-weight) + base_N)


def mixture_loss(
    decoder: Decoder,
    memory: Memory,
    batch: dict[str, jax.Array],
    weight: float,
    tap: Tap,
    through_memory: bool,
    dtype: Any = jnp.float32,
    remat: str = "none",
    mesh: Mesh | None = None,
) -> jax.Array:
    """−Σ log(λ·p_M(y) + (1 − λ)·p_LM(y)) over weighted positions, nats.

    Args:
      decoder: trained.
      memory: frozen by the caller not differentiating it.
      batch: tokens, segments, labels, weight, each [B, T].
      weight: λ.
      tap: the memory's input.
      through_memory: False cuts the gradient at the memory's input.
      dtype: of the computation.
      remat: see `scan_blocks`.
      mesh: devices that the batch is split over.
    """
    hidden, tapped = decoder(batch["tokens"], batch["segments"], tap, dtype, remat)
    labels_N, weight_N = batch["labels"].reshape(-1), batch["weight"].reshape(-1)
    tapped = tapped if through_memory else jax.lax.stop_gradient(tapped)
    base_N = label_log_prob(hidden.reshape(labels_N.size, -1), decoder.head_kernel(), labels_N, mesh)
    memory_hidden = memory(tapped.reshape(labels_N.size, -1), dtype=dtype, remat=remat)
    memory_N = label_log_prob(memory_hidden, memory.head_kernel(), labels_N, mesh)
    return -(mixture_log_prob(memory_N, base_N, weight) * weight_N).sum()


def joint_task(
    decoder_config: DecoderConfig,
    memory: Memory,
    config: JointConfig,
    tap: Tap,
    weight: float,
    mesh: Mesh,
) -> Task:
    """The training of a decoder of that shape beside a frozen memory, but for its data."""
    memory_def, memory_state = nnx.split(memory)
    dtype = compute_dtype(config.dtype)
    return Task(
        name="joint",
        make_model=lambda rngs: Decoder(decoder_config, rngs),
        loss=lambda model, frozen, batch, key: mixture_loss(
            model,
            nnx.merge(memory_def, frozen),
            batch,
            weight,
            tap,
            config.through_memory,
            dtype,
            config.remat,
            mesh,
        ),
        unit="tokens",
        unit_per_step=config.batch_size * config.context,
        frozen=memory_state,
    )


def train_joint(
    directory: Directory,
    manifest: Manifest,
    config: JointConfig,
    embed: EmbedConfig,
    decoder: Decoder,
    memory: Memory,
    default_weight: float,
    train_stream: TokenStream,
    validation_stream: TokenStream,
    mesh: Mesh,
) -> Manifest:
    """Trains a copy of the decoder with the memory frozen and publishes it as `directory`.

    Args:
      directory: where the artifact goes.
      manifest: of that artifact, begun.
      config: how to train.
      embed: how the memory's inputs were read; tap and context are taken from it.
      decoder, memory: the starting point; the memory does not change.
      default_weight: λ where `config.interpolation` is "auto".
      train_stream, validation_stream: corpora.
      mesh: devices.
    """
    weight = float(default_weight if config.interpolation == "auto" else config.interpolation)
    dtype = compute_dtype(config.dtype)
    ranges = spread(len(validation_stream), config.eval_rows)
    scored = read(validation_stream.has_next, ranges)
    labels_N = read(validation_stream.labels, ranges)[scored]

    def evaluate(model: Decoder) -> dict[str, float]:
        taps, log_prob_N = row_reader(embed, model, mesh).taps_and_log_probs(validation_stream, ranges)
        memory_N = memory_log_probs(memory, taps[scored], labels_N, mesh, dtype)
        return mixture_figures(log_prob_N[scored], memory_N)

    task = dataclasses.replace(
        joint_task(decoder.config, memory, config, embed.tap, weight, mesh),
        batches=Batches(
            WindowSource(train_stream, config.context), config.batch_size, config.seed, config.read_threads
        ),
        evaluate=evaluate,
        initial=nnx.to_pure_dict(nnx.state(decoder)),
    )
    tokens = config.steps * task.unit_per_step
    decoder_flops = decoder.config.train_flops(tokens, config.context)
    # The frozen memory runs forward, and backward for its input only: 4 of 6 FLOPs a weight.
    memory_flops = memory.config.train_flops(tokens) * 2 // 3
    return train(
        task,
        directory,
        manifest,
        config,
        mesh,
        {
            "model": dataclasses.asdict(decoder.config),
            "interpolation": weight,
            "train_flops": decoder_flops + memory_flops,
            "train_tokens": tokens,
        },
    )
