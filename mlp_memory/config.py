"""Every setting of a run, section by section; plain dataclasses, no gin."""

import dataclasses
from typing import Any

from mlp_memory.artifacts import UserError, config_dict
from mlp_memory.corpus.config import CorpusConfig
from mlp_memory.datastore.config import EmbedConfig
from mlp_memory.decoder.config import DecoderConfig, PretrainConfig
from mlp_memory.evaluation.config import EvaluateConfig
from mlp_memory.evaluation.harness.config import BenchmarkConfig
from mlp_memory.index.config import IndexConfig
from mlp_memory.inference.config import GenerateConfig
from mlp_memory.interchange.config import PretrainedConfig
from mlp_memory.joint.config import GateConfig, JointConfig
from mlp_memory.memory.config import DistillConfig, MemoryConfig
from mlp_memory.parallel.config import FleetConfig, HostsConfig, MeshConfig
from mlp_memory.studies.config import StudyConfig
from mlp_memory.targets.config import RetrieveConfig
from mlp_memory.updating.config import UpdateConfig


@dataclasses.dataclass(frozen=True)
class BaselineConfig:
    """The decoder-only peer: as many parameters, and as many training FLOPs, as decoder and
    memory together.

    Attributes:
      enabled: False leaves the stage, and its row in the results, out. An imported decoder
        has no such peer: what its training cost is not known.
      learning_rate: 0 takes pretraining's.
    """

    enabled: bool = True
    learning_rate: float = 0.0


@dataclasses.dataclass(frozen=True)
class Config:
    """Every section of a recipe; a field's name is its gin name."""

    corpus: CorpusConfig = dataclasses.field(default_factory=CorpusConfig)
    decoder: DecoderConfig = dataclasses.field(default_factory=DecoderConfig)
    pretrained: PretrainedConfig = dataclasses.field(default_factory=PretrainedConfig)
    pretrain: PretrainConfig = dataclasses.field(default_factory=PretrainConfig)
    embed: EmbedConfig = dataclasses.field(default_factory=EmbedConfig)
    index: IndexConfig = dataclasses.field(default_factory=IndexConfig)
    retrieve: RetrieveConfig = dataclasses.field(default_factory=RetrieveConfig)
    memory: MemoryConfig = dataclasses.field(default_factory=MemoryConfig)
    distill: DistillConfig = dataclasses.field(default_factory=DistillConfig)
    joint: JointConfig = dataclasses.field(default_factory=JointConfig)
    gate: GateConfig = dataclasses.field(default_factory=GateConfig)
    baseline: BaselineConfig = dataclasses.field(default_factory=BaselineConfig)
    evaluate: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig)
    benchmark: BenchmarkConfig = dataclasses.field(default_factory=BenchmarkConfig)
    generate: GenerateConfig = dataclasses.field(default_factory=GenerateConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    hosts: HostsConfig = dataclasses.field(default_factory=HostsConfig)
    fleet: FleetConfig = dataclasses.field(default_factory=FleetConfig)
    study: StudyConfig = dataclasses.field(default_factory=StudyConfig)
    update: UpdateConfig = dataclasses.field(default_factory=UpdateConfig)

    def __post_init__(self):
        if not self.pretrained.source:  # an imported decoder's shape is known once it is opened
            self.check_decoder(self.decoder)
        if self.joint.interpolation == "gate" and not self.gate.enabled:
            raise UserError("joint.interpolation = 'gate' and gate.enabled = False: enable the gate")
        for name in self.gate.guards:
            if name not in self.corpus.elsewhere:
                known = ", ".join(self.corpus.elsewhere) or "none"
                raise UserError(f"gate.guards names {name!r}, corpus.elsewhere has {known}: add it there")

    def check_decoder(self, decoder: DecoderConfig) -> None:
        """Raises `UserError` where a section asks for more than the decoder has."""
        self.embed.tap.index(decoder.layers)
        for name in ("pretrain", "embed", "joint"):
            context = getattr(self, name).context
            if decoder.positions == "learned" and decoder.max_positions < context:
                raise UserError(
                    f"decoder.max_positions = {decoder.max_positions} is less than {name}.context = {context}"
                )


def config_json(config: Config) -> dict[str, Any]:
    """Every section of a run as plain JSON, settings that cannot change a result left out."""
    names = (field.name for field in dataclasses.fields(config))
    return {name: config_dict(getattr(config, name)) for name in names if name not in ("study", "update")}
