import dataclasses
import json
import math

import numpy as np
import pytest

from mlp_memory.artifacts import UserError, canonical_json
from mlp_memory.targets.certificate import (
    certificate_lines,
    certificate_table,
    certify_search,
    check_goal,
    complete,
    draw_sample,
)
from mlp_memory.targets.config import RetrieveConfig
from mlp_memory.targets.divergence import divergence

N, K, Q, TAU = 5000, 24, 200, 7.0
SHARDS = [(0, 2000), (2000, 4000), (4000, N), (N, N)]
CONFIG = RetrieveConfig(k=K, top_m=6, certificate_rows=Q)
SETTINGS = {
    "choice": {"how": "least validation loss", "lambda": 0.25, "nll": [[1.0]]},
    "candidates": K + 1,
    "shards": SHARDS,
    "scored_rows": N - 40,
}


def world(rng, lost=0.15, queries=Q):
    """Exact lists, lists of which some neighbours were lost to farther ones, and labels."""
    labels = (rng.zipf(1.4, N) % 50).astype(np.int32)
    every = np.stack([rng.permutation(N)[: 2 * K] for _ in range(queries)]).astype(np.int64)
    sqdist = np.sort(rng.gamma(2.0, 10.0, every.shape), axis=1).astype(np.float32)
    length = np.where(rng.random(queries) < 0.1, rng.integers(0, K, queries), 2 * K)
    length[:2] = 0, 3
    absent = np.arange(2 * K) >= length[:, None]
    every[absent], sqdist[absent] = -1, np.inf
    exact = every[:, :K].copy(), sqdist[:, :K].copy()
    # What is missed goes to the end of the line.
    order = np.argsort(rng.random(every.shape) < lost, axis=1, kind="stable")[:, :K]
    order.sort(axis=1)
    found = np.take_along_axis(every, order, 1), np.take_along_axis(sqdist, order, 1)
    short = np.argsort(found[0] < 0, axis=1, kind="stable")
    found = tuple(np.take_along_axis(part, short, 1) for part in found)
    return found, exact, labels


def naive_teacher(rows, sqdist, labels, top=None):
    mass = {}
    for row, d in zip(rows, sqdist):
        if row >= 0:
            token = int(labels[row])
            mass[token] = mass.get(token, 0.0) + math.exp(-(float(d) - float(sqdist.min())) / TAU)
    best = sorted(mass, key=lambda token: (-mass[token], token))[:top]
    total = sum(mass[token] for token in best)
    return {token: mass[token] / total for token in best}


def naive_tv(p, q):
    if not p or not q:
        return float(bool(p))
    return 0.5 * sum(abs(p.get(t, 0.0) - q.get(t, 0.0)) for t in {*p, *q})


def naive_skew(p, q):
    return sum(x * math.log(x / (0.99 * q.get(t, 0.0) + 0.01 * x)) for t, x in p.items())


def test_figures_are_those_of_a_loop_over_the_rows():
    rng = np.random.default_rng()
    found, exact, labels = world(rng)
    certificate = certify_search(found, exact, labels, TAU, CONFIG, **SETTINGS)
    recalls, tvs, skews, infinite, written_tvs, written_infinite = [], [], [], [], [], []
    hits = {shard: [0, 0] for shard in SHARDS}
    for (fr, fd), (er, ed) in zip(zip(*found), zip(*exact)):
        true, got = set(er[er >= 0].tolist()), set(fr[fr >= 0].tolist())
        if true:
            recalls.append(len(true & got) / len(true))
        for shard in SHARDS:
            inside = {row for row in true if shard[0] <= row < shard[1]}
            hits[shard][0] += len(inside & got)
            hits[shard][1] += len(inside)
        p, q = naive_teacher(er, ed, labels), naive_teacher(fr, fd, labels)
        tvs.append(naive_tv(p, q))
        skews.append(naive_skew(p, q))
        infinite.append(not set(p) <= set(q))
        q = naive_teacher(fr, fd, labels, CONFIG.top_m)
        q = {t: float(np.float16(x)) for t, x in q.items()}
        q = {t: x / sum(q.values()) for t, x in q.items()}
        written_tvs.append(naive_tv(p, q))
        written_infinite.append(not set(p) <= set(q))
    assert certificate["recall"]["mean"] == pytest.approx(np.mean(recalls), abs=1e-6)
    assert certificate["recall"]["percentiles"]["5"] == pytest.approx(np.percentile(recalls, 5), abs=1e-6)
    search, written = certificate["search"], certificate["as_written"]
    assert search["tv"]["mean"] == pytest.approx(np.mean(tvs), abs=1e-5)
    assert search["tv"]["percentiles"]["95"] == pytest.approx(np.percentile(tvs, 95), abs=1e-5)
    assert search["skew_kl"]["mean"] == pytest.approx(np.mean(skews), abs=1e-5)
    assert search["kl_infinite_share"] == pytest.approx(np.mean(infinite), abs=1e-6)
    assert written["tv"]["mean"] == pytest.approx(np.mean(written_tvs), rel=1e-3)
    assert written["kl_infinite_share"] == pytest.approx(np.mean(written_infinite), abs=1e-6)
    assert 0.5 < certificate["recall"]["mean"] < 1
    assert 0 < search["tv"]["mean"] < written["tv"]["mean"]
    for shard, part in zip(SHARDS, certificate["shards"]):
        assert part["rows"] == list(shard)
        assert part["exact_neighbours"] == hits[shard][1]
        if hits[shard][1]:
            assert part["recall"]["mean"] == pytest.approx(hits[shard][0] / hits[shard][1], abs=1e-6)
    assert certificate["shards"][3]["recall"]["mean"] is None
    # With some hundred rows, the bootstrap's interval is nearly the normal one.
    half = 1.96 * np.std(tvs) / math.sqrt(Q)
    low, high = search["tv"]["interval"]
    assert low == pytest.approx(np.mean(tvs) - half, abs=0.25 * half)
    assert high == pytest.approx(np.mean(tvs) + half, abs=0.25 * half)


