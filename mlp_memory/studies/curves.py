"""The curve stages: one training at a constant rate, its train and test losses measured on the way.

One run gives the whole curve, since at a constant rate the first n steps of a longer training are those of a
training of n steps. The losses are those of the true next tokens, at the same rows each time: "alone" is what
is trained, "mixture" a memory with its decoder, λ chosen on validation at that moment.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mlp_memory import artifacts
from mlp_memory.artifacts import Directory, config_dict
from mlp_memory.config import Config
from mlp_memory.decoder.windows import read, spread
from mlp_memory.job import Job
from mlp_memory.pipeline import Stage
from mlp_memory.statistics import units_of
from mlp_memory.targets.interpolation import mixture_rows
from mlp_memory.training.config import TrainConfig
from mlp_memory.training.metrics import read_metrics

if TYPE_CHECKING:
    from mlp_memory.decoder.score import Scored

FOLDER = "curve"
SAMPLES = ("train", "test")
Observe = Callable[[Any, int, dict[str, float]], None]


class _Sample(NamedTuple):
    """Rows that have a next token: which those are of the stretches read, their labels, and units."""

    ranges: list[tuple[int, int]]
    scored: np.ndarray
    labels_N: np.ndarray
    unit_N: np.ndarray


def curve_stage(of_memory: bool) -> Stage:
    """Trains a memory, or a decoder from scratch, for `study.epochs`."""
    decoder = () if not of_memory else ("decoder", "datastore", "targets")
    splits = ("corpus/train", "corpus/validation", "corpus/test")

    def parents(config: Config) -> tuple[str, ...]:
        return (*splits, *decoder)

    def settings(job: Job) -> dict[str, Any]:
        study, config = job.config.study, job.config
        found = {name: getattr(study, name) for name in ("epochs", "checks", "train_rows")}
        found |= {"test_rows": config.evaluate.max_rows, "embed": config_dict(config.embed)}
        if of_memory:
            return {**found, "memory": config_dict(job.memory_config), "distill": _training(config.distill)}
        return {
            **found,
            "decoder": config_dict(job.decoder_config),
            "pretrain": _training(config.pretrain),
        }

    def work(job: Job, directory: Directory) -> None:
        fingerprints = job.fingerprints(*parents(job.config))
        import jax

        manifest = artifacts.begin(
            directory, FOLDER, settings(job), fingerprints, writes=jax.process_index() == 0
        )
        (_train_memory if of_memory else _train_decoder)(job, directory, manifest)

    kind = "memory" if of_memory else "decoder"
    return Stage("curve", FOLDER, f"a {kind}'s losses as epochs grow", settings, parents, work, together=True)


def _training(config: TrainConfig) -> dict[str, Any]:
    """Settings that decide a curve: those that it sets itself left out."""
    ours = ("steps", "eval_every", "decay", "final_ratio")
    return {name: value for name, value in config_dict(config).items() if name not in ours}


def for_epochs(config: TrainConfig, rows: int, rows_per_step: int, epochs: float, checks: int) -> TrainConfig:
    """That training at a constant rate for about so many passes over the rows, measured evenly."""
    every = max(1, round(epochs * rows / rows_per_step / checks))
    return dataclasses.replace(config, steps=every * checks, eval_every=every, decay="constant")


def _samples(job: Job) -> dict[str, _Sample]:
    rows = {"train": job.config.study.train_rows, "test": job.config.evaluate.max_rows}
    found = {}
    for name in SAMPLES:
        stream = job.stream(name)
        ranges = spread(len(stream), rows[name])
        scored = read(stream.has_next, ranges)
        unit_N = units_of(read(stream.document_ids, ranges)[scored])[0]
        found[name] = _Sample(ranges, scored, read(stream.labels, ranges)[scored], unit_N)
    return found


def _write(directory: Directory, step: int, weight: float, nats: dict[str, dict[str, np.ndarray]]) -> None:
    """Of a check, by sample: tokens of each unit and each model's nats of them, summed."""
    import jax

    if jax.process_index() == 0:
        directory.write(_file(step), artifacts.canonical_json({"lambda": weight, **nats}).encode())


def _file(step: int) -> str:
    return f"checks/{step}.json"


