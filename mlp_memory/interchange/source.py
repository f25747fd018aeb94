"""A model from elsewhere: opened, recognised and checked from headers, then read onto the mesh.

Hugging Face folders (decoders, and memories in the reference layout), GGUF and llama2.c
files all become a `Source`; so do the folders that `export` writes.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from mlp_memory.artifacts import Directory, UserError, as_dtype, canonical_json, digest
from mlp_memory.decoder.config import DecoderConfig
from mlp_memory.decoder.transformer import Decoder
from mlp_memory.interchange import families
from mlp_memory.interchange.layout import OWN, Layout
from mlp_memory.interchange.llama2c_file import Llama2cFile, is_llama2c
from mlp_memory.interchange.model_folder import CONVERT, PICKLES, ModelFolder
from mlp_memory.interchange.safetensors_file import TensorSpec
from mlp_memory.memory.config import MemoryConfig
from mlp_memory.memory.mlp import Memory
from mlp_memory.parallel.sharding import state_shardings
from mlp_memory.training.progress import Progress

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "encoder.json",
    "vocab.bpe",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
)
"""What is carried along with a model, where it is there."""

# What checkpoints hold beside their weights: causal masks, rotary tables.
_BESIDE = re.compile(r"(.*\.)?(attn\.(masked_)?bias|rotary_emb\.inv_freq)$")
_PREFIXES = ("transformer.", "model.")


@dataclasses.dataclass(frozen=True)
class Source:
    """A model from elsewhere, every tensor's name, shape and dtype checked.

    Attributes:
      where: path or URL.
      kind: "decoder" or "memory".
      family: as `Layout`'s.
      config: its shape.
      layout: which tensors it has.
      dtypes: of its tensors, by the layout's names.
      read: a tensor by the layout's name; None for an optional one that is missing.
      original: its config.json.
      facts: what our export wrote beside; None for a model from elsewhere.
      files: tokenizer files by name.
    """

    where: str
    kind: str
    family: str
    config: DecoderConfig | MemoryConfig
    layout: Layout
    dtypes: Mapping[str, str]
    read: Callable[[str], np.ndarray | None]
    original: dict[str, Any]
    facts: dict[str, Any] | None
    files: dict[str, bytes]

    @functools.cached_property
    def identity(self) -> str:
        """12 hex digits over config, shapes, dtypes and the values of the last norm."""
        listed = {name: [self.layout.tensors[name], dtype] for name, dtype in sorted(self.dtypes.items())}
        norm = self.layout.gather(("norm", "scale"), self.read, np.dtype(np.float32))
        config = dataclasses.asdict(self.config)
        return digest(canonical_json([config, listed]).encode() + norm.tobytes())[:12]

    def parameter_dtype(self, path: tuple[str, ...], dtype: str) -> np.dtype:
        """What a parameter is kept in: `dtype`, or as it is stored where that is "auto"."""
        stored = [self.dtypes[name] for name, _ in self.layout.places(path) if name in self.dtypes]
        return as_dtype(stored[0] if dtype == "auto" and stored else dtype.replace("auto", "float32"))


def open_source(location: str) -> Source:
    """Recognises a model and checks it as far as headers go.

    Args:
      location: a Hugging Face folder (path, gs:// or s3://), a .gguf file or a llama2.c file.

    Raises:
      UserError: nothing there, a format or architecture that is not read, a pickle, a tensor
        that is missing, left over, of another shape or dtype than its config asks for.
    """
    path = None if "://" in location else Path(location).expanduser()
    if path is not None and not path.exists():
        raise UserError(f"{path} does not exist: give a Hugging Face folder or a .gguf file")
    if path is None or path.is_dir():
        directory = Directory(location)
        opened = ModelFolder(directory)
        files = {name: data for name in TOKENIZER_FILES if (data := directory.read(name)) is not None}
    else:
        opened = _open_file(path)
        files = opened.files
    return _recognise(opened, files)


def _open_file(path: Path) -> Any:
    if path.suffix == ".gguf" or path.open("rb").read(4) == b"GGUF":
        from mlp_memory.interchange.gguf_file import GgufFile

        return GgufFile(path)
    if is_llama2c(path):
        return Llama2cFile(path)
    if path.suffix == ".safetensors":
        raise UserError(f"{path} is one of a model's files: give its folder, {path.parent}")
    if path.suffix in PICKLES:
        raise UserError(f"{path} is a pickle, which can run code when opened: {CONVERT}")
    raise UserError(f"{path} is neither GGUF nor a llama2.c checkpoint: give a Hugging Face folder or one")


def _recognise(opened: Any, files: dict[str, bytes]) -> Source:
    where, specs = str(opened), opened.specs
    config_where = f"{where}: config.json"
    if opened.config.get("model_type") == OWN:
        kind, family, config = _own(opened.config, config_where)
    elif any("attn" in name for name in specs):
        family, config = families.read_config(opened.config, config_where)
        kind = "decoder"
    else:
        shapes = {name: spec.shape for name, spec in specs.items()}
        config = families.read_memory_config(opened.config, shapes, where)
        kind, family = "memory", config.style
    if family != OWN and config.layers > len(specs):
        raise UserError(
            f"{config_where}: {config.layers} layers, and {len(specs)} tensors in all: use the config that "
            "belongs to these weights"
        )
    model = Decoder if kind == "decoder" else Memory
    try:
        abstract = nnx.eval_shape(lambda: model(config, nnx.Rngs(0)))
    except (TypeError, ValueError, OverflowError, MemoryError) as error:
        raise UserError(f"{config_where} describes no model that can be built: {error}") from error
    flat = nnx.to_flat_state(nnx.state(abstract))
    layout = Layout(kind, family, {path: v.get_value().shape for path, v in flat})
    theirs = _names(specs, layout)
    found = {ours: specs[name] for ours, name in theirs.items()}
    left = {name: specs[name] for name in set(specs) - set(theirs.values())}
    tied = kind == "decoder" and config.tied
    layout.check(
        {**found, **left},
        where,
        lambda name: _BESIDE.match(name) is not None or (tied and name == "lm_head.weight"),
    )
    return Source(
        where=where,
        kind=kind,
        family=family,
        config=config,
        layout=layout,
        dtypes={name: spec.dtype for name, spec in found.items() if name in layout.tensors},
        read=lambda name: opened.read(theirs[name]) if name in theirs else None,
        original=opened.config,
        facts=opened.facts,
        files=files,
    )


def _own(config: dict[str, Any], where: str) -> tuple[str, str, DecoderConfig]:
    try:
        fields = {field.name for field in dataclasses.fields(DecoderConfig)}
        return "decoder", OWN, DecoderConfig(**{k: v for k, v in config.items() if k in fields})
    except TypeError as error:
        raise UserError(f"{where} describes no model: {error}") from error


def _names(specs: Mapping[str, TensorSpec], layout: Layout) -> dict[str, str]:
    """The layout's names -> the file's, which may lack the prefix of the model with its head."""
    found = {}
    for name in layout.tensors:
        bare = next((name.removeprefix(p) for p in _PREFIXES if name.startswith(p)), name)
        for candidate in (name, bare):
            if candidate in specs:
                found[name] = candidate
                break
    return found


def load(source: Source, mesh: Mesh, dtype: str = "auto") -> nnx.Module:
    """The model on the mesh, read parameter by parameter.

    Beside the model itself the host holds one parameter (all its layers) at a time.

    Args:
      source: what `open_source` found.
      mesh: devices.
      dtype: of the parameters: "float32", "bfloat16", or "auto" for as they are stored.

    Raises:
      UserError: a file is damaged, or a value is not finite.
    """
    model = Decoder if source.kind == "decoder" else Memory
    graphdef, state = nnx.split(nnx.eval_shape(lambda: model(source.config, nnx.Rngs(0))))
    shardings = nnx.traversals.flatten_mapping(state_shardings(state, mesh))
    flat = nnx.to_flat_state(state)
    with Progress(f"read {source.kind}", len(flat), "parameters") as bar:
        for path, variable in flat:
            host = source.layout.gather(path, source.read, source.parameter_dtype(path, dtype))
            if not np.isfinite(host).all():
                raise UserError(f"{source.where}: {'.'.join(path)} has values that are not finite")
            variable.set_value(jax.make_array_from_callback(host.shape, shardings[path], host.__getitem__))
            bar.advance(1)
    return nnx.merge(graphdef, state)
