"""The checks of `verify`: one finished folder at a time, every byte of it."""

import contextlib
import dataclasses
import math
from collections.abc import Callable

import numpy as np

from mlp_memory import artifacts
from mlp_memory.arrays import ArrayReader, metadata
from mlp_memory.artifacts import (
    MANIFEST,
    SEAL,
    ArraySpec,
    Directory,
    Manifest,
    Seal,
    UserError,
    as_dtype,
    chunk_count,
    chunk_key,
    digest,
    file_digest,
    first_line,
)
from mlp_memory.corpus.stream import BOUNDS_NAME, KIND, TokenStream
from mlp_memory.datastore.codec import CODEC_NAME
from mlp_memory.targets.certificate import NAME as CERTIFICATE

_ZARR = "zarr.json"
_DIGESTS = {"certificate": CERTIFICATE, "codec": CODEC_NAME, "bounds_sha256": BOUNDS_NAME}
"""Fact of a manifest -> the file that it is the digest of."""
_SUM_ERROR = 2.0**-10
"""Rounding of M probabilities in float16 moves their sum by 2^-11 at most, and by 3e-8 for each tiny one."""


@dataclasses.dataclass(frozen=True)
class Fault:
    """Something that is not as it was made.

    Attributes:
      folder: the artifact's, below the workdir; "" is the workdir itself.
      file: below that folder.
      what: is the matter.
      chunk: of an array, if the file is one.
      within: the artifact in this one that the file is of, where all of it is gone.
      stale: whether the artifact is sound, but made from what is there no more.
    """

    folder: str
    file: str
    what: str
    chunk: int | None = None
    within: str = ""
    stale: bool = False

    def __str__(self) -> str:
        return f"{f'{self.folder}/' if self.folder else ''}{self.file}: {self.what}"


@dataclasses.dataclass
class Checked:
    """What was found in one folder.

    Attributes:
      folder: below the workdir.
      files, bytes: that were read.
      faults: what is wrong.
      unfinished: whether its stage has still to finish it; nothing else is then checked.
      notes: what could not be checked, for people.
    """

    folder: str
    files: int = 0
    bytes: int = 0
    faults: list[Fault] = dataclasses.field(default_factory=list)
    unfinished: bool = False
    notes: list[str] = dataclasses.field(default_factory=list)

    def add(
        self, file: str, what: str, chunk: int | None = None, within: str = "", stale: bool = False
    ) -> None:
        self.faults.append(Fault(self.folder, file, what, chunk, within, stale))

    def count(self, size: int, advance: Callable[[int], None]) -> None:
        """One more file, of so many bytes."""
        self.files += 1
        self.bytes += size
        advance(size)


def read_manifest(workdir: Directory, folder: str) -> tuple[Manifest | None, Seal | None]:
    """What a folder's manifest says, or said when it was finished, and its seal; None for what is lost."""
    directory, seal = workdir / folder, None
    with contextlib.suppress(ValueError, AttributeError):
        seal = Seal.read(directory)
    now = _parsed(directory.read(MANIFEST), folder)
    if seal is None or (now is not None and not now.finished):
        return now, seal
    return _parsed(seal.manifest.encode(), folder), seal


def _parsed(data: bytes | None, folder: str) -> Manifest | None:
    try:
        return None if data is None else Manifest.from_json(data.decode(errors="replace"), folder)
    except UserError:
        return None


