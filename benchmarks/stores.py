"""What small stores cost: the exact teacher over each against the exact teacher over float32 keys.

    python benchmarks/stores.py --workdir=runs/smollm2 --k=1024 --output=stores.json

WORKDIR holds a corpus and a datastore of whole float32 keys; a datastore that is still being written
serves too, up to its first missing chunk. On a random sample of its rows every store is made as `embed`
would make it, searched exactly, each row itself left out, and turned into a teacher at the temperature
that suits it best: the one, of a grid around the full teacher's times the ratio of median spreads, with
the least mean total variation on one half of the sample. Total variation is reported on the other half.
"""

import argparse
import json
import re
import time
from pathlib import Path

import numpy as np

from mlp_memory.arrays import ArrayReader, Rows
from mlp_memory.artifacts import Directory, as_dtype, peek
from mlp_memory.corpus.stream import TokenStream
from mlp_memory.datastore.codec import Codec, fit
from mlp_memory.datastore.config import EmbedConfig
from mlp_memory.datastore.store import KeyStore
from mlp_memory.decoder.windows import read, spread
from mlp_memory.index.exact import exact_search
from mlp_memory.index.neighbors import exclude_self, recall_at_k
from mlp_memory.index.shards import single_rows
from mlp_memory.targets.knn import SparseTargets, knn_distribution
from mlp_memory.targets.temperature import median_spread

STORES = (
    "bfloat16,float16,int8,int8-{d},int8-448,int8-384,int8-288,int8-256,int8-128,int8-64,"
    "float32-256,float32-128"
)
_READ_ROWS = 1 << 14
_TAUS = 2.0 ** (np.arange(-8, 9) / 4)


def store_config(name: str) -> EmbedConfig:
    """ "int8-256" -> int8 of 256 dimensions; without a number all, not rotated."""
    dtype, _, dim = name.partition("-")
    return EmbedConfig(key_dtype=dtype, key_dim=int(dim or 0))


def written_rows(directory: Directory) -> int:
    """Rows of the array of keys before its first missing chunk."""
    manifest = peek(directory)
    spec = manifest.arrays["keys"]
    if manifest.finished:
        return spec.shape[0]
    there = {int(m[1]) for name in directory.names() if (m := re.fullmatch(r"chunks/(\d+)\.json", name))}
    missing = next(chunk for chunk in range(len(there) + 1) if chunk not in there)
    return min(missing * spec.chunk_rows, spec.shape[0])


class Leading:
    """The first rows of an array."""

    def __init__(self, rows: Rows, count: int):
        self._rows, self.shape = rows, (count, rows.shape[1])

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(self.shape[0])
        return np.asarray(self._rows[start:stop])


def encoded(keys: Rows, codec: Codec) -> KeyStore:
    """The store that `embed` would write of these hidden states, in memory."""
    total, dim = keys.shape
    stored_NxE = np.empty((total, codec.key_dim(dim)), as_dtype(codec.dtype))
    for start in range(0, total, _READ_ROWS):
        stop = min(start + _READ_ROWS, total)
        stored_NxE[start:stop] = codec.encode(keys[start:stop])
    return KeyStore(stored_NxE, codec)


