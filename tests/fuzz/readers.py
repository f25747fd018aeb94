"""Every reader of files from elsewhere: small valid files, and how it is called on a folder of them."""

import bz2
import dataclasses
import functools
import gzip
import hashlib
import io
import itertools
import json
import lzma
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from mutate import Files

TEXTS = ["The theme of them all.\n", "naïve café 中文 😀\n\n  x = 1\n", " ", "a b c d e f\n" * 20]
VOCAB = 270


@dataclasses.dataclass(frozen=True)
class Reader:
    """A row of the table.

    Attributes:
      seeds: makes valid inputs, each a folder's files by name.
      read: reads all of a folder; raises UserError where it refuses.
      mend: makes checksums agree again after damage, as someone who means harm would.
    """

    seeds: Callable[[], list[Files]]
    read: Callable[[Path], Any]
    mend: Callable[[Files], Files] | None = None

    def prepare(self) -> None:
        """Reads the seeds, so that what is imported and compiled once is not counted as a case's."""
        for files in self.seeds():
            with tempfile.TemporaryDirectory() as folder:
                for name, data in files.items():
                    path = Path(folder, name)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(data)
                self.read(Path(folder))


def _files(write: Callable[[Path], None]) -> Files:
    """What a function leaves in a folder."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        paths = [path for path in Path(folder).rglob("*") if path.is_file()]
        return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(paths)}


# Models.

_LLAMA = {"layers": 2, "dim": 8, "heads": 2, "kv": 1, "ffn": 12, "context": 16}


def _llama_tensors() -> dict[str, np.ndarray]:
    rng, dim, kv, ffn = np.random.default_rng(0), 8, 4, 12
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, dim)}
    for i in range(_LLAMA["layers"]):
        stem = f"model.layers.{i}"
        shapes |= {
            f"{stem}.input_layernorm.weight": (dim,),
            f"{stem}.self_attn.q_proj.weight": (dim, dim),
            f"{stem}.self_attn.k_proj.weight": (kv, dim),
            f"{stem}.self_attn.v_proj.weight": (kv, dim),
            f"{stem}.self_attn.o_proj.weight": (dim, dim),
            f"{stem}.post_attention_layernorm.weight": (dim,),
            f"{stem}.mlp.gate_proj.weight": (ffn, dim),
            f"{stem}.mlp.up_proj.weight": (ffn, dim),
            f"{stem}.mlp.down_proj.weight": (dim, ffn),
        }
    shapes["model.norm.weight"] = (dim,)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


_LLAMA_CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 12,
    "vocab_size": VOCAB,
    "tie_word_embeddings": True,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
}


def _model_folders() -> list[Files]:
    import safetensors.numpy

    from mlp_memory.artifacts import Directory
    from mlp_memory.interchange.model_folder import save_model

    tensors = _llama_tensors()
    names = sorted(tensors)
    halves = {f"model-{i:05d}-of-00002.safetensors": names[i - 1 :: 2] for i in (1, 2)}
    index = {"metadata": {}, "weight_map": {name: file for file, held in halves.items() for name in held}}
    extras = {
        "config.json": json.dumps(_LLAMA_CONFIG).encode(),
        "tokenizer_config.json": b'{"eos_token": "</s>", "chat_template": "{{ messages }}"}',
        "generation_config.json": b'{"eos_token_id": 2}',
    }
    shards = {f: safetensors.numpy.save({n: tensors[n] for n in held}) for f, held in halves.items()}
    rng = np.random.default_rng(1)
    memory = {
        "layers.0.input_layernorm.weight": (8,),
        "layers.0.mlp.gate_proj.weight": (12, 8),
        "layers.0.mlp.up_proj.weight": (12, 8),
        "layers.0.mlp.down_proj.weight": (8, 12),
        "norm.weight": (8,),
        "embedding_transform.weight": (8, 6),
        "lm_head.weight": (VOCAB, 8),
    }
    floats = {name: rng.normal(size=shape).astype(np.float32) for name, shape in memory.items()}
    own = _files(lambda path: save_model(Directory(path / "m"), _LLAMA_CONFIG, tensors, facts={"tap": "x"}))
    return [
        {**extras, "model.safetensors": safetensors.numpy.save(tensors)},
        {**extras, **shards, "model.safetensors.index.json": json.dumps(index).encode()},
        {"config.json": b'{"model_type": "llama"}', "model.safetensors": safetensors.numpy.save(floats)},
        {name.removeprefix("m/"): data for name, data in own.items()},
    ]


def _mend_model(files: Files) -> Files:
    try:
        facts = json.loads(files["mlp_memory.json"])
        facts["config_sha256"] = hashlib.sha256(files["config.json"]).hexdigest()[:16]
        return files | {"mlp_memory.json": json.dumps(facts).encode()}
    except (KeyError, ValueError, TypeError, RecursionError):
        return files


def _read_source(location: str) -> None:
    from mlp_memory.interchange.source import open_source

    source = open_source(location)
    _ = source.identity
    for name in source.layout.tensors:
        source.read(name)
    if source.files and source.kind == "decoder" and any(n.startswith("tokenizer.") for n in source.files):
        from mlp_memory.corpus.vocabulary import Vocabulary

        _use(Vocabulary(source.files, location))


def _gguf_names() -> dict[str, str]:
    parts = {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    found = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    for i, (theirs, ours) in itertools.product(range(2), parts.items()):
        found[f"model.layers.{i}.{theirs}.weight"] = f"blk.{i}.{ours}.weight"
    return found


def _pieces() -> list[str]:
    letters = [chr(c) for c in range(97, 97 + VOCAB - 259)]
    return ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *letters]


def _gguf(kind: str, quantised: bool) -> Files:
    import gguf

    def write(folder: Path) -> None:
        writer = gguf.GGUFWriter(folder / "m.gguf", "llama")
        writer.add_block_count(2)
        writer.add_embedding_length(8)
        writer.add_head_count(2)
        writer.add_head_count_kv(1)
        writer.add_feed_forward_length(12)
        writer.add_context_length(16)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_tokenizer_model(kind)
        pieces = _pieces()
        if kind == "gpt2":
            from mlp_memory.corpus.json_tokenizer import byte_names

            pieces = ["</s>", *byte_names(), *(f"a{c}" for c in "bcdefghijklmn")]
            writer.add_tokenizer_pre("llama-bpe")
            writer.add_token_merges([f"a {c}" for c in "bcdefghijklmn"])
        writer.add_token_list(pieces)
        writer.add_token_scores([-float(i) for i in range(VOCAB)])
        writer.add_token_types(
            [2, 3, 3, *[6] * 256, *[1] * (VOCAB - 259)] if kind == "llama" else [3, *[1] * (VOCAB - 1)]
        )
        writer.add_eos_token_id(2 if kind == "llama" else 0)
        names = _gguf_names()
        for name, value in _llama_tensors().items():
            half = quantised and value.ndim == 2
            writer.add_tensor(names[name], value.astype(np.float16) if half else value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    return _files(write)


def _gguf_seeds() -> list[Files]:
    return [_gguf("llama", False), _gguf("gpt2", True)]


def _llama2c_seeds() -> list[Files]:
    tensors, layers = _llama_tensors(), range(2)
    stems = (
        *("input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
        *("post_attention_layernorm", "mlp.gate_proj", "mlp.down_proj", "mlp.up_proj"),
    )
    parts = [tensors["model.embed_tokens.weight"]]
    parts += [tensors[f"model.layers.{i}.{stem}.weight"] for stem in stems for i in layers]
    parts += [tensors["model.norm.weight"], np.zeros((2, 16, 2), np.float32)]
    header = struct.pack("<7i", 8, 12, 2, 2, 1, VOCAB, 16)
    tokenizer = struct.pack("<i", 8)
    for i, piece in enumerate(_pieces()):
        tokenizer += struct.pack("<fi", -float(i), len(piece)) + piece.encode()
    return [{"m.bin": header + b"".join(p.tobytes() for p in parts), "tokenizer.bin": tokenizer}]


# Tokenizers.


def _use(vocabulary: Any) -> None:
    for text in (*TEXTS, "<s></s><unk>\u2581\ufffd" + "ab" * 500):
        ids = vocabulary.encode(text)
        vocabulary.decode([i for i in ids if 0 <= i < vocabulary.size])
    for token in {0, 1, vocabulary.bos, vocabulary.eos, vocabulary.size - 1}:
        if 0 <= token < vocabulary.size:
            vocabulary.piece(token)


def _read_vocabulary(folder: Path) -> None:
    from mlp_memory.corpus.vocabulary import Vocabulary

    _use(Vocabulary.from_path(str(folder)))


def _tokenizer_seeds() -> list[Files]:
    import tokenizers as t

    found = []
    byte_level = t.Tokenizer(t.models.BPE())
    byte_level.pre_tokenizer = t.pre_tokenizers.Sequence(
        [
            t.pre_tokenizers.Split(t.Regex(r"\p{N}{1,3}|\s+(?!\S)|\s+"), "isolated"),
            t.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    byte_level.decoder = t.decoders.ByteLevel()
    alphabet = sorted(t.pre_tokenizers.ByteLevel.alphabet())
    byte_level.train_from_iterator(
        TEXTS,
        t.trainers.BpeTrainer(
            vocab_size=280, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    found.append(byte_level)
    unigram = t.Tokenizer(
        t.models.Unigram([("<unk>", 0.0), ("</s>", 0.0), *((c, -2.0) for c in "abcdehmtx=▁")], 0, False)
    )
    unigram.normalizer = t.normalizers.Sequence(
        [t.normalizers.NFKC(), t.normalizers.Replace(t.Regex(" +"), "▁")]
    )
    unigram.pre_tokenizer = t.pre_tokenizers.Metaspace()
    unigram.decoder = t.decoders.Sequence([t.decoders.Replace("▁", " "), t.decoders.Fuse()])
    found.append(unigram)
    words = t.Tokenizer(
        t.models.WordPiece({"[UNK]": 0, "</s>": 1, "the": 2, "##m": 3, "a": 4}, unk_token="[UNK]")
    )
    words.normalizer = t.normalizers.BertNormalizer()
    words.pre_tokenizer = t.pre_tokenizers.BertPreTokenizer()
    words.decoder = t.decoders.WordPiece()
    words.add_special_tokens(["</s>"])
    found.append(words)
    extras = {
        "tokenizer_config.json": b'{"eos_token": {"content": "</s>"}, "chat_template": "{{ 7 * 7 }}"}',
        "special_tokens_map.json": b'{"eos_token": "</s>"}',
        "added_tokens.json": b'{"<extra>": 300}',
    }
    return [{"tokenizer.json": json.dumps(json.loads(each.to_str())).encode(), **extras} for each in found]


def _gpt2_seeds() -> list[Files]:
    from mlp_memory.corpus.json_tokenizer import byte_names

    tokens = [*byte_names(), "th", "the", "<|endoftext|>"]
    return [
        {
            "encoder.json": json.dumps({token: i for i, token in enumerate(tokens)}).encode(),
            "vocab.bpe": b"#version: 0.2\nt h\nth e\n",
            "tokenizer_config.json": b'{"eos_token": "<|endoftext|>"}',
        }
    ]


def _sentencepiece_seeds() -> list[Files]:
    import sentencepiece

    from mlp_memory.corpus import sentencepiece_pieces as pieces

    def train(**options: Any) -> Files:
        out = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS * 30),
            model_writer=out,
            hard_vocab_limit=False,
            minloglevel=2,
            **options,
        )
        return {"tokenizer.model": out.getvalue()}

    kinds = [2, 3, 3, *[6] * 256, *[1] * (VOCAB - 259)]
    made = pieces.from_pieces(_pieces(), [-float(i) for i in range(VOCAB)], kinds, 0, 1, 2, True, "m")
    return [
        train(vocab_size=60),
        train(vocab_size=300, model_type="bpe", byte_fallback=True, user_defined_symbols=["\n", "<x>"]),
        {"tokenizer.model": made, "added_tokens.json": b'{"<extra>": 300}'},
    ]


# Documents.


def _packed(name: str, data: bytes) -> list[Files]:
    return [
        {name: data},
        {f"{name}.gz": gzip.compress(data)},
        {f"{name}.bz2": bz2.compress(data)},
        {f"{name}.xz": lzma.compress(data)},
    ]


def _documents(kind: str, name: str, data: bytes) -> Reader:
    def read(folder: Path) -> None:
        from mlp_memory.corpus.config import CorpusConfig
        from mlp_memory.corpus.documents import input_files, read_group

        for path in sorted(folder.iterdir()):
            config = CorpusConfig(source=kind, train_files=[str(path)], **_SMALL_DOCUMENTS)
            for source in config.sources.values():
                for _ in read_group(source, input_files(config), "train"):
                    pass

    return Reader(lambda: _packed(name, data), read)


_SMALL_DOCUMENTS = {"max_document_mb": 8}
_JSON_LINES = b"".join(json.dumps({"id": i, "text": text}).encode() + b"\n" for i, text in enumerate(TEXTS))
_WIKITEXT = (
    b" \n = Title = \n \n Some text <unk> . \n \n = = Section = = \n \n More . \n"
    b" \n = Other = \n \n Text . \n"
)


def _tables() -> list[Any]:
    import pyarrow as pa

    texts = pa.array(TEXTS * 5)
    return [
        pa.table({"id": list(range(len(texts))), "text": texts}),
        pa.table({"text": texts.dictionary_encode()}),
        pa.table({"text": texts.cast(pa.large_string()), "l": pa.array([[1, 2], [], None, [3]] * 5)}),
    ]


def _parquet_seeds() -> list[Files]:
    import pyarrow.parquet as pq

    found = []
    for n, table in enumerate(_tables()):
        out = io.BytesIO()
        pq.write_table(table, out, compression=("none", "snappy", "zstd")[n], write_page_checksum=n == 0)
        found.append({"a.parquet": out.getvalue()})
    return found


def _read_parquet(folder: Path) -> None:
    from mlp_memory.corpus.config import CorpusConfig
    from mlp_memory.corpus.documents import read_file

    for path in folder.glob("*.parquet"):
        for _ in read_file(CorpusConfig(source="parquet", train_files=[str(path)]).sources[""], path):
            pass


def _arrow_seeds() -> list[Files]:
    import pyarrow as pa

    found = []
    for table in _tables():
        out = io.BytesIO()
        with pa.ipc.new_stream(out, table.schema) as stream:
            stream.write_table(table, max_chunksize=8)
        state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_indices_files": None}
        found.append({"state.json": json.dumps(state).encode(), "data-00000-of-00001.arrow": out.getvalue()})
    both = {f"train/{name}": data for name, data in found[0].items()}
    both |= {f"test/{name}": data for name, data in found[1].items()}
    return [*found, {**both, "dataset_dict.json": b'{"splits": ["train", "test"]}'}]


def _read_arrow(folder: Path) -> None:
    from mlp_memory.corpus.config import CorpusConfig
    from mlp_memory.corpus.documents import input_files, read_group

    config = CorpusConfig(source="hf_dataset", train_files=[str(folder)])
    files = input_files(config)
    for group in ("train", "test"):
        for _ in read_group(config.sources[""], files, group):
            pass


# What benchmarks read.


def _rows_seeds() -> list[Files]:
    rows = [
        {
            "question": "Is it?",
            "answer": ["yes", "no"],
            "label": 1,
            "text": "a b",
            "knowledge": "x",
            "facts": ["y"],
        },
        {
            "question": "What?",
            "answer": "that",
            "mc1_targets": {"choices": ["a", "b"], "labels": [1, 0]},
            "label": "0",
        },
        {
            "user_query": "q",
            "chatgpt_response": "r",
            "hallucination": "no",
            "right_answer": "a",
            "hallucinated_answer": "b",
        },
    ]
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    table = b'question,answer,label\n"a, b","c\nd",1\nx,y,0\n'
    return [
        {"a.json": json.dumps(rows).encode()},
        {"a.json": json.dumps({"Data": rows}).encode()},
        *_packed("a.jsonl", lines),
        {"a.csv": table},
        {"a.tsv": b"question\tanswer\tlabel\nx\ty\t1\n"},
        {"a.csv.gz": gzip.compress(table)},
    ]


def _read_rows(folder: Path) -> None:
    from mlp_memory.evaluation.harness.examples import made
    from mlp_memory.evaluation.harness.rows import read
    from mlp_memory.evaluation.harness.tasks import TASKS

    for path in sorted(folder.iterdir()):
        rows = read(path)
        for task in TASKS.values():
            made(task, rows)


# Our own artifacts.


def _stream_seeds() -> list[Files]:
    from mlp_memory.arrays import ChunkWriter
    from mlp_memory.artifacts import ArraySpec, Directory, begin
    from mlp_memory.corpus.stream import BOUNDS_NAME, KIND

    def write(blocks: int, finish: bool) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            directory = Directory(folder / "a")
            manifest = begin(
                directory, KIND, {"seed": 1}, {}, {"tokens": ArraySpec((90,), "uint16", 32, blocks)}
            )
            bounds = np.array([0, 10, 11, 90], "<i8").tobytes()
            directory.write(BOUNDS_NAME, bounds)
            writer = ChunkWriter(directory, manifest)
            for chunk in range(len(writer)):
                start, stop = writer.rows(chunk)
                writer.write(chunk, tokens=np.arange(start, stop, dtype=np.uint16))
            if finish:
                writer.finish(
                    vocab_size=99, words=1, bytes=1, bounds_sha256=hashlib.sha256(bounds).hexdigest()
                )

        return make

    return [_files(write(0, True)), _files(write(8, True)), _files(write(0, False))]


def _read_stream(folder: Path) -> None:
    from mlp_memory.arrays import ChunkWriter
    from mlp_memory.artifacts import ArraySpec, Directory, begin, peek
    from mlp_memory.corpus.stream import KIND, TokenStream

    directory = Directory(folder / "a")
    found = peek(directory)
    if found is not None and not found.finished:
        specs = {"tokens": ArraySpec((90,), "uint16", 32)}
        writer = ChunkWriter(directory, begin(directory, KIND, {"seed": 1}, {}, specs))
        for chunk in writer.missing():
            start, stop = writer.rows(chunk)
            writer.write(chunk, tokens=np.arange(start, stop, dtype=np.uint16))
        writer.finish(vocab_size=99, words=1, bytes=1)
        return
    stream = TokenStream.open(directory)
    stream.labels(0, min(len(stream), 1000))


def _mend_stream(files: Files) -> Files:
    try:
        manifest = json.loads(files["a/manifest.json"])
        manifest["facts"]["bounds_sha256"] = hashlib.sha256(files["a/bounds.i64"]).hexdigest()
        return files | {"a/manifest.json": json.dumps(manifest).encode()}
    except (KeyError, ValueError, TypeError, RecursionError):
        return files


def _codec_seeds() -> list[Files]:
    from mlp_memory.datastore.codec import Codec

    rng = np.random.default_rng(2)
    codec = Codec(
        "int8", rng.normal(size=6).astype("f4"), rng.normal(size=(6, 3)).astype("f4"), np.ones(3, "f4")
    )
    return [{"codec.npz": codec.to_bytes()}]


def _read_codec(folder: Path) -> None:
    from mlp_memory.artifacts import Directory, Manifest, digest
    from mlp_memory.datastore.codec import open_codec

    path = folder / "codec.npz"
    data = path.read_bytes() if path.exists() else b""
    manifest = Manifest("datastore", {"embed": {"key_dtype": "int8"}}, {}, facts={"codec": digest(data)})
    codec = open_codec(Directory(folder), manifest)
    codec.decode(codec.encode(np.ones((2, 6), np.float32)))


def _kept_seeds() -> list[Files]:
    from mlp_memory.evaluation.harness import kept
    from mlp_memory.inference.continuations import Partner, Scored

    partner = {f.name: np.ones(3, np.float32) for f in dataclasses.fields(Partner)}
    scored = Scored(np.array([3]), np.zeros(3, np.float32), np.ones(3, bool), {"memory": Partner(**partner)})
    return [{"a.npz": kept._to_bytes(scored)}]


def _read_kept(folder: Path) -> None:
    from mlp_memory.artifacts import Directory
    from mlp_memory.evaluation.harness.kept import Kept

    store = Kept(Directory(folder), 4, {})
    pair, key = ("a", "b"), None
    path = folder / "a.npz"
    if path.exists():
        from mlp_memory.artifacts import digest

        key = f"s-0000-{digest(store._asked([pair]))}"
        path.rename(folder / key)
        from mlp_memory.inference.continuations import Scored

        empty = Scored(np.array([1]), np.zeros(1, np.float32), np.ones(1, bool), {})
        store.scored("s", "scores", [pair], lambda pairs: empty)


def _units_seeds() -> list[Files]:
    from mlp_memory.artifacts import Directory
    from mlp_memory.targets.candidates import CandidateLists

    def candidates(folder: Path) -> None:
        store = CandidateLists(Directory(folder / "candidates"), 100)
        store.write(0, 0, np.arange(6).reshape(2, 3), np.ones((2, 3), np.float32))

    out = io.BytesIO()
    fields = {"number": 0, "key": "k", "num_bytes": 5, "lossy": 0}
    np.savez(out, tokens_T=np.arange(5), lengths_D=np.array([5]), **fields)
    return [{**_files(candidates), "units/00000000.npz": out.getvalue()}]


def _read_units(folder: Path) -> None:
    from mlp_memory.artifacts import Directory
    from mlp_memory.corpus import units
    from mlp_memory.targets.candidates import CandidateLists

    store = CandidateLists(Directory(folder / "candidates"), 100)
    for shard in store.shards(0):
        store.read(0, shard)
    units._finished(Directory(folder / "units"))


def _mend_units(files: Files) -> Files:
    name = "candidates/00000000/shard-00000"
    head, _, data = files.get(name, b"").partition(b"\n")
    try:
        facts = json.loads(head)
        facts["sha256"] = hashlib.sha256(data).hexdigest()
        return files | {name: json.dumps(facts).encode() + b"\n" + data}
    except (ValueError, TypeError, RecursionError):
        return files


def _report_seeds() -> list[Files]:
    from mlp_memory.evaluation.sections import Claim, Findings, Plot, Section, Series, Table

    series = Series("s", (1.0, 2.0, 3.0), (1.0, 0.5, 2.0), (0.5, 0.2, 1.0), (2.0, 1.0, 3.0))
    section = Section(
        "t", ("p",), (Table("x", ("a", "b"), (("1", "2"),)),), (Plot("p", "x", "y", (series,), True, True),)
    )
    findings = Findings((Claim("c", "p", "o", "i", "yes", "s", "cmd"),), (section,))
    data = json.dumps(findings.to_json()).encode()
    results = {
        "schema": 1,
        "test": {"perplexity": {"base": {"value": 3.0}}, "documents": 2},
    }
    metrics = b'{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5, "validation_loss": 1.0}\n'
    return [
        {
            "benchmarks/findings.json": data,
            "studies/k/findings.json": data,
            "times.jsonl": b'{"stage": "a", "seconds": 1.5}\n',
        },
        {
            "reports/results.json": json.dumps(results).encode(),
            "decoder/metrics.jsonl": metrics,
            "benchmarks/findings.json": data,
        },
    ]


def _read_report(folder: Path) -> None:
    from mlp_memory.artifacts import Directory
    from mlp_memory.evaluation.page import draw, read_results
    from mlp_memory.workdir import seconds_by_stage

    workdir = Directory(folder)
    seconds_by_stage(workdir)
    results = read_results(workdir) if (folder / "reports/results.json").exists() else None
    draw(workdir, results)


def _config_seeds() -> list[Files]:
    from mlp_memory.recipes import load_config, resolved_gin

    recipe = Path(__file__).parents[2] / "gin_configs/recipes/demo.gin"
    load_config([str(recipe)], [], None)
    mixture = 'corpus.source = "mixture"\ncorpus.parts = {"a": @a/part()}\na/part.source = "python_docs"\n'
    demo = resolved_gin().encode()
    load_config([], [*mixture.splitlines()], None)
    return [{"config.gin": demo}, {"config.gin": resolved_gin().encode()}]


def _read_config(folder: Path) -> None:
    from mlp_memory.artifacts import Directory
    from mlp_memory.recipes import load_config

    load_config([], [], Directory(folder))


def _workdir_seeds() -> list[Files]:
    """Manifests that name each other."""
    from mlp_memory.artifacts import Directory, begin, finish

    def make(folder: Path) -> None:
        made: dict[str, str] = {}
        for name, kind, facts in (
            ("decoder", "decoder", {"model": {"layers": 1}}),
            ("datastore", "datastore", {"dim": 8}),
            ("memory", "memory", {"model": {"layers": 1}}),
        ):
            directory = Directory(folder / name)
            made[name] = finish(directory, begin(directory, kind, {}, dict(made)), **facts).fingerprint

    return [_files(make)]


def _read_workdir(folder: Path) -> None:
    from mlp_memory.artifacts import Directory
    from mlp_memory.job import Job
    from mlp_memory.recipes import load_config
    from mlp_memory.workdir import status_table

    workdir = Directory(folder)
    job = Job(workdir, load_config([], [], workdir))
    for name in ("decoder", "datastore", "memory"):
        job.manifest(name)
    status_table(job)


@functools.cache
def _checkpoint_seeds() -> list[Files]:
    from flax import nnx

    from mlp_memory.artifacts import Directory, begin
    from mlp_memory.memory.config import MemoryConfig
    from mlp_memory.memory.mlp import Memory
    from mlp_memory.training import checkpoints

    def make(folder: Path) -> None:
        model = Memory(MemoryConfig(*_MEMORY), nnx.Rngs(0))
        directory = Directory(folder / "memory")
        checkpoints.publish(directory, begin(directory, "memory", {}, {}), nnx.to_pure_dict(nnx.state(model)))

    return [_files(make)]


_MEMORY = ("gpt2", 2, 8, 12, 0.0, 1e-5, 8, 40)


def _read_checkpoint(folder: Path) -> None:
    import jax
    from flax import nnx

    from mlp_memory.artifacts import Directory, require
    from mlp_memory.memory.config import MemoryConfig
    from mlp_memory.memory.mlp import Memory
    from mlp_memory.parallel.config import MeshConfig
    from mlp_memory.parallel.mesh import make_mesh
    from mlp_memory.training import checkpoints

    directory = Directory(folder / "memory")
    abstract = nnx.eval_shape(lambda: Memory(MemoryConfig(*_MEMORY), nnx.Rngs(0)))
    checkpoints.restore(
        directory, require(directory, "distill"), abstract, make_mesh(MeshConfig(), jax.devices()[:1])
    )


class _Alone:
    """A stream of one document."""

    def __len__(self) -> int:
        return 300

    def has_next(self, start: int, stop: int) -> np.ndarray:
        return np.arange(start, stop) < 299

    def document_ids(self, start: int, stop: int) -> np.ndarray:
        return np.zeros(stop - start, np.int64)


@functools.cache
def _index_seeds() -> list[Files]:
    from mlp_memory.artifacts import Directory
    from mlp_memory.index.config import IndexConfig
    from mlp_memory.index.stage import build_index

    keys = np.random.default_rng(3).normal(size=(300, 8)).astype(np.float32)

    def make(folder: Path) -> None:
        build_index(Directory(folder / "index"), keys, "datastore-1", _Alone(), IndexConfig(leaves=4), 5)

    return [_files(make)]


def _read_index(folder: Path) -> None:
    from mlp_memory.artifacts import Directory
    from mlp_memory.index.search import open_index

    valid = np.arange(300) < 299
    index = open_index(Directory(folder / "index"), np.zeros((300, 8), np.float32), valid)
    index.search(np.ones((3, 8), np.float32), 5)


READERS: dict[str, Reader] = {
    "safetensors": Reader(
        functools.cache(_model_folders), lambda folder: _read_source(str(folder)), _mend_model
    ),
    "gguf": Reader(functools.cache(_gguf_seeds), lambda folder: _read_source(str(folder / "m.gguf"))),
    "llama2c": Reader(functools.cache(_llama2c_seeds), lambda folder: _read_source(str(folder / "m.bin"))),
    "tokenizer_json": Reader(functools.cache(_tokenizer_seeds), _read_vocabulary),
    "gpt2_bpe": Reader(functools.cache(_gpt2_seeds), _read_vocabulary),
    "sentencepiece": Reader(functools.cache(_sentencepiece_seeds), _read_vocabulary),
    "jsonl": _documents("jsonl", "a.jsonl", _JSON_LINES),
    "text": _documents("text", "a.txt", "".join(TEXTS).encode()),
    "wikitext": _documents("wikitext", "a.tokens", _WIKITEXT),
    "parquet": Reader(functools.cache(_parquet_seeds), _read_parquet),
    "arrow": Reader(functools.cache(_arrow_seeds), _read_arrow),
    "benchmark_rows": Reader(functools.cache(_rows_seeds), _read_rows),
    "token_stream": Reader(functools.cache(_stream_seeds), _read_stream, _mend_stream),
    "codec": Reader(functools.cache(_codec_seeds), _read_codec),
    "kept_scores": Reader(functools.cache(_kept_seeds), _read_kept),
    "units": Reader(functools.cache(_units_seeds), _read_units, _mend_units),
    "report": Reader(functools.cache(_report_seeds), _read_report),
    "config_gin": Reader(functools.cache(_config_seeds), _read_config),
    "workdir": Reader(functools.cache(_workdir_seeds), _read_workdir),
    "checkpoint": Reader(_checkpoint_seeds, _read_checkpoint),
    "index": Reader(_index_seeds, _read_index),
}
