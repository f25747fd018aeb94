"""Where a decoder that is not pretrained here, and a memory that is not distilled here, come from."""

import dataclasses

from mlp_memory.artifacts import UserError
from mlp_memory.settings import check_choice


@dataclasses.dataclass(frozen=True)
class PretrainedConfig:
    """Models from elsewhere.

    Attributes:
      source: a Hugging Face folder (path, gs:// or s3://), a .gguf file or a llama2.c file;
        "" pretrains here. Its shape takes the place of the `decoder` section, and its
        tokenizer is the corpus vocabulary where `corpus.vocab_file` names no other.
      memory: a folder of the decoder's memory, in the reference layout; "" distils here. With
        it, nothing is embedded, indexed, retrieved or distilled, and evaluation compares
        the decoder with and without it.
      finetune: go on training it on the corpus, as `pretrain` says, before it is embedded.
      dtype: of the imported parameters: "float32", "bfloat16", or "auto" for as they are
        stored. Training keeps float32.
    """

    source: str = ""
    memory: str = ""
    finetune: bool = False
    dtype: str = "auto"

    def __post_init__(self):
        for name in ("source", "memory"):
            if not isinstance(getattr(self, name), str):
                raise UserError(f"pretrained.{name} = {getattr(self, name)!r}: give a path")
        if not isinstance(self.finetune, bool):
            raise UserError(f"pretrained.finetune = {self.finetune!r}: give True or False")
        check_choice(self, {"dtype": ("auto", "float32", "bfloat16")})
        if self.finetune and not self.source:
            raise UserError("pretrained.finetune without pretrained.source: give a model to train on")
