"""The `tokenize` stage: text in, WORKDIR/corpus out.

Documents are read and counted first, so that bad input is found before TensorFlow is even
imported. A document's rows are bos, its pieces, eos: the first real token is predicted
too, and only the eos row has no next token.
"""

import dataclasses
import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from mlp_memory import artifacts
from mlp_memory.arrays import ChunkWriter
from mlp_memory.artifacts import ArraySpec, Directory, Manifest, UserError
from mlp_memory.corpus import units, vocabulary_files, vocabulary_training
from mlp_memory.corpus.config import SPLITS, CorpusConfig, PartConfig
from mlp_memory.corpus.documents import Files, file_sha256, fingerprints, input_files, naming_part
from mlp_memory.corpus.split import SplitFacts, count_whole, read_split, read_whole, scan
from mlp_memory.corpus.stream import BOUNDS_NAME, KIND, TokenStream
from mlp_memory.corpus.vocabulary import KIND as VOCABULARY_KIND
from mlp_memory.corpus.vocabulary import Vocabulary
from mlp_memory.corpus.vocabulary_files import SENTENCEPIECE


@dataclasses.dataclass(frozen=True)
class _Work:
    """What parts of the corpus are made from; `settings` is what their manifests record."""

    config: CorpusConfig
    settings: dict[str, Any]
    facts: dict[str, SplitFacts]
    texts: Callable[[str], Iterator[str]]


def tokenize(
    directory: Directory, config: CorpusConfig, tokenizer: Mapping[str, bytes] | None = None
) -> None:
    """Writes `vocabulary`, `train`, `validation`, `test` and the texts elsewhere, as far as they are missing.

    The bytes depend on the texts and the config alone, however often the work was
    interrupted. A part that is unfinished or damaged is made again.

    Args:
      directory: WORKDIR/corpus.
      config: the texts, the splits and the vocabulary.
      tokenizer: files of the one to take over where config.vocab_file names none; None
        trains one.

    Raises:
      UserError: bad input, or `directory` holds a corpus of another config or other texts.
    """
    _tokenize_splits(directory, config, tokenizer)
    for name, source in config.elsewhere.items():
        with naming_part(name, "elsewhere"):
            _tokenize_elsewhere(directory, name, config, source)


def _tokenize_splits(
    directory: Directory, config: CorpusConfig, tokenizer: Mapping[str, bytes] | None
) -> None:
    found = {name: artifacts.peek(directory / name) for name in ("vocabulary", *SPLITS)}
    _require_same(directory, found, _settings(config, tokenizer))
    missing = [name for name, manifest in found.items() if not _is_whole(directory / name, manifest)]
    if not missing:
        _require_same_inputs(directory, found, config, tokenizer)
        return

    files = input_files(config)
    given = None
    if config.vocab_file:
        given = Vocabulary.from_path(config.vocab_file, *_borders(config), config.lossless)
    elif tokenizer is not None:
        given = Vocabulary(tokenizer, "the tokenizer of pretrained.source", "", *_borders(config))
    settings = _settings(config, tokenizer) | {"inputs": _inputs(config, files)}
    _require_same(directory, found, settings)
    facts = scan(config, files)
    work = _Work(config, settings, facts, lambda split: read_split(config, files, split, facts))
    if "vocabulary" in missing:
        _write_vocabulary(directory / "vocabulary", work, given)
    vocabulary = Vocabulary.load(directory / "vocabulary")
    for split in SPLITS:
        if split in missing:
            _write_split(directory, work, vocabulary, split)


def _tokenize_elsewhere(directory: Directory, name: str, config: CorpusConfig, source: PartConfig) -> None:
    vocabulary, made = Vocabulary.load(directory / "vocabulary"), artifacts.peek(directory / name)
    if _is_whole(directory / name, made) and made.parents == {"vocabulary": vocabulary.fingerprint}:
        _require_same_elsewhere(directory / name, source)
        return
    files = input_files(source)
    settings = {**artifacts.config_dict(source), "inputs": fingerprints(source, files)}
    facts = {name: count_whole(source, files)}
    work = _Work(config, settings, facts, lambda _: read_whole(source, files))
    _write_split(directory, work, vocabulary, name)


def _require_same_elsewhere(directory: Directory, source: PartConfig) -> None:
    """Raises `UserError` where a whole text elsewhere was made otherwise, or its files have changed since."""
    try:
        inputs = fingerprints(source, input_files(source))
    except UserError:  # it outlives its input
        inputs = None
    manifest = artifacts.peek(directory)
    if source.source == "python_docs" or inputs is None:
        inputs = manifest.config.get("inputs")
    settings = {**artifacts.config_dict(source), "inputs": inputs}
    artifacts.require_same(directory, manifest, Manifest(manifest.kind, settings, manifest.parents))


def require_same_corpus(
    directory: Directory, config: CorpusConfig, tokenizer: Mapping[str, bytes] | None = None
) -> None:
    """Raises `UserError` where what is there was made with another config or from other texts."""
    found = {name: artifacts.peek(directory / name) for name in ("vocabulary", *SPLITS)}
    _require_same(directory, found, _settings(config, tokenizer))
    _require_same_inputs(directory, found, config, tokenizer)
    for name, source in config.elsewhere.items():
        if (made := artifacts.peek(directory / name)) is not None and made.finished:
            with naming_part(name, "elsewhere"):
                _require_same_elsewhere(directory / name, source)


