"""The stages in order: what each reads, what it writes, and when it has nothing to do.

A stage reads finished artifacts under WORKDIR and writes one. Heavy packages are imported
inside the stage that needs them: a training process never loads TensorFlow, seqio or ScaNN.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mlp_memory import artifacts
from mlp_memory.artifacts import ArraySpec, Directory, Manifest, UserError, config_dict
from mlp_memory.config import Config, config_json
from mlp_memory.corpus.config import SPLITS
from mlp_memory.evaluation.harness.names import SYSTEM
from mlp_memory.job import TOKENIZER, Job

if TYPE_CHECKING:
    from mlp_memory.datastore import embed as embedding
    from mlp_memory.decoder.score import RowReader
    from mlp_memory.evaluation.score import Systems
    from mlp_memory.interchange.source import Source
    from mlp_memory.targets.units import Inputs


@dataclasses.dataclass(frozen=True)
class Stage:
    """A step from finished artifacts to one more.

    Attributes:
      name: on the command line.
      folder: the artifact under WORKDIR.
      help: one line.
      settings: what of the config decides the artifact's bytes, as in its manifest.
      parents: artifacts it is made from.
      work: makes it.
      wanted: whether a config asks for it.
      parts: the artifacts inside the folder under a config, where it is not one itself.
      together: whether all processes of a job do it; process 0 alone if not.
    """

    name: str
    folder: str
    help: str
    settings: Callable[[Job], dict[str, Any]]
    parents: Callable[[Config], tuple[str, ...]]
    work: Callable[[Job, Directory], None]
    wanted: Callable[[Config], bool] = lambda config: True
    parts: Callable[[Config], tuple[str, ...]] = lambda config: ()
    together: bool = False

    def is_done(self, job: Job) -> bool:
        """Whether the artifact is whole, undamaged at first sight and made from what is there now.

        Raises:
          UserError: it was made otherwise, a parent changed, or a file is damaged.
        """
        parts = self.parts(job.config)
        if parts:
            from mlp_memory.corpus.tokenize import require_same_corpus

            require_same_corpus(job.workdir / self.folder, job.config.corpus, job.tokenizer)
        names = [f"{self.folder}/{part}" for part in parts] or [self.folder]
        directories = [job.workdir / name for name in names]
        found = [artifacts.peek(directory) for directory in directories]
        for directory, manifest in zip(directories, found):
            if manifest is not None and manifest.finished:
                artifacts.require(directory, self.name)
                artifacts.sweep(directory)
            if manifest is not None and not parts:
                parents = job.fingerprints(*self.parents(job.config))
                wanted = Manifest(manifest.kind, self.settings(job), parents)
                artifacts.require_same(directory, manifest, wanted)
        return all(manifest is not None and manifest.finished for manifest in found)


def _begin(
    stage: str, kind: str, job: Job, directory: Directory, arrays: dict[str, ArraySpec] | None = None
) -> Manifest:
    import jax

    this = find_stage(stage)
    parents = job.fingerprints(*this.parents(job.config))
    writes = jax.process_index() == 0
    return artifacts.begin(directory, kind, this.settings(job), parents, arrays, writes)


def _tokenize(job: Job, directory: Directory) -> None:
    from mlp_memory.corpus.tokenize import tokenize
    from mlp_memory.updating.request import read_record

    if record := read_record(job.workdir):
        raise UserError(
            f"{job.workdir} is an update of {record.get('base')}: run `update` again, not tokenize"
        )
    tokenize(directory, job.config.corpus, job.tokenizer)


def _pretrain(job: Job, directory: Directory) -> None:
    from mlp_memory.decoder.pretrain import pretrain
    from mlp_memory.interchange.source import load

    manifest = _begin("pretrain", "decoder", job, directory)
    streams = (job.stream("train"), job.stream("validation"))
    initial = load(job.source, job.mesh) if job.config.pretrained.finetune else None
    pretrain(directory, manifest, job.decoder_config, job.config.pretrain, *streams, job.mesh, initial)


def _import(job: Job, directory: Directory) -> None:
    if artifacts.peek(job.workdir / "corpus/train") is not None:
        _ = job.decoder_config  # a vocabulary that does not fit is told before anything is read
    _publish_imported("import", job.source, job, directory)


def _import_memory(job: Job, directory: Directory) -> None:
    _publish_imported("import_memory", job.memory_source, job, directory)


def _publish_imported(stage: str, source: "Source", job: Job, directory: Directory) -> None:
    from mlp_memory.interchange.importing import import_model

    manifest = _begin(stage, source.kind, job, directory)
    import_model(directory, manifest, source, job.mesh, job.config.pretrained.dtype, directory / TOKENIZER)


def import_stage(job: Job, location: str | None) -> Stage:
    """The stage that imports the model at `location`, or the one that the config names."""
    pretrained = job.config.pretrained
    for name, named in (("import", pretrained.source), ("import_memory", pretrained.memory)):
        if named and location in (None, named):
            return find_stage(name)
    raise UserError("import: nothing to import, give --from=DIR_OR_FILE or pretrained.source")


def _embed(job: Job, directory: Directory) -> None:
    from mlp_memory.datastore.embed import embed, key_specs

    job.manifest("decoder")
    shape = (len(job.stream("train")), job.decoder_config.dim)
    manifest = _begin("embed", "datastore", job, directory, key_specs(job.config.embed, *shape))
    inputs = functools.partial(embed_inputs, job.workdir.location, job.config)
    embed(directory, manifest, job.config.embed, shape, inputs, job.config.fleet)


def embed_inputs(location: str, config: Config) -> "embedding.Inputs":
    """What embed reads, opened in any process that sees the workdir."""
    from mlp_memory.datastore.embed import Inputs

    job = Job(Directory(location), config)
    return Inputs(job.decoder()[0], job.stream("train"), job.mesh)


def _index(job: Job, directory: Directory) -> None:
    from mlp_memory.index.stage import build_index

    parent = job.fingerprints("datastore")["datastore"]
    stream, config = job.stream("train"), job.config
    build_index(directory, job.keys(), parent, stream, config.index, config.retrieve.k, job.mesh)


def _retrieve(job: Job, directory: Directory) -> None:
    from mlp_memory.targets.retrieve import Truth, Validation, retrieve

    parents = job.fingerprints(*find_stage("retrieve").parents(job.config))
    config, validation, keys = job.config.retrieve, None, job.keys()
    if config.temperature == "auto":
        rows = job.held_out(config.validation_rows)
        validation = Validation(keys.queries(rows.taps_NxD), rows.base_log_prob_N, rows.labels_N)
    inputs = functools.partial(retrieve_inputs, job.workdir.location, job.config)
    truth = Truth(
        splits={split: job.stream(split) for split in ("validation", "test")},
        states=None if job.config.embed.keeps_states else job.states(),
        mesh=job.mesh,
    )
    retrieve(directory, inputs, parents, config, validation, job.config.fleet, truth)


def retrieve_inputs(location: str, config: Config) -> "Inputs":
    """What retrieve reads, opened in any process that sees the workdir."""
    from mlp_memory.targets.units import Inputs

    job = Job(Directory(location), config)
    keys = job.keys()
    return Inputs(job.stream("train"), keys, job.index(keys))


def _distill(job: Job, directory: Directory) -> None:
    from mlp_memory.memory.distill import distill

    manifest, config = _begin("distill", "memory", job, directory), job.config.distill
    held_out = job.held_out(config.eval_rows)
    data = (job.stream("train"), job.memory_inputs(), job.workdir / "targets", held_out)
    distill(directory, manifest, job.memory_config, config, *data, job.mesh)


def _joint(job: Job, directory: Directory) -> None:
    from mlp_memory.joint.train import train_joint

    manifest = _begin("joint", "joint", job, directory)
    memory, distilled = job.memory()
    weight = distilled.facts["validation"]["validation_lambda"]
    if job.config.joint.interpolation == "gate":
        weight = job.gate()
    train_joint(
        directory,
        manifest,
        job.config.joint,
        job.embed_config,
        job.decoder()[0],
        memory,
        weight,
        job.stream("train"),
        job.stream("validation"),
        job.mesh,
    )


def _gate(job: Job, directory: Directory) -> None:
    _fit_gate("gate", "pretrain", job, directory)


def _joint_gate(job: Job, directory: Directory) -> None:
    _fit_gate("joint_gate", "joint", job, directory)


def _fit_gate(stage: str, decoder: str, job: Job, directory: Directory) -> None:
    from mlp_memory.joint.gate import fit_gate, gate_facts, held_out

    manifest, config = _begin(stage, "gate", job, directory), job.config.gate
    reader, memory = job.row_reader(decoder), job.memory()[0]
    names = ("validation", *config.guards)
    texts = {name: held_out(reader, memory, job.stream(name), config.rows) for name in names}
    gate, facts = fit_gate(texts, config)
    artifacts.finish(directory, manifest, gate=gate_facts(gate), **facts)


def _baseline(job: Job, directory: Directory) -> None:
    from mlp_memory.decoder.pretrain import pretrain

    manifest = _begin("baseline", "baseline", job, directory)
    streams = (job.stream("train"), job.stream("validation"))
    pretrain(directory, manifest, *job.baseline_configs(), *streams, job.mesh)


def _evaluate(job: Job, directory: Directory) -> None:
    from mlp_memory.corpus.vocabulary import Vocabulary
    from mlp_memory.evaluation import page, stage
    from mlp_memory.targets.certificate import NAME as CERTIFICATE

    page.read_findings(job.workdir)  # a damaged one is told before anything is scored
    manifest = _begin("evaluate", "report", job, directory)
    trained = {"pretrain": "decoder", "distill": "memory"}
    trained |= {name: name for name in ("joint", "baseline") if find_stage(name).wanted(job.config)}
    gates = [name for name in ("gate", "joint_gate") if find_stage(name).wanted(job.config)]
    distilled = _distills(job.config)
    facts = {name: job.manifest(folder).facts for name, folder in trained.items()}
    elsewhere = tuple(job.config.corpus.elsewhere)
    corpora = {split: job.stream(split) for split in ("validation", "test", *elsewhere, "train")}
    certificate = (job.workdir / "targets").read(CERTIFICATE)
    stage.evaluate(
        directory,
        manifest,
        stage.Inputs(
            config=job.config.evaluate,
            streams={split: corpora[split] for split in ("validation", "test", *elsewhere)},
            vocabulary=Vocabulary.load(job.workdir / "corpus/vocabulary"),
            systems=functools.cache(lambda: _systems(job)),
            embed=job.embed_config,
            targets=job.manifest("targets").facts if distilled else None,
            index=job.manifest("index").facts if distilled else None,
            trained=facts,
            draw=functools.partial(page.draw, job.workdir),
            settings=config_json(job.config),
            corpus={split: stream.manifest.facts for split, stream in corpora.items()},
            certificate=json.loads(certificate) if certificate else None,
            gates={name: job.manifest(name).facts for name in gates},
            train=corpora["train"] if distilled else None,
        ),
    )


def _systems(job: Job) -> "Systems":
    """Everything that evaluation compares, loaded."""
    from mlp_memory.evaluation.score import Systems

    def reader(stage: str) -> "RowReader | None":
        return job.row_reader(stage) if find_stage(stage).wanted(job.config) else None

    return Systems(
        decoder=job.decoder()[0],
        base=job.row_reader(),
        joint=reader("joint"),
        baseline=reader("baseline"),
        memory=job.memory()[0],
        neighbors=job.neighbors() if _distills(job.config) else None,
        gate=job.gate("gate"),
        joint_gate=job.gate("joint_gate"),
        mesh=job.mesh,
    )


def _benchmark(job: Job, directory: Directory) -> None:
    from mlp_memory.evaluation.harness.stage import benchmark

    benchmark(directory, lambda: _begin("benchmark", "benchmarks", job, directory), job)


def _export(job: Job, directory: Directory) -> None:
    from mlp_memory.interchange.export import export

    manifest, vocabulary = _begin("export", "export", job, directory), job.vocabulary()
    imported = job.workdir / "decoder" / TOKENIZER
    models = {"decoder": job.decoder, "memory": job.memory}
    if find_stage("joint").wanted(job.config):
        models["joint"] = lambda: job.decoder("joint")
    export(
        directory,
        manifest,
        models=models,
        tap=dataclasses.asdict(job.embed_config.tap),
        tokenizer={**{name: imported.read(name) for name in imported.names()}, **vocabulary.files},
        special={"bos_token_id": vocabulary.bos, "eos_token_id": vocabulary.eos},
    )


def find_stage(name: str) -> Stage:
    """The stage of that name."""
    return next(stage for stage in STAGES if stage.name == name)


def _pretrain_settings(job: Job) -> dict[str, Any]:
    return {
        "decoder": config_dict(job.decoder_config),
        "pretrain": config_dict(job.config.pretrain),
        **job.pretrained_settings(),
    }


def _baseline_settings(job: Job) -> dict[str, Any]:
    shape, config = job.baseline_configs()
    return {"decoder": config_dict(shape), "pretrain": config_dict(config)}


def _distill_settings(job: Job) -> dict[str, Any]:
    return {"memory": config_dict(job.memory_config), "distill": config_dict(job.config.distill)}


def _joint_settings(job: Job) -> dict[str, Any]:
    return {"joint": config_dict(job.config.joint), **_read_settings(job)}


def _gate_settings(job: Job) -> dict[str, Any]:
    return {"gate": config_dict(job.config.gate), **_read_settings(job)}


def _evaluate_settings(job: Job) -> dict[str, Any]:
    return {"evaluate": config_dict(job.config.evaluate), **_read_settings(job)}


def _read_settings(job: Job) -> dict[str, Any]:
    """How rows are read, where no datastore among the ancestors says so."""
    return {} if _distills(job.config) else {"embed": config_dict(job.config.embed)}


def _distills(config: Config) -> bool:
    """Whether the memory is made here, from a datastore, rather than imported."""
    return not config.pretrained.memory


def _wants_joint(config: Config) -> bool:
    return _distills(config) if config.joint.enabled is None else config.joint.enabled


def _wants_joint_gate(config: Config) -> bool:
    return config.gate.enabled and _wants_joint(config)


def _wants_baseline(config: Config) -> bool:
    return config.baseline.enabled and not config.pretrained.source and _distills(config)


def _evaluate_parents(config: Config) -> tuple[str, ...]:
    parents = ["corpus/validation", "corpus/test", "decoder", "memory"]
    parents += [f"corpus/{name}" for name in config.corpus.elsewhere]
    parents += ["index", "targets"] if _distills(config) else []
    parents += ["joint"] if _wants_joint(config) else []
    parents += ["gate"] if config.gate.enabled else []
    parents += ["joint_gate"] if _wants_joint_gate(config) else []
    parents += ["baseline"] if _wants_baseline(config) else []
    return tuple(parents)


def _benchmark_settings(job: Job) -> dict[str, Any]:
    return {"benchmark": config_dict(job.config.benchmark), **_read_settings(job)}


def _benchmark_parents(config: Config) -> tuple[str, ...]:
    used = [SYSTEM[name] for name in config.benchmark.systems]
    parents = ["decoder"]
    parents += ["memory"] if any(system.partner == "memory" for system in used) else []
    parents += ["joint"] if any(system.decoder == "joint" for system in used) else []
    for decoder, gate in (("base", "gate"), ("joint", "joint_gate")):
        parents += [gate] if any(system.gated and system.decoder == decoder for system in used) else []
    searched = any(system.partner in ("knn_lm_exact", "knn_lm_scann") for system in used)
    parents += ["datastore", "index", "targets"] if searched else []
    return tuple(parents)


def _export_parents(config: Config) -> tuple[str, ...]:
    return ("corpus/vocabulary", "decoder", "memory", *(("joint",) if _wants_joint(config) else ()))


def _joint_parents(config: Config) -> tuple[str, ...]:
    gate = ("gate",) if config.joint.interpolation == "gate" else ()
    return ("corpus/train", "corpus/validation", "decoder", "memory", *gate)


def _gate_parents(decoder: str) -> Callable[[Config], tuple[str, ...]]:
    """Of a gate for the decoder in that folder."""

    def parents(config: Config) -> tuple[str, ...]:
        return ("corpus/validation", *(f"corpus/{name}" for name in config.gate.guards), decoder, "memory")

    return parents


def _from(*names: str) -> Callable[[Config], tuple[str, ...]]:
    return lambda config: names


STAGES: tuple[Stage, ...] = (
    Stage(
        "tokenize",
        "corpus",
        "text -> vocabulary and token streams",
        lambda job: config_dict(job.config.corpus),
        _from(),
        _tokenize,
        parts=lambda config: ("vocabulary", *SPLITS, *config.corpus.elsewhere),
    ),
    Stage(
        "import",
        "decoder",
        "a pretrained decoder from elsewhere",
        lambda job: job.pretrained_settings(),
        _from(),
        _import,
        wanted=lambda config: bool(config.pretrained.source) and not config.pretrained.finetune,
        together=True,
    ),
    Stage(
        "import_memory",
        "memory",
        "a memory from elsewhere",
        lambda job: job.pretrained_settings("memory"),
        _from(),
        _import_memory,
        wanted=lambda config: bool(config.pretrained.memory),
        together=True,
    ),
    Stage(
        "pretrain",
        "decoder",
        "train the decoder on the stream",
        _pretrain_settings,
        _from("corpus/train", "corpus/validation"),
        _pretrain,
        wanted=lambda config: not config.pretrained.source or config.pretrained.finetune,
        together=True,
    ),
    Stage(
        "embed",
        "datastore",
        "the decoder's hidden state at every row",
        lambda job: {"embed": config_dict(job.config.embed)},
        _from("corpus/train", "decoder"),
        _embed,
        wanted=_distills,
    ),
    Stage(
        "index",
        "index",
        "ScaNN over the keys, recall measured",
        lambda job: {**config_dict(job.config.index), "k": job.config.retrieve.k},
        _from("datastore"),
        _index,
        wanted=_distills,
    ),
    Stage(
        "retrieve",
        "targets",
        "neighbours -> sparse next-token distributions",
        lambda job: config_dict(job.config.retrieve),
        _from("corpus/train", "corpus/validation", "corpus/test", "datastore", "index"),
        _retrieve,
        wanted=_distills,
    ),
    Stage(
        "distill",
        "memory",
        "train the memory on the distributions",
        _distill_settings,
        _from("corpus/train", "corpus/validation", "datastore", "targets"),
        _distill,
        wanted=_distills,
        together=True,
    ),
    Stage(
        "gate",
        "gate",
        "fit how much of the memory to take at each token",
        _gate_settings,
        _gate_parents("decoder"),
        _gate,
        wanted=lambda config: config.gate.enabled,
    ),
    Stage(
        "joint",
        "joint",
        "train the decoder on, memory frozen",
        _joint_settings,
        _joint_parents,
        _joint,
        wanted=_wants_joint,
        together=True,
    ),
    Stage(
        "joint_gate",
        "joint_gate",
        "the same after joint training",
        _gate_settings,
        _gate_parents("joint"),
        _joint_gate,
        wanted=_wants_joint_gate,
    ),
    Stage(
        "baseline",
        "baseline",
        "train a decoder of equal size and FLOPs",
        _baseline_settings,
        _from("corpus/train", "corpus/validation", "decoder", "memory"),
        _baseline,
        wanted=_wants_baseline,
        together=True,
    ),
    Stage(
        "evaluate",
        "reports",
        "held-out perplexity, results.json, index.html",
        _evaluate_settings,
        _evaluate_parents,
        _evaluate,
    ),
    Stage(
        "benchmark",
        "benchmarks",
        "tasks through lm-eval, λ tuned for each",
        _benchmark_settings,
        _benchmark_parents,
        _benchmark,
        wanted=lambda config: config.benchmark.wanted,
    ),
    Stage(
        "export",
        "export",
        "decoder, memory and joint decoder as safetensors",
        lambda job: {},
        _export_parents,
        _export,
        together=True,
    ),
)
