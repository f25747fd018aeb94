import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mlp_memory.artifacts import UserError
from mlp_memory.decoder.config import DecoderConfig, Tap, equal_parameters, parameter_count
from mlp_memory.decoder.transformer import Decoder

# The decoder once more in NumPy float64, with loops in place of every trick.


def slow_norm(x_D, p, config):
    x_D = x_D - x_D.mean() if config.norm == "layernorm" else x_D
    y_D = slow_rms_norm(x_D, p, config)
    return y_D + p["bias"] if config.norm == "layernorm" else y_D


def slow_rms_norm(x_D, p, config):
    return x_D / math.sqrt((x_D**2).mean() + config.norm_epsilon) * p["scale"]


def slow_linear(x_I, p):
    y_O = np.array(
        [sum(x_I[i] * p["kernel"][i, o] for i in range(len(x_I))) for o in range(p["kernel"].shape[1])]
    )
    return y_O + p["bias"] if "bias" in p else y_O


def slow_wavelength(wavelength, config):
    """Positions per turn after scaling (Llama 3.1's rule in terms of wavelengths)."""
    longer = wavelength * config.rope_factor
    if config.rope_scaling == "none":
        return wavelength
    if config.rope_scaling == "linear":
        return longer
    if wavelength < config.rope_original / config.rope_high_factor:
        return wavelength
    if wavelength > config.rope_original / config.rope_low_factor:
        return longer
    low, high = config.rope_low_factor, config.rope_high_factor
    smooth = (config.rope_original / wavelength - low) / (high - low)
    return 1 / ((1 - smooth) / longer + smooth / wavelength)


def slow_rotate(x_E, position, config):
    half, y_E = len(x_E) // 2, x_E.copy()
    for i in range(half):
        wavelength = slow_wavelength(2 * math.pi * config.rope_base ** (i / half), config)
        angle = 2 * math.pi * position / wavelength
        a, b = x_E[i], x_E[i + half]
        y_E[i] = a * math.cos(angle) - b * math.sin(angle)
        y_E[i + half] = b * math.cos(angle) + a * math.sin(angle)
    return y_E


def slow_gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def slow_feed_forward(x_D, p, config):
    up_F = slow_linear(x_D, p["up"])
    if config.activation == "gelu":
        return slow_linear(slow_gelu(up_F), p["down"])
    gate_F = slow_linear(x_D, p["gate"])
    return slow_linear(gate_F / (1 + np.exp(-gate_F)) * up_F, p["down"])


def slow_attention(x_TxD, segments_T, p, config, layer):
    length, size = len(x_TxD), config.head_dim
    heads = {}
    for name, count in (
        ("query", config.heads),
        ("key", config.num_kv_heads),
        ("value", config.num_kv_heads),
    ):
        heads[name] = [slow_linear(x_TxD[t], p[name]).reshape(count, size) for t in range(length)]
    if config.qk_norm:
        for name in ("query", "key"):
            heads[name] = [
                np.array([slow_rms_norm(h, p[f"{name}_norm"], config) for h in heads[name][t]])
                for t in range(length)
            ]
    windowed = config.window and layer >= config.window_from
    if config.positions == "rotary":
        for name in ("query", "key"):
            heads[name] = [
                np.array([slow_rotate(h, t, config) for h in heads[name][t]]) for t in range(length)
            ]
    out_TxD = np.zeros_like(x_TxD)
    for t in range(length):
        parts = []
        for h in range(config.heads):
            kv = h // (config.heads // config.num_kv_heads)
            first = max(0, t + 1 - config.window) if windowed else 0
            seen = [s for s in range(first, t + 1) if segments_T[s] == segments_T[t]]
            scores = np.array([heads["query"][t][h] @ heads["key"][s][kv] / math.sqrt(size) for s in seen])
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            parts.append(sum(w * heads["value"][s][kv] for w, s in zip(weights, seen)))
        out_TxD[t] = slow_linear(np.concatenate(parts), p["out"])
    return out_TxD


def slow_decoder(params, config, tokens_T, segments_T):
    """Final hidden states, logits, and {(layer, kind): tap}."""
    x_TxD = np.array([params["embedding"][t] for t in tokens_T])
    if config.positions == "learned":
        x_TxD = x_TxD + params["positions"][: len(tokens_T)]
    taps = {}
    for layer in range(config.layers):
        p = jax.tree.map(lambda x, layer=layer: x[layer], params["blocks"])
        normed = np.array([slow_norm(x, p["attention_norm"], config) for x in x_TxD])
        x_TxD = x_TxD + slow_attention(normed, segments_T, p["attention"], config, layer)
        taps[layer, "ffn_input"] = np.array([slow_norm(x, p["ffn_norm"], config) for x in x_TxD])
        x_TxD = x_TxD + np.array([slow_feed_forward(x, p["ffn"], config) for x in taps[layer, "ffn_input"]])
        taps[layer, "residual"] = x_TxD
    hidden_TxD = np.array([slow_norm(x, params["norm"], config) for x in x_TxD])
    head_DxV = params["embedding"].T if config.tied else params["head"]
    return hidden_TxD, hidden_TxD @ head_DxV, taps


