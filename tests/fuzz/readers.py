"""What is fuzzed: each reader of foreign or stored files, valid seeds for it, and how it is called.

Run as a program it is the child process: `python readers.py NAME` answers each path on standard input
with "ok", "refused: ..." (a `UserError`) or "FAILED: ..." (anything else).
"""

import dataclasses
import gzip
import io
import json
import lzma
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests/interchange")]

from mlp_memory.artifacts import Directory, UserError, first_line  # noqa: E402

TEXT = "The river runs through the old town.\n\n= Heading =\n\nIt is long; ünïcode and 数字 are in it."


@dataclasses.dataclass(frozen=True)
class Reader:
    """One way in.

    Attributes:
      seeds: writes valid inputs into a folder, each a file or a folder of files.
      read: reads one; raises `UserError` for what cannot be read.
    """

    seeds: Callable[[Path], None]
    read: Callable[[Path], Any]


def _models(folder: Path) -> None:
    """Tiny models as Hugging Face folders, GGUF and llama2.c files."""
    import test_source
    from flax import nnx

    from mlp_memory.decoder.transformer import Decoder

    for name in ("llama", "gpt2"):
        config = dataclasses.replace(test_source.SHAPES[name], layers=1)
        tensors = test_source.exported(Decoder(config, nnx.Rngs(0)), folder / name)
        test_source.write_gguf(folder / f"{name}.gguf", config, tensors, quantised=name == "llama")
        if name == "llama":
            test_source.write_llama2c(folder / "llama.bin", config, tensors)


def _some(folder: Path, keep: Callable[[Path], bool]) -> None:
    _models(folder)
    for path in list(folder.iterdir()):
        if not keep(path):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _read_model(path: Path) -> None:
    from mlp_memory.interchange.source import open_source

    source = open_source(str(path))
    for name in source.layout.tensors:
        source.read(name)


def _tokenizers(folder: Path) -> None:
    import sentencepiece
    import tokenizers

    texts = [TEXT] * 20
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(texts, trainer)
    (folder / "json").mkdir()
    bpe.save(str(folder / "json/tokenizer.json"))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=300,
        hard_vocab_limit=False,
        byte_fallback=True,
        minloglevel=2,
    )
    (folder / "pieces").mkdir()
    (folder / "pieces/tokenizer.model").write_bytes(model.getvalue())
    saved = json.loads((folder / "json/tokenizer.json").read_text())["model"]
    (folder / "pair").mkdir()
    (folder / "pair/vocab.json").write_text(json.dumps(saved["vocab"] | {"<|endoftext|>": 300}))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in saved["merges"]]
    (folder / "pair/merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))


def _read_tokenizer(path: Path) -> None:
    from mlp_memory.corpus.vocabulary import Vocabulary

    vocabulary = Vocabulary.from_path(str(path))
    vocabulary.decode(vocabulary.encode(TEXT))
    vocabulary.piece(vocabulary.size - 1)


def _texts(folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"text": TEXT, "id": i, "more": [1, {"a": None}]} for i in range(5)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0))
    (folder / "a.jsonl.xz").write_bytes(lzma.compress(lines))
    (folder / "a.txt").write_text(TEXT)
    (folder / "a.tokens").write_text(f" = Title = \n \n {TEXT} \n" * 3)
    table = pyarrow.table({"text": [TEXT] * 5, "n": list(range(5))})
    pyarrow.parquet.write_table(table, folder / "a.parquet")
    file = pyarrow.OSFile(str(folder / "a.arrow"), "wb")
    with file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


def _read_texts(path: Path) -> None:
    from mlp_memory.corpus.config import PartConfig
    from mlp_memory.corpus.documents import read_file

    kinds = {
        "jsonl": "jsonl",
        "txt": "text",
        "tokens": "wikitext",
        "parquet": "parquet",
        "arrow": "hf_dataset",
    }
    kind = next(kind for ending, kind in kinds.items() if f".{ending}" in path.name)
    for _ in read_file(PartConfig(source=kind, train_files=(str(path),)), path):
        pass


