"""A memory that mixes tokens: a transformer of the MLP memory's size over the tapped states of a window.

Like a decoder's, its position t sees positions ..t of its own document and window, and a row is scored
through the window that gives it the most context. It learns from the rows, targets and α of the MLP memory.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from mlp_memory import artifacts
from mlp_memory.arrays import ChunkWriter
from mlp_memory.artifacts import ArraySpec, Directory, config_dict
from mlp_memory.corpus.stream import TokenStream
from mlp_memory.decoder.config import DecoderConfig, parameter_count
from mlp_memory.decoder.layers import Linear, Norm, parameter, scan_blocks, stack
from mlp_memory.decoder.transformer import Block
from mlp_memory.decoder.windows import Ranges, WindowPlan, read, spread
from mlp_memory.job import Job
from mlp_memory.memory.config import DistillConfig, MemoryConfig
from mlp_memory.memory.distill import TargetSource, mixture_figures, soft_targets
from mlp_memory.memory.states import StoredStates
from mlp_memory.parallel.sharding import place_whole_batch
from mlp_memory.pipeline import Stage
from mlp_memory.studies.measure import FOLDER as MEASURE
from mlp_memory.studies.measure import HELD_OUT, score
from mlp_memory.studies.sizes import memory_parameters
from mlp_memory.training import checkpoints
from mlp_memory.training.batches import Batches
from mlp_memory.training.loop import Task, compute_dtype, train
from mlp_memory.training.sparse_head import label_and_spread, sparse_cross_entropy

if TYPE_CHECKING:
    from mlp_memory.decoder.score import RowReader

FOLDER = "mixer"
_WINDOWS = 16


def mixer_shape(decoder: DecoderConfig, memory: MemoryConfig) -> DecoderConfig:
    """Blocks of the memory's style, width and parameters, closest in proportion to a decoder's, with
    the decoder's head size; its vocabulary is counted once.

    Args:
      decoder: whose states it reads.
      memory: the MLP memory that it is to match, resolved.
    """
    gpt2 = memory.style == "gpt2"
    width = decoder.head_dim if memory.dim % decoder.head_dim == 0 else memory.dim
    shape = DecoderConfig(
        layers=1,
        dim=memory.dim,
        heads=memory.dim // width,
        norm="layernorm" if gpt2 else "rmsnorm",
        activation=memory.activation,
        bias="all" if gpt2 else "none",
        tied=True,  # its head alone: it has no token embedding
        norm_epsilon=memory.norm_epsilon,
        vocab_size=memory.vocab_size,
    )
    wanted = memory_parameters(memory) - _transform(memory)
    found = []
    for layers in range(1, 2 * memory.layers + 1):
        least = dataclasses.replace(shape, layers=layers, ffn_dim=16)
        slope = parameter_count(dataclasses.replace(least, ffn_dim=32)) - parameter_count(least)
        step = max(1, 1 + round((wanted - parameter_count(least)) / slope))
        fitted = dataclasses.replace(least, ffn_dim=16 * step)
        miss = abs(parameter_count(fitted) / wanted - 1)
        odd = abs(np.log(fitted.hidden_dim / shape.hidden_dim))
        found.append(((miss > 0.01, miss if miss > 0.01 else odd), layers, fitted))
    return min(found)[2]


def mixer_parameters(decoder: DecoderConfig, memory: MemoryConfig) -> int:
    """Scalars in all its parameters."""
    return parameter_count(mixer_shape(decoder, memory)) + _transform(memory)


def _transform(memory: MemoryConfig) -> int:
    return (memory.input_dim + 1) * memory.dim if memory.input_dim != memory.dim else 0


class SequenceMemory(nnx.Module):
    """Tapped states of windows to final states; times `head_kernel` they are logits.

    Args:
      config: the shape.
      input_dim: of a tapped state.
      rngs: parameter seeds.
    """

    def __init__(self, config: DecoderConfig, input_dim: int, rngs: nnx.Rngs):
        d = config.dim
        self.transform = Linear((input_dim, d), ("input", "embed"), True, rngs) if input_dim != d else None
        self.blocks = stack(lambda r: Block(config, r), config.layers, rngs)
        self.norm = Norm(config.norm, d, config.norm_epsilon, rngs)
        self.head = parameter(rngs, (d, config.vocab_size), ("embed", "vocab"), d**-0.5)

    def __call__(
        self, h_BxTxD: jax.Array, segments_BxT: jax.Array, dtype: Any = jnp.float32, remat: str = "none"
    ) -> jax.Array:
        """Final normed states [B, T, dim] in `dtype`; position t sees positions ..t of its segment."""
        x_BxTxD = h_BxTxD.astype(dtype)
        if self.transform is not None:
            x_BxTxD = self.transform(x_BxTxD)
        length = x_BxTxD.shape[1]
        mask_BxTxT = jnp.tril(jnp.ones((1, length, length), bool))
        mask_BxTxT = mask_BxTxT & (segments_BxT[:, :, None] == segments_BxT[:, None, :])
        positions_1xT = jnp.arange(length)[None]

        def step(block: Block, x: jax.Array, layer: jax.Array) -> jax.Array:
            return block(x, positions_1xT, mask_BxTxT, None)[0]

        return self.norm(scan_blocks(self.blocks, step, x_BxTxD, remat))

    def head_kernel(self) -> jax.Array:
        """The output projection, [dim, V]."""
        return self.head[...]


class WindowTargets:
    """Training elements: consecutive windows of rows with state, teacher, next token and document."""

    def __init__(self, stream: TokenStream, states: StoredStates, targets: Directory, context: int):
        self._targets = TargetSource(stream, states, targets, context)
        self._stream, self._context = stream, context

    def __len__(self) -> int:
        return len(self._targets)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        start = index * self._context
        segments_T = _segments(self._stream, start, self._context)
        return {**self._targets[index], "segments": segments_T}


def _segments(stream: TokenStream, start: int, length: int) -> np.ndarray:
    """Document numbers of `length` rows, −1 past the stream's end, int32."""
    found_T = stream.document_ids(start, min(start + length, len(stream)))
    return np.pad(found_T, (0, length - len(found_T)), constant_values=-1)


