"""Scores and answers, kept chunk by chunk as they come: a killed benchmark goes on where it stopped."""

import io
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mlp_memory.artifacts import Directory, digest
from mlp_memory.inference.continuations import Partner, Scored
from mlp_memory.npz import FAULTS, read_npz
from mlp_memory.training.progress import Progress

Pair = tuple[str, str]


class Kept:
    """Chunks under a folder, each named by what was asked, so that what was asked otherwise is asked again.

    Args:
      directory: below the stage's folder; it goes when the stage is finished.
      size: requests in a chunk.
      settings: what else decides the answers.
    """

    def __init__(self, directory: Directory, size: int, settings: Any):
        self._directory, self._size, self._settings = directory, size, settings

    def scored(
        self, name: str, what: str, pairs: Sequence[Pair], score: Callable[[list[Pair]], Scored]
    ) -> Scored:
        """The scores of pairs, chunk by chunk; pairs of one context share a chunk.

        Args:
          name: of the scores.
          what: for the progress bar.
          pairs: (context, continuation), those of one context in a row.
          score: makes what is missing.
        """
        parts = self._through(
            name, what, _chunks(pairs, self._size), score, lambda data: _from_bytes(data), _to_bytes
        )
        return Scored.joined(parts)

    def texts(
        self, name: str, what: str, prompts: Sequence[str], generate: Callable[[list[str]], list[str]]
    ) -> list[str]:
        """What follows each prompt, chunk by chunk."""
        chunks = [list(prompts[at : at + self._size]) for at in range(0, len(prompts), self._size)]
        parts = self._through(
            name, what, chunks, generate, json.loads, lambda texts: json.dumps(texts).encode()
        )
        return [text for part in parts for text in part]

    def _through(
        self,
        name: str,
        what: str,
        chunks: list[list[Any]],
        make: Callable[[list[Any]], Any],
        read: Callable[[bytes], Any],
        write: Callable[[Any], bytes],
    ) -> list[Any]:
        keys = [f"{name}-{n:04d}-{digest(self._asked(chunk))}" for n, chunk in enumerate(chunks)]
        found = [self._directory.read(key) for key in keys]
        parts = [None if data is None else _readable(read, data) for data in found]
        missing = [n for n, part in enumerate(parts) if part is None]  # what cannot be read is asked again
        total = sum(map(len, chunks))
        done = total - sum(len(chunks[n]) for n in missing)
        if missing:
            with Progress(f"benchmark: {what}", total, "requests", done=done) as bar:
                for n in missing:
                    parts[n] = make(chunks[n])
                    self._directory.write(keys[n], write(parts[n]))
                    bar.advance(len(chunks[n]))
        return parts

    def _asked(self, chunk: list[Any]) -> bytes:
        return json.dumps([self._settings, chunk]).encode()


def _readable(read: Callable[[bytes], Any], data: bytes) -> Any | None:
    try:
        return read(data)
    except (*FAULTS, RecursionError):
        return None


def _chunks(pairs: Sequence[Pair], size: int) -> list[list[Pair]]:
    """At least `size` pairs each, cut where the context changes."""
    found: list[list[Pair]] = []
    for pair in pairs:
        full = found and len(found[-1]) >= size and found[-1][-1][0] != pair[0]
        if not found or full:
            found.append([])
        found[-1].append(pair)
    return found


def _to_bytes(scored: Scored) -> bytes:
    arrays = {"counts": scored.counts_R, "base": scored.base_T, "greedy": scored.greedy_T}
    for name, partner in scored.partners.items():
        arrays |= {f"{name}/{field}": value for field, value in vars(partner).items()}
    data = io.BytesIO()
    np.savez(data, **arrays)
    return data.getvalue()


def _from_bytes(data: bytes) -> Scored:
    arrays = read_npz(data)
    names = dict.fromkeys(key.split("/")[0] for key in arrays if "/" in key)
    partners = {
        name: Partner(**{key.split("/")[1]: arrays[key] for key in arrays if key.startswith(f"{name}/")})
        for name in names
    }
    tokens = (int(arrays["counts"].sum()),)
    if arrays["counts"].ndim != 1 or any(
        array.shape != tokens for name, array in arrays.items() if name != "counts"
    ):
        raise ValueError("arrays of unequal lengths")
    return Scored(arrays["counts"], arrays["base"], arrays["greedy"], partners)
