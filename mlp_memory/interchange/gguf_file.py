"""GGUF: llama.cpp's file of metadata, tokenizer and (quantised) tensors; the only importer of gguf.

Tensors come out in float32 under their Hugging Face names and in their order.
"""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from mlp_memory.artifacts import UserError, first_line
from mlp_memory.corpus import sentencepiece_pieces
from mlp_memory.interchange import gguf_header
from mlp_memory.interchange.rotary_order import halves_from_pairs
from mlp_memory.interchange.safetensors_file import TensorSpec

_ARCHITECTURES = {
    "gpt2": gguf.MODEL_ARCH.GPT2,
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
_ROPE_FACTORS = "rope_freqs.weight"
# What GPT-2 stores [in, out] elsewhere.
_CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# How `tokenizer.ggml.pre` cuts text before merges: steps in tokenizer.json's own words.
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
_PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_BYTES | {"use_regex": True}],
    "default": [_BYTES | {"use_regex": True}],
    "smollm": [{"type": "Digits", "individual_digits": True}, _BYTES | {"use_regex": True}],
    **{
        name: [
            {
                "type": "Split",
                "pattern": {
                    "Regex": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
                    + digits
                    + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
                },
                "behavior": "Isolated",
                "invert": False,
            },
            _BYTES | {"use_regex": False},
        ]
        for name, digits in (("llama-bpe", "{1,3}"), ("qwen2", ""))
    },
}