def test_a_search_that_misses_nothing_is_certified_without_error():
    rng = np.random.default_rng()
    _, exact, labels = world(rng)
    certificate = certify_search(exact, exact, labels, TAU, CONFIG, **SETTINGS)
    assert certificate["recall"]["interval"] == [1.0, 1.0]
    assert certificate["search"]["tv"]["mean"] == certificate["search"]["skew_kl"]["mean"] == 0.0
    assert certificate["search"]["kl_infinite_share"] == 0.0
    assert certificate["as_written"]["tv"]["mean"] > 0  # the cut to top_m is no search's error
    whole = dataclasses.replace(CONFIG, top_m=K)
    certificate = certify_search(exact, exact, labels, TAU, whole, **SETTINGS)
    assert 0 < certificate["as_written"]["tv"]["mean"] < 2**-11  # float16 alone


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng()
    inside, trials = 0, 120
    for seed in range(trials):
        value = rng.random(300) < 0.3
        rows = np.where(value, 1, 2)[:, None].astype(np.int64)
        exact = np.ones((300, 1), np.int64), np.zeros((300, 1), np.float32)
        config = dataclasses.replace(CONFIG, k=1, top_m=1, certificate_seed=seed)
        found = rows, exact[1]
        figures = certify_search(found, exact, np.arange(N, dtype=np.int32), 1.0, config, **SETTINGS)
        low, high = figures["recall"]["interval"]
        inside += low <= 0.3 <= high
    # 95 % of 120 is 114; fewer than 100 has a chance below 1e-4, with a true level of 93 % too.
    assert inside >= 100


def test_the_certificate_is_plain_json_and_repeats():
    found, exact, labels = world(np.random.default_rng())
    text = canonical_json(certify_search(found, exact, labels, TAU, CONFIG, **SETTINGS))
    assert text == canonical_json(certify_search(found, exact, labels, TAU, CONFIG, **SETTINGS))
    accepting = dataclasses.replace(CONFIG, accept_below_goal=True)
    assert text == canonical_json(certify_search(found, exact, labels, TAU, accepting, **SETTINGS))
    assert "nll" not in text
    other = dataclasses.replace(CONFIG, certificate_seed=1)
    assert text != canonical_json(certify_search(found, exact, labels, TAU, other, **SETTINGS))


def test_a_sample_without_neighbours_has_no_recall_and_meets_the_goal():
    none = np.full((1, K), -1), np.full((1, K), np.inf, np.float32)
    certificate = certify_search(none, none, np.zeros(1, np.int32), TAU, CONFIG, **SETTINGS)
    assert certificate["recall"]["mean"] is None
    check_goal(certificate, CONFIG)
    done = complete(certificate, [(np.zeros(1, np.float32), np.zeros(1, int))])
    assert f"recall@{K}" in certificate_table(done)
    canonical_json(done)


def test_the_goal_is_refused_only_when_the_interval_rules_it_out(capsys):
    found, exact, labels = world(np.random.default_rng())
    certificate = certify_search(found, exact, labels, TAU, CONFIG, **SETTINGS)
    low, high = certificate["recall"]["interval"]
    tv_low, tv_high = certificate["search"]["tv"]["interval"]
    assert low < high
    assert tv_low < tv_high

    def check(**goals):
        check_goal(certificate, dataclasses.replace(CONFIG, **goals))

    check(goal_recall=high, goal_tv=tv_low)
    with pytest.raises(UserError, match=rf"recall@{K} is 0\.\d+ .*goal_recall = .*raise index.target_recall"):
        check(goal_recall=high + 1e-6, goal_tv=1.0)
    with pytest.raises(UserError, match=r"total variation .*retrieve.goal_tv = .*accept_below_goal"):
        check(goal_recall=0.0, goal_tv=tv_low - 1e-6)
    with pytest.raises(UserError, match=r"recall@.*total variation") as refused:
        check(goal_recall=1.0, goal_tv=0.0)
    assert "\n" not in str(refused.value)
    assert capsys.readouterr().err == ""
    check(goal_recall=1.0, goal_tv=0.0, accept_below_goal=True)
    err = capsys.readouterr().err
    assert err.startswith(f"retrieve: recall@{K} is ")
    assert err.endswith("; accepted\n")
    strict = dataclasses.replace(CONFIG, goal_recall=1.0, goal_tv=0.0)
    goal = certify_search(found, exact, labels, TAU, strict, **SETTINGS)["goal"]
    assert goal == {"recall": 1.0, "tv": 0.0, "recall_missed": True, "tv_missed": True, "met": False}


