"""Where each of our parameters is among a family's tensors: one table per family.

A tensor elsewhere is one or several of our parameters, joined along their last axis and
transposed or not; ours have the layers stacked in front.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from mlp_memory.artifacts import UserError
from mlp_memory.interchange.safetensors_file import TensorSpec

Path = tuple[str, ...]
"""A parameter's place in the model, such as ("blocks", "ffn", "up", "kernel")."""

FLOATS = ("float32", "bfloat16", "float16")
OWN = "mlp_memory"
"""The family of shapes that no other library has: our own names, layers stacked."""


class Tensor(NamedTuple):
    """One tensor of a family.

    Attributes:
      name: `{i}` stands for the layer.
      paths: our parameters in it, joined along their last axis.
      transposed: stored [out, in] where we have [in, out].
      optional: zeros where it is not there.
    """

    name: str
    paths: tuple[Path, ...]
    transposed: bool = False
    optional: bool = False


class Part(NamedTuple):
    """One of our parameters, or a layer of it, as columns start..stop of a tensor."""

    path: Path
    layer: int | None
    start: int
    stop: int


def _linear(name: str, *paths: Path, transposed: bool) -> list[Tensor]:
    """A linear layer's weight and bias."""
    weight = Tensor(f"{name}.weight", tuple((*p, "kernel") for p in paths), transposed)
    return [weight, Tensor(f"{name}.bias", tuple((*p, "bias") for p in paths))]


def _norm(name: str, path: Path) -> list[Tensor]:
    return [Tensor(f"{name}.weight", ((*path, "scale"),)), Tensor(f"{name}.bias", ((*path, "bias"),))]


def _gpt2_decoder() -> list[Tensor]:
    layer = "transformer.h.{i}"
    attention = [("blocks", "attention", part) for part in ("query", "key", "value")]
    return [
        Tensor("transformer.wte.weight", (("embedding",),)),
        Tensor("transformer.wpe.weight", (("positions",),)),
        *_norm(f"{layer}.ln_1", ("blocks", "attention_norm")),
        *_linear(f"{layer}.attn.c_attn", *attention, transposed=False),
        *_linear(f"{layer}.attn.c_proj", ("blocks", "attention", "out"), transposed=False),
        *_norm(f"{layer}.ln_2", ("blocks", "ffn_norm")),
        *_linear(f"{layer}.mlp.c_fc", ("blocks", "ffn", "up"), transposed=False),
        *_linear(f"{layer}.mlp.c_proj", ("blocks", "ffn", "down"), transposed=False),
        *_norm("transformer.ln_f", ("norm",)),
        Tensor("lm_head.weight", (("head",),), transposed=True),
    ]


def _llama_decoder() -> list[Tensor]:
    layer = "model.layers.{i}"
    projections = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "out"}
    attention = [
        tensor
        for theirs, ours in projections.items()
        for tensor in _linear(f"{layer}.self_attn.{theirs}", ("blocks", "attention", ours), transposed=True)
    ]
    feed_forward = [
        tensor
        for part in ("gate", "up", "down")
        for tensor in _linear(f"{layer}.mlp.{part}_proj", ("blocks", "ffn", part), transposed=True)
    ]
    return [
        Tensor("model.embed_tokens.weight", (("embedding",),)),
        *_norm(f"{layer}.input_layernorm", ("blocks", "attention_norm")),
        *attention,
        *_norm(f"{layer}.self_attn.q_norm", ("blocks", "attention", "query_norm")),
        *_norm(f"{layer}.self_attn.k_norm", ("blocks", "attention", "key_norm")),
        *_norm(f"{layer}.post_attention_layernorm", ("blocks", "ffn_norm")),
        *feed_forward,
        *_norm("model.norm", ("norm",)),
        Tensor("lm_head.weight", (("head",),), transposed=True),
    ]


def _memory_ends() -> list[Tensor]:
    return [
        Tensor("embedding_transform.weight", (("transform", "kernel"),), transposed=True),
        Tensor("embedding_transform.bias", (("transform", "bias"),), optional=True),
        Tensor("lm_head.weight", (("head",),), transposed=True),
    ]


def _gpt2_memory() -> list[Tensor]:
    return [
        *_norm("h.{i}.ln_1", ("blocks", "norm")),
        *_linear("h.{i}.mlp.c_fc", ("blocks", "ffn", "up"), transposed=False),
        *_linear("h.{i}.mlp.c_proj", ("blocks", "ffn", "down"), transposed=False),
        *_norm("ln_f", ("norm",)),
        *_memory_ends(),
    ]


def _llama_memory() -> list[Tensor]:
    return [
        *_norm("layers.{i}.input_layernorm", ("blocks", "norm")),
        *(
            Tensor(
                f"layers.{{i}}.mlp.{part}_proj.weight", (("blocks", "ffn", part, "kernel"),), transposed=True
            )
            for part in ("gate", "up", "down")
        ),
        *_norm("norm", ("norm",)),
        *_memory_ends(),
    ]


