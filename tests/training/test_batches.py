import itertools

import jax
import numpy as np
import pytest

from mlp_memory.training.batches import Batches


class Numbers:
    """Elements 0 .. n, each told apart by its number."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"number": np.int64(index), "values": np.full(3, index, np.float32)}


def numbers(source, batch, seed, first, steps) -> list[list[int]]:
    iterator = Batches(source, batch, seed).from_step(first)
    found = list(itertools.islice(iterator, steps))
    assert all((b["values"] == b["number"][:, None]).all() for b in found)
    return [b["number"].tolist() for b in found]


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_a_batch_is_a_function_of_seed_and_step_alone(rng, batch):
    source, seed = Numbers(int(rng.integers(5, 40))), int(rng.integers(1000))
    straight = numbers(source, batch, seed, 0, 20)
    assert numbers(source, batch, seed, 0, 20) == straight
    for first in rng.integers(0, 19, 3):
        assert numbers(source, batch, seed, int(first), 20 - int(first)) == straight[first:]
    assert numbers(source, batch, seed + 1, 0, 20) != straight


def test_an_epoch_holds_every_element_once_and_epochs_differ(rng):
    count, batch = int(rng.integers(20, 60)), int(rng.integers(2, 9))
    steps = -(-3 * count // batch)
    laid = list(itertools.chain(*numbers(Numbers(count), batch, 7, 0, steps)))
    epochs = [laid[i * count : (i + 1) * count] for i in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(count))
        assert epoch != sorted(epoch)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_batch_larger_than_the_source_goes_on_into_the_next_epoch():
    (found,) = numbers(Numbers(3), 8, 0, 0, 1)
    assert sorted(found[:3]) == sorted(found[3:6]) == [0, 1, 2]


@pytest.mark.parametrize("processes", [2, 8])
def test_processes_together_read_the_batches_of_one(rng, monkeypatch, processes):
    source, seed = Numbers(int(rng.integers(5, 40))), int(rng.integers(1000))
    straight = numbers(source, 8, seed, 0, 9)
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    parts = []
    for process in range(processes):
        monkeypatch.setattr(jax, "process_index", lambda p=process: p)
        parts.append(numbers(source, 8, seed, 3, 6))
    assert [[n for part in parts for n in part[i]] for i in range(6)] == straight[3:]
