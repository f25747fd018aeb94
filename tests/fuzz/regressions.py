"""What was found once, as code: files that a reader died of, hung on or told of in more than a line."""

import gzip
import io
import json
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
from mutate import DEEP, Files, npy
from readers import READERS

_LONG_NUMBER = b"9" * 5000
Make = Callable[[], Files]


def _seed(reader: str, number: int, **files: bytes | Callable[[bytes], bytes]) -> Make:
    """A seed with some files replaced; `__` in a name stands for a slash and `_dot_` for a dot."""

    def make() -> Files:
        made = dict(READERS[reader].seeds()[number])
        for key, value in files.items():
            name = key.replace("__", "/").replace("_dot_", ".")
            made[name] = value(made[name]) if callable(value) else value
        return made

    return make


def _changed(change: Callable[[Any], Any]) -> Callable[[bytes], bytes]:
    """A change to parsed JSON as one to its bytes."""

    def of_bytes(data: bytes) -> bytes:
        table = json.loads(data)
        return json.dumps(table if (found := change(table)) is None else found).encode()

    return of_bytes


def _gguf(tensors: int, entries: int, rest: bytes = b"") -> Make:
    return lambda: {"m.gguf": b"GGUF" + struct.pack("<IQQ", 3, tensors, entries) + rest + bytes(64)}


