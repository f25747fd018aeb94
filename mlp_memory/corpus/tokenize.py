"""The `tokenize` stage: text in, WORKDIR/corpus out.

Documents are read and counted first, so that bad input is found before TensorFlow is even
imported. A document's rows are bos, its pieces, eos: the first real token is predicted
too, and only the eos row has no next token.
"""

import dataclasses
import hashlib
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mlp_memory import artifacts
from mlp_memory.artifacts import ArraySpec, ChunkWriter, Directory, Manifest, UserError
from mlp_memory.corpus import vocabulary_training
from mlp_memory.corpus.config import SPLITS, CorpusConfig
from mlp_memory.corpus.documents import Files, file_sha256, fingerprints, input_files
from mlp_memory.corpus.split import SplitFacts, read_split, scan
from mlp_memory.corpus.stream import BOUNDS_NAME, KIND, TokenStream
from mlp_memory.corpus.vocabulary import KIND as VOCABULARY_KIND
from mlp_memory.corpus.vocabulary import MODEL_NAME, Vocabulary
from mlp_memory.training.progress import Progress


@dataclasses.dataclass(frozen=True)
class _Work:
    """What every part of the corpus is made from; `settings` is what its manifest records."""

    config: CorpusConfig
    settings: dict[str, Any]
    files: Files
    facts: dict[str, SplitFacts]


def tokenize(directory: Directory, config: CorpusConfig) -> None:
    """Writes `vocabulary`, `train`, `validation` and `test` under `directory`, as far as they are missing.

    The bytes depend on the texts and the config alone, however often the work was
    interrupted. A part that is unfinished or damaged is made again.

    Args:
      directory: WORKDIR/corpus.
      config: the texts, the splits and the vocabulary.

    Raises:
      UserError: bad input, or `directory` holds a corpus of another config or other texts.
    """
    found = {name: artifacts.peek(directory / name) for name in ("vocabulary", *SPLITS)}
    _require_same(directory, found, artifacts.config_dict(config))
    missing = [name for name, manifest in found.items() if not _is_whole(directory / name, manifest)]
    if not missing:
        _require_same_inputs(directory, found, config)
        return

    files = input_files(config)
    given = Vocabulary.from_file(config.vocab_file) if config.vocab_file else None
    settings = artifacts.config_dict(config) | {"inputs": _inputs(config, files)}
    _require_same(directory, found, settings)
    work = _Work(config, settings, files, scan(config, files))
    if "vocabulary" in missing:
        _write_vocabulary(directory / "vocabulary", work, given)
    vocabulary = Vocabulary.load(directory / "vocabulary")
    if splits := [split for split in SPLITS if split in missing]:
        _write_splits(directory, work, vocabulary, splits)


def require_same_corpus(directory: Directory, config: CorpusConfig) -> None:
    """Raises `UserError` where what is there was made with another config or from other texts."""
    found = {name: artifacts.peek(directory / name) for name in ("vocabulary", *SPLITS)}
    _require_same(directory, found, artifacts.config_dict(config))
    _require_same_inputs(directory, found, config)


def _is_whole(directory: Directory, manifest: Manifest | None) -> bool:
    """Whether a part is finished and undamaged."""
    if manifest is None or not manifest.finished:
        return False
    try:
        Vocabulary.load(directory) if manifest.kind == VOCABULARY_KIND else TokenStream.open(directory)
    except UserError:
        return False
    return True


def _require_same(directory: Directory, found: dict[str, Manifest | None], settings: dict[str, Any]) -> None:
    """Raises `UserError` where a part was made with other settings; names the whole corpus."""
    for manifest in found.values():
        if manifest is not None:
            # Input files are compared once they have been read.
            before = {k: v for k, v in manifest.config.items() if k != "inputs" or k in settings}
            wanted = Manifest(manifest.kind, settings, {})
            artifacts.require_same(directory, Manifest(manifest.kind, before, {}), wanted)


def _require_same_inputs(
    directory: Directory, found: dict[str, Manifest | None], config: CorpusConfig
) -> None:
    """Raises `UserError` where the texts of a whole corpus have changed since.

    A whole corpus outlives its input: files may be gone, and Python may be another.
    """
    if any(source.source == "python_docs" for source in config.sources.values()):
        return
    try:
        inputs = _inputs(config, input_files(config))
    except UserError:
        return
    _require_same(directory, found, artifacts.config_dict(config) | {"inputs": inputs})


