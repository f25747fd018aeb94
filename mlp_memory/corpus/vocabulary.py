"""Text to token ids and back, whatever tokenizer it is, without TensorFlow."""

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np

from mlp_memory import artifacts
from mlp_memory.artifacts import Directory, UserError, first_line
from mlp_memory.corpus import vocabulary_files
from mlp_memory.corpus.byte_tokens import ByteTokens
from mlp_memory.corpus.json_tokenizer import JsonTokenizer
from mlp_memory.corpus.sentencepiece_model import SentencePieceModel, make_lossless
from mlp_memory.corpus.vocabulary_files import SENTENCEPIECE, TOKENIZER_JSON

KIND = "vocabulary"
_ADDED = "added_tokens.json"
# Models get a row of their embedding for each id: a file that claims billions would fill the memory.
_MOST_IDS = 1 << 24
# What documents are bordered with where no file says so, the first that is there.
_WELL_KNOWN = {
    "bos": ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>"),
    "eos": ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>"),
}


class _Tokenizer(Protocol):
    """What is asked of each kind; ids are checked before they come here."""

    size: int
    bos: int | None
    eos: int | None

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: list[int]) -> str: ...
    def piece(self, token: int) -> str: ...
    def id_of(self, token: str) -> int | None: ...


class Vocabulary:
    """Encodes and decodes.

    No text is encoded as a special token, though it may spell one's name, and the ids of a
    text alone, with or without bos and eos around, decode to it: always, with a vocabulary
    trained here, bytes, byte-level BPE and SentencePiece with byte fallback; as far as its
    normaliser lets it, with any other.

    A vocabulary trained here has the ids 0 pad, 1 unknown, 2 bos, 3 eos, 4 newline, 5..260
    the 256 bytes, then learned pieces; pad and unknown never occur in an encoded text.

    Attributes:
      files: what it is made of, by name; the same bytes make the same vocabulary.
      kind: "sentencepiece", "tokenizers", "gpt2" or "bytes".
      size: number of ids; every id is below it.
      bos, eos: ids that open and close a document. They are the tokens asked for, else those
        of tokenizer_config.json or special_tokens_map.json, else the model's own, else those
        of a well-known name (<s>, </s>, <|endoftext|>). One serves for both where only one is.
      fingerprint: of the vocabulary's manifest; "" where it was not read from one.

    Args:
      files: see `vocabulary_files` for the names.
      name: how errors call it.
      fingerprint: of the manifest.
      bos, eos: tokens by name, None to take the files' word.
      lossless: write characters that the tokenizer would change or drop in others, so that
        they come back; every other text has the ids it has without.

    Raises:
      UserError: the files are no tokenizer, or there is neither bos nor eos.
    """

    def __init__(
        self,
        files: Mapping[str, bytes],
        name: str,
        fingerprint: str = "",
        bos: str | None = None,
        eos: str | None = None,
        lossless: bool = True,
    ):
        self.files, self.fingerprint, self._name = dict(files), fingerprint, name
        self.kind = vocabulary_files.kind_of(files, name)
        self._tokenizer = _make_tokenizer(self.kind, files, name, lossless)
        self._added = _added_tokens(files, name, self._tokenizer.size)
        self.size: int = max([self._tokenizer.size, *(i + 1 for i in self._added)])
        if self.size > _MOST_IDS:
            raise UserError(f"{name} has ids up to {self.size - 1}, more than {_MOST_IDS}: fetch it again")
        self.bos, self.eos = self._borders(bos, eos)

    @classmethod
    def from_path(
        cls, path: str, bos: str | None = None, eos: str | None = None, lossless: bool = True
    ) -> "Vocabulary":
        """A tokenizer from anywhere on this machine.

        Args:
          path: a tokenizer.json, a SentencePiece model or one half of GPT-2's pair, under any
            name; a folder that has one of them; or the word "bytes".
          bos, eos: see the class.
          lossless: see the class; besides, a SentencePiece model without byte pieces is
            extended (see `sentencepiece_model.make_lossless`).

        Raises:
          UserError: there is no such file, it is no tokenizer, or it has neither bos nor eos.
        """
        files, name = vocabulary_files.read(path), f"vocab_file {path!r}"
        vocabulary = cls(files, name, "", bos, eos, lossless)
        if not lossless or vocabulary.kind != "sentencepiece":
            return vocabulary
        model = make_lossless(files[SENTENCEPIECE])
        if model == files[SENTENCEPIECE]:
            return vocabulary
        if vocabulary._added:
            raise UserError(
                f"{name}: {_ADDED} takes the ids that a lossless form needs: set corpus.lossless = False "
                "or give the tokenizer.json"
            )
        return cls(files | {SENTENCEPIECE: model}, name, "", bos, eos)

    @classmethod
    def load(cls, directory: Directory) -> "Vocabulary":
        """The vocabulary in WORKDIR/corpus/vocabulary.

        Raises:
          UserError: it is missing, unfinished or damaged.
        """
        manifest = artifacts.require(directory, "tokenize")
        files = {}
        for name, sha256 in manifest.facts.get("files", {}).items():
            if name not in vocabulary_files.KEPT_NAMES:
                raise UserError(f"{directory} names {name!r}, no tokenizer's file: run tokenize again")
            data = directory.read(name)
            if data is None or hashlib.sha256(data).hexdigest() != sha256:
                state = "is missing" if data is None else "is damaged"
                raise UserError(f"{directory}/{name} {state}: run `python -m mlp_memory tokenize` again")
            files[name] = data
        if not files:
            raise UserError(f"{directory} names no files: run `python -m mlp_memory tokenize` again")
        settings = {name: manifest.config.get(name) for name in ("bos", "eos")}
        settings["lossless"] = manifest.config.get("lossless", True)
        return cls(files, str(directory), manifest.fingerprint, **settings)

    def save(self, directory: Directory, settings: Mapping[str, Any]) -> None:
        """Writes what `load` reads; `settings` go into its manifest: bos, eos and lossless as given here."""
        manifest = artifacts.begin(directory, KIND, settings, {})
        for name, data in self.files.items():
            directory.write(name, data)
        artifacts.finish(
            directory,
            manifest,
            files={name: hashlib.sha256(data).hexdigest() for name, data in self.files.items()},
            tokenizer=self.kind,
            vocab_size=self.size,
            bos=self.bos,
            eos=self.eos,
        )

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without bos and eos."""
        return self._tokenizer.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; bos and eos give no text, broken UTF-8 gives U+FFFD.

        Raises:
          IndexError: an id is negative or not below `size`.
        """
        ids_T = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), np.int64)
        if ids_T.size and not 0 <= ids_T.min() <= ids_T.max() < self.size:
            raise IndexError(f"tokens {ids_T.min()} to {ids_T.max()} of a vocabulary of {self.size}")
        kept = ids_T[(ids_T != self.bos) & (ids_T != self.eos)].tolist()
        if not self._added:
            return self._tokenizer.decode(kept)
        runs = itertools.groupby(kept, key=lambda i: i in self._added)
        return "".join(
            "".join(self._added[i] for i in run) if is_added else self._tokenizer.decode(list(run))
            for is_added, run in runs
        )

    def piece(self, token: int) -> str:
        """One id as a printable word for reports: U+2581 for a space, escapes for control characters.

        Raises:
          IndexError: the id is negative or not below `size`.
        """
        token = int(token)
        if not 0 <= token < self.size:
            raise IndexError(f"token {token} of a vocabulary of {self.size}")
        piece = self._added[token] if token in self._added else self._tokenizer.piece(token)
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in piece)

    def _borders(self, bos: str | None, eos: str | None) -> tuple[int, int]:
        found = [self._named("bos", bos), self._named("eos", eos)]
        if found == [None, None]:
            found = [self._well_known("bos"), self._well_known("eos")]
        first, last = found
        if first is None and last is None:
            raise UserError(
                f"{self._name} has neither a bos nor an eos token, and documents need one as their border: "
                "set corpus.eos to a special token's name"
            )
        return (last if first is None else first), (first if last is None else last)

    def _named(self, which: str, asked: str | None) -> int | None:
        """The border that the settings, the extra files or the model name."""
        if asked is not None:
            token = self._id_of(asked)
            if token is None:
                raise UserError(f"corpus.{which} = {asked!r} is no token of {self._name}: name one it has")
            if token in self.encode(asked):
                raise UserError(
                    f"corpus.{which} = {asked!r} is a token that texts are made of: name a special one"
                )
            return token
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            value = _table(self.files, file, self._name).get(f"{which}_token")
            content = value.get("content") if isinstance(value, dict) else value
            if isinstance(content, str):
                if (token := self._id_of(content)) is None:
                    raise UserError(
                        f"{self._name}: {file} names {which}_token {content!r}, which the tokenizer does not "
                        f"have: set corpus.{which} to a token that it has"
                    )
                return token
        if (own := getattr(self._tokenizer, which)) is not None:
            return own
        value = _table(self.files, "generation_config.json", self._name).get(f"{which}_token_id")
        token = value[0] if isinstance(value, list) and value else value
        return token if type(token) is int and 0 <= token < self.size else None

    def _well_known(self, which: str) -> int | None:
        found = ((self._id_of(name), name) for name in _WELL_KNOWN[which])
        return next((i for i, name in found if i is not None and i not in self.encode(name)), None)

    def _id_of(self, token: str) -> int | None:
        added = {content: i for i, content in self._added.items()}
        return added[token] if token in added else self._tokenizer.id_of(token)


