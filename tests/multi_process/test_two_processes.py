import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from mlp_memory.artifacts import Directory
from mlp_memory.decoder.config import DecoderConfig
from mlp_memory.interchange.export import export_model
from mlp_memory.memory.config import MemoryConfig
from mlp_memory.memory.mlp import Memory

PROGRAMS = Path(__file__).parents[1] / "multi_device"


def test_two_processes_of_four_devices_train_what_one_device_and_eight_of_one_process_train(
    job, training_inputs, tmp_path
):
    program, mesh = PROGRAMS / "train_on_meshes.py", "data=2,fsdp=2,tensor=2"
    jobs = [
        job(program, training_inputs, tmp_path / "one", "data=1"),
        job(program, training_inputs, tmp_path / "eight", mesh, devices=8),
        job(program, training_inputs, tmp_path / "two", mesh, count=2, devices=4),
    ]
    for started in jobs:
        started.finish()
    with np.load(tmp_path / f"two/{mesh}.npz") as found:
        assert {"loss at 20", "memory loss at 20"} < set(found)
        for other in (f"eight/{mesh}.npz", "one/data=1.npz"):
            with np.load(tmp_path / other) as expected:
                assert set(expected) == set(found)
                for name in expected:
                    close = np.testing.assert_allclose
                    close(found[name], expected[name], atol=1e-5, rtol=1e-5, err_msg=f"{other} {name}")


def test_a_process_that_does_not_know_its_number_is_told_in_one_line(job, training_inputs, tmp_path):
    words = (PROGRAMS / "train_on_meshes.py", training_inputs, tmp_path / "out", "data=1")
    code, error = job(*words, MLP_MEMORY_COORDINATOR="127.0.0.1:1", MLP_MEMORY_PROCESS="x").end(0, 60)
    assert code != 0
    assert "needs MLP_MEMORY_PROCESSES and MLP_MEMORY_PROCESS as whole numbers" in error.splitlines()[-1]


@pytest.fixture
def pretrained(make_decoder, randomize, tmp_path) -> list[str]:
    """Bindings of a run that starts from a decoder and a memory, over texts in bytes."""
    decoder = make_decoder(DecoderConfig(layers=2, dim=16, heads=4, ffn_dim=24, vocab_size=260))
    memory = randomize(lambda: Memory(MemoryConfig("gpt2", 2, 16, 24, 0.0, 1e-5, 16, 260), nnx.Rngs(0)))
    export_model(Directory(tmp_path / "decoder"), decoder, {}, {}, {})
    export_model(Directory(tmp_path / "memory"), memory, {"lambda": 0.3}, {}, {})
    lines = [json.dumps({"text": f"document {n} " * 8}) for n in range(200)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    settings = {
        "corpus.source": "jsonl",
        "corpus.train_files": str(tmp_path / "texts.jsonl"),
        "corpus.vocab_file": "bytes",
        "pretrained.source": str(tmp_path / "decoder"),
        "pretrained.memory": str(tmp_path / "memory"),
    }
    return [f"--gin={name}={value!r}" for name, value in settings.items()]


MESH = ["--gin=mesh.fsdp=2", "--gin=mesh.tensor=2"]


def test_the_command_line_imports_and_exports_in_two_processes_as_in_one(job, pretrained, files_of, tmp_path):
    def command(stage: str, folder: str) -> list[str]:
        return ["-m", "mlp_memory", stage, f"--workdir={tmp_path / folder}", *pretrained]

    job(*command("tokenize", "one")).finish()
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    for stage in ("import", "import_memory", "export"):
        one = job(*command(stage, "one"))
        job(*command(stage, "two"), *MESH, count=2, devices=2).finish()
        one.finish()
    for folder in ("decoder", "memory", "export"):
        assert files_of(tmp_path / "two" / folder) == files_of(tmp_path / "one" / folder), folder
    for name in ("decoder", "memory"):
        weights = [tmp_path / place / name / "model.safetensors" for place in (".", "two/export")]
        assert weights[0].read_bytes() == weights[1].read_bytes()


def test_two_processes_run_one_stage_after_the_other_and_process_0_does_alone_what_one_can_do(
    job, pretrained, tmp_path
):
    small = {
        "pretrained.finetune": True,
        "pretrain.steps": 4,
        "pretrain.eval_every": 2,
        "pretrain.batch_size": 4,
        "pretrain.context": 16,
        "pretrain.eval_rows": 64,
        "embed.context": 16,
        "embed.stride": 8,
        "evaluate.max_rows": 64,
        "gate.folds": 2,
        "gate.bootstrap": 20,
        "gate.penalties": (1e-2,),
        "evaluate.bootstrap": 20,
        "evaluate.samples": 0,
    }
    words = ["-m", "mlp_memory", "run", f"--workdir={tmp_path / 'run'}", *pretrained, *MESH]
    words += [f"--gin={name}={value!r}" for name, value in small.items()]
    errors = job(*words, count=2, devices=2).finish()
    # The mesh of four devices takes both processes; in what process 0 does alone it has two.
    done = [json.loads(line)["stage"] for line in (tmp_path / "run/times.jsonl").read_text().splitlines()]
    assert sorted(done) == ["evaluate", "export", "gate", "import_memory", "pretrain", "tokenize"]
    for folder in ("corpus/test", "decoder", "memory", "reports", "export"):
        assert json.loads((tmp_path / "run" / folder / "manifest.json").read_text())["finished"], folder
    assert "index.html" in errors[0]
    assert "index.html" not in errors[1]
    steps = [
        json.loads(line)["step"] for line in (tmp_path / "run/decoder/metrics.jsonl").read_text().splitlines()
    ]
    assert steps == [0, 2, 4]
    # A second job finds nothing to do, and says so once.
    again = job(*words, count=2, devices=2).finish()
    assert ("done" in again[0], again[1]) == (True, "")
