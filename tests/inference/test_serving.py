import json
import os
import subprocess
import sys

import pytest

from mlp_memory.artifacts import Directory, UserError
from mlp_memory.corpus.vocabulary import Vocabulary
from mlp_memory.inference.config import GenerateConfig
from mlp_memory.inference.generate import Steps, generate
from mlp_memory.inference.next_token import Mixture
from mlp_memory.inference.sampling import Filters
from mlp_memory.interchange import serve
from mlp_memory.interchange.serving import export_serving

# Runs a folder's serve.py where this package cannot be imported.
PROGRAM = """
import runpy, sys

class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("mlp_memory", "flax"):
            raise ImportError(f"{name} may not be imported here")

sys.meta_path.insert(0, Refused())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
assert "mlp_memory" not in sys.modules
"""


@pytest.fixture
def vocabulary():
    return Vocabulary.from_path("bytes")


@pytest.fixture
def exported(make_mixture, decoders, vocabulary, tmp_path):
    """(decoder's name, settings, memory) -> its mixture and the folder it was exported to."""

    def make(name, memory=True, **settings):
        mixture = make_mixture(decoders[name], memory=memory)
        export_serving(
            Directory(tmp_path / name), mixture, vocabulary, GenerateConfig(**settings), "base_plus_memory"
        )
        return mixture, tmp_path / name

    return make


def said_here(mixture, prompts, config):
    texts = [[] for _ in prompts]
    for found in generate(Steps(mixture, Filters.of(config)), prompts, 1, config):
        for row, token in found:
            texts[row].append(token)
    return texts


def said_elsewhere(folder, *words):
    done = subprocess.run(
        [sys.executable, "-I", "-c", PROGRAM, str(folder / "serve.py"), *words],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_process_without_this_package_says_the_same_after_ragged_prompts(exported, prompts, rng):
    mixture, folder = exported("mistral", max_tokens=9)
    prompts.append(rng.integers(0, 37, 70).tolist())  # beyond one multiple of the lengths' rounding
    lines = said_elsewhere(folder, *(f"--tokens={' '.join(map(str, prompt))}" for prompt in prompts))
    assert [[*map(int, line.split())] for line in lines] == said_here(
        mixture, prompts, GenerateConfig(max_tokens=9)
    )


def test_draws_elsewhere_are_those_here_by_filters_and_seed(exported, prompts):
    settings = {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.001, "repetition_penalty": 1.3}
    mixture, folder = exported("gpt2", max_tokens=6, **settings)
    server = serve.Server(folder)
    assert server.generate(prompts) == said_here(mixture, prompts, GenerateConfig(max_tokens=6, **settings))
    other = {**settings, "temperature": 0.7, "top_p": 0.8, "seed": 5}
    found = server.generate(prompts, seed=5, temperature=0.7, top_p=0.8)
    assert found == said_here(mixture, prompts, GenerateConfig(max_tokens=6, **other))


def test_one_export_serves_any_batch_and_length_with_and_without_memory(exported, prompts):
    mixture, folder = exported("qwen3", memory=False)
    server = serve.Server(folder)
    for some, count in ((prompts, 3), (prompts[1:3], 64)):
        wanted = said_here(mixture, some, GenerateConfig(max_tokens=count))
        assert server.generate(some, max_tokens=count) == wanted
    assert server.generate([]) == []


def test_text_goes_through_the_folders_tokenizer(exported, vocabulary):
    _, folder = exported("llama", max_tokens=1)
    encode, decode = serve.tokenizer(serve.Server(folder))
    for text in ("a b", "é\n ▁", ""):
        assert encode(text) == vocabulary.encode(text)
        assert decode(encode(text)) == text


def test_what_was_exported_is_described(exported):
    mixture, folder = exported("llama")
    facts = json.loads((folder / "serving.json").read_text())
    assert facts["lambda"] == pytest.approx(float(mixture.parameters["weight"]))
    assert [entry["name"] for entry in facts["weights"]][-1] == "weight"
    shapes = {entry["name"]: entry["shape"] for entry in facts["state"]}
    assert shapes["token"] == ["b"]
    assert shapes["cache_keys_0"].count("c") == 1
    assert set(facts["platforms"]) == {"cpu", "cuda", "tpu"}


def test_a_damaged_folder_is_told_in_a_line(exported, monkeypatch, capsys):
    _, folder = exported("gpt2")
    monkeypatch.setattr(sys, "argv", ["serve.py", f"--folder={folder}", "--tokens=1 2"])
    for name in ("weights.safetensors", "prefill.stablehlo", "step.stablehlo", "serving.json"):
        whole = (folder / name).read_bytes()
        for damaged in (None, b"", whole[:-100], bytes([*whole[:-1], whole[-1] ^ 1])):
            (folder / name).unlink() if damaged is None else (folder / name).write_bytes(damaged)
            with pytest.raises(SystemExit) as ended:
                serve.main()
            assert ended.value.code == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith("error: ")
            assert name in line
        (folder / name).write_bytes(whole)
    serve.Server(folder)


def test_the_weights_of_another_model_are_refused(exported):
    folder = exported("llama")[1]
    other = exported("qwen3")[1]
    (folder / "weights.safetensors").write_bytes((other / "weights.safetensors").read_bytes())
    with pytest.raises(serve.ServingError, match=r"weights\.safetensors is not the file that was exported"):
        serve.Server(folder)


def test_an_impossible_request_is_told(exported):
    server = serve.Server(exported("gpt2")[1])
    for wrong, named in (
        ({"prompts": [[1], []]}, "prompt 1 is empty"),
        ({"prompts": [[1, 37]]}, "tokens are 0 to 36"),
        ({"prompts": [[1]], "max_tokens": 0}, "max_tokens = 0"),
        ({"prompts": [[1]], "temperature": 0.5}, "temperature"),
        ({"prompts": [[1] * 20], "max_tokens": 5}, "prompt 0 has 20 tokens; with max_tokens = 5, 19 fit"),
    ):
        with pytest.raises(serve.ServingError, match=named):
            server.generate(**{"max_tokens": 4, **wrong})


def test_beams_are_not_exported(exported):
    with pytest.raises(UserError, match="beams"):
        exported("gpt2", beams=2)


def test_the_weights_are_served_in_the_dtype_of_the_mixture(make_mixture, decoders, vocabulary, tmp_path):
    decoder, memory = make_mixture(decoders["llama"]).models()
    mixture = Mixture(decoder, memory, 0.5, make_mixture(decoders["llama"]).tap, "bfloat16")
    export_serving(Directory(tmp_path / "half"), mixture, vocabulary, GenerateConfig(), "base_plus_memory")
    facts = serve.Server(tmp_path / "half").facts
    assert {entry["dtype"] for entry in facts["weights"] if entry["name"] != "weight"} == {"bfloat16"}
    assert {entry["dtype"] for entry in facts["state"] if "cache" in entry["name"]} == {"bfloat16"}
