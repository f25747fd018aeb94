"""Which files a tokenizer is made of: told apart by what they hold, kept under names that say their kind."""

import json
from collections.abc import Mapping
from pathlib import Path

from mlp_memory.artifacts import UserError, first_line

SENTENCEPIECE = "tokenizer.model"
TOKENIZER_JSON = "tokenizer.json"
BYTES = "bytes.txt"
# GPT-2's own names, and those of Hugging Face folders, under which the pair is kept.
VOCABULARY_NAMES = ("vocab.json", "encoder.json")
MERGES_NAMES = ("merges.txt", "vocab.bpe")
# What says which tokens are bos and eos; goes where the tokenizer goes.
EXTRAS = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "added_tokens.json")
KEPT_NAMES = (SENTENCEPIECE, TOKENIZER_JSON, BYTES, *VOCABULARY_NAMES, *MERGES_NAMES, *EXTRAS)
"""Every name under which a vocabulary keeps a file."""
# The word that stands for a vocabulary without files, and what is kept of it.
BYTES_WORD = "bytes"
_BYTES_NOTE = b"One token a byte: 0 pad, 1 eos, 2 unknown, then byte b is b + 3.\n"
_SENTENCEPIECE_NAMES = (SENTENCEPIECE, "spiece.model", "sentencepiece.bpe.model")
_WANTED = (
    "give a tokenizer.json, a SentencePiece model, GPT-2's encoder.json with its vocab.bpe, "
    'a folder with one of these, or "bytes"'
)


def kind_of(files: Mapping[str, bytes], name: str) -> str:
    """ "sentencepiece", "tokenizers", "gpt2" or "bytes".

    Raises:
      UserError: `files` hold no tokenizer, half of one, or two.
    """
    vocabulary, merges = vocabulary_name(files), merges_name(files)
    if (vocabulary is None) != (merges is None):
        other = MERGES_NAMES if merges is None else VOCABULARY_NAMES
        raise UserError(f"{name}: {vocabulary or merges} without {' or '.join(other)}: give both")
    kinds = {
        "sentencepiece": SENTENCEPIECE in files,
        "tokenizers": TOKENIZER_JSON in files,
        "gpt2": vocabulary is not None,
        "bytes": BYTES in files,
    }
    found = [kind for kind, is_there in kinds.items() if is_there]
    if len(found) != 1:
        what = f"has two tokenizers, {found[0]} and {found[1]}" if found else "has no tokenizer"
        raise UserError(f"{name} {what}: {_WANTED}")
    return found[0]


def vocabulary_name(files: Mapping[str, object]) -> str | None:
    """The name that the vocabulary of a GPT-2 pair has in `files`."""
    return next((name for name in VOCABULARY_NAMES if name in files), None)


def merges_name(files: Mapping[str, object]) -> str | None:
    """The name that the merges of a GPT-2 pair have in `files`."""
    return next((name for name in MERGES_NAMES if name in files), None)


def find(path: str) -> dict[str, Path]:
    """Where the files of a tokenizer are, by the names they are kept under; nothing for "bytes".

    Args:
      path: a file of any name, a folder, or the word "bytes".

    Raises:
      UserError: there is no such file, it is no tokenizer, or its other half is missing.
    """
    if path == BYTES_WORD:
        return {}
    place = Path(path).expanduser()
    if place.is_dir():
        return _in_folder(place) | _extras(place)
    kept = _of_file(place)
    # A file under its proper name is one of its folder's; under another it stands alone.
    return kept | _extras(place.parent) if place.name in {*kept, *_SENTENCEPIECE_NAMES} else kept


def read(path: str) -> dict[str, bytes]:
    """The files of a tokenizer (see `find`).

    Raises:
      UserError: as `find`, or a file cannot be read.
    """
    if path == BYTES_WORD:
        return {BYTES: _BYTES_NOTE}
    return {name: _read(file) for name, file in find(path).items()}


def _in_folder(folder: Path) -> dict[str, Path]:
    names = {entry.name: entry for entry in folder.iterdir()}
    if TOKENIZER_JSON in names:
        return {TOKENIZER_JSON: names[TOKENIZER_JSON]}
    for name in _SENTENCEPIECE_NAMES:
        if name in names:
            return {SENTENCEPIECE: names[name]}
    if first := vocabulary_name(names) or merges_name(names):
        return _of_file(names[first])
    raise UserError(f"vocab_file {str(folder)!r}: the folder has no tokenizer: {_WANTED}")


def _extras(folder: Path) -> dict[str, Path]:
    return {name: folder / name for name in EXTRAS if (folder / name).is_file()}


def _of_file(path: Path) -> dict[str, Path]:
    data = _read(path)
    where = f"vocab_file {str(path)!r}"
    if not data:
        raise UserError(f"{where} is empty: {_WANTED}")
    if data[:1] == b"\x80" and data.endswith(b"."):
        raise UserError(f"{where} is a Python pickle, which could run code and is not opened: {_WANTED}")
    if data.lstrip()[:1] in (b"{", b"["):
        try:
            table = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is not whole JSON ({first_line(error)}): fetch it again") from error
        if isinstance(table, dict) and isinstance(table.get("model"), dict):
            return {TOKENIZER_JSON: path}
        if isinstance(table, dict) and table and all(type(value) is int for value in table.values()):
            return _with_partner(path, VOCABULARY_NAMES, MERGES_NAMES)
        raise UserError(f"{where} is JSON, but neither a tokenizer.json nor GPT-2's vocabulary: {_WANTED}")
    if _is_merges(data):
        return _with_partner(path, MERGES_NAMES, VOCABULARY_NAMES)
    return {SENTENCEPIECE: path}


def _is_merges(data: bytes) -> bool:
    lines = data[:4096].split(b"\n")[:-1]
    return bool(lines) and all(line.startswith(b"#version") or len(line.split(b" ")) == 2 for line in lines)


def _with_partner(path: Path, own: tuple[str, ...], others: tuple[str, ...]) -> dict[str, Path]:
    """Both files of a pair such as gpt2_encoder.json and gpt2_vocab.bpe, by their common prefix."""
    for name in own:
        if path.name.endswith(name):
            prefix = path.name.removesuffix(name)
            for other in others:
                if (partner := path.with_name(prefix + other)).is_file():
                    return {own[0]: path, others[0]: partner}
            raise UserError(
                f"vocab_file {str(path)!r} is half of a byte-level BPE: "
                f"put {prefix}{others[0]} or {prefix}{others[1]} beside it"
            )
    raise UserError(
        f"vocab_file {str(path)!r} is half of a byte-level BPE and its name does not lead to the other: "
        f"call the two ...{VOCABULARY_NAMES[0]} and ...{MERGES_NAMES[0]}"
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"vocab_file {str(path)!r}: {error.strerror}, check the path") from error