class HeldOutWindows:
    """The rows of `ranges` with the states of all their windows, as the decoder reads them.

    Args:
      reader: the decoder's, with the datastore's taps and windows.
      stream: the rows'.
      ranges: which.
      plan: the windows.
    """

    def __init__(self, reader: "RowReader", stream: TokenStream, ranges: Ranges, plan: WindowPlan):
        parts = []
        for start, stop in ranges:
            windows = plan.windows(start, stop, len(stream))
            first, last = windows[0].start, min(windows[-1].start + plan.context, len(stream))
            taps_NxD = reader.taps(stream, first, last)
            labels_N = stream.labels(first, last)
            for w in windows:
                rows = slice(w.start - first, min(w.start + plan.context, last) - first)
                pad = plan.context - (rows.stop - rows.start)
                parts.append(
                    (
                        np.pad(taps_NxD[rows], ((0, pad), (0, 0))),
                        np.pad(labels_N[rows], (0, pad)),
                        _segments(stream, w.start, plan.context),
                        slice(w.first - w.start, w.stop - w.start),
                    )
                )
        taps, labels, segments, self._used = zip(*parts)
        self._arrays = {"h": np.stack(taps), "labels": np.stack(labels), "segments": np.stack(segments)}

    def log_probs(self, model: SequenceMemory, mesh: Mesh, dtype: Any) -> np.ndarray:
        """log p(next token) of each row, [n] float32; it means nothing where there is none."""
        graphdef, params = nnx.split(model)
        split = mesh.shape["slice"] * mesh.shape["data"] * mesh.shape["fsdp"]
        batch, windows = -(-_WINDOWS // split) * split, len(self._used)

        @jax.jit
        def scored(params: nnx.State, arrays: dict[str, jax.Array]) -> jax.Array:
            model = nnx.merge(graphdef, params)
            hidden = model(arrays["h"], arrays["segments"], dtype)
            labels_N = arrays["labels"].reshape(-1)
            log_prob_N, _ = label_and_spread(
                hidden.reshape(labels_N.size, -1), model.head_kernel(), labels_N, mesh
            )
            return log_prob_N.reshape(arrays["labels"].shape)

        found = []
        for start in range(0, windows, batch):
            part = {name: values[start : start + batch] for name, values in self._arrays.items()}
            pad = batch - len(part["h"])
            whole = {name: np.pad(v, ((0, pad), *[(0, 0)] * (v.ndim - 1))) for name, v in part.items()}
            log_prob = np.asarray(scored(params, place_whole_batch(whole, mesh)))
            found += [log_prob[n, used] for n, used in enumerate(self._used[start : start + batch])]
        return np.concatenate(found)


def mixer_stage() -> Stage:
    """Distils the transformer memory, as `distill` does the MLP's."""
    parents = ("corpus/train", "corpus/validation", "datastore", "targets")

    def settings(job: Job) -> dict[str, Any]:
        shape = mixer_shape(job.decoder_config, job.memory_config)
        return {"mixer": config_dict(shape), "distill": config_dict(job.config.distill)}

    def work(job: Job, directory: Directory) -> None:
        writes = jax.process_index() == 0
        fingerprints = job.fingerprints(*parents)
        manifest = artifacts.begin(directory, FOLDER, settings(job), fingerprints, writes=writes)
        _train(job, directory, manifest)

    return Stage(
        "distill_mixer",
        FOLDER,
        "train a transformer memory on the distributions",
        settings,
        lambda config: parents,
        work,
        together=True,
    )


def _in_windows(config: DistillConfig, context: int) -> DistillConfig:
    """That training with as many rows a step, in windows."""
    windows = max(1, config.batch_size * config.block_rows // context)
    return dataclasses.replace(config, batch_size=windows, block_rows=context)


def _train(job: Job, directory: Directory, manifest: artifacts.Manifest) -> None:
    embed, stream, mesh = job.embed_config, job.stream("train"), job.mesh
    config = _in_windows(job.config.distill, embed.context)
    shape, dtype = mixer_shape(job.decoder_config, job.memory_config), compute_dtype(config.dtype)
    source = WindowTargets(stream, StoredStates(job.states()), job.workdir / "targets", embed.context)
    validation, rows = job.held_out(config.eval_rows), job.stream("validation")
    ranges = spread(len(rows), config.eval_rows)
    windows = HeldOutWindows(job.row_reader(), rows, ranges, WindowPlan(embed.context, embed.stride))
    scored = read(rows.has_next, ranges)

    def loss(model: SequenceMemory, frozen: Any, batch: dict[str, jax.Array], *_: Any) -> jax.Array:
        hidden = model(batch["h"], batch["segments"], dtype, config.remat)
        hidden_NxD = hidden.reshape(batch["labels"].size, -1)
        targets = soft_targets(batch, config.alpha)
        return sparse_cross_entropy(hidden_NxD, model.head_kernel(), *targets, mesh)

    def evaluate(model: SequenceMemory) -> dict[str, float]:
        return mixture_figures(validation.base_log_prob_N, windows.log_probs(model, mesh, dtype)[scored])

    task = Task(
        name="transformer memory",
        make_model=lambda rngs: SequenceMemory(shape, job.decoder_config.dim, rngs),
        loss=loss,
        unit="rows",
        unit_per_step=config.batch_size * config.block_rows,
        batches=Batches(source, config.batch_size, config.seed, config.read_threads),
        evaluate=evaluate,
    )
    trained = config.steps * task.unit_per_step
    facts = {
        "model": dataclasses.asdict(shape),
        "train_flops": shape.train_flops(trained, embed.context),
        "train_rows": trained,
    }
    train(task, directory, manifest, config, mesh, facts)


def mixer_measure_stage() -> Stage:
    """Scores the decoder and the transformer memory on held-out rows."""
    parents = (*(f"corpus/{split}" for split in HELD_OUT), "decoder", FOLDER)

    def settings(job: Job) -> dict[str, Any]:
        return {"rows": job.config.evaluate.max_rows, "embed": config_dict(job.config.embed)}

    def work(job: Job, directory: Directory) -> None:
        fingerprints, embed = job.fingerprints(*parents), job.config.embed
        manifest = artifacts.begin(directory, MEASURE, settings(job), fingerprints)
        score(job, directory, False, manifest.config, fingerprints)
        reader, model = job.row_reader(), _load(job)
        dtype, plan = compute_dtype(job.config.distill.dtype), WindowPlan(embed.context, embed.stride)
        for split in HELD_OUT:
            stream = job.stream(split)
            ranges = spread(len(stream), job.config.evaluate.max_rows)
            log_prob_N = HeldOutWindows(reader, stream, ranges, plan).log_probs(model, job.mesh, dtype)
            log_prob_N = np.where(read(stream.has_next, ranges), log_prob_N, 0).astype(np.float32)
            arrays = {"base_memory": ArraySpec(log_prob_N.shape, "float32", len(log_prob_N))}
            where = directory / "mixer" / split
            rows = artifacts.begin(where, "scored_rows", manifest.config, fingerprints, arrays)
            if not rows.finished:
                writer = ChunkWriter(where, rows)
                writer.write(0, base_memory=log_prob_N)
                writer.finish()
        artifacts.finish(directory, manifest)

    return Stage("measure", MEASURE, "held-out rows scored", settings, lambda config: parents, work)


def _load(job: Job) -> SequenceMemory:
    directory = job.workdir / FOLDER
    manifest = artifacts.require(directory, "study")
    shape, dim = DecoderConfig(**manifest.facts["model"]), job.decoder_config.dim
    abstract = nnx.eval_shape(lambda: SequenceMemory(shape, dim, nnx.Rngs(0)))
    return checkpoints.restore(directory, manifest, abstract, job.mesh)