def test_what_the_finished_targets_tell_is_added_block_by_block():
    rng = np.random.default_rng()
    found, exact, labels = world(rng)
    certificate = certify_search(found, exact, labels, TAU, CONFIG, **SETTINGS)
    kept = rng.beta(8, 1, 3000).astype(np.float32)
    neighbours = np.where(rng.random(3000) < 0.2, rng.integers(0, K, 3000), K)
    kept[neighbours == 0] = 0
    cuts = np.sort(rng.integers(0, 3000, 5))
    blocks = list(zip(np.split(kept, cuts), np.split(neighbours, cuts)))
    done = complete(certificate, iter(blocks), {"ngram": 13, "splits": {}, "train": {"copies": 0}})
    assert done["rows"] == {
        "rows": 3000,
        "fewer_than_k": int((neighbours < K).sum()),
        "share_fewer_than_k": round(float((neighbours < K).mean()), 6),
        "without_neighbours": int((neighbours == 0).sum()),
    }
    assert done["kept_mass"]["mean"] == pytest.approx(kept.mean(dtype=np.float64), abs=1e-6)
    for p, got in done["kept_mass"]["percentiles"].items():
        want = np.percentile(kept, int(p), method="lower")
        assert want - 0.001 <= got <= want + 1e-5
    assert {name: done[name] for name in certificate} == certificate
    assert done == complete(certificate, [(kept, neighbours)], done["overlap"])


def test_the_table_shows_every_figure_also_after_a_round_trip():
    found, exact, labels = world(np.random.default_rng())
    config = dataclasses.replace(CONFIG, exclude_window=3, exclude_document=True, exclude_context=9)
    certificate = certify_search(found, exact, labels, TAU, config, **SETTINGS, approximate_recall=0.98)
    copy = {"scored": 200, "covered_share": 0.0125, "documents": 4, "copy_count": 1}
    repeats = {"documents": 99, "copies": 2, "copied_share": 0.003}
    audit = {"ngram": 13, "splits": {"test": copy}, "train": repeats}
    full = complete(certificate, [(np.full(9, 0.9, np.float32), np.full(9, K - 1))], audit)
    table = certificate_table(json.loads(canonical_json(full)))
    assert table.endswith("\n")
    for text in (
        f"{certificate['recall']['mean']:.4f} (95 %: ",
        f"{certificate['search']['tv']['mean']:.4f} (95 %: ",
        f"{certificate['as_written']['tv']['mean']:.4f} (95 %: ",
        "0.900 in the mean, 5 % of rows below 0.900",
        "9 of 9, 0 without any",
        "τ = 7, least validation loss",
        "the row itself, rows within 3 positions, rows of its document, rows with its last 9 tokens",
        "over 4 shards",
        "a recall of 0.98",
        "1.25% of 200 tokens in sequences of 13; 1 of 4 documents are copies",
        "2 of 99 (0.30% of rows)",
        "200 of 4,960 rows, seed 0",
    ):
        assert text in table
    assert len(certificate_lines(certificate)) < len(certificate_lines(full))


def test_the_sample_is_drawn_from_rows_with_a_next_token(make_stream):
    stream = make_stream(2000, mean_document=5)
    valid = np.flatnonzero(stream.has_next(0, len(stream)))
    everything = draw_sample(stream, dataclasses.replace(CONFIG, certificate_rows=5000))
    np.testing.assert_array_equal(everything, valid)
    one = draw_sample(stream, CONFIG)
    assert len(one) == len(set(one)) == Q
    assert set(one) <= set(valid)
    assert (np.diff(one) > 0).all()
    np.testing.assert_array_equal(one, draw_sample(stream, CONFIG))
    other = draw_sample(stream, dataclasses.replace(CONFIG, certificate_seed=1))
    assert set(one) != set(other)
    # The index chose its settings on other rows: no more of them are the same than by chance.
    tuned = np.random.default_rng(0).choice(valid, size=Q, replace=False)
    assert len(set(tuned) & set(one)) < Q / 2


def test_divergence_of_a_row_without_mass():
    tokens = np.array([[3, 4]])
    some, none = np.array([[0.5, 0.5]], np.float32), np.zeros((1, 2), np.float32)
    off = divergence(tokens, some, tokens, none)
    assert off.tv_Q == pytest.approx([1.0])
    assert off.skew_kl_Q == pytest.approx([math.log(100)])
    assert off.infinite_Q.tolist() == [True]
    for q in (none, some):
        off = divergence(tokens, none, tokens, q)
        assert (off.tv_Q.tolist(), off.skew_kl_Q.tolist(), off.infinite_Q.tolist()) == ([0], [0], [False])
