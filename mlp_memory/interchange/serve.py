"""Continues prompts with the model of this folder. Needs jax, numpy and safetensors alone.

    python serve.py --tokens='2 301 17' --tokens='2 5' --max_tokens=32
    python serve.py --text='Once upon a time'      # by the library of the folder's tokenizer

From Python: Server(folder).generate([[2, 301, 17], [2, 5]], max_tokens=32).
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from jax import export

FORMAT = "mlp_memory serving 1"
NUMBERS = ("temperature", "top_p", "min_p", "penalty")
_ROUND = 64
"""Lengths are rounded up to a multiple of this, so that few programs are compiled."""


class ServingError(Exception):
    """What the user can mend, in one line."""


class Server:
    """The model of a folder, on the first device.

    Args:
      folder: what `export_serving` wrote.

    Raises:
      ServingError: a file is missing or is not the one that was written, or this device was not exported for.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.facts = self._facts()
        platform = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
        if platform not in self.facts["platforms"]:
            raise ServingError(
                f"exported for {', '.join(self.facts['platforms'])}; this device is {platform}"
            )
        for name, wanted in self.facts["sha256"].items():
            self._check(name, wanted)
        self._weights = self._read_weights()
        prefill, step = (self._program(name) for name in ("prefill.stablehlo", "step.stablehlo"))
        self._prefill, self._step = jax.jit(prefill.call), jax.jit(step.call, donate_argnums=1)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int | None = None,
        seed: int | None = None,
        **numbers: float,
    ) -> list[list[int]]:
        """What follows each prompt, up to the end of its document, which is left out.

        Args:
          prompts: token ids, at least one each; a document begins with `facts["bos"]`.
          max_tokens: most tokens to add.
          seed: of the draws.
          numbers: of the filters that the programs have: temperature, top_p, min_p, penalty.

        Raises:
          ServingError: an impossible prompt or setting.
        """
        facts, defaults = self.facts, self.facts["defaults"]
        max_tokens = defaults["max_tokens"] if max_tokens is None else max_tokens
        seed = defaults["seed"] if seed is None else seed
        self._check_request(prompts, max_tokens, numbers)
        if not prompts:
            return []
        settings = [np.float32({**defaults, **numbers}[name]) for name in facts["numbers"]]
        lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
        tokens_BxT = np.zeros((len(prompts), _rounded(lengths_B.max())), np.int32)
        for row, prompt in zip(tokens_BxT, prompts):
            row[: len(prompt)] = prompt
        state = self._prefill(self._weights, tokens_BxT, lengths_B, np.uint32(seed & 0xFFFFFFFF), settings)
        state = self._with_room(state, _rounded(lengths_B.max() + max_tokens))
        token = [entry["name"] for entry in facts["state"]].index("token")
        texts: list[list[int]] = [[] for _ in prompts]
        going = set(range(len(prompts)))
        for count in range(max_tokens):
            said_B = np.asarray(state[token])
            going = {row for row in going if said_B[row] != facts["eos"]}
            for row in going:
                texts[row].append(int(said_B[row]))
            if not going or count + 1 == max_tokens:
                break
            state = self._step(self._weights, state, settings)
        return texts

    def _facts(self) -> dict[str, Any]:
        path = self.folder / "serving.json"
        if not path.is_file():
            raise ServingError(f"{path} is missing: give a folder that export_serving wrote")
        try:
            facts = json.loads(path.read_bytes())
            if facts["format"] != FORMAT:
                raise ServingError(
                    f"{path} is of format {facts['format']!r}, this reads {FORMAT!r}: export again"
                )
        except (ValueError, KeyError, TypeError) as error:
            raise ServingError(f"{path} is damaged or unfinished: export again") from error
        return facts

    def _check(self, name: str, wanted: str) -> None:
        path = self.folder / name
        if not path.is_file():
            raise ServingError(f"{path} is missing: export again")
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != wanted:
                raise ServingError(f"{path} is not the file that was exported (checksum): export again")

    def _read_weights(self) -> list[jax.Array]:
        path, weights = self.folder / "weights.safetensors", []
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                for entry in self.facts["weights"]:
                    array = file.get_tensor(entry["name"])
                    if [*array.shape] != entry["shape"] or array.dtype.name != entry["dtype"]:
                        raise ValueError(f"{entry['name']} is {array.dtype.name}{array.shape}")
                    weights.append(jnp.asarray(array))
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise ServingError(f"{path} does not fit serving.json ({error}): export again") from error
        return weights

    def _program(self, name: str) -> export.Exported:
        try:
            return export.deserialize(bytearray((self.folder / name).read_bytes()))
        except Exception as error:  # whatever an older or newer jax says
            raise ServingError(
                f"{self.folder / name} was written by jax {self.facts['jax']}, which jax {jax.__version__} "
                f"cannot read: export again ({type(error).__name__})"
            ) from error

    def _check_request(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, numbers: dict[str, float]
    ) -> None:
        if max_tokens < 1:
            raise ServingError(f"max_tokens = {max_tokens}: give 1 or more")
        filters = self.facts["filters"]
        offered = {
            "temperature": not filters["greedy"],
            **{name: filters[name] for name in ("top_p", "min_p", "penalty")},
        }
        for name, value in numbers.items():
            if not offered.get(name):
                there = ", ".join(name for name in NUMBERS if offered[name]) or "no filters"
                raise ServingError(f"{name}: the programs were exported without it; they have {there}")
            if not value > 0:
                raise ServingError(f"{name} = {value}: give a number above 0")
        for row, prompt in enumerate(prompts):
            if not len(prompt):
                raise ServingError(
                    f"prompt {row} is empty: give at least one token (bos is {self.facts['bos']})"
                )
            if not all(0 <= token < self.facts["vocab_size"] for token in prompt):
                raise ServingError(f"prompt {row}: tokens are 0 to {self.facts['vocab_size'] - 1}")
            most = self.facts["max_positions"] - max_tokens
            if self.facts["max_positions"] and len(prompt) > most:
                raise ServingError(
                    f"prompt {row} has {len(prompt)} tokens; with max_tokens = {max_tokens}, {most} fit"
                )

    def _with_room(self, state: list[jax.Array], capacity: int) -> list[jax.Array]:
        """The state with room for `capacity` positions: the axes called "c"."""
        grown = []
        for array, entry in zip(state, self.facts["state"]):
            room = [(0, max(capacity - n, 0) if s == "c" else 0) for n, s in zip(array.shape, entry["shape"])]
            grown.append(jnp.pad(array, room) if any(after for _, after in room) else array)
        return grown


