import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlp_memory.artifacts import Directory, UserError, peek
from mlp_memory.training.config import TrainConfig

PROGRAM = Path(__file__).with_name("toy.py")


@pytest.fixture(scope="module")
def toy():
    spec = importlib.util.spec_from_file_location("toy", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def config(toy, steps: int = 12, **settings) -> TrainConfig:
    return TrainConfig(steps=steps, **{**toy.SETTINGS, **settings})


def assert_same_parameters(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_training_lowers_the_loss_and_cleans_up(toy, tmp_path):
    manifest = toy.train_toy(tmp_path / "a", config(toy, 40))
    lines = [json.loads(line) for line in (tmp_path / "a/metrics.jsonl").read_text().splitlines()]
    validation = {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}
    assert list(validation) == [0, 5, 10, 15, 20, 25, 30, 35, 40]
    assert validation[40] < 0.5 * validation[0]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 41))
    assert manifest.finished
    assert manifest.facts["parameters"] == 8
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "checksums.json",
        "manifest.json",
        "metrics.jsonl",
        "model",
        "tensorboard",
    ]


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_gradients_are_those_of_the_whole_batch(toy, tmp_path, parts):
    toy.train_toy(tmp_path / "whole", config(toy, 10))
    toy.train_toy(tmp_path / "parts", config(toy, 10, accumulate=parts))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        toy.load_toy(tmp_path / "whole"),
        toy.load_toy(tmp_path / "parts"),
    )


def test_parts_of_a_batch_count_by_their_weight(toy, tmp_path):
    """One part without any weight changes nothing: the sum is divided once, by the whole weight."""

    def lopsided(index, element):
        return {**element, "weight": element["weight"] * (index % 2)}

    for name, parts in (("whole", 1), ("parts", 4)):
        source = toy.Points(change=lopsided)
        toy.train_toy(tmp_path / name, config(toy, 10, accumulate=parts), source)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        toy.load_toy(tmp_path / "whole"),
        toy.load_toy(tmp_path / "parts"),
    )


def test_a_batch_without_weight_leaves_finite_parameters(toy, tmp_path):
    source = toy.Points(change=lambda i, element: {**element, "weight": 0 * element["weight"]})
    toy.train_toy(tmp_path / "a", config(toy, 5), source)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(toy.load_toy(tmp_path / "a")))


def test_the_checkpoint_with_the_lowest_validation_loss_is_published(toy, tmp_path):
    losses, seen = iter([5.0, 3.0, 1.0, 2.0, 1.5, 4.0]), {}

    def evaluate(model):
        loss = next(losses)
        seen.setdefault(loss, jax.tree.map(np.asarray, [model.kernel[...], model.bias[...]]))
        return {"validation_loss": loss}

    manifest = toy.train_toy(tmp_path / "a", config(toy, 25), evaluate=evaluate)
    assert manifest.facts["step"] == 10
    assert manifest.facts["validation"] == {"validation_loss": 1.0}
    found = toy.load_toy(tmp_path / "a")
    np.testing.assert_array_equal(found["kernel"], seen[1.0][0])
    np.testing.assert_array_equal(found["bias"], seen[1.0][1])


def test_which_of_equally_good_checkpoints_is_published_does_not_depend_on_how_many_are_kept(toy, tmp_path):
    """Equal losses are not rare: while a memory is of no use, the best mixture is the decoder alone."""
    published = set()
    for keep in (1, 2, 10):
        losses = iter([5.0, 1.0, 1.0, 2.0, 1.0, 4.0])
        manifest = toy.train_toy(
            tmp_path / f"keep-{keep}",
            config(toy, 25, keep=keep),
            evaluate=lambda model, losses=losses: {"validation_loss": next(losses)},
        )
        published.add(manifest.facts["step"])
    assert len(published) == 1


def test_the_best_checkpoint_survives_a_restart_after_later_ones(toy, tmp_path):
    """The best one is older than the `keep` latest when the run stops and when it goes on."""
    by_step = {0: 5.0, 5: 1.0, 10: 2.0, 15: 3.0, 20: 4.0}
    steps = iter(by_step)

    def stopping(model):
        step = next(steps)
        if step == 15:
            raise KeyboardInterrupt
        return {"validation_loss": by_step[step]}

    with pytest.raises(KeyboardInterrupt):
        toy.train_toy(tmp_path / "a", config(toy, 20), evaluate=stopping)
    steps = iter([15, 20])
    manifest = toy.train_toy(
        tmp_path / "a", config(toy, 20), evaluate=lambda model: {"validation_loss": by_step[next(steps)]}
    )
    assert manifest.facts["step"] == 5


def test_no_steps_publish_the_initial_parameters(toy, tmp_path):
    manifest = toy.train_toy(tmp_path / "a", config(toy, 0))
    assert manifest.facts["step"] == 0
    start = {"kernel": jnp.arange(6.0).reshape(3, 2), "bias": jnp.ones(2)}
    toy.train_toy(tmp_path / "b", config(toy, 0), initial=start)
    assert_same_parameters(toy.load_toy(tmp_path / "b"), start)


