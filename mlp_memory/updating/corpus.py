"""The train stream of an update: the base's, deleted documents emptied, new ones behind it."""

import hashlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from mlp_memory import artifacts
from mlp_memory.arrays import ChunkWriter
from mlp_memory.artifacts import ArraySpec, Directory, UserError
from mlp_memory.corpus import units
from mlp_memory.corpus.documents import read_file
from mlp_memory.corpus.split import count_words
from mlp_memory.corpus.stream import BOUNDS_NAME, DELETED_NAME, KIND, TokenStream
from mlp_memory.corpus.vocabulary import Vocabulary
from mlp_memory.targets.overlap import document_digests
from mlp_memory.updating.request import Request

_NAMED = 5


class Documents:
    """Documents as a stream: their tokens, bos and eos around, and where each begins."""

    deleted_D = np.zeros(0, np.bool_)

    def __init__(self, tokens_N: np.ndarray, bounds_D1: np.ndarray):
        self.tokens, self.bounds_D1 = tokens_N, bounds_D1

    def __len__(self) -> int:
        return len(self.tokens)


def update_corpus(corpus: Directory, request: Request, request_digest: str, workers: int | None) -> None:
    """Writes `train` of an update's corpus; its vocabulary and held-out splits are there.

    Documents to add that the stream has already are left out. Facts beside those of a corpus:
    added_documents, deleted_documents (all so far), deleted_sha256, update (the request's record).

    Args:
      corpus: WORKDIR/corpus.
      request: what to add and delete.
      request_digest: of its record; a parent of the stream.
      workers: processes that tokenise.

    Raises:
      UserError: a file cannot be read, a document to delete is not there, nothing is left to do.
    """
    directory, base = corpus / "train", TokenStream.open(request.base / "corpus/train")
    vocabulary = Vocabulary.load(corpus / "vocabulary")
    dtype = base.tokens.dtype
    known_Dx2 = document_digests(base)
    deleted_D = base.deleted_D.copy()
    deleted_D[_to_delete(corpus, request, base, known_Dx2, vocabulary)] = True
    texts = list(_texts(request, request.add))
    encoded = _encode(directory, corpus, texts, dtype, workers)
    fresh = _fresh(encoded, known_Dx2[~deleted_D])
    if left_out := len(texts) - len(fresh):
        line = f"update: {left_out} of {len(texts)} documents are in the train stream already: left out"
        print(line, file=sys.stderr)
    if not len(fresh) and not (deleted_D & ~base.deleted_D).any():
        raise UserError("update: nothing to do, all documents are in the train stream already")
    added_D = np.diff(encoded.bounds_D1)[fresh]
    bounds_D1 = np.concatenate([base.bounds_D1, base.bounds_D1[-1] + np.cumsum(added_D)])
    deleted = np.flatnonzero(deleted_D)
    files = {BOUNDS_NAME: bounds_D1.astype("<i8").tobytes()}
    if len(deleted):
        files[DELETED_NAME] = deleted.astype("<i8").tobytes()
    made_from = base.manifest
    spec = ArraySpec((int(bounds_D1[-1]),), dtype.name, made_from.arrays["tokens"].chunk_rows)
    parents = made_from.parents | {"update": request_digest}
    manifest = artifacts.begin(directory, KIND, made_from.config, parents, {"tokens": spec})
    for name, data in files.items():
        directory.write(name, data)
    new_N = np.concatenate([encoded.tokens[a:b] for a, b in _extents(encoded, fresh)] or [np.zeros(0, dtype)])
    writer = ChunkWriter(directory, manifest)
    _write_tokens(writer, request.base / "corpus/train", base, deleted_D, new_N.astype(dtype))
    facts = _facts(base, vocabulary, deleted_D, [texts[d] for d in fresh.tolist()])
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    facts |= {"bounds_sha256": hashes[BOUNDS_NAME], "tokens": int(bounds_D1[-1]), "update": request.record}
    facts |= {"deleted_sha256": hashes[DELETED_NAME]} if len(deleted) else {}
    writer.finish(**facts)


def _texts(request: Request, names: tuple[str, ...]) -> Iterator[str]:
    for source, path in request.parts(names):
        yield from (text for text in read_file(source, path) if text)


