"""A workdir and a config: what every stage asks of them, opened or loaded when first asked for."""

import dataclasses
import functools
from typing import TYPE_CHECKING

from mlp_memory import artifacts
from mlp_memory.artifacts import Directory, Manifest, config_dict
from mlp_memory.config import Config
from mlp_memory.corpus.stream import TokenStream
from mlp_memory.datastore.config import EmbedConfig
from mlp_memory.decoder.config import DecoderConfig, PretrainConfig, equal_parameters
from mlp_memory.memory.config import MemoryConfig

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from mlp_memory.decoder.score import RowReader
    from mlp_memory.decoder.transformer import Decoder
    from mlp_memory.memory.distill import ValidationRows
    from mlp_memory.memory.mlp import Memory

MADE_BY = {
    "corpus": "tokenize",
    "decoder": "pretrain",
    "datastore": "embed",
    "index": "index",
    "targets": "retrieve",
    "memory": "distill",
    "joint": "joint",
    "baseline": "baseline",
    "reports": "evaluate",
    "export": "export",
}
"""Folder under the workdir -> the stage that makes it."""


class Job:
    """A workdir and a config: paths, opened corpora, the mesh, each made when first asked for."""

    def __init__(self, workdir: Directory, config: Config):
        self.workdir, self.config = workdir, config
        self._manifests: dict[str, Manifest] = {}

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
            found = artifacts.require(directory, MADE_BY[name.split("/")[0]])
            # Inside corpus/ the vocabulary is known by its own name.
            paths = {
                parent: "corpus/vocabulary" if parent == "vocabulary" else parent for parent in found.parents
            }
            # What is no longer there (a datastore is large) cannot be compared.
            there = {parent: path for parent, path in paths.items() if artifacts.peek(self.workdir / path)}
            now = {parent: self.manifest(path).fingerprint for parent, path in there.items()}
            artifacts.require_same(directory, found, Manifest(found.kind, found.config, now))
            self._manifests[name] = found
        return self._manifests[name]

    @functools.cached_property
    def embed_config(self) -> EmbedConfig:
        """How rows are read: as the datastore's were.

        Raises:
          UserError: the config says otherwise.
        """
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
    def decoder_config(self) -> DecoderConfig:
        """The decoder's shape over the corpus vocabulary."""
        return self.config.decoder.with_vocabulary(self.manifest("corpus/train").facts["vocab_size"])

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
        return load_decoder(self.workdir / folder, stage, self.mesh)

    def memory(self) -> "tuple[Memory, Manifest]":
        """The distilled memory."""
        from mlp_memory.memory.distill import load_memory

        return load_memory(self.workdir / "memory", self.mesh)

    def row_reader(self, stage: str = "pretrain") -> "RowReader":
        """Reads rows through the decoder of a stage as the datastore's rows are read."""
        from mlp_memory.datastore.embed import row_reader

        return row_reader(self.embed_config, self.decoder(stage)[0], self.mesh)

    def keys(self) -> artifacts.ArrayReader:
        """The datastore's keys."""
        return artifacts.ArrayReader(self.workdir / "datastore", "keys")

    def held_out(self, rows: int) -> "ValidationRows":
        """About `rows` validation rows as the base decoder reads them."""
        from mlp_memory.decoder.windows import read, spread
        from mlp_memory.memory.distill import ValidationRows

        stream = self.stream("validation")
        ranges = spread(len(stream), rows)
        taps, log_prob = self.row_reader().taps_and_log_probs(stream, ranges)
        scored = read(stream.has_next, ranges)
        return ValidationRows(taps[scored], log_prob[scored], read(stream.labels, ranges)[scored])