_TABLES = {
    ("decoder", "gpt2"): _gpt2_decoder(),
    ("memory", "gpt2"): _gpt2_memory(),
    ("memory", "llama"): _llama_memory(),
    **{("decoder", family): _llama_decoder() for family in ("llama", "mistral", "qwen2", "qwen3")},
}


class Layout:
    """Which tensors a model of a family has, and where our parameters are in them.

    Args:
      kind: "decoder" or "memory".
      family: "gpt2", "llama", "mistral", "qwen2", "qwen3" or "mlp_memory".
      shapes: our parameters' shapes by path; those under "blocks" have the layers in front.

    Attributes:
      shapes: as given.
      tensors: every tensor's shape by name, as the family stores it.
      optional: names that may be missing.

    Raises:
      ValueError: the family has no place for a parameter.
    """

    def __init__(self, kind: str, family: str, shapes: Mapping[Path, tuple[int, ...]]):
        self.shapes = dict(shapes)
        self.tensors: dict[str, tuple[int, ...]] = {}
        self.optional: set[str] = set()
        self._parts: dict[str, list[Part]] = {}
        self._transposed: set[str] = set()
        own = [Tensor(".".join(path), (path,)) for path in shapes]
        for tensor in own if family == OWN else _TABLES[kind, family]:
            if all(path in shapes for path in tensor.paths):
                layers = range(shapes[tensor.paths[0]][0]) if "{i}" in tensor.name else [None]
                for layer in layers:
                    self._place(tensor, tensor.name.format(i=layer), layer)
        placed = {part.path for parts in self._parts.values() for part in parts}
        if left := sorted(set(shapes) - placed):
            raise ValueError(f"a {kind} of family {family} has no tensor for {'.'.join(left[0])}")

    def _place(self, tensor: Tensor, name: str, layer: int | None) -> None:
        start, parts = 0, []
        for path in tensor.paths:
            shape = self.shapes[path] if layer is None else self.shapes[path][1:]
            parts.append(Part(path, layer, start, start + shape[-1]))
            start += shape[-1]
        shape = (*shape[:-1], start)
        self._parts[name] = parts
        self.tensors[name] = shape[::-1] if tensor.transposed else shape
        self._transposed |= {name} if tensor.transposed else set()
        self.optional |= {name} if tensor.optional else set()

    def check(
        self, found: Mapping[str, TensorSpec], where: str, ignored: Callable[[str], bool] = lambda name: False
    ) -> None:
        """Raises unless a file holds this layout's tensors, each of its shape and of floats.

        Args:
          found: what the file holds, under this layout's names.
          where: the file, for messages.
          ignored: names that may be there beside.

        Raises:
          UserError: a tensor is missing, left over, of another shape or no float.
        """
        for name, shape in self.tensors.items():
            if name not in found:
                if name in self.optional:
                    continue
                left = sorted(n for n in set(found) - set(self.tensors) if not ignored(n))
                hint = f"it holds {left[0]!r} {found[left[0]].shape} instead" if left else "fetch it again"
                raise UserError(f"{where}: tensor {name!r} of shape {shape} is missing: {hint}")
            if found[name].shape != shape:
                raise UserError(
                    f"{where}: tensor {name!r} has shape {found[name].shape}, its config asks for {shape}: "
                    "use the config that belongs to these weights"
                )
            if found[name].dtype not in FLOATS:
                raise UserError(
                    f"{where}: tensor {name!r} of shape {shape} is {found[name].dtype}: "
                    f"give a copy in {', '.join(FLOATS)}"
                )
        for name in sorted(set(found) - set(self.tensors)):
            if not ignored(name):
                raise UserError(
                    f"{where}: tensor {name!r} of shape {found[name].shape} is left over: its config "
                    "describes a model without it"
                )

    def places(self, path: Path) -> list[tuple[str, Part]]:
        """The tensors that hold a parameter, and what of it each holds."""
        return [(name, part) for name, parts in self._parts.items() for part in parts if part.path == path]

    def gather(self, path: Path, read: Callable[[str], np.ndarray | None], dtype: np.dtype) -> np.ndarray:
        """One of our parameters out of the family's tensors.

        Args:
          path: which.
          read: a tensor by name; None where an optional one is missing, which gives zeros.
          dtype: of the result.
        """
        out = np.zeros(self.shapes[path], dtype)
        for name, part in self.places(path):
            array = read(name)
            if array is not None:
                array = array.T if name in self._transposed else array
                out[... if part.layer is None else part.layer] = array[..., part.start : part.stop]
        return out

    def scatter(self, name: str, parameter: Callable[[Path, int | None], np.ndarray]) -> np.ndarray:
        """One tensor of the family out of our parameters.

        Args:
          name: which.
          parameter: one of ours by path: a layer of it, or the whole for None.
        """
        pieces = [parameter(part.path, part.layer) for part in self._parts[name]]
        whole = pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=-1)
        return np.ascontiguousarray(whole.T if name in self._transposed else whole)
