import itertools

import numpy as np
import pytest

from mlp_memory.artifacts import Directory
from mlp_memory.evaluation.harness.kept import Kept
from mlp_memory.inference.continuations import Partner, Scored


def score(pairs):
    """Two tokens each, told apart by the texts' lengths."""
    base = np.array([-float(len(a) + i) for a, _ in pairs for i in (0, 1)], np.float32)
    other = np.array([-float(len(b) + i) for _, b in pairs for i in (0, 1)], np.float32)
    partner = Partner(other, base * 0 + 0.5, base * 0, base * 0 + 1)
    return Scored(np.full(len(pairs), 2), base, base > -3, {"memory": partner})


def same(a: Scored, b: Scored) -> bool:
    parts = [(a.counts_R, b.counts_R), (a.base_T, b.base_T), (a.greedy_T, b.greedy_T)]
    parts += list(zip(vars(a.partners["memory"]).values(), vars(b.partners["memory"]).values()))
    return all(np.array_equal(x, y) for x, y in parts)


@pytest.fixture
def pairs(rng):
    contexts = ["x" * int(n) for n in rng.permutation(np.arange(1, 12))]
    return [(context, "y" * int(rng.integers(1, 9))) for context in contexts for _ in range(3)]


def test_chunks_are_scored_once_and_keep_each_context_together(tmp_path, pairs):
    asked = []

    def counted(chunk):
        asked.append(chunk)
        return score(chunk)

    for _ in range(2):
        found = Kept(Directory(tmp_path), 4, {}).scored("base", "toy", pairs, counted)
        assert same(found, score(pairs))
    assert sum(map(len, asked)) == len(pairs)
    assert len(asked) > 1
    borders = [(one[-1][0], two[0][0]) for one, two in itertools.pairwise(asked)]
    assert all(before != after for before, after in borders)


def test_after_a_kill_only_what_is_missing_is_asked(tmp_path, pairs):
    asked = []

    def until_the_third(chunk):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(chunk)
        return score(chunk)

    with pytest.raises(KeyboardInterrupt):
        Kept(Directory(tmp_path), 4, {}).scored("base", "toy", pairs, until_the_third)
    rest = []
    found = Kept(Directory(tmp_path), 4, {}).scored(
        "base", "toy", pairs, lambda c: rest.append(c) or score(c)
    )
    assert same(found, score(pairs))
    assert [pair for chunk in asked + rest for pair in chunk] == pairs


def test_what_is_asked_otherwise_is_asked_again(tmp_path, pairs):
    def texts(settings, prompts):
        asked = []

        def generate(chunk):
            asked.extend(chunk)
            return [prompt.upper() for prompt in chunk]

        found = Kept(Directory(tmp_path), 2, settings).texts("base", "toy", prompts, generate)
        assert found == [prompt.upper() for prompt in prompts]
        return asked

    assert texts({"context": 1}, ["a", "b", "c"]) == ["a", "b", "c"]
    assert texts({"context": 1}, ["a", "b", "c"]) == []
    assert texts({"context": 2}, ["a", "b", "c"]) == ["a", "b", "c"]
    assert texts({"context": 1}, ["a", "b", "d"]) == ["d"]