def _inputs(config: CorpusConfig, files: Files) -> dict[str, str]:
    """What texts and vocabulary come from: each file's sha256, the version of Python."""
    inputs = fingerprints(config, files)
    if config.vocab_file:
        inputs[config.vocab_file] = file_sha256(Path(config.vocab_file).expanduser())
    return inputs


def _write_vocabulary(directory: Directory, work: _Work, given: Vocabulary | None) -> None:
    if given is None:
        train = read_split(work.config, work.files, "train", work.facts)
        model = vocabulary_training.train(train, work.facts["train"].bytes, work.config.vocab_size)
        given = Vocabulary(model, "the trained vocabulary")
    directory.delete()
    manifest = artifacts.begin(directory, VOCABULARY_KIND, work.settings, {})
    directory.write(MODEL_NAME, given.model)
    artifacts.finish(
        directory,
        manifest,
        model_sha256=hashlib.sha256(given.model).hexdigest(),
        vocab_size=given.size,
        bos=given.bos,
        eos=given.eos,
    )


def _write_splits(directory: Directory, work: _Work, vocabulary: Vocabulary, splits: list[str]) -> None:
    from mlp_memory.corpus import tasks  # TensorFlow takes seconds to import; bad input is found before

    dtype = np.dtype("<u2" if vocabulary.size <= 1 << 16 else "<u4")
    with tempfile.TemporaryDirectory() as folder:
        model_file = Path(folder, MODEL_NAME)
        model_file.write_bytes(vocabulary.model)
        task = tasks.make_task(
            lambda split: read_split(work.config, work.files, split, work.facts),
            model_file,
            vocabulary.bos,
            vocabulary.eos,
            cut_long=vocabulary.newline_stands_alone,
        )
        for split in splits:
            documents = work.facts[split].documents
            # A stream's length is known only at its end, so ids wait in a nameless file,
            # which a kill leaves nothing of.
            with tempfile.TemporaryFile(dir=folder) as spool:
                with Progress(f"tokenize {split}", documents, "documents") as progress:
                    bounds_D1 = _spool(spool, dtype, tasks.encode(task, split), progress)
                if len(bounds_D1) - 1 != documents:
                    raise UserError(
                        f"the {split} split had {documents} documents when it was checked and has "
                        f"{len(bounds_D1) - 1} now: were the files changed? Run tokenize again"
                    )
                _write_stream(directory / split, work, work.facts[split], vocabulary, bounds_D1, spool, dtype)


def _spool(
    spool: BinaryIO, dtype: np.dtype, parts: Iterable[tuple[np.ndarray, bool]], progress: Progress
) -> np.ndarray:
    """Writes token ids one after the other; returns document bounds, int64 [documents + 1]."""
    bounds, rows = [0], 0
    for ids_T, is_last in parts:
        try:
            spool.write(ids_T.astype(dtype).tobytes())
        except OSError as error:
            folder = tempfile.gettempdir()
            raise UserError(f"cannot write to {folder} ({error.strerror}): set TMPDIR to another") from error
        rows += len(ids_T)
        if is_last:
            bounds.append(rows)
            progress.advance(1)
    return np.array(bounds, np.int64)


def _write_stream(
    directory: Directory,
    work: _Work,
    facts: SplitFacts,
    vocabulary: Vocabulary,
    bounds_D1: np.ndarray,
    spool: BinaryIO,
    dtype: np.dtype,
) -> None:
    rows = int(bounds_D1[-1])
    bounds = bounds_D1.astype("<i8").tobytes()
    directory.delete()
    arrays = {"tokens": ArraySpec((rows,), dtype.name, work.config.chunk_rows)}
    parents = {"vocabulary": vocabulary.fingerprint}
    manifest = artifacts.begin(directory, KIND, work.settings, parents, arrays)
    directory.write(BOUNDS_NAME, bounds)
    writer = ChunkWriter(directory, manifest)
    spool.seek(0)
    for chunk in range(len(writer)):
        start, stop = writer.rows(chunk)
        writer.write(chunk, tokens=np.frombuffer(spool.read((stop - start) * dtype.itemsize), dtype))
    writer.finish(
        **dataclasses.asdict(facts),
        tokens=rows,
        vocab_size=vocabulary.size,
        bounds_sha256=hashlib.sha256(bounds).hexdigest(),
    )
