"""Where a decoder that is not pretrained here comes from."""

import dataclasses

from mlp_memory.artifacts import UserError
from mlp_memory.settings import check_choice


@dataclasses.dataclass(frozen=True)
class PretrainedConfig:
    """A decoder from elsewhere.

    Attributes:
      source: a Hugging Face folder (path, gs:// or s3://), a .gguf file or a llama2.c file;
        "" pretrains here. Its shape takes the place of the `decoder` section, and its
        tokenizer is the corpus vocabulary where `corpus.vocab_file` names no other.
      finetune: go on training it on the corpus, as `pretrain` says, before it is embedded.
      dtype: of the imported parameters: "float32", "bfloat16", or "auto" for as they are
        stored. Training keeps float32.
    """

    source: str = ""
    finetune: bool = False
    dtype: str = "auto"

    def __post_init__(self):
        if not isinstance(self.source, str):
            raise UserError(f"pretrained.source = {self.source!r}: give a path")
        if not isinstance(self.finetune, bool):
            raise UserError(f"pretrained.finetune = {self.finetune!r}: give True or False")
        check_choice(self, {"dtype": ("auto", "float32", "bfloat16")})
        if self.finetune and not self.source:
            raise UserError("pretrained.finetune without pretrained.source: give a model to train on")