def _stream(folder: Path) -> None:
    """A finished token stream."""
    import hashlib

    from mlp_memory.arrays import ChunkWriter
    from mlp_memory.artifacts import ArraySpec, begin

    directory = Directory(folder / "stream")
    rng, bounds = np.random.default_rng(0), np.array([0, 30, 90, 100], "<i8").tobytes()
    manifest = begin(directory, "corpus", {}, {}, {"tokens": ArraySpec((100,), "uint16", 40)})
    directory.write("bounds.i64", bounds)
    writer = ChunkWriter(directory, manifest)
    tokens = rng.integers(0, 50, 100)
    for chunk in range(len(writer)):
        start, stop = writer.rows(chunk)
        writer.write(chunk, tokens=tokens[start:stop])
    writer.finish(vocab_size=50, words=9, bytes=9, bounds_sha256=hashlib.sha256(bounds).hexdigest())


def _read_stream(path: Path) -> None:
    from mlp_memory.corpus.stream import TokenStream
    from mlp_memory.verify.check import check_folder

    check_folder(Directory(path.parent), path.name)
    stream = TokenStream.open(Directory(path))
    stream.labels(0, len(stream))


def _stored(folder: Path) -> None:
    """Small stored files: a codec, a choice of blocks, candidate lists."""
    from mlp_memory.datastore.codec import Codec
    from mlp_memory.targets.candidates import CandidateLists
    from mlp_memory.updating.choice import NAME, Choice, keep

    rng = np.random.default_rng(0)
    codec = Codec("int8", rng.random(6).astype("f4"), rng.random((6, 3)).astype("f4"), np.ones(3, "f4"))
    (folder / "codec.npz").write_bytes(codec.to_bytes())
    keep(Directory(folder), Choice(*(np.arange(3) for _ in range(4))))
    (folder / NAME).rename(folder / "choice.npz")
    lists = CandidateLists(Directory(folder / "lists"), 1000)
    lists.write(0, 0, rng.integers(0, 1000, (4, 5)), rng.random((4, 5)).astype("f4"))


def _read_stored(path: Path) -> None:
    from mlp_memory.datastore.codec import Codec
    from mlp_memory.targets.candidates import CandidateLists
    from mlp_memory.updating import choice

    if path.is_dir():
        CandidateLists(Directory(path), 1000).read(0, 0)
    elif path.name.startswith("codec"):
        Codec.from_bytes("int8", path.read_bytes(), path.name)
    else:
        directory = Directory(path.parent / "there")
        directory.write(choice.NAME, path.read_bytes())
        choice.read(directory)


def _records(folder: Path) -> None:
    """JSON that commands read: findings, results, an update's record, a seal."""
    from mlp_memory.artifacts import Seal

    findings = {"title": "t", "order": 1, "claims": [], "sections": []}
    for name, value in {
        "benchmarks/findings.json": findings,
        "reports/results.json": {"test": {"perplexity": {"base": 3.0}}},
        "update.json": {"base": "x", "add": {}, "delete": [1], "delete_files": {}, "text_field": "text"},
    }.items():
        path = folder / "workdir" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))
    (folder / "workdir/checksums.json").write_text(Seal({"a": "b"}, "c").to_json())


def _read_records(path: Path) -> None:
    from mlp_memory.evaluation.page import read_findings, read_results
    from mlp_memory.updating.request import read_record
    from mlp_memory.verify.check import check_folder

    workdir = Directory(path)
    for read in (read_findings, read_results, read_record, lambda workdir: check_folder(workdir, "")):
        try:
            read(workdir)
        except UserError:
            continue


READERS: dict[str, Reader] = {
    "safetensors": Reader(lambda folder: _some(folder, Path.is_dir), _read_model),
    "gguf": Reader(lambda folder: _some(folder, lambda path: path.suffix == ".gguf"), _read_model),
    "llama2c": Reader(lambda folder: _some(folder, lambda path: path.suffix == ".bin"), _read_model),
    "tokenizers": Reader(_tokenizers, _read_tokenizer),
    "texts": Reader(_texts, _read_texts),
    "stream": Reader(_stream, _read_stream),
    "stored": Reader(_stored, _read_stored),
    "records": Reader(_records, _read_records),
}


def main() -> None:
    """Reads what it is told to, one path a line, until there are no more."""
    read = READERS[sys.argv[1]].read
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries that print must not spoil the answers
    for line in sys.stdin:
        try:
            read(Path(line.rstrip("\n")))
            said = "ok"
        except UserError as error:
            whole = str(error)
            said = f"refused: {first_line(error)}" if "\n" not in whole else f"FAILED: two lines: {whole!r}"
        except BaseException:
            said = "FAILED: " + " | ".join(traceback.format_exc().strip().splitlines()[-6:])
        print(said.replace("\n", " "), file=answers, flush=True)


if __name__ == "__main__":
    main()