def check_folder(
    workdir: Directory, folder: str, advance: Callable[[int], None] = lambda size: None
) -> Checked:
    """Every file of a finished artifact, and what its arrays hold.

    Args:
      workdir: whose.
      folder: the artifact's, below it; "" checks the workdir's own files.
      advance: told of bytes as they are read.
    """
    found, directory = Checked(folder), workdir / folder if folder else workdir
    manifest, seal = read_manifest(workdir, folder) if folder else (None, None)
    if manifest is not None and not manifest.finished:
        found.unfinished = True
        if seal is not None:  # it has been finished before
            found.add(MANIFEST, "was taken away to be made again")
        return found
    try:
        seal = Seal.read(directory)
    except (ValueError, AttributeError) as error:
        found.add(SEAL, f"is damaged ({first_line(error)})")
    for name, wanted in (seal.files if seal else {}).items():
        _check_file(found, directory, name, wanted, advance)
    if not folder:
        if seal is None and not found.faults:
            found.notes.append(f"not covered: files of the workdir itself, which has no {SEAL}")
        return found
    _check_manifest(found, directory, manifest, seal, advance)
    if manifest is None:
        return found
    for within in seal.within if seal else ():
        if (directory / within).read(MANIFEST) is None and (directory / within).read(SEAL) is None:
            found.add(f"{within}/{MANIFEST}", "is missing", within=within)
    for name, spec in manifest.arrays.items():
        # What zarr.json holds may differ between versions of tensorstore: a seal knows what was written.
        sealed = seal is not None and f"{name}/{_ZARR}" in seal.files
        if not sealed and (directory / name).read(_ZARR) != metadata(spec):
            found.add(f"{name}/{_ZARR}", "is not as it was written")
        if all(fault.file != f"{name}/{_ZARR}" for fault in found.faults):
            _check_array(found, directory, manifest, name, spec, advance)
    covered = set(seal.files) if seal else _check_by_manifest(found, directory, manifest, advance)
    _note_others(found, directory, manifest, seal, covered)
    if not found.faults:
        _check_contents(found, workdir, manifest)
    return found


def _check_by_manifest(
    found: Checked, directory: Directory, manifest: Manifest, advance: Callable[[int], None]
) -> set[str]:
    """What a manifest alone says of files, where there is no seal; the files that it speaks for."""
    digests = {name: found[0] for name, found in manifest.checksums.items() if name not in manifest.arrays}
    for fact, name in _DIGESTS.items():
        if fact in manifest.facts:
            digests[name] = manifest.facts[fact]
    for name, wanted in digests.items():
        _check_file(found, directory, name, wanted[:16], advance)
    covered = {*digests, *(f"{name}/{_ZARR}" for name in manifest.arrays)}
    if "checksums" in manifest.facts:
        from mlp_memory.training.checkpoints import damaged_parameter

        try:
            if wrong := damaged_parameter(directory, manifest):
                found.add("model", f"parameter {wrong} is not what was published")
        except UserError as error:
            found.add("model", first_line(error))
        covered |= {name for name in directory.names() if name.startswith("model/")}
    return covered


def _note_others(
    found: Checked, directory: Directory, manifest: Manifest, seal: Seal | None, covered: set[str]
) -> None:
    """Says which files nothing is known of."""
    names = directory.names()
    marks = (f"/{MANIFEST}", f"/{SEAL}")
    within = {name.rpartition("/")[0] for name in names if name.endswith(marks)}
    others = [name for name in artifacts.sealed(names, manifest, within) if name not in covered]
    if others:
        why = "its stage has not written it" if seal else f"made before there was a {SEAL}"
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        found.notes.append(f"not covered: {found.folder}/{others[0]}{more}: {why}")


def _check_manifest(
    found: Checked,
    directory: Directory,
    manifest: Manifest | None,
    seal: Seal | None,
    advance: Callable[[int], None],
) -> None:
    text = directory.read(MANIFEST)
    found.count(len(text or b""), advance)
    if text is None:
        found.add(MANIFEST, "is missing")
    elif manifest is None:
        found.add(MANIFEST, "cannot be read")
    elif text != (seal.manifest if seal else manifest.to_json()).encode():
        found.add(MANIFEST, "is not as it was written")


def _check_file(
    found: Checked, directory: Directory, name: str, wanted: str, advance: Callable[[int], None]
) -> None:
    if directory.is_local:  # which may be too large for memory
        path, now = directory.path / name, file_digest(directory, name)
        size = 0 if now is None else path.stat().st_size
    else:
        data = directory.read(name)
        now, size = (None, 0) if data is None else (digest(data), len(data))
    if now != wanted:
        found.add(name, "is missing" if now is None else "is not as it was written")
    if now is not None:
        found.count(size, advance)


