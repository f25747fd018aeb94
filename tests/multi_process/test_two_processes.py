import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
from flax import nnx

from mlp_memory.artifacts import Directory
from mlp_memory.decoder.config import DecoderConfig
from mlp_memory.interchange.export import export_model
from mlp_memory.memory.config import MemoryConfig
from mlp_memory.memory.mlp import Memory

PROGRAMS = Path(__file__).parents[1] / "multi_device"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(*words: object, devices: int = 1, **environment: str) -> subprocess.Popen:
    """Python with these words."""
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        env={
            **os.environ,
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(PROGRAMS.parents[1]),
            **environment,
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_two(*words: object, devices: int = 2) -> list[subprocess.Popen]:
    """Two processes of one job."""
    job = {"MLP_MEMORY_COORDINATOR": f"127.0.0.1:{free_port()}", "MLP_MEMORY_PROCESSES": "2"}
    return [start(*words, devices=devices, **job, MLP_MEMORY_PROCESS=str(index)) for index in range(2)]


def finish(*processes: subprocess.Popen) -> None:
    try:
        for process in processes:
            error = process.communicate(timeout=300)[1]
            assert process.returncode == 0, error[-4000:]
    finally:
        for process in processes:
            process.kill()


def test_two_processes_train_what_one_trains(training_inputs, tmp_path):
    program = PROGRAMS / "train_on_meshes.py"
    one = start(program, training_inputs, tmp_path / "one", "data=1")
    finish(one, *start_two(program, training_inputs, tmp_path / "two", "data=2,fsdp=2"))
    with (
        np.load(tmp_path / "one/data=1.npz") as expected,
        np.load(tmp_path / "two/data=2,fsdp=2.npz") as found,
    ):
        assert set(expected) == set(found)
        for name in expected:
            np.testing.assert_allclose(found[name], expected[name], atol=1e-5, rtol=1e-5, err_msg=name)


def test_a_process_that_does_not_know_its_number_is_told_in_one_line(training_inputs, tmp_path):
    process = start(
        PROGRAMS / "train_on_meshes.py",
        training_inputs,
        tmp_path / "out",
        "data=1",
        MLP_MEMORY_COORDINATOR="127.0.0.1:1",
        MLP_MEMORY_PROCESS="x",
    )
    error = process.communicate(timeout=60)[1]
    assert process.returncode != 0
    assert "needs MLP_MEMORY_PROCESSES and MLP_MEMORY_PROCESS as whole numbers" in error.splitlines()[-1]


def test_two_processes_import_and_export_what_one_does(model_folders, files_of, tmp_path):
    program, meshes = PROGRAMS / "import_on_meshes.py", ("fsdp=2,tensor=2", "data=2,tensor=2")
    one = start(program, model_folders, tmp_path / "one", "data=1")
    finish(one, *start_two(program, model_folders, tmp_path / "two", *meshes))
    wanted = files_of(tmp_path / "one/data=1")
    assert len([name for name in wanted if name.endswith("-out/model.safetensors")]) == 4
    for mesh in meshes:
        assert files_of(tmp_path / "two" / mesh) == wanted, mesh


def test_the_command_line_imports_and_exports_in_two_processes_as_in_one(
    make_decoder, randomize, files_of, tmp_path
):
    decoder = make_decoder(DecoderConfig(layers=2, dim=16, heads=4, ffn_dim=24, vocab_size=260))
    memory = randomize(lambda: Memory(MemoryConfig("gpt2", 2, 16, 24, 0.0, 1e-5, 16, 260), nnx.Rngs(0)))
    export_model(Directory(tmp_path / "decoder"), decoder, {}, {}, {})
    export_model(Directory(tmp_path / "memory"), memory, {"lambda": 0.3}, {}, {})
    lines = [json.dumps({"text": f"document {n}"}) for n in range(200)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    settings = {
        "corpus.source": "jsonl",
        "corpus.train_files": str(tmp_path / "texts.jsonl"),
        "corpus.vocab_file": "bytes",
        "pretrained.source": str(tmp_path / "decoder"),
        "pretrained.memory": str(tmp_path / "memory"),
    }
    words = [f"--gin={name}={value!r}" for name, value in settings.items()]
    mesh = ["--gin=mesh.fsdp=2", "--gin=mesh.tensor=2"]

    def command(stage: str, folder: str) -> list[str]:
        return ["-m", "mlp_memory", stage, f"--workdir={tmp_path / folder}", *words]

    finish(start(*command("tokenize", "one")))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    for stage in ("import", "import_memory", "export"):
        finish(start(*command(stage, "one")), *start_two(*command(stage, "two"), *mesh))
    for folder in ("decoder", "memory", "export"):
        assert files_of(tmp_path / "two" / folder) == files_of(tmp_path / "one" / folder), folder
    for name in ("decoder", "memory"):
        weights = [tmp_path / place / name / "model.safetensors" for place in (".", "two/export")]
        assert weights[0].read_bytes() == weights[1].read_bytes()
