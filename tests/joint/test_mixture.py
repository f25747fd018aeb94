import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mlp_memory.artifacts import Directory, UserError, begin
from mlp_memory.datastore.config import EmbedConfig
from mlp_memory.decoder.config import Tap
from mlp_memory.decoder.pretrain import load_decoder
from mlp_memory.decoder.windows import window_arrays
from mlp_memory.joint.config import JointConfig
from mlp_memory.joint.train import mixture_log_prob, mixture_loss, train_joint
from mlp_memory.memory.config import MemoryConfig
from mlp_memory.memory.mlp import Memory

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


@pytest.mark.parametrize(
    "impossible", [{"interpolation": 1.0}, {"interpolation": -0.1}, {"interpolation": "best"}, {"context": 1}]
)
def test_impossible_settings_are_refused(impossible):
    with pytest.raises(UserError):
        JointConfig(**impossible)
