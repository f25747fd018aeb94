import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mlp_memory.artifacts import Directory, UserError, begin
from mlp_memory.datastore.config import EmbedConfig
from mlp_memory.decoder.config import DecoderConfig, Tap
from mlp_memory.decoder.pretrain import load_decoder
from mlp_memory.decoder.windows import window_arrays
from mlp_memory.joint.adapters import Adapters
from mlp_memory.joint.config import JointConfig
from mlp_memory.joint.gate import Gate, gate_weight
from mlp_memory.joint.train import joint_flops, mixture_log_prob, mixture_loss, scheduled, train_joint
from mlp_memory.memory.config import MemoryConfig
from mlp_memory.memory.distill import mixture_figures
from mlp_memory.memory.mlp import Memory
from mlp_memory.training.sparse_head import spread_of

TAP = Tap(0, "ffn_input")


def make_memory(config, randomize) -> Memory:
    shape = MemoryConfig(
        style="gpt2", layers=1, dim=8, ffn_dim=8, input_dim=config.dim, vocab_size=config.vocab_size
    )
    return randomize(lambda: Memory(shape, nnx.Rngs(0)))


@pytest.fixture
def batch(make_stream):
    stream = make_stream(29)
    parts = [window_arrays(stream, start, 10) for start in (0, 10, 20)]
    return {name: np.stack([p[name] for p in parts]) for name in parts[0]}


def dense_loss(decoder, memory, batch, weight, tapped_by):
    """From whole softmaxes; `tapped_by` makes the memory's input from the decoder's tap."""
    hidden, tapped = decoder(batch["tokens"], batch["segments"], TAP)
    base = jax.nn.softmax(hidden @ decoder.head_kernel())
    other = jax.nn.softmax(memory(tapped_by(tapped)) @ memory.head_kernel())
    p = jnp.take_along_axis(weight * other + (1 - weight) * base, batch["labels"][..., None], -1)[..., 0]
    return -(jnp.log(p) * batch["weight"]).sum()


@pytest.mark.parametrize(("name", "through"), [("llama", True), ("gpt2", False)])
def test_mixture_loss_and_gradient_are_those_of_the_dense_mixture(
    decoders, make_decoder, randomize, batch, rng, name, through
):
    decoder, weight = make_decoder(decoders[name]), float(rng.uniform(0.1, 0.9))
    memory = make_memory(decoder.config, randomize)
    graphdef, state = nnx.split(decoder)
    constant = jax.jit(lambda: decoder(batch["tokens"], batch["segments"], TAP)[1])()

    def found(state):
        return mixture_loss(nnx.merge(graphdef, state), memory, batch, weight, TAP, through)

    def expected(state):
        tapped_by = (lambda tapped: tapped) if through else (lambda tapped: constant)
        return dense_loss(nnx.merge(graphdef, state), memory, batch, weight, tapped_by)

    (a, grads_a), (b, grads_b) = (jax.jit(jax.value_and_grad(f))(state) for f in (found, expected))
    np.testing.assert_allclose(a, b, rtol=1e-4)
    for x, y in zip(jax.tree.leaves(grads_a), jax.tree.leaves(grads_b)):
        np.testing.assert_allclose(x, y, atol=1e-4 * float(jnp.abs(y).max() + 1))


def test_the_path_through_the_memory_carries_gradient(decoders, make_decoder, randomize, batch):
    """Where the decoder's own head is cut off by λ near 1, only that path is left."""
    decoder = make_decoder(decoders["llama"])
    memory = make_memory(decoder.config, randomize)
    graphdef, state = nnx.split(decoder)

    @jax.jit
    def gradients(state):
        def loss(state, through):
            return mixture_loss(nnx.merge(graphdef, state), memory, batch, 1 - 1e-7, TAP, through)

        return [jax.grad(lambda s, t=t: loss(s, t))(state) for t in (True, False)]

    with_path, without = (nnx.to_pure_dict(g) for g in gradients(state))
    assert float(jnp.abs(with_path["blocks"]["attention"]["query"]["kernel"][0]).max()) > 1e-4
    assert float(jnp.abs(without["blocks"]["attention"]["query"]["kernel"][0]).max()) < 1e-4