def _by_unit(sample: _Sample, models: dict[str, np.ndarray]) -> dict[str, list[float]]:
    sums = {
        name: np.bincount(sample.unit_N, nll_N.astype(np.float64)).tolist() for name, nll_N in models.items()
    }
    return {"tokens": np.bincount(sample.unit_N).tolist(), **sums}


def _train_memory(job: Job, directory: Directory, manifest: artifacts.Manifest) -> None:
    from mlp_memory.memory.distill import distill
    from mlp_memory.memory.score import memory_log_probs
    from mlp_memory.training.loop import compute_dtype

    config, study = job.config.distill, job.config.study
    train = job.stream("train")
    config = for_epochs(config, len(train), config.batch_size * config.block_rows, study.epochs, study.checks)
    samples, reader = _samples(job), job.row_reader()
    dtype = compute_dtype(config.dtype)

    def taken(sample: _Sample, name: str) -> "Scored":
        found = reader.scores(job.stream(name), sample.ranges)
        return found._replace(
            taps_NxD=found.taps_NxD[sample.scored], log_prob_N=found.log_prob_N[sample.scored]
        )

    states = {name: taken(sample, name) for name, sample in samples.items()}

    def observe(model: Any, step: int, figures: dict[str, float]) -> None:
        weight, found = figures["validation_lambda"], {}
        for name, sample in samples.items():
            base = states[name]
            log_prob_N = memory_log_probs(model, base.taps_NxD, sample.labels_N, job.mesh, dtype)
            mixture_N = mixture_rows(base.log_prob_N, log_prob_N, weight)
            found[name] = _by_unit(sample, {"alone": -log_prob_N, "mixture": mixture_N})
        _write(directory, step, weight, found)

    data = (train, job.memory_inputs(), job.workdir / "targets", job.held_out(config.eval_rows))
    distill(directory, manifest, job.memory_config, config, *data, job.mesh, observe)


def _train_decoder(job: Job, directory: Directory, manifest: artifacts.Manifest) -> None:
    from mlp_memory.datastore.embed import row_reader
    from mlp_memory.decoder.pretrain import pretrain

    config, study = job.config.pretrain, job.config.study
    train = job.stream("train")
    config = for_epochs(config, len(train), config.batch_size * config.context, study.epochs, study.checks)
    samples = _samples(job)

    def observe(model: Any, step: int, figures: dict[str, float]) -> None:
        reader, found = row_reader(job.config.embed, model, job.mesh), {}
        for name, sample in samples.items():
            log_prob_N = reader.scores(job.stream(name), sample.ranges).log_prob_N[sample.scored]
            found[name] = _by_unit(sample, {"alone": -log_prob_N})
        _write(directory, step, 0.0, found)

    streams = (train, job.stream("validation"))
    pretrain(directory, manifest, job.decoder_config, config, *streams, job.mesh, observe=observe)


class Check(NamedTuple):
    """A moment of a curve: step, epochs passed, models' validation losses, λ, `_by_unit` of each sample."""

    step: int
    epochs: float
    validation: dict[str, float]
    weight: float
    samples: dict[str, dict[str, np.ndarray]]


def read_curve(job: Job) -> list[Check]:
    """A finished curve's checks in order, that of untrained parameters left out."""
    directory, found = job.workdir / FOLDER, []
    manifest, rows = artifacts.require(directory, "study"), len(job.stream("train"))
    seen = manifest.facts.get("train_rows") or manifest.facts["train_tokens"]
    lines = [line for line in read_metrics(directory) if "validation_loss" in line and line["step"] > 0]
    for line in lines:
        check = json.loads(directory.read(_file(line["step"])))
        weight = check.pop("lambda")
        samples = {name: {k: np.array(v) for k, v in part.items()} for name, part in check.items()}
        epochs = line["step"] / lines[-1]["step"] * seen / rows
        found.append(Check(line["step"], epochs, _validation(line), weight, samples))
    return found


def _validation(line: dict[str, float]) -> dict[str, float]:
    """Nats per token by model; a memory's own `validation_loss` is that of the mixture."""
    if "validation_memory_perplexity" not in line:
        return {"alone": line["validation_loss"]}
    return {"alone": math.log(line["validation_memory_perplexity"]), "mixture": line["validation_loss"]}
