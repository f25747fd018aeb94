import numpy as np
import pytest

from mlp_memory.artifacts import canonical_json
from mlp_memory.targets import ngrams, overlap
from mlp_memory.targets.overlap import audit, audit_warnings, document_digests


class Stream:
    def __init__(self, documents, dtype=np.uint16):
        self.documents = [[int(t) for t in d] for d in documents]
        self.tokens = np.array([t for d in self.documents for t in d], dtype)
        self.bounds_D1 = np.cumsum([0, *map(len, documents)]).astype(np.int64)
        self.deleted_D = np.zeros(len(documents), bool)

    def __len__(self):
        return len(self.tokens)


def random_documents(rng, count, vocab, mean=25):
    return [rng.integers(0, vocab, rng.integers(1, 2 * mean)).tolist() for _ in range(count)]


def grams_of(document, n):
    return {tuple(document[i : i + n]) for i in range(len(document) - n + 1)}


def covered(document, grams, n):
    rows = set()
    for i in range(len(document) - n + 1):
        if tuple(document[i : i + n]) in grams:
            rows |= set(range(i, i + n - 1))
    return len(rows)


def brute_force(train, held, n):
    """Per held-out document: (rows covered by any, most rows of one, the first such train document)."""
    sets = [grams_of(d, n) for d in train.documents]
    union = set().union(*sets) if sets else set()
    result = []
    for document in held.documents:
        if len(document) < n:
            twin = train.documents.index(document) if document in train.documents else -1
            most = [len(document) - 1 if i == twin else 0 for i in range(len(sets))]
            result.append((max(most, default=0), max(most, default=0), twin))
            continue
        most = [covered(document, grams, n) for grams in sets]
        best = int(np.argmax(most)) if any(most) else -1
        result.append((covered(document, union, n), max(most, default=0), best))
    return result


@pytest.fixture(params=[1 << 20, 17])
def block_rows(request, monkeypatch):
    """Blocks that hold everything, and blocks that no document fits into."""
    monkeypatch.setattr(ngrams, "_BLOCK_ROWS", request.param)
    monkeypatch.setattr(overlap, "_BLOCK_ROWS", request.param)
    monkeypatch.setattr(overlap, "_EXPANDED", 1 << 21 if request.param > 17 else 40)


@pytest.mark.usefixtures("block_rows")
@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@pytest.mark.parametrize("n", [2, 3, 5, 13])
def test_coverage_is_that_of_sets_of_ngrams(n, dtype):
    rng = np.random.default_rng()
    # A vocabulary in which chance repeats short n-grams; long ones are repeated on purpose.
    vocab = 8 if n < 13 else 60_000 if dtype == np.uint16 else 4_000_000_000
    train = random_documents(rng, 60, vocab)
    held = random_documents(rng, 12, vocab)
    for document in held[:8]:
        for source in rng.permutation(60)[:3]:
            a, size = rng.integers(0, len(train[source])), rng.integers(1, 20)
            at = rng.integers(0, len(document))
            document[at:at] = train[source][a : a + size]
    train, held = Stream(train, dtype), Stream(held, dtype)
    empty = Stream([], dtype)
    found = audit(train, {"validation": held, "nothing": empty, "again": held}, n)
    want = brute_force(train, held, n)
    for name in ("validation", "again"):
        part = found["splits"][name]
        assert part["scored"] == len(held) - 12
        assert part["documents"] == 12
        assert part["covered"] == sum(any_ for any_, _, _ in want)
        assert part["covered_share"] == pytest.approx(part["covered"] / part["scored"], abs=1e-6)
        scored = [len(d) - 1 for d in held.documents]
        shares = [most / max(s, 1) for (_, most, _), s in zip(want, scored)]
        assert part["share_in_one_document"]["50"] == pytest.approx(np.median(shares), abs=1e-6)
        copies = {
            d: best for d, ((_, _, best), share) in enumerate(zip(want, shares)) if best >= 0 and share >= 0.5
        }
        assert {c["document"]: c["train_document"] for c in part["copies"] if scored[c["document"]]} == {
            d: best for d, best in copies.items() if scored[d]
        }
        for copy in part["copies"]:
            assert copy["first_tokens"] == held.documents[copy["document"]][:24]
    assert found["splits"]["nothing"]["scored"] == found["splits"]["nothing"]["copy_count"] == 0
    canonical_json(found)


