"""A workdir and a config: what every stage asks of them, opened or loaded when first asked for."""

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlp_memory import artifacts
from mlp_memory.arrays import Rows
from mlp_memory.artifacts import Directory, Manifest, UserError, config_dict
from mlp_memory.config import Config
from mlp_memory.corpus.stream import TokenStream
from mlp_memory.datastore.config import EmbedConfig
from mlp_memory.decoder.config import DecoderConfig, PretrainConfig, equal_parameters
from mlp_memory.memory.config import MemoryConfig

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from mlp_memory.corpus.vocabulary import Vocabulary
    from mlp_memory.datastore.store import KeyStore
    from mlp_memory.decoder.score import RowReader
    from mlp_memory.decoder.transformer import Decoder
    from mlp_memory.index.search import Index
    from mlp_memory.interchange.source import Source
    from mlp_memory.joint.gate import Gate
    from mlp_memory.memory.distill import ValidationRows
    from mlp_memory.memory.mlp import Memory
    from mlp_memory.memory.states import States
    from mlp_memory.targets.knn_lm import Neighbors

MADE_BY = {
    "corpus": "tokenize",
    "decoder": "pretrain",
    "datastore": "embed",
    "index": "index",
    "targets": "retrieve",
    "memory": "distill",
    "gate": "gate",
    "joint": "joint",
    "joint_gate": "joint_gate",
    "baseline": "baseline",
    "reports": "evaluate",
    "benchmarks": "benchmark",
    "export": "export",
}
"""Folder under the workdir -> the stage that makes it."""

IMPORTED = {"source": "decoder", "memory": "memory"}
"""Setting in the `pretrained` section -> the kind of model it names, and its folder."""

TOKENIZER = "tokenizer"
"""The folder of an imported decoder that holds its tokenizer's files."""


def is_there(source: str) -> bool:
    """Whether a pretrained model is still where it was; remote ones are taken to be."""
    return "://" in source or Path(source).expanduser().exists()


