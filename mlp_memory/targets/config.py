"""What a user may choose about the targets."""

import dataclasses

from mlp_memory.artifacts import UserError, runtime


@dataclasses.dataclass(frozen=True)
class RetrieveConfig:
    """How neighbours become distributions.

    Attributes:
      k: neighbours of each row, itself not among them.
      temperature: τ of exp(−d/τ), d a squared distance; or "auto": the best of `temperatures`
        on the validation sample, as kNN-LM mixed with the decoder by the best λ.
      top_m: tokens kept of each distribution, the most probable ones, renormalised.
      temperatures: what "auto" tries, as multiples of the sample's median spread (mean over a
        query's neighbours of the distance beyond its nearest), so that keys of any scale and
        dimension are served by one grid.
      validation_rows: rows of the validation split that decide "auto"; a sample if it has more.
      chunk_rows: rows searched and written at a time.
      spill_gigabytes: disk space for the candidates that several shards give before they are
        merged, 8 bytes each. Less means more rounds, and each loads every shard again.
    """

    k: int = 256
    temperature: float | str = "auto"
    top_m: int = 64
    temperatures: tuple[float, ...] = (0.125, 0.1875, 0.25, 0.375, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 8.0)
    validation_rows: int = 4096
    chunk_rows: int = 16384
    spill_gigabytes: float = runtime(8.0)

    def __post_init__(self) -> None:
        if not 1 <= self.k <= 65535:
            raise UserError(f"retrieve.k = {self.k}: give 1 to 65535")
        for name in ("top_m", "validation_rows", "chunk_rows"):
            if getattr(self, name) < 1:
                raise UserError(f"retrieve.{name} = {getattr(self, name)}: give 1 or more")
        if not self.spill_gigabytes > 0:
            raise UserError(f"retrieve.spill_gigabytes = {self.spill_gigabytes!r}: give a number above 0")
        if self.temperature != "auto" and not (
            isinstance(self.temperature, int | float) and 0 < self.temperature < float("inf")
        ):
            raise UserError(f'retrieve.temperature = {self.temperature!r}: give a positive number or "auto"')
        if not self.temperatures or not all(0 < t < float("inf") for t in self.temperatures):
            raise UserError(f"retrieve.temperatures = {self.temperatures}: give positive multiples")