@pytest.mark.usefixtures("block_rows")
@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_a_planted_copy_of_held_out_text_is_named(dtype):
    rng = np.random.default_rng()
    train = random_documents(rng, 200, 5000, mean=80)
    test = random_documents(rng, 9, 5000, mean=80)
    victim, host = int(rng.integers(9)), int(rng.integers(200))
    test[victim] = rng.integers(0, 5000, 150).tolist()
    at = int(rng.integers(0, len(train[host]) + 1))
    train[host][at:at] = test[victim]
    train, test = Stream(train, dtype), Stream(test, dtype)
    found = audit(train, {"validation": Stream([], dtype), "test": test}, 13)
    (copy,) = found["splits"]["test"]["copies"]
    assert (copy["document"], copy["train_document"], copy["share"]) == (victim, host, 1.0)
    first = int(test.bounds_D1[victim])
    assert copy["rows"] == [first, first + 150]
    start, stop = copy["train_rows"]
    assert train.tokens[start:stop].tolist() == train.documents[host]
    (line,) = audit_warnings(found)
    assert line == (
        f"audit: test document {victim} (rows {first}..{first + 149}) is 100 % contained in train document "
        f"{host} (rows {start}..{stop - 1})"
    )


@pytest.mark.usefixtures("block_rows")
def test_a_partial_copy_is_named_from_half_of_the_document_on():
    rng = np.random.default_rng()
    for share in (0.45, 0.49, 0.5, 0.52, 0.97):
        train = random_documents(rng, 50, 5000, mean=40)
        test = [rng.integers(0, 5000, 401).tolist() for _ in range(3)]
        victim, host = int(rng.integers(3)), int(rng.integers(50))
        tokens = round(400 * share) + 1  # so many rows with their next token
        at = int(rng.integers(0, 401 - tokens + 1))
        train[host] += test[victim][at : at + tokens]
        found = audit(Stream(train), {"test": Stream(test)}, 13)
        part = found["splits"]["test"]
        assert part["covered"] == round(400 * share)
        assert part["share_in_one_document"]["100"] == pytest.approx(share, abs=1e-6)
        named = [(c["document"], c["train_document"], c["share"]) for c in part["copies"]]
        assert named == ([(victim, host, share)] if share >= 0.5 else [])


def test_text_put_together_from_many_documents_is_covered_but_no_copy():
    rng = np.random.default_rng()
    train = [rng.integers(0, 5000, 40).tolist() for _ in range(10)]
    test = [t for d in train for t in d]
    part = audit(Stream(train), {"test": Stream([test])}, 13)["splits"]["test"]
    assert part["covered"] == 10 * 39
    assert part["copy_count"] == 0
    assert part["share_in_one_document"]["100"] == pytest.approx(39 / 399, abs=1e-6)


@pytest.mark.usefixtures("block_rows")
@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_planted_duplicate_documents_are_named_with_their_first(dtype):
    rng = np.random.default_rng()
    train = random_documents(rng, 120, 50_000)
    train = [[*d, 50_000 + i] for i, d in enumerate(train)]  # none equal by chance
    planted = {}
    places = np.sort(rng.permutation(120)[:6]).tolist()
    for copy in places[3:]:
        source = int(rng.choice(places[:3]))
        train[copy], planted[copy] = list(train[source]), source
    stream = Stream(train, dtype)
    found = audit(stream, {}, 13)["train"]
    assert {p["document"]: p["first_document"] for p in found["pairs"]} == planted
    assert found["copies"] == 3
    assert found["copied_rows"] == sum(len(train[c]) for c in planted)
    assert found["copied_share"] == pytest.approx(found["copied_rows"] / len(stream), abs=1e-6)
    for pair in found["pairs"]:
        assert (
            stream.tokens[slice(*pair["rows"])].tolist() == stream.tokens[slice(*pair["first_rows"])].tolist()
        )
    lines = audit_warnings({"splits": {}, "train": found})
    assert len(lines) == 3
    assert f"train document {places[3]} " in lines[0]
    assert f"repeats train document {planted[places[3]]} " in lines[0]


