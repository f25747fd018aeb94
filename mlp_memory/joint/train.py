"""The joint stage: the decoder goes on training on the mixture's likelihood (PAPER.md, 5)."""

import dataclasses
import functools
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
from mlp_memory.joint.adapters import Adapters
from mlp_memory.joint.config import JointConfig
from mlp_memory.joint.gate import Gate, gate_weight
from mlp_memory.memory.config import MemoryConfig
from mlp_memory.memory.distill import mixture_figures
from mlp_memory.memory.mlp import Memory
from mlp_memory.memory.score import memory_log_probs
from mlp_memory.parallel.sharding import state_shardings
from mlp_memory.training.batches import Batches
from mlp_memory.training.loop import Task, compute_dtype, train
from mlp_memory.training.sparse_head import divergence, label_and_spread, label_log_prob


def mixture_log_prob(memory_N: jax.Array, base_N: jax.Array, weight: jax.Array | float) -> jax.Array:
    """log(λ·p_M + (1 − λ)·p_LM) from the two log-probabilities of the same tokens; λ for all or for each."""
    return jnp.logaddexp(jnp.log(weight) + memory_N, jnp.log1p(-weight) + base_N)


def mixture_loss(
    decoder: Decoder,
    memory: Memory,
    batch: dict[str, jax.Array],
    weight: jax.Array | float | Gate,
    tap: Tap,
    through_memory: bool,
    dtype: Any = jnp.float32,
    remat: str = "none",
    mesh: Mesh | None = None,
    start: Decoder | None = None,
    kl: float = 0.0,
) -> jax.Array:
    """−Σ log(λ·p_M(y) + (1 − λ)·p_LM(y)) + kl·Σ KL(p_start ‖ p_LM) over weighted positions, nats.

    Args:
      decoder: trained.
      memory: frozen by the caller not differentiating it.
      batch: tokens, segments, labels, weight, each [B, T].
      weight: λ, or the gate that gives it, through which no gradient goes.
      tap: the memory's input.
      through_memory: False cuts the gradient at the memory's input.
      dtype: of the computation.
      remat: see `scan_blocks`.
      mesh: devices that the batch is split over.
      start: what the decoder is held to; frozen as the memory is. Read where `kl` is above 0.
      kl: weight of the divergence.
    """
    read = (batch["tokens"], batch["segments"], tap, dtype, remat)
    hidden, tapped = decoder(*read)
    labels_N, weight_N = batch["labels"].reshape(-1), batch["weight"].reshape(-1)
    hidden_NxD, tap_NxD = (x.reshape(labels_N.size, -1) for x in (hidden, tapped))
    tap_NxD = tap_NxD if through_memory else jax.lax.stop_gradient(tap_NxD)
    memory_hidden = memory(tap_NxD, dtype=dtype, remat=remat)
    base, of_memory = (hidden_NxD, decoder.head_kernel()), (memory_hidden, memory.head_kernel())
    if isinstance(weight, Gate):
        spreads = [label_and_spread(*one, labels_N, mesh)[1] for one in (base, of_memory)]
        weight = jax.lax.stop_gradient(gate_weight(weight, *spreads, tap_NxD))
    base_N, memory_N = (label_log_prob(*one, labels_N, mesh) for one in (base, of_memory))
    loss = -(mixture_log_prob(memory_N, base_N, weight) * weight_N).sum()
    if kl > 0:
        start_NxD = start(*read)[0].reshape(hidden_NxD.shape)
        loss += kl * divergence(start_NxD, start.head_kernel(), *base, weight_N, mesh)
    return loss


def scheduled(config: JointConfig, weight: float, step: jax.Array | int) -> jax.Array | float:
    """λ of a step, from 0; `weight` is where it ends."""
    first = config.interpolation_start
    if first is None:
        return weight
    return first + (weight - first) * jnp.minimum(step / config.interpolation_steps, 1.0)