def _settings(config: CorpusConfig, tokenizer: Mapping[str, bytes] | None) -> dict[str, Any]:
    """What decides the corpus's bytes, beside the texts."""
    settings = artifacts.config_dict(config)
    if tokenizer is not None and not config.vocab_file:
        settings["tokenizer"] = {name: artifacts.digest(data) for name, data in sorted(tokenizer.items())}
    return settings


def _is_whole(directory: Directory, manifest: Manifest | None) -> bool:
    """Whether a part is finished and undamaged; such a part's checksums.json is written where it is lost."""
    if manifest is None or not manifest.finished:
        return False
    try:
        Vocabulary.load(directory) if manifest.kind == VOCABULARY_KIND else TokenStream.open(directory)
    except UserError:
        return False
    artifacts.reseal(directory, manifest)
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
    directory: Directory,
    found: dict[str, Manifest | None],
    config: CorpusConfig,
    tokenizer: Mapping[str, bytes] | None,
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
    _require_same(directory, found, _settings(config, tokenizer) | {"inputs": inputs})


def _inputs(config: CorpusConfig, files: Files) -> dict[str, str]:
    """What texts and vocabulary come from: each file's sha256, the version of Python."""
    inputs = fingerprints(config, files)
    if config.vocab_file:
        inputs |= {str(p): file_sha256(p) for p in vocabulary_files.find(config.vocab_file).values()}
    return inputs


def _write_vocabulary(directory: Directory, work: _Work, given: Vocabulary | None) -> None:
    if given is None:
        model = vocabulary_training.train(
            work.texts("train"), work.facts["train"].bytes, work.config.vocab_size
        )
        given = Vocabulary({SENTENCEPIECE: model}, "the trained vocabulary", "", *_borders(work.config))
    directory.delete()
    given.save(directory, work.settings)


def _borders(config: CorpusConfig) -> tuple[str | None, str | None]:
    return config.bos, config.eos


def _write_split(directory: Directory, work: _Work, vocabulary: Vocabulary, split: str) -> None:
    parents, facts = {"vocabulary": vocabulary.fingerprint}, work.facts[split]
    _clear(directory / split, parents)
    dtype = np.dtype("<u2" if vocabulary.size <= 1 << 16 else "<u4")
    encoded = units.encode_split(
        directory / split,
        directory / "vocabulary",
        work.texts(split),
        facts.bytes,
        dtype,
        work.config.workers,
    )
    lengths_D = np.concatenate([unit.lengths_D for unit in encoded]) if encoded else np.zeros(0, np.int64)
    if len(lengths_D) != facts.documents:
        raise UserError(
            f"the {split} split had {facts.documents} documents when it was checked and has "
            f"{len(lengths_D)} now: were the files changed? Run tokenize again"
        )
    if lossy := sum(unit.lossy for unit in encoded):
        print(
            f"{split}: {lossy:,} of {facts.documents:,} documents cannot be told exactly from their tokens: "
            "this tokenizer changes texts",
            file=sys.stderr,
        )
    _write_stream(directory / split, work, facts, vocabulary, encoded, lengths_D, dtype)


def _clear(directory: Directory, parents: dict[str, str]) -> None:
    """Removes all but what an earlier, unfinished run can give to this one."""
    manifest = artifacts.peek(directory)
    if manifest is None:
        for name in ("tokens", "chunks"):
            (directory / name).delete()
    elif manifest.finished or manifest.parents != parents:
        directory.delete()


def _write_stream(
    directory: Directory,
    work: _Work,
    facts: SplitFacts,
    vocabulary: Vocabulary,
    encoded: list[units.Encoded],
    lengths_D: np.ndarray,
    dtype: np.dtype,
) -> None:
    bounds_D1 = np.concatenate([[0], np.cumsum(lengths_D)])
    rows, bounds = int(bounds_D1[-1]), bounds_D1.astype("<i8").tobytes()
    arrays = {"tokens": ArraySpec((rows,), dtype.name, work.config.chunk_rows)}
    parents = {"vocabulary": vocabulary.fingerprint}
    manifest = artifacts.begin(directory, KIND, work.settings, parents, arrays)
    directory.write(BOUNDS_NAME, bounds)
    writer = ChunkWriter(directory, manifest)
    pieces = (units.read_tokens(directory, unit) for unit in encoded)
    for chunk, tokens_T in enumerate(_rechunk(pieces, writer.chunk_rows)):
        writer.write(chunk, tokens=tokens_T)
    writer.finish(
        **dataclasses.asdict(facts),
        lossy_documents=sum(unit.lossy for unit in encoded),
        tokens=rows,
        vocab_size=vocabulary.size,
        bounds_sha256=hashlib.sha256(bounds).hexdigest(),
    )


def _rechunk(pieces: Iterable[np.ndarray], rows: int) -> Iterator[np.ndarray]:
    """The same values in arrays of `rows` each, the last as long as it comes."""
    kept, count = [], 0
    for piece_T in pieces:
        kept.append(piece_T)
        count += len(piece_T)
        if count >= rows:
            joined_T = np.concatenate(kept)
            whole = count - count % rows
            yield from np.split(joined_T[:whole], whole // rows)
            kept, count = [joined_T[whole:]], count - whole
    if count:
        yield np.concatenate(kept)