def test_the_seed_decides_the_start(toy, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        toy.train_toy(tmp_path / name, config(toy, 0, seed=seed))
    a, b, c = (toy.load_toy(tmp_path / name) for name in "abc")
    assert_same_parameters(a, b)
    assert (a["kernel"] != c["kernel"]).any()


def poisoned(toy, step: int, settings: TrainConfig):
    """Points of which one that step `step` (from 1) reads first is not finite, and its rows."""
    batches = toy.Batches(toy.Points(), settings.batch_size, settings.seed)
    seen = set()
    for _, batch in zip(range(step - 1), batches.from_step(0)):
        seen |= set(batch["rows"].tolist())
    rows = next(batches.from_step(step - 1))["rows"].tolist()
    bad = next(row for row in rows if row not in seen)

    def change(index, element):
        return {**element, "x": element["x"] * (np.nan if 2 * index == bad else 1)}

    return toy.Points(change=change), rows


def test_a_loss_that_is_not_finite_stops_with_step_and_rows_and_keeps_the_checkpoint(toy, tmp_path):
    settings = config(toy, 30)
    source, rows = poisoned(toy, 7, settings)
    evaluate = {"evaluate": lambda model: {"validation_loss": float(model.bias[...].sum() ** 2)}}
    with pytest.raises(UserError) as stopped:
        toy.train_toy(tmp_path / "a", settings, source, **evaluate)
    message = str(stopped.value)
    assert "nan at step 7" in message
    assert str(sorted(rows)) in message
    assert "\n" not in message
    assert not peek(Directory(tmp_path / "a")).finished
    toy.train_toy(tmp_path / "a", settings, toy.Points(), **evaluate)
    toy.train_toy(tmp_path / "straight", settings, toy.Points(), **evaluate)
    assert_same_parameters(toy.load_toy(tmp_path / "a"), toy.load_toy(tmp_path / "straight"))


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_is_saved(toy, tmp_path):
    """The loss is finite, its gradient is not: d sqrt(x)/dx at 0."""

    def loss(model, frozen, batch, key, step):
        return toy.squared_error(model, frozen, batch, key) + jnp.sqrt(0 * model.bias[...].sum())

    with pytest.raises(UserError, match="step 1"):
        toy.train_toy(tmp_path / "a", config(toy, 5), loss=loss)


def test_a_validation_loss_that_is_not_finite_is_one_line(toy, tmp_path):
    with pytest.raises(UserError, match="validation"):
        toy.train_toy(
            tmp_path / "a", config(toy, 5), evaluate=lambda model: {"validation_loss": float("nan")}
        )


def run_program(folder: Path, steps: int, seconds: float) -> subprocess.Popen:
    command = [sys.executable, str(PROGRAM), str(folder), str(steps), str(seconds)]
    environment = {**os.environ, "PYTHONPATH": str(PROGRAM.parents[2])}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for(condition, process, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def whole_checkpoints(folder: Path) -> int:
    steps = folder / "steps"
    return sum(p.name.isdigit() for p in steps.iterdir()) if steps.is_dir() else 0


def test_a_run_stopped_by_sigterm_and_sigkill_is_a_straight_run_bit_for_bit(toy, tmp_path, rng):
    steps, seconds = 40, 0.02
    straight = run_program(tmp_path / "straight", steps, seconds)
    folder = tmp_path / "stopped"
    moments = [signal.SIGTERM, signal.SIGKILL, signal.SIGTERM]
    for moment in moments:
        process = run_program(folder, steps, seconds)
        before = {p.name for p in (folder / "steps").iterdir()} if (folder / "steps").is_dir() else set()
        # A checkpoint of this start, so that the training is under way and not yet over.
        wait_for(
            lambda before=before: (
                whole_checkpoints(folder) and {p.name for p in (folder / "steps").iterdir()} - before
            ),
            process,
        )
        time.sleep(float(rng.uniform(0, 0.3)))
        assert process.poll() is None, process.stderr.read()
        process.send_signal(moment)
        code = process.wait(60)
        assert code == (143 if moment == signal.SIGTERM else -signal.SIGKILL)
        process.stderr.close()
        assert not peek(Directory(folder)).finished
    last = run_program(folder, steps, seconds)
    for process in (straight, last):
        error = process.communicate(timeout=60)[1]
        assert process.returncode == 0, error
    assert "goes on from step" in error
    assert_same_parameters(toy.load_toy(tmp_path / "straight"), toy.load_toy(folder))
    for name in ("metrics.jsonl", "manifest.json"):
        assert (tmp_path / "straight" / name).read_bytes() == (folder / name).read_bytes(), name
    listed = [sorted(p.name for p in f.iterdir()) for f in (tmp_path / "straight", folder)]
    assert listed[0] == listed[1]


def interrupted(toy, folder, settings, step: int) -> None:
    """Leaves a training as it is when it is killed in its validation after `step`."""
    calls = iter(range(0, 1000, settings.eval_every))

    def evaluate(model):
        if next(calls) == step:
            raise KeyboardInterrupt
        return {"validation_loss": 1.0}

    with pytest.raises(KeyboardInterrupt):
        toy.train_toy(folder, settings, evaluate=evaluate)


def flip_byte(path: Path, rng) -> None:
    data = bytearray(path.read_bytes())
    data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
    path.write_bytes(data)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "emptied"])