def neighbours(
    keys: Rows, valid_N: np.ndarray, sample_Q: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The sampled rows' k nearest others, exactly."""
    queries_QxE = single_rows(keys, sample_Q)
    return exclude_self(*exact_search(keys, valid_N, queries_QxE, k + 1), sample_Q, k)


def total_variation(a: SparseTargets, b: SparseTargets, vocab_size: int) -> np.ndarray:
    """½ Σ_y |a(y) − b(y)| of each pair of distributions, [Q]."""
    found_Q, dense_V = np.empty(len(a.token_ids_QxM)), np.zeros(vocab_size)
    for q in range(len(found_Q)):
        dense_V[:] = 0
        np.add.at(dense_V, a.token_ids_QxM[q], a.probs_QxM[q])
        np.subtract.at(dense_V, b.token_ids_QxM[q], b.probs_QxM[q])
        found_Q[q] = np.abs(dense_V).sum() / 2
    return found_Q


def mean_and_interval(values: np.ndarray) -> tuple[float, list[float]]:
    """The mean and its 95 % interval, by 2,000 resamples."""
    draws = np.random.default_rng(0).integers(0, len(values), (2000, len(values)))
    return float(values.mean()), np.quantile(values[draws].mean(axis=1), [0.025, 0.975]).tolist()


def main() -> None:
    """Prints the table and writes the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--k", type=int, default=1024)
    parser.add_argument("--queries", type=int, default=512)
    parser.add_argument("--rows", type=int, default=0, help="use only so many rows; 0 all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stores", default=STORES, help=f"by comma, as {STORES}")
    parser.add_argument("--spreads", type=float, default=0.25, help="the full teacher's τ in median spreads")
    parser.add_argument("--output", type=Path, help="a JSON file of the figures")
    args = parser.parse_args()

    workdir = Directory(args.workdir)
    stream = TokenStream.open(workdir / "corpus/train")
    rows = written_rows(workdir / "datastore")
    rows = min(rows, args.rows or rows)
    keys = Leading(ArrayReader(workdir / "datastore", "keys"), rows)
    dim = keys.shape[1]
    valid_N, labels_N = stream.has_next(0, rows), stream.labels(0, rows)
    sample_Q = np.random.default_rng(args.seed).choice(np.flatnonzero(valid_N), args.queries, replace=False)
    sample_Q.sort()
    chosen = np.random.default_rng(args.seed + 1).permutation(args.queries) < args.queries // 2

    true_rows, true_sqdist = neighbours(keys, valid_N, sample_Q, args.k)
    true_spread = median_spread(true_sqdist)
    tau = args.spreads * true_spread
    teacher = knn_distribution(true_rows, true_sqdist, labels_N[true_rows], tau, args.k)
    print(f"{rows} keys of {dim} dimensions, k = {args.k}, τ = {tau:.4g} ({args.spreads} median spreads)\n")
    print(
        "| store | bytes a token | smaller than bfloat16 | recall@k | total variation | 95 % interval | τ |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|")

    figures = []
    for name in dict.fromkeys(args.stores.format(d=dim).split(",")):
        config, began = store_config(name), time.monotonic()
        if config.key_dim > dim:
            continue
        codec = Codec(config.key_dtype)
        if config.fitted:
            codec = fit(config, read(lambda a, b: keys[a:b], spread(rows, config.projection_rows)))
        store = encoded(keys, codec)
        found_rows, found_sqdist = neighbours(store, valid_N, sample_Q, args.k)
        best = None
        for factor in _TAUS * median_spread(found_sqdist) / true_spread:
            made = knn_distribution(found_rows, found_sqdist, labels_N[found_rows], factor * tau, args.k)
            variation_Q = total_variation(made, teacher, stream.vocab_size)
            if best is None or variation_Q[chosen].mean() < best[1][chosen].mean():
                best = factor, variation_Q
        mean, interval = mean_and_interval(best[1][~chosen])
        size = store.shape[1] * as_dtype(config.key_dtype).itemsize
        figures.append(
            {
                "store": name,
                "bytes_per_token": size,
                "smaller_than_bfloat16": 2 * dim / size,
                "recall": recall_at_k(found_rows, true_rows),
                "total_variation": mean,
                "interval": interval,
                "tau_factor": float(best[0]),
                "explained_variance": codec.explained,
                "clip_share": codec.clipped,
                "seconds": round(time.monotonic() - began, 1),
            }
        )
        f = figures[-1]
        print(
            f"| {name} | {size} | {f['smaller_than_bfloat16']:.2f} | {f['recall']:.3f} | {mean:.4f} | "
            f"{interval[0]:.4f} … {interval[1]:.4f} | {best[0]:.3f}·τ |",
            flush=True,
        )
    if args.output:
        settings = {"rows": rows, "dim": dim, "k": args.k, "queries": args.queries, "seed": args.seed}
        args.output.write_text(json.dumps({**settings, "tau": tau, "stores": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
