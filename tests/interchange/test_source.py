import dataclasses
import json
import struct
from pathlib import Path

import gguf
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from mlp_memory.artifacts import Directory, UserError
from mlp_memory.decoder.config import DecoderConfig
from mlp_memory.interchange import families
from mlp_memory.interchange.export import export_model
from mlp_memory.interchange.model_folder import ModelFolder
from mlp_memory.interchange.source import load, open_source
from mlp_memory.memory.config import MemoryConfig
from mlp_memory.memory.mlp import Memory

STORIES = Path(__file__).parents[3] / "shared/data/models/stories260K/stories260K.bin"
LLAMA = DecoderConfig(
    layers=2, dim=32, heads=4, kv_heads=2, ffn_dim=64, vocab_size=64, max_positions=64, tied=True
)
SHAPES = {
    "llama": LLAMA,
    "llama, every bias": dataclasses.replace(LLAMA, bias="all", tied=False, head_size=6),
    "llama 3.1": dataclasses.replace(LLAMA, rope_scaling="llama3", rope_factor=8.0, rope_original=16),
    "linear rope": dataclasses.replace(LLAMA, rope_scaling="linear", rope_factor=2.0),
    "mistral": dataclasses.replace(LLAMA, window=5),
    "qwen2": dataclasses.replace(LLAMA, bias="qkv"),
    "qwen2, windowed": dataclasses.replace(LLAMA, bias="qkv", window=5, window_from=1),
    "qwen3": dataclasses.replace(LLAMA, qk_norm=True, head_size=10),
    "one layer": dataclasses.replace(LLAMA, layers=1),
    "gpt2": DecoderConfig(
        layers=2,
        dim=24,
        heads=3,
        ffn_dim=40,
        norm="layernorm",
        positions="learned",
        activation="gelu",
        bias="all",
        tied=True,
        vocab_size=50,
        max_positions=32,
    ),
    "no family": dataclasses.replace(LLAMA, norm="layernorm"),
}
FAMILY = {
    **{name: name.split()[0].rstrip(",") for name in SHAPES},
    "linear rope": "llama",
    "one layer": "llama",
    "no family": "mlp_memory",
}


def parameters(model: nnx.Module) -> dict[str, np.ndarray]:
    flat = nnx.to_flat_state(nnx.state(model))
    return {".".join(path): np.asarray(variable.get_value()) for path, variable in flat}


def assert_same_bytes(found: nnx.Module, wanted: nnx.Module) -> None:
    ours, theirs = parameters(found), parameters(wanted)
    assert sorted(ours) == sorted(theirs)
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        assert ours[name].tobytes() == value.tobytes(), name


def as_dtype(model: nnx.Module, dtype: object) -> nnx.Module:
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(lambda x: x.astype(dtype), state))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("name", SHAPES)
def test_a_decoder_that_goes_out_comes_back_with_its_shape_and_bytes(
    name, dtype, make_decoder, mesh, tmp_path
):
    model = as_dtype(make_decoder(SHAPES[name]), dtype)
    export_model(Directory(tmp_path / "m"), model, {"fingerprint": "f"}, {"tokenizer.model": b"t"}, {})
    source = open_source(str(tmp_path / "m"))
    assert (source.kind, source.family, source.config) == ("decoder", FAMILY[name], SHAPES[name])
    assert source.facts == {"fingerprint": "f"}
    assert source.files == {"tokenizer.model": b"t"}
    found = load(source, mesh)
    assert_same_bytes(found, model)
    export_model(Directory(tmp_path / "again"), found, {"fingerprint": "f"}, source.files, {})
    for file in (tmp_path / "m").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_parameters_can_be_read_in_another_dtype(make_decoder, mesh, tmp_path):
    model = make_decoder(LLAMA)
    export_model(Directory(tmp_path / "m"), model, {}, {}, {})
    half = load(open_source(str(tmp_path / "m")), mesh, "bfloat16")
    assert_same_bytes(half, as_dtype(model, ml_dtypes.bfloat16))


def test_a_checkpoint_without_its_head_prefix_and_with_masks_beside_is_read(make_decoder, mesh, tmp_path):
    model = make_decoder(SHAPES["gpt2"])
    export_model(Directory(tmp_path / "m"), model, {}, {}, {})
    tensors = safetensors.numpy.load_file(tmp_path / "m/model.safetensors")
    bare = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    bare |= {f"h.{i}.attn.bias": np.tril(np.ones((1, 1, 32, 32), bool)) for i in range(2)}
    bare["lm_head.weight"] = bare["wte.weight"]  # tied, and stored all the same
    write_foreign(tmp_path / "bare", json.loads((tmp_path / "m/config.json").read_text()), bare)
    assert_same_bytes(load(open_source(str(tmp_path / "bare")), mesh), model)


