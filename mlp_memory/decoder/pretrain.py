"""Language-model pretraining, for the decoder and for the baseline of equal parameters."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from mlp_memory import artifacts
from mlp_memory.artifacts import Directory, Manifest
from mlp_memory.corpus.stream import TokenStream
from mlp_memory.decoder.config import DecoderConfig, PretrainConfig, Tap
from mlp_memory.decoder.score import RowReader
from mlp_memory.decoder.transformer import Decoder
from mlp_memory.decoder.windows import WindowPlan, WindowSource, read, spread
from mlp_memory.training import checkpoints
from mlp_memory.training.batches import Batches
from mlp_memory.training.loop import Task, compute_dtype, train
from mlp_memory.training.sparse_head import sparse_cross_entropy


def language_model_loss(
    model: Decoder, dtype: Any, batch: dict[str, jax.Array], remat: str, mesh: Mesh | None = None
) -> jax.Array:
    """Summed cross-entropy of the next tokens, nats, over weighted positions."""
    hidden, _ = model(batch["tokens"], batch["segments"], dtype=dtype, remat=remat)
    labels_Nx1, weight_Nx1 = batch["labels"].reshape(-1, 1), batch["weight"].reshape(-1, 1)
    hidden_NxD = hidden.reshape(labels_Nx1.size, -1)
    return sparse_cross_entropy(hidden_NxD, model.head_kernel(), labels_Nx1, weight_Nx1, mesh)


def pretrain_task(name: str, model_config: DecoderConfig, config: PretrainConfig, mesh: Mesh) -> Task:
    """The training of a decoder of that shape, but for its data."""
    dtype = compute_dtype(config.dtype)
    return Task(
        name=name,
        make_model=lambda rngs: Decoder(model_config, rngs),
        loss=lambda model, frozen, batch, *_: language_model_loss(model, dtype, batch, config.remat, mesh),
        unit="tokens",
        unit_per_step=config.batch_size * config.context,
    )


def pretrain(
    directory: Directory,
    manifest: Manifest,
    model_config: DecoderConfig,
    config: PretrainConfig,
    train_stream: TokenStream,
    validation_stream: TokenStream,
    mesh: Mesh,
    initial: Decoder | None = None,
    observe: Callable[[Decoder, int, dict[str, float]], None] | None = None,
) -> Manifest:
    """Trains a decoder on a stream and publishes it as `directory`.

    Args:
      directory: where the artifact goes.
      manifest: of that artifact, begun.
      model_config: the shape, its vocabulary set.
      config: how to train.
      train_stream, validation_stream: corpora of one vocabulary.
      mesh: devices.
      initial: what training starts from; None for fresh parameters.
      observe: see `Task`.

    Raises:
      UserError: the loss is not finite.
    """
    dtype = compute_dtype(config.dtype)
    plan = WindowPlan(config.context, config.context)
    ranges = spread(len(validation_stream), config.eval_rows)
    scored = read(validation_stream.has_next, ranges)

    def evaluate(model: Decoder) -> dict[str, float]:
        reader = RowReader(model, mesh, plan, Tap(), dtype=dtype)
        _, log_prob_N = reader.taps_and_log_probs(validation_stream, ranges)
        nll = float(-log_prob_N[scored].astype(np.float64).mean())
        return {"validation_loss": nll, "validation_perplexity": float(np.exp(nll))}

    task = dataclasses.replace(
        pretrain_task(directory.location.rsplit("/", 1)[-1], model_config, config, mesh),
        batches=Batches(
            WindowSource(train_stream, config.context), config.batch_size, config.seed, config.read_threads
        ),
        evaluate=evaluate,
        observe=observe,
        initial=None if initial is None else nnx.to_pure_dict(nnx.state(initial)),
    )
    tokens = config.steps * config.batch_size * config.context
    return train(
        task,
        directory,
        manifest,
        config,
        mesh,
        {
            "model": dataclasses.asdict(model_config),
            "train_flops": model_config.train_flops(tokens, config.context),
            "train_tokens": tokens,
        },
    )


def load_decoder(directory: Directory, stage: str, mesh: Mesh) -> tuple[Decoder, Manifest]:
    """The published decoder of an artifact; `stage` is what makes it.

    Raises:
      UserError: missing, unfinished or damaged.
    """
    manifest = artifacts.require(directory, stage)
    config = DecoderConfig(**manifest.facts["model"])
    abstract = nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0)))
    return checkpoints.restore(directory, manifest, abstract, mesh), manifest