class GgufFile:
    """Tensors of a GGUF file under Hugging Face names, dequantised one by one.

    Attributes:
      config: a config.json for it, made from the metadata.
      specs: every tensor's shape and dtype (float32).
      files: its tokenizer, as `tokenizer.json` or `tokenizer.model`, and `tokenizer_config.json`.

    Raises:
      UserError: the file is damaged or of an architecture that is not read.
    """

    facts = None

    def __init__(self, path: Path):
        self._path = path
        try:
            gguf_header.check(path)
            reader = gguf.GGUFReader(path)
            self._fields = {name: field.contents() for name, field in reader.fields.items()}
            self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        except Exception as error:  # the library has no one class for "this file is damaged"
            raise UserError(f"{path} is no whole GGUF file ({first_line(error)}): fetch it again") from error
        architecture = self._fields.get("general.architecture")
        if architecture not in _ARCHITECTURES:
            raise UserError(
                f"{path}: architecture {architecture!r} is not supported, only {', '.join(_ARCHITECTURES)}"
            )
        self._architecture: str = architecture
        try:
            self.config = self._read_config()
            self._names = self._hugging_face_names()
            self.specs = {ours: TensorSpec(self._shape(ours), "float32") for ours in self._names}
            self.files = self._read_tokenizer()
        except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
            raise UserError(
                f"{path}: its metadata fit no {architecture} ({first_line(error)}): fetch it again"
            ) from error

    def __str__(self) -> str:
        return str(self._path)

    def read(self, name: str) -> np.ndarray:
        """One tensor, dequantised to float32."""
        tensor = self._tensors[self._names[name]]
        try:
            array = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
            array = array.reshape(tuple(int(n) for n in reversed(tensor.shape)))
        except (NotImplementedError, ValueError) as error:
            raise UserError(
                f"{self._path}: tensor {name!r} is {tensor.tensor_type.name}: {first_line(error)}"
            ) from error
        if self._architecture == "llama":
            for part, key in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
                if f"self_attn.{part}." in name:
                    return halves_from_pairs(array, self.config[key])
        return array.T if self._architecture == "gpt2" and name.endswith(_CONV1D) else array

    def _shape(self, name: str) -> tuple[int, ...]:
        shape = tuple(int(n) for n in reversed(self._tensors[self._names[name]].shape))
        turned = self._architecture == "gpt2" and name.endswith(_CONV1D)
        return shape[::-1] if turned else shape

    def _is_same(self, name: str, other: str) -> bool:
        """Whether two tensors hold the same bytes. Older converters wrote GPT-2's embedding twice."""
        one, two = self._tensors[name], self._tensors[other]
        return one.tensor_type == two.tensor_type and np.array_equal(one.data, two.data)

    def _need(self, name: str) -> Any:
        if name not in self._fields:
            raise UserError(f"{self._path}: metadata {name} is missing: fetch the file again")
        return self._fields[name]

    def _read_config(self) -> dict[str, Any]:
        a, get = self._architecture, self._fields.get
        if "token_embd.weight" not in self._tensors:
            raise UserError(f"{self._path}: tensor 'token_embd.weight' is missing: fetch the file again")
        vocab_size = int(self._tensors["token_embd.weight"].shape[1])
        tied = "output.weight" not in self._tensors
        if a == "gpt2":
            tied = tied or self._is_same("output.weight", "token_embd.weight")
            return {
                "model_type": a,
                "n_layer": self._need(f"{a}.block_count"),
                "n_embd": self._need(f"{a}.embedding_length"),
                "n_head": self._need(f"{a}.attention.head_count"),
                "n_inner": get(f"{a}.feed_forward_length"),
                "n_positions": self._need(f"{a}.context_length"),
                "layer_norm_epsilon": _short(self._need(f"{a}.attention.layer_norm_epsilon")),
                "vocab_size": vocab_size,
                "tie_word_embeddings": tied,
            }
        heads = self._need(f"{a}.attention.head_count")
        config = {
            "model_type": "mistral" if a == "llama" and get(f"{a}.attention.sliding_window") else a,
            "num_hidden_layers": self._need(f"{a}.block_count"),
            "hidden_size": self._need(f"{a}.embedding_length"),
            "num_attention_heads": heads,
            "num_key_value_heads": get(f"{a}.attention.head_count_kv", heads),
            "head_dim": get(f"{a}.attention.key_length") or self._need(f"{a}.embedding_length") // heads,
            "intermediate_size": self._need(f"{a}.feed_forward_length"),
            "rms_norm_eps": _short(self._need(f"{a}.attention.layer_norm_rms_epsilon")),
            "max_position_embeddings": get(f"{a}.context_length", 2048),
            "rope_theta": _short(get(f"{a}.rope.freq_base", 10000.0)),
            "sliding_window": get(f"{a}.attention.sliding_window"),
            "vocab_size": vocab_size,
            "tie_word_embeddings": tied,
        }
        if (kind := get(f"{a}.rope.scaling.type", "none")) != "none":
            config["rope_scaling"] = {"rope_type": kind, "factor": get(f"{a}.rope.scaling.factor", 1.0)}
        if _ROPE_FACTORS in self._tensors:
            config["rope_scaling"] = self._rope_factors(config["head_dim"], config["rope_theta"])
        return config

    def _rope_factors(self, head_dim: int, base: float) -> dict[str, Any]:
        """Llama 3.1's rule, of which the file keeps only what came out for each frequency."""
        found = np.asarray(self._tensors[_ROPE_FACTORS].data, np.float32).reshape(-1)
        if len(found) != head_dim // 2:
            raise ValueError(f"{len(found)} rope factors for heads of {head_dim}")
        frequency = base ** -(np.arange(head_dim // 2) / (head_dim // 2))
        original = 8192
        kept = np.clip((original * frequency / (2 * np.pi) - 1.0) / 3.0, 0, 1)
        for factor in (8.0, 32.0, float(found.max())):
            wanted = 1 / (kept + (1 - kept) / factor)
            if found.shape == wanted.shape and np.allclose(found, wanted, rtol=1e-3):
                return {
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": original,
                }
        raise UserError(
            f"{self._path}: {_ROPE_FACTORS} {found.shape} follow no rule known here: import the Hugging Face "
            "folder instead"
        )

    def _hugging_face_names(self) -> dict[str, str]:
        """Hugging Face name -> the file's, for every tensor that one exists for; others keep theirs."""
        layers = self.config.get("num_hidden_layers", self.config.get("n_layer"))
        if not 0 < layers <= len(self._tensors):
            raise ValueError(f"{layers} layers of {len(self._tensors)} tensors")
        table = gguf.get_tensor_name_map(_ARCHITECTURES[self._architecture], layers)
        gpt2 = self._architecture == "gpt2"
        ends = ("wte", "wpe", "ln_f") if gpt2 else ("embed_tokens", "norm")
        parts = (
            ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
            if gpt2
            else (
                *("input_layernorm", "post_attention_layernorm"),
                *(f"self_attn.{p}" for p in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
                *(f"mlp.{p}_proj" for p in ("gate", "up", "down")),
            )
        )
        prefix, block = ("transformer", "h") if gpt2 else ("model", "layers")
        stems = [f"{prefix}.{end}" for end in ends]
        stems += [f"{prefix}.{block}.{i}.{part}" for i in range(layers) for part in parts]
        found = {}
        for name in [f"{stem}.{kind}" for stem in (*stems, "lm_head") for kind in ("weight", "bias")]:
            theirs = table.get_name(name, try_suffixes=(".weight", ".bias"))
            if theirs in self._tensors:
                found[name] = theirs
        left = set(self._tensors) - set(found.values()) - {_ROPE_FACTORS}
        return {**found, **{name: name for name in left}}

    def _read_tokenizer(self) -> dict[str, bytes]:
        kind = self._fields.get("tokenizer.ggml.model")
        if kind is None:
            return {}
        tokens, kinds = self._need("tokenizer.ggml.tokens"), self._need("tokenizer.ggml.token_type")
        if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
            raise ValueError("tokenizer.ggml.tokens are no texts")
        special = {
            name: self._fields.get(f"tokenizer.ggml.{long}_token_id", -1)
            for name, long in (("unk", "unknown"), ("bos", "bos"), ("eos", "eos"))
        }
        names = {f"{k}_token": tokens[i] for k, i in special.items() if 0 <= i < len(tokens)}
        config = {"tokenizer_config.json": json.dumps(names, ensure_ascii=False).encode()}
        if kind == "llama":
            model = sentencepiece_pieces.from_pieces(
                tokens,
                self._need("tokenizer.ggml.scores"),
                kinds,
                **special,
                add_dummy_prefix=self._fields.get("tokenizer.ggml.add_space_prefix", True),
                where=str(self._path),
            )
            return {"tokenizer.model": model, **config}
        if kind == "gpt2":
            return {"tokenizer.json": self._byte_pairs(tokens, kinds), **config}
        raise UserError(f"{self._path}: tokenizer {kind!r} is not supported: give corpus.vocab_file")

    def _byte_pairs(self, tokens: list[str], kinds: list[int]) -> bytes:
        """tokenizer.json of a byte-level BPE."""
        pre = self._fields.get("tokenizer.ggml.pre", "default")
        if pre not in _PRE_TOKENIZERS:
            raise UserError(
                f"{self._path}: pre-tokenizer {pre!r} is not known, only {', '.join(_PRE_TOKENIZERS)}: "
                "give corpus.vocab_file"
            )
        added = [
            {
                "id": i,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": kind == sentencepiece_pieces.CONTROL,
            }
            for i, (token, kind) in enumerate(zip(tokens, kinds))
            if kind in (sentencepiece_pieces.CONTROL, sentencepiece_pieces.USER_DEFINED)
        ]
        return json.dumps(
            {
                "version": "1.0",
                "truncation": None,
                "padding": None,
                "added_tokens": added,
                "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
                "pre_tokenizer": {"type": "Sequence", "pretokenizers": _PRE_TOKENIZERS[pre]},
                "post_processor": None,
                "decoder": _BYTES | {"use_regex": True},
                "model": {
                    "type": "BPE",
                    "dropout": None,
                    "unk_token": None,
                    "continuing_subword_prefix": None,
                    "end_of_word_suffix": None,
                    "fuse_unk": False,
                    "byte_fallback": False,
                    "ignore_merges": pre == "llama-bpe",
                    "vocab": {token: i for i, token in enumerate(tokens)},
                    "merges": self._need("tokenizer.ggml.merges"),
                },
            },
            ensure_ascii=False,
        ).encode()


def _short(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05 rather than 9.999999747378752e-06."""
    return float(str(np.float32(value)))