def test_logits_and_every_tap_are_those_of_the_slow_decoder(decoder_config, make_decoder, rng):
    config, model, length = decoder_config, make_decoder(decoder_config), 11
    tokens_T = rng.integers(0, config.vocab_size, length)
    segments_T = np.cumsum(rng.random(length) < 0.2)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), nnx.to_pure_dict(nnx.state(model)))
    hidden, logits, taps = slow_decoder(params, config, tokens_T, segments_T)
    wanted = [
        Tap(layer, kind)
        for layer in range(-config.layers, config.layers)
        for kind in ("ffn_input", "residual")
    ]

    @jax.jit
    def everything(tokens, segments):
        found_hidden, _ = model(tokens, segments)
        found_taps = [model(tokens, segments, tap)[1][0] for tap in wanted]
        return found_hidden[0], model.logits(found_hidden)[0], found_taps

    found_hidden, found_logits, found_taps = everything(tokens_T[None], segments_T[None])
    np.testing.assert_allclose(found_hidden, hidden, atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(found_logits, logits, atol=1e-4, rtol=1e-4)
    for tap, found in zip(wanted, found_taps):
        np.testing.assert_allclose(
            found, taps[tap.layer % config.layers, tap.kind], atol=1e-4, rtol=1e-4, err_msg=str(tap)
        )


def test_rematerialisation_changes_neither_states_nor_gradients(decoders, make_decoder, rng):
    model = make_decoder(decoders["llama"])
    tokens = rng.integers(0, 37, (2, 8))
    graphdef, state = nnx.split(model)

    def loss(state, remat):
        return (nnx.merge(graphdef, state)(tokens, remat=remat)[0] ** 3).sum()

    run = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    value, grads = run(state, "none")
    for remat in ("dots", "full"):
        found_value, found_grads = run(state, remat)
        np.testing.assert_allclose(found_value, value, rtol=1e-5)
        for a, b in zip(jax.tree.leaves(found_grads), jax.tree.leaves(grads)):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * float(jnp.abs(b).max() + 1))


@pytest.mark.parametrize("layer", [-4, 3, 100])
def test_a_tap_outside_the_decoder_is_refused(decoders, make_decoder, layer):
    with pytest.raises(UserError, match=f"tap layer {layer} is outside a decoder of 3 layers"):
        make_decoder(decoders["llama"])(np.zeros((1, 2), np.int32), tap=Tap(layer))
    with pytest.raises(UserError, match="tap kind"):
        Tap(0, "attention").index(3)


def test_counted_parameters_are_those_of_the_model(decoder_config, make_decoder):
    leaves = jax.tree.leaves(nnx.state(make_decoder(decoder_config)))
    assert parameter_count(decoder_config) == sum(leaf.size for leaf in leaves)


def test_counted_multiplications_are_those_of_the_matrices(decoder_config, make_decoder):
    params = nnx.to_flat_state(nnx.state(make_decoder(decoder_config)))
    kernels = sum(v.get_value().size for path, v in params if path[-1] == "kernel")
    assert decoder_config.matmul_parameters() == kernels + decoder_config.dim * decoder_config.vocab_size


def test_the_equal_parameter_decoder_has_as_many_parameters_as_asked(rng):
    for _ in range(10):
        base = DecoderConfig(
            layers=int(rng.integers(1, 5)),
            dim=int(rng.choice([32, 64, 96])),
            heads=4,
            activation=str(rng.choice(["swiglu", "gelu"])),
            bias=str(rng.choice(["none", "qkv", "attention", "all"])),
            tied=bool(rng.integers(2)),
            vocab_size=int(rng.integers(300, 3000)),
        )
        untied = dataclasses.replace(base, tied=False)
        wanted = int(parameter_count(untied) * rng.uniform(1.2, 4))
        found = equal_parameters(base, wanted)
        assert (found.dim, found.heads, found.vocab_size, found.tied) == (base.dim, 4, base.vocab_size, False)
        assert abs(parameter_count(found) / wanted - 1) < 0.02


@pytest.mark.parametrize(
    "impossible",
    [
        {"layers": 0},
        {"dim": 64.0},
        {"heads": 5},
        {"kv_heads": 3},
        {"kv_heads": -1},
        {"ffn_dim": -16},
        {"norm": "batchnorm"},
        {"positions": "alibi"},
        {"activation": "relu"},
        {"dim": 12, "heads": 4},
        {"vocab_size": -5},
        {"max_positions": 0},
        {"norm_epsilon": -1.0},
        {"rope_base": 0.0},
        {"bias": True},
        {"window": -1},
        {"rope_scaling": "yarn"},
        {"rope_scaling": "llama3", "rope_low_factor": 4.0, "rope_high_factor": 4.0},
        {"rope_scaling": "linear", "rope_factor": 0.0},
    ],
    ids=str,
)
def test_an_impossible_shape_is_refused(impossible):
    with pytest.raises(UserError):
        DecoderConfig(**{"dim": 16, "heads": 4, **impossible})


def test_a_vocabulary_that_does_not_fit_is_refused(rng):
    size = int(rng.integers(300, 1000))
    assert DecoderConfig().with_vocabulary(size).vocab_size == size
    assert DecoderConfig(vocab_size=size + 8).with_vocabulary(size).vocab_size == size + 8
    with pytest.raises(UserError, match=f"{size - 1} is smaller than the corpus vocabulary's {size}"):
        DecoderConfig(vocab_size=size - 1).with_vocabulary(size)


def test_abstract_and_real_models_have_the_same_shapes(decoder_config):
    abstract = nnx.state(nnx.eval_shape(lambda: Decoder(decoder_config, nnx.Rngs(0))))
    real = nnx.state(Decoder(decoder_config, nnx.Rngs(0)))
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), nnx.to_pure_dict(abstract))
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), nnx.to_pure_dict(real))
