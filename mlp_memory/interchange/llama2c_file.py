"""llama2.c's checkpoint: seven numbers and the float32 weights one after the other.

Its tokenizer is a file beside it, `tok*.bin` or `tokenizer.bin`.
"""

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np

from mlp_memory.artifacts import UserError, first_line
from mlp_memory.corpus import sentencepiece_pieces
from mlp_memory.interchange.rotary_order import halves_from_pairs
from mlp_memory.interchange.safetensors_file import TensorSpec

_HEADER = struct.Struct("<7i")


def is_llama2c(path: Path) -> bool:
    """Whether the file's length is the one that its first seven numbers ask for."""
    try:
        return _Checkpoint.bytes_of(_header(path)) == path.stat().st_size
    except (OSError, struct.error, ArithmeticError, UserError):
        return False


def _header(path: Path) -> dict[str, int]:
    with path.open("rb") as file:
        values = _HEADER.unpack(file.read(_HEADER.size))
    names = ("dim", "ffn", "layers", "heads", "kv_heads", "vocab", "context")
    found = dict(zip(names, values))
    if min(v for k, v in found.items() if k != "vocab") < 1 or max(values) > 1 << 24 or not found["vocab"]:
        raise UserError(f"{path} is no llama2.c checkpoint")
    return found


class _Checkpoint:
    """Where each tensor begins, under its name in Llama's layout, in float32 words."""

    @staticmethod
    def tensors(h: dict[str, int]) -> list[tuple[str, tuple[int, ...], bool]]:
        """Name, shape and whether it stands once per layer, in the order of the file."""
        kv, layer = h["dim"] // h["heads"] * h["kv_heads"], "model.layers.{i}."
        rotary = (h["context"], h["dim"] // h["heads"] // 2)
        return [
            ("model.embed_tokens.weight", (abs(h["vocab"]), h["dim"]), False),
            (layer + "input_layernorm.weight", (h["dim"],), True),
            (layer + "self_attn.q_proj.weight", (h["dim"], h["dim"]), True),
            (layer + "self_attn.k_proj.weight", (kv, h["dim"]), True),
            (layer + "self_attn.v_proj.weight", (kv, h["dim"]), True),
            (layer + "self_attn.o_proj.weight", (h["dim"], h["dim"]), True),
            (layer + "post_attention_layernorm.weight", (h["dim"],), True),
            (layer + "mlp.gate_proj.weight", (h["ffn"], h["dim"]), True),
            (layer + "mlp.down_proj.weight", (h["dim"], h["ffn"]), True),
            (layer + "mlp.up_proj.weight", (h["ffn"], h["dim"]), True),
            ("model.norm.weight", (h["dim"],), False),
            ("", rotary, False),  # cosines and sines, which are computed here
            ("", rotary, False),
            *([("lm_head.weight", (abs(h["vocab"]), h["dim"]), False)] if h["vocab"] < 0 else []),
        ]

    @classmethod
    def bytes_of(cls, h: dict[str, int]) -> int:
        words = sum(math.prod(s) * (h["layers"] if each else 1) for _, s, each in cls.tensors(h))
        return _HEADER.size + 4 * words


class Llama2cFile:
    """Tensors of a llama2.c checkpoint under Llama's names, read one by one.

    Attributes:
      config: a config.json for it.
      specs: every tensor's shape and dtype.
      files: its tokenizer as a SentencePiece model, where there is one beside it.

    Raises:
      UserError: the file is no such checkpoint.
    """

    facts = None

    def __init__(self, path: Path):
        self._path, self._header = path, _header(path)
        h = self._header
        self.config: dict[str, Any] = {
            "model_type": "llama",
            "hidden_size": h["dim"],
            "intermediate_size": h["ffn"],
            "num_hidden_layers": h["layers"],
            "num_attention_heads": h["heads"],
            "num_key_value_heads": h["kv_heads"],
            "vocab_size": abs(h["vocab"]),
            "max_position_embeddings": h["context"],
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": h["vocab"] > 0,
            "torch_dtype": "float32",
        }
        self.specs: dict[str, TensorSpec] = {}
        self._offsets: dict[str, int] = {}
        offset = _HEADER.size
        for name, shape, each in _Checkpoint.tensors(h):
            for i in range(h["layers"] if each else 1):
                if name:
                    self.specs[name.format(i=i)] = TensorSpec(shape, "float32")
                    self._offsets[name.format(i=i)] = offset
                offset += 4 * math.prod(shape)
        self.files = self._tokenizer()

    def __str__(self) -> str:
        return str(self._path)

    def read(self, name: str) -> np.ndarray:
        """One tensor.

        Raises:
          UserError: the file was cut off since it was opened.
        """
        shape = self.specs[name].shape
        try:
            flat = np.fromfile(self._path, "<f4", math.prod(shape), offset=self._offsets[name])
            array = flat.reshape(shape)
        except (OSError, ValueError) as error:
            raise UserError(f"{self._path}: tensor {name!r} of shape {shape}: {first_line(error)}") from error
        for part, heads in (("q_proj", self._header["heads"]), ("k_proj", self._header["kv_heads"])):
            if f"{part}.weight" in name:
                return halves_from_pairs(array, heads)
        return array

    def _tokenizer(self) -> dict[str, bytes]:
        folder = self._path.parent
        for path in sorted([*folder.glob("tok*.bin"), *folder.glob("tokenizer*.bin")]):
            return {"tokenizer.model": read_tokenizer(path, abs(self._header["vocab"]))}
        return {}


def read_tokenizer(path: Path, vocab_size: int) -> bytes:
    """A llama2.c tokenizer file as a serialised SentencePiece model.

    Its ids are 0 unknown, 1 bos, 2 eos, then the 256 bytes, then pieces.

    Raises:
      UserError: the file is cut off or damaged.
    """
    data, offset = path.read_bytes(), 4
    pieces, scores = [], []
    try:
        for _ in range(vocab_size):
            score, length = struct.unpack_from("<fi", data, offset)
            if not 0 <= length <= len(data) - offset - 8:
                raise ValueError(f"a piece of {length} bytes")
            offset += 8 + length
            pieces.append(data[offset - length : offset].decode().replace(" ", "\u2581"))
            scores.append(score)
    except (struct.error, ValueError) as error:
        raise UserError(
            f"{path} is no llama2.c tokenizer of {vocab_size} pieces: {first_line(error)}"
        ) from error
    names = ("<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)))
    pieces[: len(names)] = names[: len(pieces)]
    s = sentencepiece_pieces
    kinds = [s.UNKNOWN, s.CONTROL, s.CONTROL, *[s.BYTE] * 256, *[s.NORMAL] * vocab_size][:vocab_size]
    return s.from_pieces(pieces, scores, kinds, 0, 1, 2, True, str(path))
