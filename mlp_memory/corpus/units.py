"""Documents encoded in units, by several processes, so that a killed run goes on where it stopped.

A unit is a run of documents. Its tokens are published under SPLIT/units as soon as they are
all there, in one write, named by what they were made from; they become the split's array
when every unit is done. Cutting does not depend on the number of processes, so neither do
the bytes that come out.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import io
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING

import numpy as np

from mlp_memory import artifacts
from mlp_memory.artifacts import Directory, UserError
from mlp_memory.corpus.quiet import quiet_tensorflow
from mlp_memory.corpus.vocabulary import Vocabulary
from mlp_memory.npz import FAULTS, read_npz
from mlp_memory.parallel.fleet import usable_cores
from mlp_memory.training.progress import Progress

if TYPE_CHECKING:
    from mlp_memory.corpus import tasks

FOLDER = "units"
# Text of one unit: a second or two of one core's work, which is what a kill can cost.
UNIT_BYTES = 4 << 20
# Less text than this is encoded sooner than processes start, each of which imports TensorFlow.
PARALLEL_BYTES = 32 << 20


@dataclasses.dataclass(frozen=True)
class Unit:
    """Documents in a row; `key` is the sha256 of the vocabulary's fingerprint and the texts."""

    number: int
    texts: list[str]
    num_bytes: int
    key: str


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A finished unit, less its tokens.

    Attributes:
      number, key, num_bytes: of the unit.
      lengths_D: int64 [D], tokens of each document, bos and eos counted.
      lossy: documents whose tokens do not decode to their text.
    """

    number: int
    key: str
    num_bytes: int
    lengths_D: np.ndarray
    lossy: int


def cut_units(texts: Iterable[str], fingerprint: str) -> Iterator[Unit]:
    """The documents in units of `UNIT_BYTES` or a little more, in their order."""
    number, unit, size, key = 0, [], 0, hashlib.sha256(fingerprint.encode())
    for text in texts:
        data = text.encode()
        key.update(len(data).to_bytes(8, "little") + data)
        unit.append(text)
        size += len(data)
        if size >= UNIT_BYTES:
            yield Unit(number, unit, size, key.hexdigest())
            number, unit, size, key = number + 1, [], 0, hashlib.sha256(fingerprint.encode())
    if unit:
        yield Unit(number, unit, size, key.hexdigest())


def encode_split(
    directory: Directory,
    vocabulary: Directory,
    texts: Iterable[str],
    num_bytes: int,
    dtype: np.dtype,
    workers: int | None,
) -> list[Encoded]:
    """Encodes the units that are not yet there; returns all of them in order.

    Args:
      directory: of the split.
      vocabulary: WORKDIR/corpus/vocabulary.
      texts: the documents of the split, none empty.
      num_bytes: their size in UTF-8.
      dtype: of the stored tokens.
      workers: processes, None for one a usable core.

    Raises:
      UserError: a text cannot be read or encoded, or a process was killed.
    """
    store, fingerprint = directory / FOLDER, artifacts.require(vocabulary, "tokenize").fingerprint
    found = _finished(store)
    done = sum(encoded.num_bytes for encoded in found.values())
    finished: dict[int, Encoded] = {}

    def missing() -> Iterator[Unit]:
        for unit in cut_units(texts, fingerprint):
            if unit.number in found and found[unit.number].key == unit.key:
                finished[unit.number] = found[unit.number]
            else:
                yield unit

    count = _processes(workers, num_bytes - done)
    make = functools.partial(encode_unit, store.location, vocabulary.location, fingerprint, dtype.str)
    with Progress(f"tokenize {directory.location.rsplit('/', 1)[-1]}", num_bytes, "bytes", done) as progress:
        for encoded in map(make, missing()) if count == 1 else _in_processes(make, missing(), count):
            finished[encoded.number] = encoded
            progress.advance(encoded.num_bytes)
    return [finished[number] for number in sorted(finished)]


def _processes(workers: int | None, num_bytes: int) -> int:
    if num_bytes < PARALLEL_BYTES:
        return 1
    return min(workers or usable_cores(), -(-num_bytes // UNIT_BYTES))


def encode_unit(store: str, vocabulary: str, fingerprint: str, dtype: str, unit: Unit) -> Encoded:
    """Encodes one unit, decodes it again to see what was lost, and publishes it.

    Raises:
      UserError: a text cannot be encoded, or the disk refuses.
    """
    words, encoder = _encoder(vocabulary, fingerprint)
    documents = [ids_T.astype(dtype) for ids_T in encoder.encode(unit.texts)]
    lossy = sum(words.decode(ids_T) != text for ids_T, text in zip(documents, unit.texts, strict=True))
    lengths_D = np.array([len(ids_T) for ids_T in documents], np.int64)
    encoded = Encoded(unit.number, unit.key, unit.num_bytes, lengths_D, lossy)
    file = io.BytesIO()
    np.savez(file, tokens_T=np.concatenate(documents), **dataclasses.asdict(encoded))
    Directory(store).write(_name(unit.number), file.getvalue())
    return encoded


@functools.lru_cache(maxsize=1)
def _encoder(location: str, fingerprint: str) -> tuple[Vocabulary, "tasks.Encoder"]:
    vocabulary = Vocabulary.load(Directory(location))
    quiet_tensorflow()
    from mlp_memory.corpus import tasks  # TensorFlow takes seconds to import; bad input is found before

    return vocabulary, tasks.Encoder(vocabulary)


def _name(number: int) -> str:
    return f"{number:08d}.npz"


def read_tokens(directory: Directory, encoded: Encoded) -> np.ndarray:
    """The tokens of a finished unit of a split, [tokens].

    Raises:
      UserError: they are gone or damaged since.
    """
    store = directory / FOLDER
    contents = _read(store, _name(encoded.number))
    if contents is None or contents["key"] != encoded.key:
        raise UserError(f"{store}/{_name(encoded.number)} is gone or damaged: run tokenize again")
    return contents["tokens_T"]


def _finished(store: Directory) -> dict[int, Encoded]:
    found = {}
    for name in store.names():
        # A unit that cannot be read is made again.
        if (contents := _read(store, name)) is not None:
            number, lengths_D = int(contents["number"]), contents["lengths_D"]
            facts = str(contents["key"]), int(contents["num_bytes"]), lengths_D, int(contents["lossy"])
            found[number] = Encoded(number, *facts)
    return found


def _read(store: Directory, name: str) -> dict[str, np.ndarray] | None:
    data = store.read(name)
    try:
        contents = read_npz(data or b"")
    except FAULTS:
        return None
    wanted = {"tokens_T", *(field.name for field in dataclasses.fields(Encoded))}
    if not wanted <= contents.keys():
        return None
    vectors = contents["tokens_T"], contents["lengths_D"]
    if any(vector.ndim != 1 or vector.dtype.kind not in "iu" for vector in vectors):
        return None
    single = [contents[name] for name in ("number", "key", "num_bytes", "lossy")]
    kinds = "".join(value.dtype.kind for value in single)
    return contents if all(value.ndim == 0 for value in single) and kinds == "iUii" else None


def _in_processes(make: functools.partial, units: Iterable[Unit], count: int) -> Iterator[Encoded]:
    """Units as they are done, in any order; no more of them in memory than keep `count` processes busy."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(count, context, initializer=_start_process) as pool:
        running: set[concurrent.futures.Future] = set()
        try:
            for unit in units:
                running.add(pool.submit(make, unit))
                if len(running) >= 2 * count:
                    done, running = concurrent.futures.wait(
                        running, return_when=concurrent.futures.FIRST_COMPLETED
                    )
                    yield from (future.result() for future in done)
            for future in concurrent.futures.as_completed(running):
                yield future.result()
        except BrokenProcessPool as error:
            raise UserError(
                "a tokenizing process was killed, for want of memory perhaps: run tokenize again, "
                "which goes on from the finished units, or set corpus.workers to less"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _start_process() -> None:
    """Leaves interrupts to the parent, and ends when the parent does, however that was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