def _check_array(
    found: Checked,
    directory: Directory,
    manifest: Manifest,
    name: str,
    spec: ArraySpec,
    advance: Callable[[int], None],
) -> None:
    """Each chunk's values against the manifest; reading checks every block's crc32c."""
    checksums, reader = manifest.checksums.get(name, []), ArrayReader(directory, name, 0, manifest)
    for chunk in range(chunk_count(spec)):
        start = chunk * spec.chunk_shape[0]
        stop = min(start + spec.chunk_shape[0], spec.shape[0])
        file = f"{name}/{chunk_key(spec, chunk)}"
        try:
            values = reader[start:stop]
        except UserError as error:
            gone = directory.is_local and not (directory.path / file).is_file()
            found.add(file, "is missing" if gone else f"rows {start}..{stop - 1}: {first_line(error)}", chunk)
            continue
        found.count(spec.chunk_bytes(chunk), advance)
        data = np.ascontiguousarray(values).view(np.uint8).data if values.size else b""
        if chunk >= len(checksums) or digest(data) != checksums[chunk]:
            found.add(file, f"rows {start}..{stop - 1} are not as they were written", chunk)
        elif (bad := _not_finite(values, spec)) is not None:
            found.add(file, f"row {start + bad} is not finite", chunk)


def _not_finite(values: np.ndarray, spec: ArraySpec) -> int | None:
    """The first row with a value that is no finite number."""
    if as_dtype(spec.dtype).kind not in "fV":
        return None
    bad = ~np.isfinite(values.astype(np.float32).reshape(len(values), -1)).all(axis=1)
    return int(bad.argmax()) if bad.any() else None


def _check_contents(found: Checked, workdir: Directory, manifest: Manifest) -> None:
    """What an artifact's arrays must say, whatever their checksums."""
    if manifest.kind == KIND:
        try:
            stream = TokenStream.open(workdir / found.folder)
            spec = manifest.arrays["tokens"]
            for start in range(0, len(stream), spec.chunk_shape[0]):
                stream.tokens[start : min(start + spec.chunk_shape[0], len(stream))]
        except UserError as error:
            found.add(MANIFEST, first_line(error))
        return
    if manifest.kind not in ("targets", "datastore"):
        return
    try:
        stream = TokenStream.open(workdir / "corpus/train")
    except UserError:
        found.notes.append(f"{found.folder}: not compared with corpus/train, which cannot be read")
        return
    if manifest.kind == "targets":
        _check_targets(found, workdir / found.folder, manifest, stream)
    elif manifest.arrays and manifest.arrays["keys"].shape[0] != len(stream):
        found.add(MANIFEST, f"{manifest.arrays['keys'].shape[0]} keys for a stream of {len(stream)} rows")


def _check_targets(found: Checked, directory: Directory, manifest: Manifest, stream: TokenStream) -> None:
    """Probabilities that are none or do not sum to 1, or where there is no teacher; unknown tokens."""
    spec = manifest.arrays["probs"]
    every = "blocks" not in manifest.facts  # an update has teachers of chosen rows
    if every and spec.shape[0] != len(stream):
        found.add(MANIFEST, f"{spec.shape[0]} teachers for a stream of {len(stream)} rows")
        return
    names = ("token_ids", "probs", "neighbours")
    ids, probs, neighbours = (ArrayReader(directory, name, cache_bytes=0) for name in names)
    for chunk in range(chunk_count(spec)):
        start = chunk * spec.chunk_shape[0]
        stop = min(start + spec.chunk_shape[0], spec.shape[0])
        probs_RxM, taught_R = probs[start:stop].astype(np.float64), neighbours[start:stop] > 0
        problems = {
            "names a token beyond the vocabulary": (ids[start:stop] >= stream.vocab_size).any(axis=1),
            "has a negative probability": (probs_RxM < 0).any(axis=1),
            "does not sum to 1": taught_R & (np.abs(probs_RxM.sum(axis=1) - 1) > _tolerance(spec)),
            "has probabilities without neighbours": ~taught_R & (probs_RxM != 0).any(axis=1),
        }
        if every:
            problems["has a teacher and no next token"] = taught_R & ~stream.has_next(start, stop)
        for what, bad_R in problems.items():
            if bad_R.any():
                file = f"probs/{chunk_key(spec, chunk)}"
                found.add(file, f"row {start + int(bad_R.argmax())} {what}", chunk)


def _tolerance(spec: ArraySpec) -> float:
    return _SUM_ERROR + 3e-8 * math.prod(spec.shape[1:])


def folders(workdir: Directory, stage_folders: list[str]) -> list[str]:
    """The finished artifacts below these folders, and those within them, that are there."""
    found = []
    for folder in stage_folders:
        names = (workdir / folder).names()
        marks = {name.rpartition("/")[0] for name in names if name.rpartition("/")[2] in (MANIFEST, SEAL)}
        found += sorted(f"{folder}/{mark}".rstrip("/") for mark in marks)
    return found
