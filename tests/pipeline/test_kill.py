import time
from pathlib import Path

import numpy as np

# A kill is due a moment after one of these appears for the first time.
MOMENTS = [
    "corpus/vocabulary/manifest.json",
    "corpus/train/bounds.i64",
    "decoder/manifest.json",
    "decoder/steps/*",
    "decoder/model*",
    "datastore/chunks/*",
    "index/manifest.json",
    "index/shard-*/*",
    "targets/chunks/*",
    "memory/steps/*",
    "joint/steps/*",
    "baseline/steps/*",
    "reports/rows/validation/chunks/*",
    "reports/rows/test/chunks/*",
    "export/decoder/*",
]
KILLS = 3


def compared(folder: Path) -> dict[str, bytes]:
    """Files that must not depend on how often the run was killed.

    Left out: logs for TensorBoard, seconds spent, the lock, and Orbax's own files, whose names
    are random, and their list; parameters are compared as exported, and by checksum in the manifests.
    """
    return {
        name: path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
        and not (name := str(path.relative_to(folder))).startswith((".lock", "times.jsonl"))
        and not {"tensorboard", "model"} & set(path.relative_to(folder).parts)
        and not (path.name == "checksums.json" and (path.parent / "model").is_dir())
    }


def test_a_run_killed_again_and_again_ends_in_the_bytes_of_an_uninterrupted_one(
    small_run, recipe, start_command, tmp_path, rng
):
    workdir, log = tmp_path / "workdir", tmp_path / "log"
    chosen = sorted(rng.choice(len(MOMENTS), KILLS, replace=False).tolist())
    words = ("run", f"--workdir={workdir}", f"--gin_file={recipe}")
    killed = []
    for moment in chosen:
        if any(workdir.glob(MOMENTS[moment])):
            continue  # an earlier kill came late
        process = start_command(*words, log=log)
        while not any(workdir.glob(MOMENTS[moment])):
            assert process.poll() is None, f"ended before {MOMENTS[moment]}: {log.read_text()[-3000:]}"
            time.sleep(0.005)
        time.sleep(float(rng.choice([0, rng.uniform(0, 0.1), rng.uniform(0, 1.5)])))
        process.kill()
        process.wait()
        killed.append(MOMENTS[moment])
    print("killed at", killed)
    assert killed
    process = start_command(*words, log=log)
    assert process.wait(600) == 0, log.read_text()[-3000:]
    expected, found = compared(small_run), compared(workdir)
    assert sorted(found) == sorted(expected)
    differing = [name for name in expected if found[name] != expected[name]]
    assert not differing
    for name in ("decoder", "memory", "joint", "baseline"):
        folders = [
            sorted(p.name for p in (run / name).iterdir() if p.name != "tensorboard")
            for run in (small_run, workdir)
        ]
        assert folders[0] == folders[1]
    assert "Traceback" not in log.read_text()


def test_the_comparison_sees_arrays_parameters_and_results(small_run):
    """What the test above compares does hold what matters."""
    names = compared(small_run)
    for name in (
        "corpus/train/tokens/c/0",
        "datastore/keys/c/0/0",
        "targets/probs/c/0/0",
        "decoder/manifest.json",
        "memory/metrics.jsonl",
        "reports/results.json",
        "reports/index.html",
        "export/joint/model.safetensors",
        "index/manifest.json",
    ):
        assert name in names
    assert np.sum([len(data) for data in names.values()]) > 1e6