def test_many_findings_are_counted_and_the_worst_are_named():
    rng = np.random.default_rng()
    test = [rng.integers(0, 5000, 60).tolist() for _ in range(130)]
    found = audit(Stream(test * 2), {"test": Stream(test)}, 13)
    assert found["splits"]["test"]["copy_count"] == found["train"]["copies"] == 130
    assert len(found["splits"]["test"]["copies"]) == len(found["train"]["pairs"]) == 100
    lines = audit_warnings(found)
    assert len(lines) == 12
    assert "125 more test documents" in lines[5]
    assert "125 more train documents" in lines[11]


def test_ngrams_of_equal_hash_are_told_apart(monkeypatch):
    rng = np.random.default_rng()
    real = ngrams.gram_hashes
    # 12 bits: about ten foreign n-grams have the hash of a held-out one.
    monkeypatch.setattr(
        ngrams, "gram_hashes", lambda tokens, n, seed=0: real(tokens, n, seed) & np.uint64(0xFFF << 52)
    )
    train, held = random_documents(rng, 80, 30), Stream([rng.integers(0, 30, 25).tolist()])
    held.documents[0][5:15] = train[7][:10]
    held, train = Stream(held.documents), Stream(train)
    part = audit(train, {"test": held}, 4)["splits"]["test"]
    want = brute_force(train, held, 4)
    assert part["covered"] == want[0][0]
    assert part["share_in_one_document"]["100"] == pytest.approx(want[0][1] / (len(held) - 1), abs=1e-6)


def test_held_out_ngrams_of_equal_hash_get_another_seed(monkeypatch):
    rng = np.random.default_rng()
    train, held = Stream(random_documents(rng, 30, 6)), Stream(random_documents(rng, 5, 6))
    want = audit(train, {"test": held}, 4)
    real, seeds = ngrams.gram_hashes, []

    def collide_at_first(tokens, n, seed=0):
        seeds.append(seed)
        return real(tokens, n, seed) & np.uint64((1 << 64) - 1 if seed > 1 else 0xF << 60)

    monkeypatch.setattr(ngrams, "gram_hashes", collide_at_first)
    assert audit(train, {"test": held}, 4) == want
    assert seeds == [0, 1, 2, 2]


def test_digests_depend_on_tokens_and_neither_on_dtype_nor_blocks(monkeypatch):
    rng = np.random.default_rng()
    documents = random_documents(rng, 30, 9)
    whole = document_digests(Stream(documents))
    monkeypatch.setattr(overlap, "_BLOCK_ROWS", 7)
    np.testing.assert_array_equal(document_digests(Stream(documents, np.uint32)), whole)
    for i in range(30):
        for j in range(30):
            assert (documents[i] == documents[j]) == (whole[i] == whole[j]).all()


def test_the_audit_reads_a_stored_stream(make_stream):
    train, test = make_stream(900), make_stream(300)
    found = audit(train, {"test": test}, 3)
    want = brute_force(documents_of(train), documents_of(test), 3)
    assert found["splits"]["test"]["covered"] == sum(any_ for any_, _, _ in want)


def documents_of(stream):
    tokens = stream.tokens[0 : len(stream)]
    return Stream([tokens[a:b].tolist() for a, b in zip(stream.bounds_D1[:-1], stream.bounds_D1[1:])])