def test_the_mixture_is_a_distribution_at_every_weight(rng):
    base, other = (jax.nn.log_softmax(jnp.asarray(rng.normal(size=(4, 9)) * 5)) for _ in range(2))
    for weight in (0.0, 0.025, 0.5, 0.975):
        mixed = mixture_log_prob(other, base, weight)
        np.testing.assert_allclose(np.exp(mixed).sum(-1), 1, atol=1e-5)
        np.testing.assert_allclose(
            np.exp(mixed), weight * np.exp(other) + (1 - weight) * np.exp(base), atol=1e-6
        )
    np.testing.assert_array_equal(mixture_log_prob(other, base, 0.0), base)


def test_weightless_positions_have_no_loss(decoders, make_decoder, randomize, batch):
    decoder = make_decoder(decoders["llama"])
    memory = make_memory(decoder.config, randomize)
    changed = {**batch, "labels": np.where(batch["weight"] > 0, batch["labels"], 5)}
    loss = jax.jit(lambda batch: mixture_loss(decoder, memory, batch, 0.4, TAP, True))
    a, b = loss(batch), loss(changed)
    assert float(a) == float(b)


def test_joint_training_changes_the_decoder_and_not_the_memory(
    decoders, make_decoder, randomize, make_stream, mesh, tmp_path
):
    decoder = make_decoder(decoders["llama"])
    memory = make_memory(decoder.config, randomize)
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(memory)))
    start = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(decoder)))
    directory = Directory(tmp_path / "joint")
    config = JointConfig(
        steps=6, batch_size=2, context=12, eval_every=6, learning_rate=1e-2, warmup=1, eval_rows=60
    )
    embed = EmbedConfig(context=12, stride=6, tap_layer=TAP.layer, tap_kind=TAP.kind, batch_windows=4)
    stream = make_stream(120)  # held out from itself, so that what is learned shows
    manifest = train_joint(
        directory,
        begin(directory, "joint", {}, {}),
        config,
        embed,
        decoder,
        memory,
        0.25,
        stream,
        stream,
        mesh,
    )
    assert manifest.facts["interpolation"] == 0.25
    jax.tree.map(np.testing.assert_array_equal, before, nnx.to_pure_dict(nnx.state(memory)))
    jax.tree.map(np.testing.assert_array_equal, start, nnx.to_pure_dict(nnx.state(decoder)))
    trained, _ = load_decoder(directory, "joint", mesh)
    assert manifest.facts["step"] == 6
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), start, nnx.to_pure_dict(nnx.state(trained)))
    assert all(jax.tree.leaves(moved))


def test_a_gates_lambda_is_that_of_both_distributions_and_carries_no_gradient(
    decoders, make_decoder, randomize, batch, rng
):
    decoder = make_decoder(decoders["llama"])
    memory = make_memory(decoder.config, randomize)
    gate = Gate(*(rng.normal(size=4 + decoder.config.dim).astype(np.float32) for _ in range(3)), 0.2, 0.9)
    gate = gate._replace(width_F=1 + gate.width_F**2)
    graphdef, state = nnx.split(decoder)

    @jax.jit
    def lambdas(state):
        decoder = nnx.merge(graphdef, state)
        hidden, tapped = decoder(batch["tokens"], batch["segments"], TAP)
        whole = (hidden @ decoder.head_kernel(), memory(tapped) @ memory.head_kernel())
        spreads = [spread_of(jax.nn.log_softmax(z).reshape(-1, z.shape[-1])) for z in whole]
        weight_N = gate_weight(gate, *spreads, tapped.reshape(-1, tapped.shape[-1]))
        return weight_N.reshape(batch["labels"].shape)

    weight = lambdas(state)
    assert weight.std() > 0

    def found(state):
        return mixture_loss(nnx.merge(graphdef, state), memory, batch, gate, TAP, True)

    def expected(state):
        return dense_loss(nnx.merge(graphdef, state), memory, batch, weight[..., None], lambda tapped: tapped)

    (a, grads_a), (b, grads_b) = (jax.jit(jax.value_and_grad(f))(state) for f in (found, expected))
    np.testing.assert_allclose(a, b, rtol=1e-4)
    for x, y in zip(jax.tree.leaves(grads_a), jax.tree.leaves(grads_b)):
        np.testing.assert_allclose(x, y, atol=1e-4 * float(jnp.abs(y).max() + 1))


