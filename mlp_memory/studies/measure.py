"""The measure stage: held-out rows scored by a variant's decoder and its memory, without kNN-LM."""

import functools
from typing import Any, NamedTuple

import numpy as np

from mlp_memory import artifacts
from mlp_memory.arrays import ArrayReader
from mlp_memory.artifacts import ArraySpec, Directory, UserError, config_dict
from mlp_memory.config import Config
from mlp_memory.decoder.windows import read, spread
from mlp_memory.job import Job
from mlp_memory.pipeline import Stage

FOLDER = "measure"
HELD_OUT = ("validation", "test")


class Measured(NamedTuple):
    """Of a split's scored rows: log-probabilities by model (base, base_memory), float32, and documents."""

    log_probs: dict[str, np.ndarray]
    documents_N: np.ndarray


def measure_stage(with_memory: bool) -> Stage:
    """Scores the decoder, and the memory where there is one."""

    def parents(config: Config) -> tuple[str, ...]:
        return (*(f"corpus/{split}" for split in HELD_OUT), "decoder", *(("memory",) if with_memory else ()))

    def settings(job: Job) -> dict[str, Any]:
        return {"rows": job.config.evaluate.max_rows, "embed": config_dict(job.config.embed)}

    def work(job: Job, directory: Directory) -> None:
        fingerprints = job.fingerprints(*parents(job.config))
        manifest = artifacts.begin(directory, FOLDER, settings(job), fingerprints)
        score(job, directory, with_memory, manifest.config, fingerprints)
        artifacts.finish(directory, manifest)

    return Stage("measure", FOLDER, "held-out rows scored", settings, parents, work)


def score(
    job: Job, directory: Directory, with_memory: bool, config: dict[str, Any], parents: dict[str, str]
) -> None:
    """Writes rows/SPLIT below the directory; goes on where an earlier start stopped."""
    from mlp_memory.evaluation.score import Systems, score_split

    @functools.cache
    def systems() -> Systems:
        return Systems(
            decoder=job.decoder()[0],
            base=job.row_reader(),
            joint=None,
            baseline=None,
            memory=job.memory()[0] if with_memory else None,
            neighbors=None,
            gate=None,
            joint_gate=None,
            mesh=job.mesh,
        )

    names = ("base", "base_memory") if with_memory else ("base",)
    for split in HELD_OUT:
        stream, settings = job.stream(split), job.config.evaluate
        ranges = spread(len(stream), settings.max_rows)
        rows = sum(stop - start for start, stop in ranges)
        arrays = {name: ArraySpec((rows,), "float32", settings.chunk_rows) for name in names}
        score_split(directory / f"rows/{split}", split, systems, arrays, stream, ranges, config, parents)


def read_measured(job: Job, split: str) -> Measured:
    """What the measure stage wrote of a split.

    Raises:
      UserError: a score is not finite.
    """
    stream = job.stream(split)
    ranges = spread(len(stream), job.config.evaluate.max_rows)
    scored = read(stream.has_next, ranges)
    directory = job.workdir / FOLDER / "rows" / split
    manifest = artifacts.require(directory, "study")
    found = {name: ArrayReader(directory, name)[0 : len(scored)][scored] for name in manifest.arrays}
    mixer = job.workdir / FOLDER / "mixer" / split
    if artifacts.peek(mixer) is not None:
        found["base_memory"] = ArrayReader(mixer, "base_memory")[0 : len(scored)][scored]
    for name, log_prob_N in found.items():
        if not np.isfinite(log_prob_N).all():
            raise UserError(f"{directory}: a log-probability of {name} is not finite")
    return Measured(found, read(stream.document_ids, ranges)[scored])