def _make_tokenizer(kind: str, files: Mapping[str, bytes], name: str, lossless: bool) -> _Tokenizer:
    if kind == "sentencepiece":
        return SentencePieceModel(files[SENTENCEPIECE], name, lossless)
    if kind == "tokenizers":
        return JsonTokenizer.from_json(files[TOKENIZER_JSON], name, lossless)
    if kind == "gpt2":
        vocabulary, merges = vocabulary_files.vocabulary_name(files), vocabulary_files.merges_name(files)
        return JsonTokenizer.from_pair(files[vocabulary], files[merges], name, lossless)
    return ByteTokens()


def _added_tokens(files: Mapping[str, bytes], name: str, size: int) -> dict[int, str]:
    """Tokens that added_tokens.json puts after a model's own ids."""
    table = _table(files, _ADDED, name)
    if not all(type(i) is int and 0 <= i < 2**31 for i in table.values()):
        raise UserError(f"{name}: {_ADDED} is not a table of tokens and their ids: fetch it again")
    return {i: content for content, i in table.items() if i >= size}


def _table(files: Mapping[str, bytes], file: str, name: str) -> dict[str, Any]:
    """A JSON object among the files; empty where the file is not there."""
    if file not in files:
        return {}
    try:
        table = json.loads(files[file])
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: {file} is not JSON ({first_line(error)}): fetch it again") from error
    if not isinstance(table, dict):
        raise UserError(f"{name}: {file} is a JSON {type(table).__name__}, not a table: fetch it again")
    return table