def _text(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _index(change: Callable[[Any], Any]) -> Make:
    return _seed("index", 0, index__manifest_dot_json=_changed(change))


def _codec(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, explained=1.0, clipped=0.0, **{name: a.astype(np.float32) for name, a in arrays.items()})
    return file.getvalue()


def _npz(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return out.getvalue()


def _replacements(table: dict[str, Any]) -> None:
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "aaaaaaaaaa"}
    table["normalizer"] = {"type": "Sequence", "normalizers": [step] * 12}


def _split(pattern: str) -> Callable[[dict[str, Any]], None]:
    def change(table: dict[str, Any]) -> None:
        step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        table["pre_tokenizer"] = step

    return change


def _without_unknown(table: dict[str, Any]) -> None:
    table["model"]["unk_token"] = "[nowhere]"


def _wide_offsets(data: bytes) -> bytes:
    """An Arrow stream whose first text ends far outside the file."""
    first = len("The theme of them all.\n")
    return data.replace(struct.pack("<ii", 0, first), struct.pack("<ii", 0, 2**31 - 1), 1)


_BOMB = gzip.compress(bytes(64_000_000), 1)
_HUGE = npy("<f4", (2**60,))
_OBJECTS = npy("|O", (1,), b"\x80\x04K\x01.")

REGRESSIONS: dict[str, dict[str, Make]] = {
    "gguf": {
        "2^60 tensors": _gguf(2**60, 0),
        "2^60 entries": _gguf(0, 2**60),
        "an array of 2^60 bytes": _gguf(0, 1, _text(b"k") + struct.pack("<IIQ", 9, 0, 2**60)),
        "a text of 2^60 bytes": _gguf(0, 1, _text(b"k") + struct.pack("<IQ", 8, 2**60)),
        "a tensor of 2^60 floats": _gguf(1, 0, _text(b"t") + struct.pack("<IQIQ", 1, 2**60, 0, 0)),
    },
    "tokenizer_json": {
        "no unknown token": _seed("tokenizer_json", 2, tokenizer_dot_json=_changed(_without_unknown)),
        "half of a surrogate pair": _seed(
            "tokenizer_json", 0, tokenizer_config_dot_json=b'{"eos_token": "\\ud800"}'
        ),
        "replacements that multiply": _seed("tokenizer_json", 1, tokenizer_dot_json=_changed(_replacements)),
        "a pattern that panics": _seed("tokenizer_json", 0, tokenizer_dot_json=_changed(_split("(a|aa)+$c"))),
        "ids of 31 bits": _seed("tokenizer_json", 0, added_tokens_dot_json=b'{"<x>": 2147483647}'),
        "deep": lambda: {"tokenizer.json": b'{"model": ' + b"[" * DEEP},
    },
    "sentencepiece": {
        "a piece that is no UTF-8": _seed(
            "sentencepiece", 2, tokenizer_dot_model=lambda data: data.replace(b"<unk>", b"<\xff\xffk>")
        )
    },
    "jsonl": {
        "a line without end, packed": lambda: {"a.jsonl.gz": _BOMB},
        "a long number": lambda: {"a.jsonl": b'{"text": ' + _LONG_NUMBER + b"}\n"},
        "deep": lambda: {"a.jsonl": b'{"text": ' + b"[" * DEEP + b"\n"},
        "a field that is no plain text": lambda: {"a.jsonl": b'{"\\ud800\\n\\u001b[31m": 1}\n'},
    },
    "text": {"a file without end, packed": lambda: {"a.txt.gz": _BOMB}},
    "wikitext": {
        "an article without end": lambda: {"a.tokens.gz": gzip.compress((b"a b " * 1000 + b"\n") * 3000, 1)}
    },
    "arrow": {
        "a text that ends outside": _seed("arrow", 0, **{"data-00000-of-00001_dot_arrow": _wide_offsets}),
        "a file elsewhere": _seed(
            "arrow", 0, state_dot_json=b'{"_data_files": [{"filename": "../../outside.arrow"}]}'
        ),
        "deep": _seed("arrow", 0, state_dot_json=b"[" * DEEP),
        "splits that are no list": _seed("arrow", 3, dataset_dict_dot_json=b'{"splits": 7}'),
    },
    "benchmark_rows": {
        "a long number": lambda: {"a.json": b"[{" + b'"label": ' + _LONG_NUMBER + b"}]"},
        "a long number in a line": lambda: {"a.jsonl": b'{}\n{"label": ' + _LONG_NUMBER + b"}\n"},
        "labels that are lists": lambda: {
            "a.json": b'[{"question": "q", "mc1_targets": {"a": [1]}, "mc2_targets": {"a": 1}}]'
        },
    },
    "token_stream": {
        "another zarr.json": _seed("token_stream", 0, a__tokens__zarr_dot_json=b'{"data_type": 7}'),
        "deep array metadata": _seed("token_stream", 2, a__tokens__zarr_dot_json=b"[" * DEEP + b"]" * DEEP),
        "a mark that is none": _seed("token_stream", 2, a__chunks__00000000_dot_json=b"\xe0{"),
        "bounds of seven bytes": _seed("token_stream", 0, a__bounds_dot_i64=bytes(7)),
        "no tokens": _seed("token_stream", 0, a__manifest_dot_json=_changed(lambda m: m | {"arrays": {}})),
        "2^60 rows": _seed(
            "token_stream",
            0,
            a__manifest_dot_json=_changed(lambda m: m["arrays"]["tokens"].update(shape=[2**60])),
        ),
        "an array elsewhere": _seed(
            "token_stream",
            0,
            a__manifest_dot_json=_changed(lambda m: m["arrays"].update({"../x": m["arrays"]["tokens"]})),
        ),
        "an array of a long name": _seed(
            "token_stream",
            0,
            a__manifest_dot_json=_changed(lambda m: m["arrays"].update({"x" * 3000: m["arrays"]["tokens"]})),
        ),
        "chunks of no rows": _seed(
            "token_stream",
            0,
            a__manifest_dot_json=_changed(lambda m: m["arrays"]["tokens"].update(chunk_rows=0)),
        ),
        "facts that are not there": _seed(
            "token_stream", 0, a__manifest_dot_json=_changed(lambda m: m["facts"].pop("words") and None)
        ),
        "a deep manifest": _seed("token_stream", 0, a__manifest_dot_json=b"[" * DEEP),
        "a long number": _seed("token_stream", 0, a__manifest_dot_json=b'{"schema": ' + _LONG_NUMBER + b"}"),
    },
    "codec": {
        "2^60 floats": lambda: {"codec.npz": _npz({"mean_D.npy": _HUGE})},
        "objects": lambda: {"codec.npz": _npz({"mean_D.npy": _OBJECTS})},
        "packed": lambda: {"codec.npz": _npz({"mean_D.npy": bytes(1 << 28)}, zipfile.ZIP_DEFLATED)},
        "a header that is no Python": lambda: {"codec.npz": _npz({"a.npy": b"\x93NUMPY\x01\0\x06\0{'a':("})},
        "components without a mean": lambda: {"codec.npz": _codec(components_DxE=np.eye(3))},
        "components in a row": lambda: {"codec.npz": _codec(mean_D=np.zeros(3), components_DxE=np.zeros(3))},
    },
    "checkpoint": {
        "a checksum for all": _seed(
            "checkpoint", 0, memory__manifest_dot_json=_changed(lambda m: m["facts"].update(checksums=3))
        )
    },
    "kept_scores": {"damaged": lambda: {"a.npz": _npz({"counts.npy": _HUGE})}},
    "units": {"damaged": lambda: {"units/00000000.npz": _npz({"number.npy": _OBJECTS})}},
    "report": {
        "metrics of no JSON": _seed("report", 1, decoder__metrics_dot_jsonl=b'{"step"'),
        "times of no JSON": _seed("report", 0, times_dot_jsonl=b"[1]\n"),
        "results of another shape": _seed("report", 1, reports__results_dot_json=b'{"test": "x"}'),
        "deep results": _seed("report", 1, reports__results_dot_json=b"[" * DEEP),
    },
    "config_gin": {
        "an import": lambda: {"config.gin": b"import antigravity\n"},
        "another file": lambda: {"config.gin": b"include '/etc/hostname'\n"},
        "a call": lambda: {"config.gin": b"corpus.parts = {'a': @gin.singleton()}\n"},
        "programs of a fleet": lambda: {"config.gin": b"fleet.options = ('--setup_file=x',)\n"},
        "deep": lambda: {"config.gin": b"corpus.fraction = " + b"[" * DEEP},
    },
    "workdir": {
        "its own parent": _seed(
            "workdir", 0, decoder__manifest_dot_json=_changed(lambda m: m["parents"].update(decoder="x"))
        ),
        "an infinite fact": _seed(
            "workdir", 0, datastore__manifest_dot_json=lambda data: data.replace(b": 8", b": 1e999")
        ),
        "a parent elsewhere": _seed(
            "workdir", 0, decoder__manifest_dot_json=_changed(lambda m: m["parents"].update({"../../x": "x"}))
        ),
    },
    "index": {
        "a file elsewhere": _seed(
            "index",
            0,
            **{
                "index__shard-00000__manifest_dot_json": _changed(
                    lambda m: m["facts"]["bytes"].update({"../../outside": 1})
                )
            },
        ),
        "more rows than there are": _seed(
            "index",
            0,
            **{
                "index__shard-00000__manifest_dot_json": _changed(
                    lambda m: m["facts"].update(rows=[0, 1 << 62])
                )
            },
        ),
        "no shards": _index(lambda m: m["facts"].update(shards=0)),
        "gigabytes in words": _index(lambda m: m["config"].update(shard_gigabytes="-1")),
        "gigabytes without end": _index(lambda m: m["config"].update(shard_gigabytes=1e308)),
        "ranges of other rows": _index(lambda m: m["facts"].update(ranges=[[0, 7]])),
    },
}
