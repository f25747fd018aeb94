"""How the decoder is trained under the mixture."""

import dataclasses

from mlp_memory.artifacts import UserError
from mlp_memory.decoder.config import PretrainConfig


@dataclasses.dataclass(frozen=True)
class JointConfig(PretrainConfig):
    """Training of the decoder under the mixture.

    Attributes:
      interpolation: λ during training, or "auto": the best on validation after distilling.
      through_memory: gradient reaches the decoder through the memory's input too.
    """

    interpolation: float | str = "auto"
    through_memory: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.interpolation != "auto" and not (
            isinstance(self.interpolation, int | float) and 0 <= self.interpolation < 1
        ):
            raise UserError(f"joint.interpolation = {self.interpolation!r}: use 'auto' or a number in [0, 1)")
