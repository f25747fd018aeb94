"""What the studies vary."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from mlp_memory.artifacts import UserError
from mlp_memory.settings import check_number, check_positive, check_whole

STUDIES = {
    "scaling": "perplexity as decoders and memories grow, at equal parameters and training FLOPs",
    "overfitting": "train and test loss as epochs grow: memory, CE-only memory, decoder",
    "alpha": "the teacher's weight",
    "tap": "the layer that the memory reads",
    "k": "neighbours of the teacher",
    "temperature": "the teacher's temperature",
    "top_m": "tokens kept of the teacher",
    "recall": "recall of the search behind the teacher",
    "depth": "blocks of the memory",
    "width": "width of the memory",
    "style": "block style of the memory",
    "mixer": "the MLP memory against a transformer memory of its size",
    "teacher": "a teacher from a larger decoder's datastore",
}
"""Name -> what it varies."""


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """The grid of each study over the recipe.

    Attributes:
      sizes: scaling: (layers, dim) of the decoders that get a memory, in the recipe's head size; each has a
        peer without memory of as many parameters and training FLOPs as the two together.
      memory_share: scaling: the memory's share of the parameters of the two.
      rate_exponent: scaling: learning rates are the recipe's times (the recipe's dim / dim) to this power.
      epochs: overfitting: passes over the train stream, at a constant learning rate.
      checks: overfitting: how often the losses are measured on the way, evenly.
      train_rows: overfitting: about so many train rows are scored each time.
      alphas: of distill.alpha.
      taps: of embed.tap_layer; () for every layer.
      ks: of retrieve.k.
      temperatures: as multiples of the keys' median spread (see retrieve.temperatures).
      top_ms: of retrieve.top_m.
      recalls: of index.target_recall; 1.0 searches exactly.
      depths: of memory.layers.
      widths: of memory.dim.
      styles: of memory.style.
      teachers: (layers, dim) of the decoders whose targets the recipe's own memory learns.
    """

    sizes: Sequence[Sequence[int]] = ((2, 64), (3, 96), (4, 128), (5, 160))
    memory_share: float = 0.5
    rate_exponent: float = 0.5
    epochs: float = 8.0
    checks: int = 8
    train_rows: int = 8192
    alphas: Sequence[float] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    taps: Sequence[int] = ()
    ks: Sequence[int] = (1, 8, 32, 128, 512)
    temperatures: Sequence[float] = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
    top_ms: Sequence[int] = (1, 4, 16, 64, 256)
    recalls: Sequence[float] = (0.3, 0.5, 0.7, 0.9, 1.0)
    depths: Sequence[int] = (1, 2, 4, 8, 16)
    widths: Sequence[int] = (64, 128, 256, 512)
    styles: Sequence[str] = ("llama", "gpt2")
    teachers: Sequence[Sequence[int]] = ((6, 256),)

    def __post_init__(self):
        check_number(self, {"rate_exponent": (0.0, 2.0)})
        check_positive(self, "epochs", "memory_share")
        if self.memory_share >= 1:
            raise UserError(f"study.memory_share = {self.memory_share!r}: give a share below 1")
        check_whole(self, {"checks": 2, "train_rows": 1})
        for field in dataclasses.fields(self):
            if isinstance(field.default, tuple):
                self._check_grid(field.name, getattr(self, field.name))

    def _check_grid(self, name: str, values: Any) -> None:
        if not isinstance(values, list | tuple):
            raise UserError(f"study.{name} = {values!r}: give a list")
        if len({str(value) for value in values}) < len(values):
            raise UserError(f"study.{name} = {values!r} has a value twice")
        if name not in ("sizes", "teachers"):
            return
        for value in values:
            pair = isinstance(value, list | tuple) and len(value) == 2
            if not pair or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in value):
                raise UserError(f"study.{name}: {value!r} is no pair of whole numbers (layers, dim)")

    def grid(self, name: str) -> Sequence[Any]:
        """The values of a field.

        Raises:
          UserError: there are none.
        """
        if not (values := getattr(self, name)):
            raise UserError(f"study.{name} is empty: give the values to try")
        return values