def tokenizer(server: Server) -> tuple[Callable[[str], list[int]], Callable[[Sequence[int]], str]]:
    """The folder's tokenizer by its own library: text to ids and back, without bos and eos.

    Characters that training had to write otherwise (docs/guide.md, Your own corpus) are not.

    Raises:
      ServingError: the library is not installed.
    """
    kind, folder = server.facts["tokenizer"]["kind"], server.folder
    if kind == "bytes":
        return (
            lambda text: [byte + 3 for byte in text.encode()],
            lambda ids: bytes(i - 3 for i in ids if i >= 3).decode(errors="replace"),
        )
    try:
        if kind == "sentencepiece":
            import sentencepiece

            model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
            return model.encode, model.decode
        import tokenizers
    except ImportError as error:
        raise ServingError(f"texts need the library {error.name}: install it, or give --tokens") from error
    if kind == "tokenizers":
        model = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        model.encode_special_tokens = True
    else:
        pairs = (("vocab.json", "encoder.json"), ("merges.txt", "vocab.bpe"))
        files = [next(str(folder / n) for n in names if (folder / n).is_file()) for names in pairs]
        model = tokenizers.ByteLevelBPETokenizer(*files)
    return (
        lambda text: model.encode(text, add_special_tokens=False).ids,
        lambda ids: model.decode(list(ids), skip_special_tokens=False),
    )


def _rounded(length: int) -> int:
    return -(-int(length) // _ROUND) * _ROUND


def main() -> None:
    """Prints a line for each prompt; what the user can mend ends in one line and exit code 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", default=str(Path(__file__).parent), help="what export_serving wrote")
    parser.add_argument("--tokens", action="append", default=[], metavar="'1 2 3'", help="may be given again")
    parser.add_argument("--text", action="append", default=[], help="may be given again")
    parser.add_argument("--max_tokens", type=int)
    parser.add_argument("--seed", type=int)
    for name in NUMBERS:
        parser.add_argument(f"--{name}", type=float, help="if exported with it")
    args = parser.parse_args()
    try:
        if not args.tokens and not args.text:
            raise ServingError("nothing to continue: give --tokens or --text")
        given = [_token_ids(words) for words in args.tokens]
        server = Server(args.folder)
        encode, decode = tokenizer(server) if args.text else (None, None)
        prompts = [*given, *([server.facts["bos"], *encode(text)] for text in args.text)]
        numbers = {name: value for name in NUMBERS if (value := getattr(args, name)) is not None}
        borders = (server.facts["bos"], server.facts["eos"])
        for row, tokens in enumerate(server.generate(prompts, args.max_tokens, args.seed, **numbers)):
            if row < len(given):
                print(*tokens)
                continue
            before, after = ([i for i in ids if i not in borders] for ids in (prompts[row], tokens))
            print(decode(before + after)[len(decode(before)) :])
    except ServingError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def _token_ids(words: str) -> list[int]:
    try:
        return [int(word) for word in words.replace(",", " ").split()]
    except ValueError as error:
        raise ServingError(f"--tokens={words!r}: give whole numbers") from error


if __name__ == "__main__":
    main()