def test_the_divergence_counts_by_its_weight_and_is_none_at_the_start(
    decoders, make_decoder, randomize, batch
):
    start, decoder = make_decoder(decoders["llama"]), make_decoder(decoders["llama"])
    memory = make_memory(decoder.config, randomize)

    @jax.jit
    def losses(one, other):
        common = (memory, batch, 0.4, TAP, True, jnp.float32, "none", None)
        return [mixture_loss(one, *common, other, kl) for kl in (0.0, 1.0, 3.0)]

    none, once, thrice = map(float, losses(start, start))
    assert none == pytest.approx(once, abs=1e-4)
    none, once, thrice = map(float, losses(decoder, start))
    z = [jax.nn.log_softmax(d.logits(d(batch["tokens"], batch["segments"])[0])) for d in (start, decoder)]
    apart = ((jnp.exp(z[0]) * (z[0] - z[1])).sum(-1) * batch["weight"]).sum()
    assert once - none == pytest.approx(float(apart), rel=1e-3)
    assert thrice - none == pytest.approx(3 * float(apart), rel=1e-3)


def test_lambda_goes_in_a_straight_line_to_where_it_stays():
    config = JointConfig(interpolation=0.5, interpolation_start=0.1, interpolation_steps=4)
    found = [float(scheduled(config, 0.5, step)) for step in range(7)]
    np.testing.assert_allclose(found, [0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.5], rtol=1e-6)
    assert scheduled(JointConfig(), 0.3, 5) == 0.3


