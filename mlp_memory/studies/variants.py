"""The variants of each study: a name and gin bindings over the recipe."""

import dataclasses
from collections.abc import Callable
from typing import Any

from mlp_memory.artifacts import UserError
from mlp_memory.config import Config
from mlp_memory.decoder.config import DecoderConfig, Tap
from mlp_memory.dry_run import resolved_shapes
from mlp_memory.studies import sizes
from mlp_memory.studies.config import STUDIES

MEMORY, DECODER, TEACHER, CURVE, DECODER_CURVE = "memory", "decoder", "teacher", "curve", "decoder_curve"
MIXER = "mixer"
"""What a variant is made for: a memory's or a decoder's perplexity, targets, a memory's or a decoder's
losses as epochs grow; a transformer memory's perplexity."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """One run of a study.

    Attributes:
      name: its folder.
      value: what it has of the varied, for tables and plots.
      bindings: gin, over the recipe's.
      kind: what it is made for.
      teacher: the variant whose targets its memory learns; "" for its own.
      pair: scaling: which size it belongs to.
    """

    name: str
    value: Any
    bindings: tuple[str, ...] = ()
    kind: str = MEMORY
    teacher: str = ""
    pair: int = 0


RECIPE = "recipe"
"""The variant without bindings."""


def variants_of(study: str, config: Config) -> list[Variant]:
    """The study's variants, those that others need first.

    Args:
      study: one of `STUDIES`.
      config: the recipe.

    Raises:
      UserError: no such study, an empty grid, or a recipe that the study cannot vary.
    """
    if study not in STUDIES:
        raise UserError(f"study {study!r}: there are {', '.join(STUDIES)}")
    if config.pretrained.memory:
        raise UserError("study: the recipe imports its memory (pretrained.memory), there is nothing to vary")
    own = {"scaling": _scaling, "overfitting": _overfitting, "teacher": _teacher}
    if study in own:
        return own[study](config)
    return [Variant(RECIPE, RECIPE), *_ABLATIONS[study](config)]


def _one(section: str, field: str) -> Callable[[Any], tuple[str, ...]]:
    return lambda value: (f"{section}.{field} = {value!r}",)


def _grid(
    name: str, field: str, bindings: Callable[[Any], tuple[str, ...]]
) -> Callable[[Config], list[Variant]]:
    """A variant for each value of a field of the `study` section."""

    def make(config: Config) -> list[Variant]:
        return [Variant(f"{name}_{v}", v, bindings(v)) for v in config.study.grid(field)]

    return make


def _tap(config: Config) -> list[Variant]:
    """Layers counted from the front, set as the recipe counts, so that its own layer is made once."""
    layers = resolved_shapes(config)[0].layers
    back = layers if config.embed.tap_layer < 0 else 0
    found = []
    for value in config.study.taps or range(layers):
        layer = Tap(value).index(layers)
        found.append(Variant(f"tap_{layer}", layer, (f"embed.tap_layer = {layer - back}",)))
    return found


def _of_recall(recall: float) -> tuple[str, ...]:
    if recall == 1:
        return ('index.backend = "exact"', "index.approximate_recall = 0.0")
    given = ("leaves", "leaves_to_search", "dimensions_per_block", "reorder")
    return (
        'index.backend = "scann"',
        f"index.target_recall = {recall!r}",
        *(f"index.{name} = 0" for name in given),
        "retrieve.goal_recall = 0.0",
        "retrieve.goal_tv = 1.0",
    )


def _mixer(config: Config) -> list[Variant]:
    if not config.embed.keeps_states:
        raise UserError(
            'study mixer reads stored hidden states: give embed.store = "array", no key_dim or int8'
        )
    return [Variant("transformer", "transformer", kind=MIXER)]


_ABLATIONS: dict[str, Callable[[Config], list[Variant]]] = {
    "alpha": _grid("alpha", "alphas", _one("distill", "alpha")),
    "tap": _tap,
    "k": _grid("k", "ks", _one("retrieve", "k")),
    "temperature": _grid(
        "temperature",
        "temperatures",
        lambda v: ('retrieve.temperature = "auto"', f"retrieve.temperatures = ({v!r},)"),
    ),
    "top_m": _grid("top_m", "top_ms", _one("retrieve", "top_m")),
    "recall": _grid("recall", "recalls", _of_recall),
    "depth": _grid("depth", "depths", _one("memory", "layers")),
    "width": _grid("width", "widths", _one("memory", "dim")),
    "mixer": _mixer,
    "style": _grid("style", "styles", _one("memory", "style")),
}


def _shape_bindings(shape: DecoderConfig) -> tuple[str, ...]:
    fields = ("layers", "dim", "heads", "kv_heads", "ffn_dim")
    return tuple(f"decoder.{name} = {getattr(shape, name)}" for name in fields)


_LAST_TAP = "embed.tap_layer = -1"  # which a decoder alone has too, whatever its depth


def _require_pretraining(study: str, config: Config) -> None:
    if config.pretrained.source:
        raise UserError(f"study {study} trains decoders of other sizes: leave pretrained.source out")


def _scaling(config: Config) -> list[Variant]:
    _require_pretraining("scaling", config)
    study, found = config.study, []
    base = resolved_shapes(config)[0]

    def rates(section: str, dim: int) -> str:
        rate = getattr(config, section).learning_rate * (base.dim / dim) ** study.rate_exponent
        return f"{section}.learning_rate = {float(f'{rate:.4g}')}"

    for number, (layers, dim) in enumerate(study.grid("sizes")):
        shape = sizes.sized(base, layers, dim)
        wanted = sizes.parameter_count(shape) * study.memory_share / (1 - study.memory_share)
        blank = dataclasses.replace(config.memory, dim=0, ffn_dim=0)
        blocks = sizes.memory_layers(blank.resolved(dim, shape.vocab_size), round(wanted))
        resized = dataclasses.replace(config, decoder=shape, memory=dataclasses.replace(blank, layers=blocks))
        whole = sizes.cost(resized, memory=True)
        alone = sizes.peer(shape, whole.parameters)
        memory = (f"memory.layers = {blocks}", "memory.dim = 0", "memory.ffn_dim = 0")
        with_memory = (*_shape_bindings(shape), *memory, rates("pretrain", dim), rates("distill", dim))
        steps = sizes.matched_steps(alone, config, whole.train_flops)
        peer = (*_shape_bindings(alone), _LAST_TAP, f"pretrain.steps = {steps}", rates("pretrain", alone.dim))
        name = f"{layers}x{dim}"
        found += [
            Variant(f"memory_{name}", f"{name} + memory", with_memory, MEMORY, pair=number),
            Variant(f"decoder_{name}", f"{alone.layers}x{alone.dim} alone", peer, DECODER, pair=number),
        ]
    return found


def _overfitting(config: Config) -> list[Variant]:
    _require_pretraining("overfitting", config)
    shape = sizes.peer(resolved_shapes(config)[0], sizes.cost(config, memory=True).parameters)
    return [
        Variant("memory", f"memory, α = {config.distill.alpha:g}", kind=CURVE),
        Variant("memory_ce", "memory, α = 0", ("distill.alpha = 0.0",), CURVE),
        Variant(
            "decoder", "decoder of equal parameters", (*_shape_bindings(shape), _LAST_TAP), DECODER_CURVE
        ),
    ]


def _teacher(config: Config) -> list[Variant]:
    _require_pretraining("teacher", config)
    base, found = resolved_shapes(config)[0], []
    for layers, dim in config.study.grid("teachers"):
        name = f"{layers}x{dim}"
        bindings = _shape_bindings(sizes.sized(base, layers, dim))
        found.append(Variant(f"decoder_{name}", f"{name} alone", bindings, TEACHER))
        found.append(Variant(f"from_{name}", f"teacher {name}", teacher=f"decoder_{name}"))
    return [Variant(RECIPE, RECIPE), *found]