MEMORIES = {
    "gpt2": MemoryConfig("gpt2", 2, 12, 20, 0.0, 1e-5, 12, 31),
    "llama": MemoryConfig("llama", 3, 12, 20, 0.0, 1e-6, 12, 31),
    "gpt2 of other width": MemoryConfig("gpt2", 1, 12, 20, 0.0, 1e-4, 7, 31),
    "llama of other width": MemoryConfig("llama", 2, 12, 20, 0.0, 1e-4, 7, 31),
}


def reference_names(config: MemoryConfig) -> dict[str, tuple[int, ...]]:
    """The layout of the reference release, written out."""
    d, f, v = config.dim, config.ffn_dim, config.vocab_size
    found: dict[str, tuple[int, ...]] = {"lm_head.weight": (v, d)}
    if config.input_dim != d:
        found |= {"embedding_transform.weight": (d, config.input_dim), "embedding_transform.bias": (d,)}
    for i in range(config.layers):
        if config.style == "gpt2":
            found |= {f"h.{i}.ln_1.weight": (d,), f"h.{i}.ln_1.bias": (d,)}
            found |= {f"h.{i}.mlp.c_fc.weight": (d, f), f"h.{i}.mlp.c_fc.bias": (f,)}
            found |= {f"h.{i}.mlp.c_proj.weight": (f, d), f"h.{i}.mlp.c_proj.bias": (d,)}
        else:
            found |= {f"layers.{i}.input_layernorm.weight": (d,), f"layers.{i}.mlp.down_proj.weight": (d, f)}
            found |= {f"layers.{i}.mlp.{part}_proj.weight": (f, d) for part in ("gate", "up")}
    last = {"ln_f.weight": (d,), "ln_f.bias": (d,)} if config.style == "gpt2" else {"norm.weight": (d,)}
    return found | last


@pytest.mark.parametrize("name", MEMORIES)
def test_a_memory_goes_out_under_the_reference_names_and_comes_back(name, randomize, mesh, rng, tmp_path):
    config = MEMORIES[name]
    memory = randomize(lambda: Memory(config, nnx.Rngs(0)))
    tap = {"layer": -1, "kind": "ffn_input"}
    export_model(Directory(tmp_path / "m"), memory, {"tap": tap}, {}, {})
    specs = ModelFolder(Directory(tmp_path / "m")).specs
    assert {n: spec.shape for n, spec in specs.items()} == reference_names(config)
    assert json.loads((tmp_path / "m/mlp_memory.json").read_text())["tap"] == tap
    source = open_source(str(tmp_path / "m"))
    assert (source.kind, source.config) == ("memory", config)
    found = load(source, mesh)
    assert_same_bytes(found, memory)
    h = rng.normal(size=(5, config.input_dim)).astype(np.float32)
    np.testing.assert_array_equal(found(h) @ found.head_kernel(), memory(h) @ memory.head_kernel())


def test_a_memory_whose_transform_has_no_bias_gets_zeros(randomize, mesh, tmp_path):
    memory = randomize(lambda: Memory(MEMORIES["gpt2 of other width"], nnx.Rngs(0)))
    export_model(Directory(tmp_path / "m"), memory, {}, {}, {})
    tensors = safetensors.numpy.load_file(tmp_path / "m/model.safetensors")
    del tensors["embedding_transform.bias"]
    write_foreign(tmp_path / "f", json.loads((tmp_path / "m/config.json").read_text()), tensors)
    found = parameters(load(open_source(str(tmp_path / "f")), mesh))
    assert not found["transform.bias"].any()
    assert found["transform.kernel"].any()


