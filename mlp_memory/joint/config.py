"""How the decoder is trained under the mixture, and how the mixture's gate is fitted."""

import dataclasses

from mlp_memory.artifacts import UserError, later, runtime
from mlp_memory.decoder.config import PretrainConfig
from mlp_memory.settings import check_number, check_positive, check_whole


@dataclasses.dataclass(frozen=True)
class JointConfig(PretrainConfig):
    """Training of the decoder under the mixture.

    Attributes:
      enabled: whether it is done; None where the memory is made here, not imported.
      interpolation: λ during training; "auto" is the best on validation after distilling, "gate" the gate's
        λ of each token.
      interpolation_start: λ of the first step, from which it goes in a straight line to `interpolation`;
        None for none.
      interpolation_steps: over so many steps.
      through_memory: gradient reaches the decoder through the memory's input too.
      kl: weight of KL(p_start ‖ p_LM), nats a token, which holds the decoder to where it started.
      adapter_rank: of low-rank adapters, which are trained in place of the decoder's own weights and merged
        into them at the end; 0 for none.
      adapter_alpha: adapters count alpha / rank times.
    """

    enabled: bool | None = runtime(None)
    interpolation: float | str = "auto"
    through_memory: bool = True
    interpolation_start: float | None = later(None)
    interpolation_steps: int = later(0)
    kl: float = later(0.0)
    adapter_rank: int = later(0)
    adapter_alpha: float = later(16.0)

    def __post_init__(self):
        super().__post_init__()
        if self.interpolation not in ("auto", "gate") and not _is_weight(self.interpolation):
            raise UserError(
                f"joint.interpolation = {self.interpolation!r}: use 'auto', 'gate' or a number in [0, 1)"
            )
        check_whole(self, {"interpolation_steps": 0, "adapter_rank": 0})
        check_number(self, {"kl": (0.0, float("inf"))})
        check_positive(self, "adapter_alpha")
        start = self.interpolation_start
        if start is not None and not _is_weight(start):
            raise UserError(f"joint.interpolation_start = {start!r}: give a number in [0, 1), or None")
        if (start is None) != (self.interpolation_steps == 0) or (
            start is not None and self.interpolation == "gate"
        ):
            raise UserError(
                f"joint.interpolation_start = {start!r}, interpolation_steps = {self.interpolation_steps}: "
                "give both, or neither, and neither where a gate gives λ"
            )
        if self.interpolation_steps > self.steps:
            raise UserError(
                f"joint.interpolation_steps = {self.interpolation_steps}: there are {self.steps} steps"
            )


def _is_weight(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1


@dataclasses.dataclass(frozen=True)
class GateConfig:
    """The fit of λ per token.

    Attributes:
      enabled: whether gates are fitted, for decoder and memory as distilled and after joint training.
      guards: names of `corpus.elsewhere`: kinds of text that the memory was not made for, where the mixture
        must not be worse than the decoder alone either.
      guard_weights: what guards count in the fit, beside 1 for the validation split, where a fit without them
        would harm one; tried in order.
      margin: nats a token that count as no harm: 0.001 is a thousandth of the perplexity.
      rows: of each text; 0 for all.
      penalties: on the squared weights, tried by cross-fitting.
      folds: of documents; a document's λ is judged by a fit to the others'.
      bootstrap: resamples behind an interval.
      level: of the interval at whose upper end no harm may be done.
      seed: of the resampling.
    """

    enabled: bool = True
    guards: tuple[str, ...] = ()
    guard_weights: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0)
    margin: float = 0.001
    rows: int = 32768
    penalties: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1)
    folds: int = 4
    bootstrap: int = 1000
    level: float = 0.95
    seed: int = 0

    def __post_init__(self):
        check_whole(self, {"rows": 0, "folds": 2, "bootstrap": 1, "seed": 0})
        check_number(self, {"level": (0.0, 1.0), "margin": (0.0, float("inf"))})
        guards = (self.guards,) if isinstance(self.guards, str) else tuple(self.guards)
        object.__setattr__(self, "guards", guards)
        for name in ("penalties", "guard_weights"):
            given = getattr(self, name)
            values = tuple(given) if isinstance(given, tuple | list) else ()
            if not values or not all(isinstance(p, int | float) and p >= 0 for p in values):
                raise UserError(f"gate.{name} = {given!r}: give numbers, 0 or more")
            object.__setattr__(self, name, values)
