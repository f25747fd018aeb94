import jax
import numpy as np
import pytest

from mlp_memory.decoder.config import Tap
from mlp_memory.decoder.score import RowReader
from mlp_memory.decoder.windows import WindowPlan, WindowSource, batch_shapes, read, spread, window_arrays


def test_served_rows_tile_any_range_once_and_in_order(rng):
    for _ in range(200):
        context = int(rng.integers(1, 40))
        plan = WindowPlan(context, int(rng.integers(1, context + 1)))
        total = int(rng.integers(1, 200))
        start, stop = np.sort(rng.integers(0, total + 1, 2))
        served = [row for w in plan.windows(start, stop, total) for row in range(w.first, w.stop)]
        assert served == list(range(start, stop))


def test_a_row_is_served_by_the_window_that_gives_it_the_most_context(rng):
    for _ in range(50):
        context = int(rng.integers(1, 30))
        plan = WindowPlan(context, int(rng.integers(1, context + 1)))
        total = int(rng.integers(1, 120))
        starts = range(0, total, plan.stride)
        for w in plan.windows(0, total, total):
            for row in range(w.first, w.stop):
                holders = [s for s in starts if s <= row < s + context]
                assert w.start in holders
                assert row - w.start == max(row - s for s in holders)
                assert row - w.start >= min(row, context - plan.stride)


def test_the_window_that_serves_a_row_does_not_depend_on_the_range_asked_for(rng):
    plan, total = WindowPlan(13, 5), 90
    whole = {r: w.start for w in plan.windows(0, total, total) for r in range(w.first, w.stop)}
    for _ in range(50):
        start, stop = np.sort(rng.integers(0, total + 1, 2))
        for w in plan.windows(start, stop, total):
            assert all(whole[r] == w.start for r in range(w.first, w.stop))


def test_training_windows_hold_every_row_once(make_stream, rng):
    stream, context = make_stream(int(rng.integers(50, 90))), int(rng.integers(3, 20))
    source = WindowSource(stream, context)
    parts = [source[i] for i in range(len(source))]
    for name, planned in batch_shapes(1, context).items():
        assert (planned.shape, planned.dtype) == ((1, *parts[0][name].shape), parts[0][name].dtype)
    segments = np.concatenate([p["segments"] for p in parts])
    held = segments >= 0
    assert held.sum() == len(stream)
    tokens = np.concatenate([p["tokens"] for p in parts])[held]
    np.testing.assert_array_equal(tokens, stream.tokens[0 : len(stream)])
    np.testing.assert_array_equal(segments[held], stream.document_ids(0, len(stream)))
    weight = np.concatenate([p["weight"] for p in parts])
    assert weight.sum() == stream.num_scored
    assert (weight[~held] == 0).all()
    labels = np.concatenate([p["labels"] for p in parts])[held]
    rows = np.flatnonzero(weight[held])
    np.testing.assert_array_equal(labels[rows], stream.tokens[0 : len(stream)][rows + 1])
    assert [int(p["rows"]) for p in parts] == [i * context for i in range(len(source))]


def test_a_window_past_the_end_is_all_padding(make_stream):
    stream = make_stream(40)
    arrays = window_arrays(stream, len(stream), 8)
    assert (arrays["segments"] == -1).all()
    assert (arrays["weight"] == 0).all()


@pytest.fixture
def reading(decoders, make_decoder, make_stream, rng, mesh):
    """A stream, a plan, its reader, and each row's tap and log-probability computed alone."""
    model, stream = make_decoder(decoders["llama"]), make_stream(75)
    plan, tap = WindowPlan(12, 5), Tap(1, "ffn_input")
    run = jax.jit(
        lambda tokens: (model(tokens, tap=tap)[1], jax.nn.log_softmax(model.logits(model(tokens)[0])))
    )
    tokens, document = stream.tokens[0:75].astype(np.int32), stream.document_ids(0, 75)
    prefixes = np.zeros((75, 12), np.int32)
    last, windows = np.zeros(75, int), {}
    for w in plan.windows(0, 75, 75):
        windows |= {r: w.start for r in range(w.first, w.stop)}
    for row in range(75):
        first = max(windows[row], int(np.flatnonzero(document == document[row])[0]))
        prefixes[row, : row + 1 - first] = tokens[first : row + 1]
        last[row] = row - first
    taps, log_probs = map(np.asarray, run(prefixes))
    alone_taps = taps[np.arange(75), last]
    following = np.append(tokens[1:], 0)
    alone_log_probs = log_probs[np.arange(75), last, following]
    reader = RowReader(model, mesh, plan, tap, batch=4)
    return stream, reader, alone_taps, alone_log_probs


def test_a_row_is_read_as_it_would_be_alone_after_its_documents_prefix(reading):
    stream, reader, alone_taps, alone_log_probs = reading
    taps, log_probs = reader.taps_and_log_probs(stream, [(0, len(stream))])
    np.testing.assert_allclose(taps, alone_taps, atol=5e-5)
    scored = stream.has_next(0, len(stream))
    np.testing.assert_allclose(log_probs[scored], alone_log_probs[scored], atol=5e-5)
    np.testing.assert_allclose(reader.taps(stream, 0, len(stream)), taps, atol=1e-6)


def test_ranges_read_apart_are_the_rows_of_the_whole(reading, rng):
    stream, reader, *_ = reading
    taps, log_probs = reader.taps_and_log_probs(stream, [(0, len(stream))])
    for _ in range(6):
        start = int(rng.integers(0, len(stream)))
        stop = int(rng.integers(start + 1, len(stream) + 1))
        found = reader.taps_and_log_probs(stream, [(start, stop)])
        assert len(found[0]) == len(found[1]) == stop - start
        np.testing.assert_allclose(found[0], taps[start:stop], atol=1e-5)
        np.testing.assert_allclose(found[1], log_probs[start:stop], atol=1e-5)
        np.testing.assert_array_equal(reader.taps(stream, start, stop), reader.taps(stream, start, stop))


def test_several_ranges_are_read_one_after_the_other(reading, rng):
    stream, reader, *_ = reading
    taps, log_probs = reader.taps_and_log_probs(stream, [(0, len(stream))])
    ranges = [(3, 9), (20, 21), (21, 40), (70, 75)]
    rows = np.concatenate([np.arange(a, b) for a, b in ranges])
    found = reader.taps_and_log_probs(stream, ranges)
    np.testing.assert_allclose(found[0], taps[rows], atol=1e-5)
    np.testing.assert_allclose(found[1], log_probs[rows], atol=1e-5)
    np.testing.assert_array_equal(read(stream.labels, ranges), stream.labels(0, len(stream))[rows])


def test_spread_ranges_are_in_order_and_hold_as_many_rows_as_asked(rng):
    for _ in range(200):
        total = int(rng.integers(1, 5000))
        most = int(rng.integers(0, 6000))
        ranges = spread(total, most)
        rows = [row for a, b in ranges for row in range(a, b)]
        assert all(a < b for a, b in ranges)
        assert rows == sorted(set(rows))
        assert rows[0] >= 0
        assert rows[-1] < total
        wanted = min(most, total) if most else total
        assert wanted - 256 < len(rows) <= wanted