def _encode(
    directory: Directory, corpus: Directory, texts: list[str], dtype: np.dtype, workers: int | None
) -> Documents:
    """The documents' tokens; what an earlier start has encoded is taken up."""
    if not texts:
        return Documents(np.zeros(0, dtype), np.zeros(1, np.int64))
    size = sum(len(text.encode()) for text in texts)
    found = units.encode_split(directory, corpus / "vocabulary", texts, size, dtype, workers)
    lengths_D = np.concatenate([unit.lengths_D for unit in found])
    tokens_N = np.concatenate([units.read_tokens(directory, unit) for unit in found])
    return Documents(tokens_N, np.concatenate([[0], np.cumsum(lengths_D)]))


def _to_delete(
    corpus: Directory, request: Request, base: TokenStream, known_Dx2: np.ndarray, vocabulary: Vocabulary
) -> list[int]:
    """Numbers of all documents to delete."""
    documents = len(base.bounds_D1) - 1
    if unknown := [number for number in request.delete if number >= documents]:
        raise UserError(f"--delete: there is no document {unknown[0]}, the train stream has {documents:,}")
    if gone := [number for number in request.delete if base.deleted_D[number]]:
        raise UserError(f"--delete: document {gone[0]} has been deleted already")
    if not request.delete_files:
        return list(request.delete)
    # A document is what its tokens say, however it is spelt in a file.
    of_text = [
        np.array([vocabulary.bos, *vocabulary.encode(text), vocabulary.eos])
        for text in _texts(request, request.delete_files)
    ]
    bounds_D1 = np.concatenate([[0], np.cumsum([len(ids_T) for ids_T in of_text])]).astype(np.int64)
    wanted = document_digests(Documents(np.concatenate(of_text), bounds_D1))
    number_of: dict[bytes, list[int]] = {}
    for number in np.flatnonzero(~base.deleted_D).tolist():
        number_of.setdefault(known_Dx2[number].tobytes(), []).append(number)
    missing = [place for place, key in enumerate(wanted) if key.tobytes() not in number_of]
    if missing:
        shown = "; ".join(vocabulary.decode(of_text[place][:12])[:50] for place in missing[:_NAMED])
        raise UserError(
            f"--delete: {len(missing)} of {len(wanted)} documents are not in the train stream: {shown!r}"
        )
    return [*request.delete, *(number for key in wanted for number in number_of[key.tobytes()])]


def _fresh(encoded: Documents, known_Dx2: np.ndarray) -> np.ndarray:
    """Numbers of the documents that are neither known nor there twice, int64."""
    seen = {key.tobytes() for key in known_Dx2}
    fresh = []
    for number, key in enumerate(document_digests(encoded)):
        if key.tobytes() not in seen:
            seen.add(key.tobytes())
            fresh.append(number)
    return np.array(fresh, np.int64)


def _extents(encoded: Documents, numbers: np.ndarray) -> list[tuple[int, int]]:
    return [(int(encoded.bounds_D1[d]), int(encoded.bounds_D1[d + 1])) for d in numbers]


def _write_tokens(
    writer: ChunkWriter, source: Directory, base: TokenStream, deleted_D: np.ndarray, new_N: np.ndarray
) -> None:
    """The chunks: the base's own where none of its documents in them has been deleted since."""
    rows, emptied_D = len(base), deleted_D & ~base.deleted_D
    writer.adopt(source, base.manifest, lambda a, b: not emptied_D[base.document_ids(a, b)].any())
    for chunk in writer.missing():
        start, stop = writer.rows(chunk)
        first, last = min(start, rows), min(stop, rows)
        old_T = np.where(deleted_D[base.document_ids(first, last)], 0, base.tokens[first:last])
        new_T = new_N[max(start - rows, 0) : max(stop - rows, 0)]
        writer.write(chunk, tokens=np.concatenate([old_T.astype(new_T.dtype), new_T]))


def _facts(
    base: TokenStream, vocabulary: Vocabulary, deleted_D: np.ndarray, added: Iterable[str]
) -> dict[str, Any]:
    """Counts: what the base had, less what is gone now, and what has been added."""
    facts, added = dict(base.manifest.facts), list(added)
    gone = [
        vocabulary.decode(base.tokens[base.bounds_D1[d] : base.bounds_D1[d + 1]])
        for d in np.flatnonzero(deleted_D & ~base.deleted_D).tolist()
    ]
    convention = facts["word_count"] if "+" not in facts["word_count"] else "whitespace"
    for texts, sign in ((gone, -1), (added, 1)):
        facts["documents"] += sign * len(texts)
        facts["words"] += sign * sum(count_words(text, convention) for text in texts)
        facts["bytes"] += sign * sum(len(text.encode()) for text in texts)
    return facts | {"added_documents": len(added), "deleted_documents": int(deleted_D.sum())}