def joint_task(
    decoder: Decoder,
    memory: Memory,
    config: JointConfig,
    tap: Tap,
    weight: float | Gate,
    mesh: Mesh,
) -> Task:
    """The training of a decoder beside a frozen memory, but for its data.

    Args:
      decoder: where it starts; kept, frozen, where adapters or the divergence want it.
      memory: frozen.
      config: how.
      tap: the memory's input.
      weight: λ at the end of its schedule, or the gate.
      mesh: devices.
    """
    gated, shape, keeps = isinstance(weight, Gate), decoder.config, config.kl > 0 or config.adapter_rank > 0
    memory_def, memory_state = nnx.split(memory)
    decoder_def, decoder_state = nnx.split(decoder)
    frozen = {"memory": memory_state} | ({"start": decoder_state} if keeps else {})
    frozen |= {"gate": weight} if gated else {}
    dtype = compute_dtype(config.dtype)

    def loss(
        model: Decoder | Adapters, frozen: Any, batch: dict[str, jax.Array], key: jax.Array, step: jax.Array
    ) -> jax.Array:
        start = nnx.merge(decoder_def, frozen["start"]) if keeps else None
        return mixture_loss(
            model.onto(start) if config.adapter_rank else model,
            nnx.merge(memory_def, frozen["memory"]),
            batch,
            frozen["gate"] if gated else scheduled(config, weight, step),
            tap,
            config.through_memory,
            dtype,
            config.remat,
            mesh,
            start,
            config.kl,
        )

    task = Task(
        name="joint",
        make_model=lambda rngs: Decoder(shape, rngs),
        loss=loss,
        unit="tokens",
        unit_per_step=config.batch_size * config.context,
        frozen=frozen,
    )
    if not config.adapter_rank:
        return task

    @functools.partial(jax.jit, out_shardings=state_shardings(decoder_state, mesh))
    def merge(adapters: nnx.State, start: nnx.State) -> Any:
        merged = nnx.merge(adapters_def, adapters).onto(nnx.merge(decoder_def, start))
        return nnx.to_pure_dict(nnx.state(merged))

    def make(rngs: nnx.Rngs) -> Adapters:
        return Adapters(shape, config.adapter_rank, config.adapter_alpha, rngs)

    def published(model: Adapters) -> Decoder:
        state = jax.tree.map(lambda x: x, decoder_state)
        nnx.replace_by_pure_dict(state, merge(nnx.state(model), decoder_state))
        return nnx.merge(decoder_def, state)

    adapters_def = nnx.graphdef(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    return dataclasses.replace(task, make_model=make, published=published)


def joint_flops(decoder: DecoderConfig, memory: MemoryConfig, config: JointConfig, tokens: int) -> int:
    """FLOPs of joint training on so many tokens.

    The frozen memory runs forward and, where gradient goes through it, backward for its input only: 2 or 4
    of training's 6 FLOPs a weight. Adapters spare the head's gradient; those of the blocks' products are
    taken whole.
    """
    trained, memory_third = decoder.train_flops(tokens, config.context), memory.train_flops(tokens) // 3
    head = 2 * tokens * decoder.dim * decoder.vocab_size
    total = trained + memory_third * (2 if config.through_memory else 1)
    if config.kl > 0:  # the start's forward, and the divergence's gradient by states and head
        total += trained // 3 + 2 * head
    if config.adapter_rank > 0:
        total -= 2 * head if config.kl > 0 else head
    if config.interpolation == "gate":
        total += head + 2 * tokens * memory.dim * decoder.vocab_size
    return total


def train_joint(
    directory: Directory,
    manifest: Manifest,
    config: JointConfig,
    embed: EmbedConfig,
    decoder: Decoder,
    memory: Memory,
    default_weight: float | Gate,
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
      default_weight: λ where `config.interpolation` is "auto", the gate where it is "gate".
      train_stream, validation_stream: corpora.
      mesh: devices.
    """
    by_default = config.interpolation in ("auto", "gate")
    weight = default_weight if by_default else float(config.interpolation)
    dtype = compute_dtype(config.dtype)
    ranges = spread(len(validation_stream), config.eval_rows)
    scored = read(validation_stream.has_next, ranges)
    labels_N = read(validation_stream.labels, ranges)[scored]
    task = joint_task(decoder, memory, config, embed.tap, weight, mesh)

    def evaluate(model: Decoder | Adapters) -> dict[str, float]:
        model = task.published(model) if task.published else model
        taps, log_prob_N = row_reader(embed, model, mesh).taps_and_log_probs(validation_stream, ranges)
        memory_N = memory_log_probs(memory, taps[scored], labels_N, mesh, dtype)
        return mixture_figures(log_prob_N[scored], memory_N)

    task = dataclasses.replace(
        task,
        batches=Batches(
            WindowSource(train_stream, config.context), config.batch_size, config.seed, config.read_threads
        ),
        evaluate=evaluate,
        initial=None if task.published else nnx.to_pure_dict(nnx.state(decoder)),
    )
    tokens = config.steps * task.unit_per_step
    return train(
        task,
        directory,
        manifest,
        config,
        mesh,
        {
            "model": dataclasses.asdict(decoder.config),
            "interpolation": "gate" if isinstance(weight, Gate) else weight,
            "train_flops": joint_flops(decoder.config, memory.config, config, tokens),
            "train_tokens": tokens,
        },
    )
