"""An update as stages: the ordinary ones, each doing only what the base has not done.

    corpus (deleted documents emptied, new ones behind) -> keys -> shards -> teachers of chosen rows -> memory

Decoder, vocabulary and held-out splits are the base's files. The result is a workdir like any other.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mlp_memory import artifacts, pipeline
from mlp_memory.artifacts import Directory, Manifest, UserError
from mlp_memory.config import Config
from mlp_memory.corpus.config import SPLITS
from mlp_memory.job import Job
from mlp_memory.pipeline import Stage
from mlp_memory.updating.request import Request, keep_record

if TYPE_CHECKING:
    from mlp_memory.targets.asked import ChosenBlocks
    from mlp_memory.targets.units import Inputs


class Update:
    """An update between its stages.

    Args:
      request: what was asked for.
      workdir: of the update.
      config: the base's, with what an update may have of its own.

    Attributes:
      base: the base's job.
      job: the update's.
    """

    def __init__(self, request: Request, workdir: Directory, config: Config):
        if workdir.location == request.base.location:
            raise UserError("--output is --workdir: an update is made in a folder of its own")
        self.request = request
        self.base, self.job = Job(request.base, config), Job(workdir, config)

    def prepare(self) -> None:
        """Checks the base, records the request, takes over what stays.

        Raises:
          UserError: the base is unfinished or was made otherwise, or the folder holds something else.
        """
        if self.base.config.pretrained.memory:
            raise UserError("update: an imported memory has no datastore that could be updated")
        for stage in self.stages():
            if not stage.is_done(self.base):
                raise UserError(
                    f"{self.base.workdir} has no finished {stage.folder}: run `{stage.name}` there first"
                )
        self.digest = keep_record(self.job.workdir, self.request)
        for part in pipeline.find_stage("tokenize").parts(self.job.config):
            if part != "train":
                directory = self.job.workdir / f"corpus/{part}"
                if (found := artifacts.peek(directory)) is not None and not found.finished:
                    directory.delete_file(artifacts.MANIFEST)  # a repair took away what was damaged
                directory.take_all(self.base.workdir / f"corpus/{part}")

    def next_stage(self) -> Stage | None:
        """The first stage that is not done."""
        return next((stage for stage in self.stages() if not stage.is_done(self.job)), None)

    def stages(self) -> list[Stage]:
        """The stages up to the memory, with an update's way of doing them; what follows is left to `run`."""
        decoder = self.job.made_by("decoder")
        work: dict[str, Callable[[Job, Directory], None]] = {
            "tokenize": self._corpus,
            decoder: self._decoder,
            "embed": self._embed,
        }
        if not self._from_scratch():
            work |= {"index": self._index, "retrieve": self._retrieve, "distill": self._distill}
        stages = map(pipeline.find_stage, ("tokenize", decoder, "embed", "index", "retrieve", "distill"))
        return [dataclasses.replace(stage, work=work.get(stage.name, stage.work)) for stage in stages]

    def _from_scratch(self) -> bool:
        how = self.job.config.update.memory
        return how == "from_scratch" or (how == "auto" and self.request.deletes)

    def _corpus(self, job: Job, directory: Directory) -> None:
        from mlp_memory.updating.corpus import update_corpus

        update_corpus(directory, self.request, self.digest, job.config.corpus.workers)

    def _decoder(self, job: Job, directory: Directory) -> None:
        """The base's files. It was trained on what the stream was at first: fact trained_on."""
        import jax

        if jax.process_index():
            return
        stage, source = pipeline.find_stage(job.made_by("decoder")), self.base.workdir / "decoder"
        found = self.base.manifest("decoder")
        manifest = dataclasses.replace(found, parents=job.fingerprints(*stage.parents(job.config)))
        facts = {} if not found.parents else {"trained_on": found.facts.get("trained_on", found.parents)}
        directory.take_all(source, without=artifacts.MANIFEST)
        artifacts.finish(directory, manifest, **facts)

    def _embed(self, job: Job, directory: Directory) -> None:
        from mlp_memory.arrays import ChunkWriter
        from mlp_memory.datastore.codec import CODEC_NAME
        from mlp_memory.datastore.embed import key_specs

        stage, source = pipeline.find_stage("embed"), self.base.workdir / "datastore"
        stream, found = job.stream("train"), self.base.manifest("datastore")
        specs = key_specs(job.config.embed, len(stream), job.decoder_config.dim)
        parents = job.fingerprints(*stage.parents(job.config))
        manifest = artifacts.begin(directory, "datastore", stage.settings(job), parents, specs)
        if found.facts.get("codec"):
            directory.take(CODEC_NAME, source)
        if specs:
            before, writer = self.base.stream("train"), ChunkWriter(directory, manifest)

            def same(start: int, stop: int) -> bool:
                return bool((before.is_deleted(start, stop) == stream.is_deleted(start, stop)).all())

            writer.adopt(source, found, same)
            _empty_deleted(writer, source, found, stream)
        stage.work(job, directory)

    def _index(self, job: Job, directory: Directory) -> None:
        from mlp_memory.index.extend import extend_index

        extend_index(
            directory,
            self.base.workdir / "index",
            self.base.manifest("index"),
            len(self.base.stream("train")),
            job.keys(),
            job.fingerprints("datastore")["datastore"],
            job.stream("train"),
            job.config.index,
            job.config.retrieve.k,
            job.mesh,
        )

    def _retrieve(self, job: Job, directory: Directory) -> None:
        from mlp_memory.targets.retrieve import Temperature, Truth, retrieve
        from mlp_memory.updating import choice

        chosen = choice.read(directory)
        if chosen is None:
            inputs = pipeline.retrieve_inputs(job.workdir.location, job.config)
            rows = job.config.distill.block_rows
            sources = (_source(self.base), _source(job))
            chosen = choice.choose(*sources, inputs.index, rows, job.config.update, job.config.distill.seed)
            choice.keep(directory, chosen)
        made = self.base.manifest("targets").facts
        retrieve(
            directory,
            functools.partial(_inputs, job.workdir.location, self.base.workdir.location, job.config),
            job.fingerprints(*pipeline.find_stage("retrieve").parents(job.config)),
            job.config.retrieve,
            fleet=job.config.fleet,
            truth=Truth(
                splits={split: job.stream(split) for split in SPLITS[1:]},
                states=None,
                mesh=job.mesh,
            ),
            temperature=Temperature(made["temperature"], made["temperature_choice"]),
            blocks=chosen.counts() | {"rows": job.config.distill.block_rows},
        )

    def _distill(self, job: Job, directory: Directory) -> None:
        from mlp_memory.updating import train

        memory, made = self.base.memory()
        asked, before = _chosen(job, self.base), self.base.stream("train")
        stage, config = pipeline.find_stage("distill"), job.config
        training = train.training(
            config.distill, config.update, len(asked) // config.distill.block_rows, made.facts, len(before)
        )
        import jax

        manifest = artifacts.begin(
            directory,
            "memory",
            stage.settings(job),
            job.fingerprints(*stage.parents(config)),
            writes=jax.process_index() == 0,
        )
        states = train.JoinedStates(self.base.memory_inputs(), job.memory_inputs(), len(before))
        rows = training.steps * training.batch_size * training.block_rows
        train.train_on(
            directory,
            manifest,
            memory,
            job.memory_config,
            training,
            asked,
            states,
            job.workdir / "targets",
            job.held_out(config.distill.eval_rows),
            job.mesh,
            {
                "model": made.facts["model"],
                "train_flops": made.facts["train_flops"] + job.memory_config.train_flops(rows),
                "train_rows": made.facts["train_rows"] + rows,
                "passes": made.facts.get("passes", made.facts["train_rows"] / len(before)),
                "update": {"steps": training.steps, "learning_rate": training.learning_rate},
            },
        )