def write_foreign(folder: Path, config: dict, tensors: dict[str, np.ndarray]) -> None:
    """A model's folder as others write it: no list of checksums."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(
        {name: np.ascontiguousarray(value) for name, value in tensors.items()}, folder / "model.safetensors"
    )


@pytest.fixture
def foreign(make_decoder, tmp_path):
    """The folder of a Llama from elsewhere, its config and its tensors."""
    export_model(Directory(tmp_path / "ours"), make_decoder(LLAMA), {}, {}, {})
    config = json.loads((tmp_path / "ours/config.json").read_text())
    tensors = dict(safetensors.numpy.load_file(tmp_path / "ours/model.safetensors"))
    write_foreign(tmp_path / "m", config, tensors)
    return tmp_path / "m", config, tensors


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c, t: t.pop(Q), [Q, "(32, 32)", "is missing"]),
        (lambda c, t: t.update({Q: t[Q][:-1]}), [Q, "(31, 32)", "(32, 32)"]),
        (lambda c, t: t.update({Q: t[Q].astype(np.int8)}), [Q, "int8", "(32, 32)"]),
        (
            lambda c, t: t.update({"model.extra.weight": t[Q]}),
            ["'model.extra.weight'", "(32, 32)", "left over"],
        ),
        (
            lambda c, t: t.update({Q.replace("weight", "bias"): t[Q][0]}),
            ["q_proj.bias", "(32,)", "left over"],
        ),
        (lambda c, t: c.update(vocab_size=65), ["model.embed_tokens.weight", "(64, 32)", "(65, 32)"]),
        (lambda c, t: c.update(num_hidden_layers=3), ["model.layers.2.", "is missing"]),
        (lambda c, t: c.update(tie_word_embeddings=False), ["lm_head.weight", "(64, 32)", "is missing"]),
        (lambda c, t: c.pop("hidden_size"), ["hidden_size is missing"]),
        (lambda c, t: c.update(model_type="mamba"), ["'mamba'", "gpt2, llama"]),
        (lambda c, t: c.update(hidden_act="relu"), ["hidden_act = 'relu'"]),
        (lambda c, t: c.update(rope_scaling={"rope_type": "yarn", "factor": 2.0}), ["'yarn'"]),
        (lambda c, t: c.update(rope_scaling={"rope_type": "llama3", "factor": 2.0}), ["low_freq_factor"]),
        (lambda c, t: c.update(hidden_size="32"), ["config.json"]),
        (lambda c, t: c.update(num_attention_heads=5), ["config.json"]),
        (lambda c, t: c.update(num_hidden_layers=10**9), ["config.json", "layers"]),
    ],
)
def test_a_mismatch_is_one_line_that_names_the_tensor_and_both_shapes(foreign, change, words):
    folder, config, tensors = foreign
    change(config, tensors)
    write_foreign(folder, config, tensors)
    with pytest.raises(UserError) as caught:
        open_source(str(folder))
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused_by_name(foreign, mesh, bad):
    folder, config, tensors = foreign
    tensors[Q][3, 4] = bad
    write_foreign(folder, config, tensors)
    with pytest.raises(UserError, match=r"blocks\.attention\.query\.kernel has values that are not finite"):
        load(open_source(str(folder)), mesh)


def test_a_truncated_shard_is_refused(foreign):
    folder, _, _ = foreign
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-7])
    with pytest.raises(UserError, match=r"model\.safetensors is truncated or damaged"):
        open_source(str(folder))


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "notes.txt", "model.safetensors", "gone"])
def test_a_file_that_is_no_model_is_one_line(tmp_path, name):
    if name != "gone":
        (tmp_path / name).write_bytes(b"\x80\x04hello")
    wanted = {
        "model.bin": "is a pickle.*weights_only=True",
        "model.pt": "is a pickle",
        "notes.txt": "neither GGUF nor",
        "model.safetensors": "give its folder",
        "gone": "does not exist",
    }[name]
    with pytest.raises(UserError, match=wanted) as caught:
        open_source(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def interleaved(weight_OxI: np.ndarray, heads: int) -> np.ndarray:
    """Rows in llama.cpp's order, one at a time: halves (j, j + E/2) become neighbours (2j, 2j + 1)."""
    size = len(weight_OxI) // heads
    out = np.empty_like(weight_OxI)
    for head in range(heads):
        for j in range(size // 2):
            out[head * size + 2 * j] = weight_OxI[head * size + j]
            out[head * size + 2 * j + 1] = weight_OxI[head * size + size // 2 + j]
    return out


def exported(model: nnx.Module, folder: Path) -> dict[str, np.ndarray]:
    export_model(Directory(folder), model, {}, {}, {})
    return dict(safetensors.numpy.load_file(folder / "model.safetensors"))


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def write_gguf(path: Path, config: DecoderConfig, tensors: dict[str, np.ndarray], quantised: bool) -> None:
    """A file as llama.cpp's converter writes it."""
    family = families.family_of(config)
    writer = gguf.GGUFWriter(path, "llama" if family == "mistral" else family)
    writer.add_block_count(config.layers)
    writer.add_embedding_length(config.dim)
    writer.add_head_count(config.heads)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_context_length(config.max_positions)
    if family == "gpt2":
        writer.add_layer_norm_eps(config.norm_epsilon)
    else:
        writer.add_head_count_kv(config.num_kv_heads)
        writer.add_layer_norm_rms_eps(config.norm_epsilon)
        writer.add_rope_freq_base(config.rope_base)
        writer.add_key_length(config.head_dim)
    if config.window:
        writer.add_sliding_window(config.window)
    for name, value in tensors.items():
        if family in ("llama", "mistral"):
            value = interleaved(value, config.heads) if "q_proj" in name else value
            value = interleaved(value, config.num_kv_heads) if "k_proj" in name else value
        elif ".c_" in name:  # Conv1D's [in, out]
            value = np.ascontiguousarray(value.T)
        stem, kind = name.rsplit(".", 1)
        if stem in GGUF_NAMES:
            theirs = f"{GGUF_NAMES[stem]}.{kind}"
        else:
            _, _, layer, part = stem.split(".", 3)
            theirs = f"blk.{layer}.{GGUF_NAMES[part]}.{kind}"
        if quantised and value.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(theirs, gguf.quants.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(theirs, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gpt2"])
def test_gguf_gives_the_parameters_that_were_written(name, tied, make_decoder, mesh, tmp_path):
    config = dataclasses.replace(SHAPES[name], tied=tied)
    model = make_decoder(config)
    write_gguf(tmp_path / "m.gguf", config, exported(model, tmp_path / "m"), quantised=False)
    source = open_source(str(tmp_path / "m.gguf"))
    assert source.config == config
    assert_same_bytes(load(source, mesh), model)


def test_a_gpt2_whose_converter_wrote_the_embedding_twice_is_tied(make_decoder, mesh, tmp_path):
    config = SHAPES["gpt2"]
    model = make_decoder(config)
    tensors = exported(model, tmp_path / "m")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    write_gguf(tmp_path / "m.gguf", config, tensors, quantised=False)
    source = open_source(str(tmp_path / "m.gguf"))
    assert source.config == config
    assert_same_bytes(load(source, mesh), model)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_quantised_gguf_gives_parameters_within_its_rounding(name, make_decoder, mesh, tmp_path):
    # Q8_0 has blocks of 32 along a row.
    config = dataclasses.replace(SHAPES[name], dim=32, heads=4, ffn_dim=64)
    model = make_decoder(config)
    write_gguf(tmp_path / "m.gguf", config, exported(model, tmp_path / "m"), quantised=True)
    found, wanted = (parameters(m) for m in (load(open_source(str(tmp_path / "m.gguf")), mesh), model))
    for name, value in wanted.items():
        if name.endswith(("kernel", "embedding", "positions")):
            assert 0 < np.abs(found[name] - value).max() < np.abs(value).max() / 100
        else:
            np.testing.assert_array_equal(found[name], value)


def test_a_gguf_file_that_is_cut_off_is_one_line(make_decoder, tmp_path, rng):
    path = tmp_path / "m.gguf"
    write_gguf(path, LLAMA, exported(make_decoder(LLAMA), tmp_path / "m"), quantised=False)
    whole = path.read_bytes()
    for length in (0, 3, 4, 20, *rng.integers(24, len(whole) - 1, 6)):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError) as caught:
            open_source(str(path))
        assert "\n" not in str(caught.value)


def write_llama2c(path: Path, config: DecoderConfig, tensors: dict[str, np.ndarray]) -> None:
    """A version 0 checkpoint: header, embeddings, then each kind of weight for all layers."""
    sign = 1 if config.tied else -1
    order = (
        *("input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
        *("post_attention_layernorm", "mlp.gate_proj", "mlp.down_proj", "mlp.up_proj"),
    )
    parts = [tensors["model.embed_tokens.weight"]]
    for stem in order:
        for layer in range(config.layers):
            value = tensors[f"model.layers.{layer}.{stem}.weight"]
            value = interleaved(value, config.heads) if "q_proj" in stem else value
            parts.append(interleaved(value, config.num_kv_heads) if "k_proj" in stem else value)
    parts += [tensors["model.norm.weight"], np.zeros((2, config.max_positions, config.head_dim // 2))]
    parts += [] if config.tied else [tensors["lm_head.weight"]]
    c = config
    header = (c.dim, c.hidden_dim, c.layers, c.heads, c.num_kv_heads, sign * c.vocab_size, c.max_positions)
    path.write_bytes(
        struct.pack("<7i", *header) + b"".join(np.asarray(part, "<f4").tobytes() for part in parts)
    )


@pytest.mark.parametrize("tied", [True, False])
def test_llama2c_gives_the_parameters_that_were_written(tied, make_decoder, mesh, tmp_path):
    config = dataclasses.replace(LLAMA, tied=tied)
    model = make_decoder(config)
    write_llama2c(tmp_path / "m.bin", config, exported(model, tmp_path / "m"))
    source = open_source(str(tmp_path / "m.bin"))
    assert source.config == config
    assert_same_bytes(load(source, mesh), model)
    (tmp_path / "cut.bin").write_bytes((tmp_path / "m.bin").read_bytes()[:-4])
    with pytest.raises(UserError):
        open_source(str(tmp_path / "cut.bin"))


def test_an_import_changes_where_a_value_of_the_model_changes(foreign):
    folder, config, tensors = foreign
    before = open_source(str(folder)).identity
    assert open_source(str(folder)).identity == before
    tensors["model.norm.weight"][0] += 1
    write_foreign(folder, config, tensors)
    assert open_source(str(folder)).identity != before