def test_a_damaged_training_checkpoint_is_one_line(toy, tmp_path, rng, damage):
    settings = config(toy, 20)
    interrupted(toy, tmp_path / "a", settings, 10)
    found = [p for p in (tmp_path / "a/steps").rglob("d/*") if p.is_file()]
    assert found
    for path in found:
        if damage == "truncated":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        elif damage == "emptied":
            path.write_bytes(b"")
        else:
            data = bytes(b ^ 0xFF for b in path.read_bytes())
            path.write_bytes(data)
    with pytest.raises(UserError, match="cannot read checkpoint") as refused:
        toy.train_toy(tmp_path / "a", settings)
    assert "\n" not in str(refused.value)


def test_a_flipped_bit_in_published_parameters_is_refused(toy, tmp_path, rng):
    toy.train_toy(tmp_path / "a", config(toy, 3))
    toy.load_toy(tmp_path / "a")
    files = [p for p in (tmp_path / "a/model").rglob("d/*") if p.is_file()]
    original = {p: p.read_bytes() for p in files}
    expected, refused = toy.load_toy(tmp_path / "a"), 0
    for _ in range(20):
        path = files[int(rng.integers(len(files)))]
        flip_byte(path, rng)
        try:
            found = toy.load_toy(tmp_path / "a")
        except UserError:
            refused += 1
        else:  # a byte that nothing reads, such as another version of the tree
            assert_same_parameters(found, expected)
        path.write_bytes(original[path])
    assert refused > 0


def test_parameters_that_are_not_those_saved_are_refused(toy, tmp_path):
    toy.train_toy(tmp_path / "a", config(toy, 3))
    toy.train_toy(tmp_path / "b", config(toy, 3, seed=1))
    os.rename(tmp_path / "a/model", tmp_path / "a/old")
    os.rename(tmp_path / "b/model", tmp_path / "a/model")
    with pytest.raises(UserError, match="is not what was saved"):
        toy.load_toy(tmp_path / "a")


def test_frozen_values_reach_the_loss_and_are_not_changed(toy, tmp_path):
    frozen = {"shift": jnp.array([1.0, -2.0])}

    def loss(model, frozen, batch, key, step):
        return ((model.bias[...] - frozen["shift"]) ** 2).sum() * batch["weight"].sum()

    losses = iter([2.0, 1.0])
    settings = config(toy, 200, learning_rate=0.1, weight_decay=0.0, eval_every=200)
    toy.train_toy(
        tmp_path / "a",
        settings,
        loss=loss,
        frozen=frozen,
        evaluate=lambda model: {"validation_loss": next(losses)},
    )
    np.testing.assert_allclose(toy.load_toy(tmp_path / "a")["bias"], [1, -2], atol=1e-2)
    np.testing.assert_array_equal(frozen["shift"], [1, -2])


def test_steps_draw_different_keys_that_a_restart_repeats(toy, tmp_path):
    """Dropout and the like: the key is a function of seed and step."""

    def loss(model, frozen, batch, key, step):
        return (model.kernel[...] * jax.random.normal(key, (3, 2))).sum() * batch["weight"].sum()

    settings = config(toy, 10)
    toy.train_toy(tmp_path / "straight", settings, loss=loss, evaluate=lambda m: {"validation_loss": 1.0})
    stops = iter([0, 1, 2])

    def evaluate(model):
        if next(stops) == 2:
            raise KeyboardInterrupt
        return {"validation_loss": 1.0}

    with pytest.raises(KeyboardInterrupt):
        toy.train_toy(tmp_path / "a", settings, loss=loss, evaluate=evaluate)
    toy.train_toy(tmp_path / "a", settings, loss=loss, evaluate=lambda m: {"validation_loss": 1.0})
    a, b = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("a", "straight"))
    assert a == b
    losses = [json.loads(line).get("loss") for line in a.decode().splitlines()]
    assert len({loss for loss in losses if loss is not None}) == 10


def test_settings_that_cannot_change_a_result_are_outside_the_manifest(toy):
    from mlp_memory.artifacts import config_dict

    a = config(toy)
    b = dataclasses.replace(a, log_every=3, keep=4, remat="full")
    assert config_dict(a) == config_dict(b)
    assert config_dict(a) != config_dict(dataclasses.replace(a, seed=5))