def test_adapters_start_as_nothing_and_have_the_gradient_of_the_whole_weights(
    decoders, make_decoder, batch, rng
):
    decoder = make_decoder(decoders["llama"])
    adapters = Adapters(decoder.config, 2, 6.0, nnx.Rngs(0))
    for a, b in zip(jax.tree.leaves(nnx.state(adapters.onto(decoder))), jax.tree.leaves(nnx.state(decoder))):
        np.testing.assert_array_equal(a, b)
    assert {"attention_query", "attention_out", "ffn_down"} <= set(adapters.down)
    for value in adapters.up.values():
        value.set_value(0.1 * rng.normal(size=value.shape).astype(np.float32))
    graphdef, state = nnx.split(adapters)

    def loss(decoder):
        return jnp.square(decoder(batch["tokens"], batch["segments"])[0]).mean() * 100

    through = jax.jit(jax.grad(lambda state: loss(nnx.merge(graphdef, state).onto(decoder))))(state)
    merged_def, merged = nnx.split(adapters.onto(decoder))
    whole = nnx.to_pure_dict(jax.jit(jax.grad(lambda s: loss(nnx.merge(merged_def, s))))(merged))
    down, up = nnx.to_pure_dict(through)["down"], nnx.to_pure_dict(through)["up"]
    for name in adapters.down:
        part, which = name.split("_")
        slope = np.asarray(whole["blocks"][part][which]["kernel"], np.float64)
        a, b = (np.asarray(x[name][...], np.float64) for x in (adapters.down, adapters.up))
        expected = {"down": 3 * slope @ b.swapaxes(1, 2), "up": 3 * a.swapaxes(1, 2) @ slope}
        for found, wanted in ((down[name], expected["down"]), (up[name], expected["up"])):
            # Of sums of many terms: float32 keeps digits of the largest, not of each.
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize(
    "settings",
    [
        {
            "adapter_rank": 2,
            "kl": 0.5,
            "interpolation": 0.4,
            "interpolation_start": 0.1,
            "interpolation_steps": 3,
        },
        {"interpolation": "gate", "through_memory": False},
    ],
)
def test_every_kind_of_joint_training_learns_goes_on_where_it_stopped_and_publishes_a_decoder(
    decoders, make_decoder, randomize, make_stream, mesh, tmp_path, settings, rng
):
    decoder = make_decoder(decoders["llama"])
    memory = make_memory(decoder.config, randomize)
    gate = Gate(*jnp.ones((3, 4 + decoder.config.dim)) * 0.1, jnp.float32(0), jnp.float32(1))
    weight = gate if settings.get("interpolation") == "gate" else 0.25
    config = JointConfig(
        steps=6,
        batch_size=2,
        context=12,
        eval_every=3,
        learning_rate=1e-2,
        warmup=1,
        eval_rows=60,
        **settings,
    )
    embed = EmbedConfig(context=12, stride=6, tap_layer=TAP.layer, tap_kind=TAP.kind, batch_windows=4)
    stream = make_stream(120)

    def run(name, **changes):
        directory = Directory(tmp_path / name)
        manifest = begin(directory, "joint", {}, {})
        arguments = (dataclasses.replace(config, **changes), embed, decoder, memory, weight, stream, stream)
        return directory, train_joint(directory, manifest, *arguments, mesh)

    directory, manifest = run("a")
    trained, _ = load_decoder(directory, "joint", mesh)
    lines = (directory.path / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["validation_loss"] for line in lines if "validation_loss" in line]
    assert losses[-1] < losses[0]
    assert manifest.facts["parameters"] == sum(x.size for x in jax.tree.leaves(nnx.state(decoder)))
    moved = nnx.to_pure_dict(
        jax.tree.map(lambda a, b: bool((a != b).any()), *map(nnx.state, (trained, decoder)))
    )
    assert moved["blocks"]["ffn"]["up"]["kernel"]
    if rank := settings.get("adapter_rank"):
        assert not moved["embedding"]
        assert not moved["blocks"]["ffn_norm"]["scale"]
        assert manifest.facts["trained_parameters"] == sum(
            rank * layers * (inputs + outputs)
            for path, v in nnx.to_flat_state(nnx.state(decoder))
            if path[-1] == "kernel"
            for layers, inputs, outputs in [v.get_value().shape]
        )
    calls = iter([0, 1, 2])

    def figures(*arrays):
        if next(calls) == 1:
            raise KeyboardInterrupt
        return mixture_figures(*arrays)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlp_memory.joint.train.mixture_figures", figures)
        with pytest.raises(KeyboardInterrupt):
            run("b")
    run("b")
    for a, b in zip(
        *(jax.tree.leaves(nnx.state(load_decoder(Directory(tmp_path / n), "joint", mesh)[0])) for n in "ab")
    ):
        np.testing.assert_array_equal(a, b)


def test_flops_count_what_is_computed():
    decoder = DecoderConfig(layers=2, dim=8, heads=2, vocab_size=30)
    memory = MemoryConfig("llama", 1, 8, 16, input_dim=8, vocab_size=30)

    def flops(**settings):
        return joint_flops(decoder, memory, JointConfig(context=16, **settings), 100)

    whole = decoder.train_flops(100, 16)
    assert flops() == whole + 2 * memory.train_flops(100) // 3
    assert flops(through_memory=False) == whole + memory.train_flops(100) // 3
    assert flops(kl=0.1) - flops() == whole // 3 + 4 * 100 * 8 * 30
    assert flops() - flops(adapter_rank=2) == 2 * 100 * 8 * 30
    assert flops(interpolation="gate") - flops() == 2 * 100 * 16 * 30


@pytest.mark.parametrize(
    "impossible",
    [
        {"interpolation": 1.0},
        {"interpolation": -0.1},
        {"interpolation": "best"},
        {"context": 1},
        {"interpolation_start": 0.1, "interpolation_steps": 5, "steps": 4},
        {"kl": -1.0},
        {"adapter_rank": -1},
        {"adapter_alpha": 0.0},
        {"interpolation_start": 0.1},
        {"interpolation_steps": 5},
        {"interpolation": "gate", "interpolation_start": 0.1, "interpolation_steps": 5},
        {"interpolation_start": 1.0, "interpolation_steps": 5},
    ],
)
def test_impossible_settings_are_refused(impossible):
    with pytest.raises(UserError):
        JointConfig(**impossible)
