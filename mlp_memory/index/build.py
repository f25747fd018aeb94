"""One shard of the index: built in a staging folder and published whole or not at all."""

import contextlib
import dataclasses
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mlp_memory.artifacts import (
    Directory,
    Manifest,
    UserError,
    begin,
    digest,
    file_digest,
    finish,
    first_line,
    peek,
    require_same,
)
from mlp_memory.index import scann_shard
from mlp_memory.index.exact import Rows
from mlp_memory.index.scann_shard import GAPS, Trained
from mlp_memory.index.shards import Stream, checked_blocks, shard_name, shard_rows
from mlp_memory.index.tuning import Structure
from mlp_memory.npz import FAULTS, read_npy


def build_shard(
    directory: Directory,
    shard: int,
    shards: int,
    keys: Rows,
    stream: Stream,
    datastore: str,
    structure: Structure,
    trained: Trained,
    extent: tuple[int, int] | None = None,
) -> None:
    """Builds and publishes one shard unless it is there already.

    Memory: a block of keys and codes, some 400 MB, whatever the shard's rows.

    Args:
      directory: WORKDIR/index.
      shard: number of the shard, from 0.
      shards: how many there are.
      keys: [N, D] keys of the whole stream, any float dtype.
      stream: rows that have a next token; the others are never inserted.
      datastore: fingerprint of the datastore.
      structure: of the tree.
      trained: centres and codes.
      extent: the shard's first row and one past its last, where shards are not of equal length.

    Raises:
      UserError: the shard's folder holds one made from other keys, or a key is not finite.
    """
    rows = len(stream)
    start, stop = extent or shard_rows(rows, shards, shard)
    target = directory / shard_name(shard)
    trained_digest = digest(b"".join(trained.files[name] for name in sorted(trained.files)))
    made_with = {"shards": shards, **dataclasses.asdict(structure), "trained": trained_digest}
    parents = {"datastore": datastore}
    found = peek(target)
    if found is not None and found.finished:
        # Another plan's shard, as a kill between two plans leaves it, is made anew.
        require_same(target, found, Manifest("index_shard", found.config, parents))
        if found.config == made_with:
            return
    valid_S = stream.has_next(start, stop)
    with _staging(directory, shard) as staging:
        np.save(staging / GAPS, start + np.flatnonzero(~valid_S).astype(np.int64))
        positions = int(valid_S.sum())
        if positions:
            blocks = (
                block_RxD[valid_S[first - start : first - start + len(block_RxD)]]
                for first, block_RxD in checked_blocks(keys, stream, start, stop)
            )
            scann_shard.write_shard(staging, trained, blocks, positions, keys.shape[1])
        facts = {
            "rows": [start, stop],
            "keys": positions,
            "leaves": structure.leaves,
            "method": "tree and hashing" if structure.leaves else "brute force",
        }
        _finish(Directory(staging), target, made_with, parents, facts)


def take_shard(directory: Directory, shard: int, source: Directory, stream: Stream, datastore: str) -> None:
    """Publishes another index's shard here, less the keys of rows that have no next token any more.

    Centres and codes stay. A shard that loses nothing is the same files; of another, what is
    left is copied block by block.

    Args:
      directory: WORKDIR/index.
      shard: number of the shard, the same in both.
      source: the other index, finished.
      stream: as long as the other's or longer.
      datastore: fingerprint of the datastore here.

    Raises:
      UserError: a file is gone or damaged.
    """
    target, source = directory / shard_name(shard), source / shard_name(shard)
    parents = {"datastore": datastore}
    here, there = peek(target), peek(source)
    if there is None or not there.finished:
        raise UserError(f"{source} is missing: run `python -m mlp_memory index` there first")
    if here is not None and here.finished and here.config == there.config and here.parents == parents:
        return
    start, stop = there.facts["rows"]
    try:
        gaps = read_npy(source.read(GAPS) or b"")
    except FAULTS as error:
        raise UserError(f"{source}/{GAPS} is damaged: run `verify --repair` there first") from error
    had_key_S, has_key_S = np.ones(stop - start, bool), stream.has_next(start, stop)
    had_key_S[gaps - start] = False
    with _staging(directory, shard) as staging:
        staged = Directory(staging)
        for name in there.facts["bytes"]:
            staged.take(name, source)
        if (had_key_S != has_key_S).any():
            (staging / GAPS).unlink()  # another name for the source's file
            np.save(staging / GAPS, start + np.flatnonzero(~has_key_S).astype(np.int64))
            scann_shard.keep_positions(staging, has_key_S[had_key_S])
        facts = there.facts | {"keys": int(has_key_S.sum())}
        _finish(staged, target, there.config, parents, facts)


def _finish(
    staged: Directory,
    target: Directory,
    made_with: dict[str, Any],
    parents: dict[str, str],
    facts: dict[str, Any],
) -> None:
    """Publishes a staged shard with the checksums and sizes of its files."""
    files = staged.names()
    manifest = begin(staged, "index_shard", made_with, parents)
    manifest.checksums = {name: [file_digest(staged, name)] for name in files}
    sizes = {name: (staged.path / name).stat().st_size for name in files}
    _publish(staged, target, finish(staged, manifest, **facts | {"bytes": sizes}))


@contextlib.contextmanager
def _staging(directory: Directory, shard: int) -> Iterator[Path]:
    """An empty local folder, next to the shard's place where that is local; gone at the end."""
    if directory.is_local:
        path = directory.path / f"building-{shard_name(shard)}"
        shutil.rmtree(path, ignore_errors=True)
    else:
        path = Path(tempfile.mkdtemp(prefix="mlp-memory-index-"))
    try:
        path.mkdir(parents=True, exist_ok=True)
        yield path
    except OSError as error:
        raise UserError(f"cannot write {path}: {first_line(error)}") from error
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _publish(staged: Directory, target: Directory, manifest: Manifest) -> None:
    """Makes a staged shard appear at its place in one step: a rename, or the manifest's write."""
    target.delete()
    if target.is_local:
        staged.path.rename(target.path)
        return
    for name in manifest.facts["bytes"]:
        target.write(name, (staged.path / name).read_bytes())
    finish(target, manifest)