class Job:
    """A workdir and a config: paths, opened corpora, the mesh, each made when first asked for."""

    def __init__(self, workdir: Directory, config: Config):
        self.workdir, self.config = workdir, config
        self._manifests: dict[str, Manifest] = {}
        self._asked: list[str] = []

    def stream(self, split: str) -> TokenStream:
        """A split of the corpus."""
        return TokenStream.open(self.workdir / f"corpus/{split}")

    @functools.cached_property
    def mesh(self) -> "Mesh":
        from mlp_memory.parallel.mesh import make_mesh

        return make_mesh(self.config.mesh)

    def manifest(self, name: str) -> Manifest:
        """The finished manifest of an artifact that was made from what is there now.

        Raises:
          UserError: it is missing, unfinished or damaged, or one of its parents, or one of
            theirs, has changed since.
        """
        if name not in self._manifests:
            directory = self.workdir / name
            found = artifacts.require(directory, self.made_by(name.split("/")[0]))
            # Inside corpus/ the vocabulary is known by its own name.
            paths = {
                parent: "corpus/vocabulary" if parent == "vocabulary" else parent for parent in found.parents
            }
            for path in paths.values():
                if path.startswith("/") or ".." in path.split("/") or path in (name, *self._asked):
                    raise UserError(f"{directory} names {path!r} as its parent: delete it and make it again")
            # What is no longer there (a datastore is large) cannot be compared.
            there = {parent: path for parent, path in paths.items() if artifacts.peek(self.workdir / path)}
            self._asked.append(name)
            try:
                now = {parent: self.manifest(path).fingerprint for parent, path in there.items()}
            finally:
                self._asked.pop()
            artifacts.require_same(directory, found, Manifest(found.kind, found.config, now))
            self._manifests[name] = found
        return self._manifests[name]

    def made_by(self, folder: str) -> str:
        """The stage that makes a folder under this config."""
        pretrained = self.config.pretrained
        if folder == "memory" and pretrained.memory:
            return "import_memory"
        imported = folder == "decoder" and pretrained.source and not pretrained.finetune
        return "import" if imported else MADE_BY.get(folder, "study")

    @functools.cached_property
    def embed_config(self) -> EmbedConfig:
        """How rows are read: as the datastore's were, or as an imported memory wants them.

        Raises:
          UserError: the config says otherwise.
        """
        self.check_memory()
        if artifacts.peek(self.workdir / "datastore"):
            wanted = Manifest("datastore", {"embed": config_dict(self.config.embed)}, {})
            artifacts.require_same(self.workdir / "datastore", self.manifest("datastore"), wanted)
        return self.config.embed

    def fingerprints(self, *names: str) -> dict[str, str]:
        """Parents for a manifest; they must be finished."""
        if "targets" in names or "memory" in names:
            _ = self.embed_config  # what was learned from the datastore is used with its taps
        return {name: self.manifest(name).fingerprint for name in names}

    @functools.cached_property
    def source(self) -> "Source":
        """The decoder that `pretrained.source` names, checked from its headers.

        Raises:
          UserError: it cannot be read, or is no decoder.
        """
        return self._open("source")

    @functools.cached_property
    def memory_source(self) -> "Source":
        """The memory that `pretrained.memory` names, checked from its headers.

        Raises:
          UserError: it cannot be read, or is no memory.
        """
        return self._open("memory")

    def _open(self, name: str) -> "Source":
        from mlp_memory.interchange.source import open_source

        location, kind = getattr(self.config.pretrained, name), IMPORTED[name]
        if not location:
            raise UserError(f"pretrained.{name} is not set: give the {kind} to import")
        found = open_source(location)
        if found.kind != kind:
            other = next(other for other in IMPORTED if other != name)
            where = f"pretrained.{name}: {location}"
            raise UserError(f"{where} is a {found.kind}, not a {kind}: give it as pretrained.{other}")
        return found

    def check_memory(self) -> None:
        """Raises `UserError` where the memory that `pretrained.memory` names does not fit the decoder."""
        if not self.config.pretrained.memory:
            return
        from mlp_memory.interchange.importing import check_memory, memory_facts

        made = artifacts.peek(self.workdir / "memory")
        if made is not None and made.finished:
            shape, tap = MemoryConfig(**made.facts["model"]), made.facts.get("tap")
        else:
            shape, tap = self.memory_source.config, memory_facts(self.memory_source).get("tap")
        if (decoder := self._known_decoder()) is not None:
            where = f"pretrained.memory: {self.config.pretrained.memory}"
            check_memory(where, shape, tap, decoder, self.config.embed.tap)

    def _known_decoder(self) -> DecoderConfig | None:
        """The decoder's shape as far as it can be known before it is made."""
        made = artifacts.peek(self.workdir / "decoder")
        if made is not None and made.finished:
            return DecoderConfig(**made.facts["model"])
        if self.config.pretrained.source:
            return self.source.config
        return self.decoder_config if artifacts.peek(self.workdir / "corpus/train") else None

    @functools.cached_property
    def decoder_config(self) -> DecoderConfig:
        """The decoder's shape: the imported one's, or the config's over the corpus vocabulary.

        Raises:
          UserError: it does not hold the corpus vocabulary, or a section asks for more than it has.
        """
        vocab_size = self.manifest("corpus/train").facts["vocab_size"]
        if not self.config.pretrained.source:
            return self.config.decoder.with_vocabulary(vocab_size)
        shape = self._known_decoder()
        if shape.vocab_size < vocab_size:
            raise UserError(
                f"{self.config.pretrained.source} has {shape.vocab_size} token embeddings, the corpus "
                f"vocabulary {vocab_size} tokens: tokenize with the model's own tokenizer (leave "
                "corpus.vocab_file out)"
            )
        self.config.check_decoder(shape)
        return shape

    def pretrained_settings(self, name: str = "source") -> dict[str, Any]:
        """What of an imported model decides the artifact's bytes; {} where there is none.

        A model that is gone once it has been imported is taken to be the one that was.

        Args:
          name: "source" or "memory".
        """
        location = getattr(self.config.pretrained, name)
        if not location:
            return {}
        if not is_there(location):
            made = artifacts.peek(self.workdir / IMPORTED[name])
            if made is not None and made.finished:
                return {"pretrained": made.config.get("pretrained")}
        source = self.source if name == "source" else self.memory_source
        return {"pretrained": {"identity": source.identity, "dtype": self.config.pretrained.dtype}}

    @functools.cached_property
    def tokenizer(self) -> dict[str, bytes] | None:
        """The imported model's tokenizer, file by file; None where the corpus has one of its own.

        Raises:
          UserError: the model comes without one.
        """
        source, folder = self.config.pretrained.source, self.workdir / "decoder" / TOKENIZER
        if not source or self.config.corpus.vocab_file:
            return None
        files = {name: folder.read(name) for name in folder.names()} or self.source.files
        if not files:
            raise UserError(f"{source} has no tokenizer beside it: give corpus.vocab_file")
        return files

    def vocabulary(self) -> "Vocabulary":
        """The corpus vocabulary, or the imported decoder's where nothing was tokenized.

        Raises:
          UserError: there is neither.
        """
        from mlp_memory.corpus.vocabulary import Vocabulary

        folder = self.workdir / "decoder" / TOKENIZER
        if artifacts.peek(self.workdir / "corpus/vocabulary") is None and (names := folder.names()):
            return Vocabulary({name: folder.read(name) for name in names}, f"{folder}")
        return Vocabulary.load(self.workdir / "corpus/vocabulary")

    @functools.cached_property
    def memory_config(self) -> MemoryConfig:
        """The memory's shape for the keys and the vocabulary."""
        dim = self.manifest("datastore").facts["dim"]
        return self.config.memory.resolved(dim, self.decoder_config.vocab_size)

    def baseline_configs(self) -> tuple[DecoderConfig, PretrainConfig]:
        """Shape and training of the equal-parameter decoder."""
        base, memory = self.manifest("decoder").facts, self.manifest("memory").facts
        shape = equal_parameters(self.decoder_config, base["parameters"] + memory["parameters"])
        config = self.config.pretrain
        per_step = shape.train_flops(config.batch_size * config.context, config.context)
        steps = round((base["train_flops"] + memory["train_flops"]) / per_step)
        rate = self.config.baseline.learning_rate or config.learning_rate
        return shape, dataclasses.replace(config, steps=steps, learning_rate=rate)

    def decoder(self, stage: str = "pretrain") -> "tuple[Decoder, Manifest]":
        """The decoder that a stage published."""
        from mlp_memory.decoder.pretrain import load_decoder

        folder = next(folder for folder, made_by in MADE_BY.items() if made_by == stage)
        return load_decoder(self.workdir / folder, self.made_by(folder), self.mesh)

    def memory(self) -> "tuple[Memory, Manifest]":
        """The memory."""
        from mlp_memory.memory.distill import load_memory

        return load_memory(self.workdir / "memory", self.mesh, self.made_by("memory"))

    def gate(self, name: str = "gate") -> "Gate | None":
        """The gate of decoder and memory, or "joint_gate" after joint training; None where there is none."""
        from mlp_memory.joint.gate import load_gate

        if artifacts.peek(self.workdir / name) is None:
            return None
        self.manifest(name)
        return load_gate(self.workdir / name, name, self.decoder_config.dim)

    def row_reader(self, stage: str = "pretrain") -> "RowReader":
        """Reads rows through the decoder of a stage as the datastore's rows are read."""
        from mlp_memory.datastore.embed import row_reader

        return row_reader(self.embed_config, self.decoder(stage)[0], self.mesh)

    def keys(self) -> "KeyStore":
        """The datastore's keys in the space that is searched, [N, E]."""
        from mlp_memory.datastore.store import open_keys

        return open_keys(*self._datastore())

    def index(self, keys: "KeyStore") -> "Index":
        """The index over the datastore's keys; a shard is loaded when it is searched."""
        from mlp_memory.index.search import open_index

        train = self.stream("train")
        return open_index(self.workdir / "index", keys, train.has_next(0, len(train)), self.mesh)

    def neighbors(self) -> "Neighbors":
        """kNN-LM over the datastore, as the targets were made."""
        from mlp_memory.targets.knn_lm import Neighbors, temperatures

        train, targets = self.stream("train"), self.manifest("targets").facts
        keys, valid_N = self.keys(), train.has_next(0, len(train))
        return Neighbors(
            keys=keys,
            valid_N=valid_N,
            labels_N=train.labels(0, len(train)),
            scann=self.index(keys).search,
            k=targets["k"],
            temperatures=temperatures(targets),
            mesh=self.mesh,
        )

    def states(self) -> Rows:
        """The hidden states of the datastore's rows, [N, D]."""
        from mlp_memory.datastore.store import open_states

        return open_states(*self._datastore())

    def memory_inputs(self) -> "States":
        """Those states as distillation reads them: stored, or computed again inside the step."""
        from mlp_memory.memory.states import RecomputedStates, StoredStates

        embed, block_rows = self.embed_config, self.config.distill.block_rows
        if embed.keeps_states:
            return StoredStates(self.states())
        return RecomputedStates(self.decoder()[0], self.stream("train"), embed, block_rows)

    def _datastore(self) -> tuple[Any, ...]:
        reader = functools.cache(self.row_reader)  # loads the decoder, if rows must be computed
        found, stream = self.manifest("datastore"), self.stream("train")
        return self.workdir / "datastore", found, self.embed_config, stream, reader

    def held_out(self, rows: int) -> "ValidationRows":
        """About `rows` validation rows as the base decoder reads them."""
        from mlp_memory.decoder.windows import read, spread
        from mlp_memory.memory.distill import ValidationRows

        stream = self.stream("validation")
        ranges = spread(len(stream), rows)
        taps, log_prob = self.row_reader().taps_and_log_probs(stream, ranges)
        scored = read(stream.has_next, ranges)
        return ValidationRows(taps[scored], log_prob[scored], read(stream.labels, ranges)[scored])