def _empty_deleted(writer: Any, source: Directory, found: Manifest, stream: Any) -> None:
    """Chunks that the base has whole and of which documents are deleted: its keys, theirs zero.

    What the decoder would make of the deleted rows is not asked.
    """
    import numpy as np

    from mlp_memory.arrays import ArrayReader

    keys = ArrayReader(source, "keys")
    for chunk in writer.missing():
        start, stop = writer.rows(chunk)
        if stop <= len(keys):
            deleted_R = stream.is_deleted(start, stop)
            keys_RxE = np.array(keys[start:stop])
            keys_RxE[deleted_R] = 0
            writer.write(chunk, keys=keys_RxE)


def _source(job: Job) -> Any:
    from mlp_memory.targets.asked import Source

    return Source(job.stream("train"), job.keys())


def _chosen(job: Job, base: Job) -> "ChosenBlocks":
    """The chosen rows, as the targets of an update have them.

    Raises:
      UserError: there is no choice, or it is damaged.
    """
    from mlp_memory.targets.asked import ChosenBlocks
    from mlp_memory.updating import choice

    chosen = choice.read(job.workdir / "targets")
    if chosen is None:
        raise UserError(f"{job.workdir}/targets/{choice.NAME} is missing: run `update` again")
    return ChosenBlocks(chosen.starts_B, job.config.distill.block_rows, _source(base), _source(job))


def _inputs(location: str, base: str, config: Config) -> "Inputs":
    """What an update's retrieve reads, opened in any process that sees both workdirs."""
    inputs = pipeline.retrieve_inputs(location, config)
    chosen = _chosen(Job(Directory(location), config), Job(Directory(base), config))
    return inputs._replace(chosen=chosen)


def summary(base: Job, job: Job) -> str:
    """What an update did, for people."""
    from mlp_memory.workdir import seconds_by_stage

    stream, old = job.stream("train"), base.stream("train")
    targets, memory = job.manifest("targets").facts, job.manifest("memory").facts
    before, after = base.manifest("memory").facts["validation"], memory["validation"]
    blocks = dict(targets.get("blocks", {}))
    rows = blocks.pop("rows", 0)
    chosen = ", ".join(f"{name} {count * rows:,}" for name, count in blocks.items())
    took = seconds_by_stage(job.workdir)
    deleted = int(stream.deleted_D.sum() - old.deleted_D.sum())
    lines = [
        f"documents     {len(stream.bounds_D1) - len(old.bounds_D1):,} added, {deleted:,} deleted",
        f"rows          {len(stream) - len(old):,} added to {len(old):,}",
        "teachers      " + (f"{chosen} rows" if chosen else "all rows; index and memory made anew as well"),
        f"validation    base + memory {before['validation_perplexity']:.2f} -> "
        f"{after['validation_perplexity']:.2f} (perplexity)",
        f"took          {sum(took.values()):,.0f} s: "
        + ", ".join(f"{name} {seconds:,.0f}" for name, seconds in took.items()),
        "",
        f"{job.workdir} is a workdir like any other: run, generate, evaluate, export --workdir={job.workdir}",
    ]
    return "\n".join(lines)
