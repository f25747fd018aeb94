"""Traces of a finished run: they give the stored teacher and say what evaluation says."""

import json

import numpy as np
import pytest

import mlp_memory as mlp_memory_package
from mlp_memory.arrays import ArrayReader
from mlp_memory.artifacts import Directory, UserError
from mlp_memory.flags import parser
from mlp_memory.index.exact import exact_search
from mlp_memory.job import Job
from mlp_memory.recipes import load_config
from mlp_memory.tracing.command import open_documents, show_documents, show_trace, trace
from mlp_memory.tracing.teacher import Teacher
from mlp_memory.tracing.text import trace_text


@pytest.fixture(scope="module")
def job(small_run):
    workdir = Directory(small_run)
    return Job(workdir, load_config([], [], workdir))


def scored_rows(stream) -> np.ndarray:
    return np.flatnonzero(stream.has_next(0, len(stream)))


def test_random_training_rows_reproduce_the_stored_teacher_to_the_rounding_of_float16(job, rng):
    train = job.stream("train")
    rows = rng.choice(scored_rows(train), 60, replace=False)
    keys = job.keys()
    documents = open_documents(job, "train")
    teacher = Teacher(job.workdir / "targets", documents, keys, job.index(keys), shown=8)
    tau = job.manifest("targets").facts["temperature"]
    token_ids, probs = (ArrayReader(job.workdir / "targets", name) for name in ("token_ids", "probs"))
    tokens = train.tokens[0 : len(train)]
    # The index misses neighbours now and then; of a list that holds all of them everything can be said.
    queries = np.concatenate([keys[row : row + 1] for row in rows])
    nearest, sqdist = exact_search(keys, train.has_next(0, len(train)), queries, 9)
    whole = 0
    for row, found, near, distances in zip(rows.tolist(), teacher(rows), nearest, sqdist):
        used = [position["row"] for position in found["drawn_on"]]
        weights = np.exp(-np.array([p["distance"] for p in found["drawn_on"]]) / tau)
        np.testing.assert_allclose(
            [p["weight"] for p in found["drawn_on"]], weights / weights.sum(), rtol=1e-5
        )
        mass = np.bincount(tokens[np.array(used) + 1], weights / weights.sum(), minlength=300)
        stored = {int(t): float(p) for t, p in zip(token_ids[row : row + 1][0], probs[row : row + 1][0]) if p}
        assert set(stored) <= set(np.flatnonzero(mass).tolist())
        for token, p in stored.items():
            assert p == pytest.approx(mass[token], rel=2**-10, abs=1e-6)
        assert found["difference"] < 2**-10
        expected = [(d, other) for d, other in zip(distances, near) if other != row][:8]
        if used == [other for _, other in expected]:
            whole += 1
            np.testing.assert_allclose(
                [p["distance"] for p in found["drawn_on"]], [d for d, _ in expected], rtol=1e-4, atol=1e-4
            )
    assert whole > 40


def test_held_out_rows_say_what_the_report_says_of_them(job, small_run, mlp_memory, tmp_path):
    results = json.loads((small_run / "reports/results.json").read_text())
    samples = [*results["samples"], *results["differing"]]
    rows = [f"--row={sample['row']}" for sample in samples]
    file = tmp_path / "new/trace.json"
    words = ("--split=test", "--neighbors=5", f"--json={file}")
    answer = mlp_memory("trace", f"--workdir={small_run}", *rows, *words)
    assert answer.code == 0, answer.error
    found = json.loads(file.read_text())["rows"]
    documents = open_documents(job, "test")
    assert [each.pop("title") for each in found] == [documents.title(each["document"]) for each in samples]
    for sample in results["differing"]:
        del sample["effect"]
    assert found == samples  # to the bit: the same programs, the same search


def test_a_prompt_goes_on_as_generate_does_at_the_same_lambda(job, small_run):
    for interpolation in (None, 0.9, "gate"):
        traced = trace(job, prompts=["abc def"], tokens=6, interpolation=interpolation)
        model = mlp_memory_package.load(str(small_run), interpolation=interpolation)
        (prompt,) = traced["prompts"]
        assert prompt["continuation"] == model.generate("abc def", max_tokens=6)
        for said in prompt["predictions"]:
            weight, log_prob = said["lambda"], said["log_prob"]
            mixed = weight * np.exp(log_prob["memory"]) + (1 - weight) * np.exp(log_prob["base"])
            assert np.exp(log_prob["mixture"]) == pytest.approx(mixed, rel=1e-4)
            assert said["next"] == said["mixture"][0][0]
            marks = [position["supports"] for position in said["drawn_on"]]
            assert marks == sorted(marks, reverse=True)
            assert interpolation != 0.9 or weight == pytest.approx(0.9)


def test_the_command_shows_and_writes_what_it_traced(small_run, mlp_memory, tmp_path, job, rng, monkeypatch):
    monkeypatch.setenv("COLUMNS", "97")
    rows = rng.choice(scored_rows(job.stream("train")), 2).tolist()
    words = [*(f"--row={row}" for row in rows), "--prompt=abc def", "--prompt=abc"]
    file = tmp_path / "trace.json"
    answer = mlp_memory(
        *("trace", f"--workdir={small_run}", *words, "--continue=2", "--neighbors=3", f"--json={file}")
    )
    assert answer.code == 0, answer.error
    found = json.loads(file.read_text())
    assert answer.out == trace_text(found, 97) + "\n"
    assert [row["row"] for row in found["rows"]] == rows
    assert [prompt["prompt"] for prompt in found["prompts"]] == ["abc def", "abc"]
    assert [len(prompt["predictions"]) for prompt in found["prompts"]] == [2, 2]
    for said in [*found["rows"], *(said for prompt in found["prompts"] for said in prompt["predictions"])]:
        assert len(said["drawn_on"]) == 3
        assert said["neighbours"] == found["k"] == 8
        assert 0 <= said["support"] <= 1 + 1e-9
        assert all(f"(document {each['document']})" in answer.out for each in said["documents"])


def test_documents_are_listed_and_found_by_their_text(small_run, mlp_memory, job):
    documents = open_documents(job, "train")
    answer = mlp_memory("documents", f"--workdir={small_run}")
    assert answer.code == 0, answer.error
    lines = answer.out.splitlines()
    assert len(lines) == len(documents) + 1
    numbers, tokens = zip(*((int(n), int(t)) for n, t, _ in (line.split(maxsplit=2) for line in lines[1:])))
    assert numbers == tuple(range(len(documents)))
    assert sum(tokens) == len(documents.stream)
    wanted = documents.text(5)[20:60]
    answer = mlp_memory("documents", f"--workdir={small_run}", f"--containing={wanted}")
    found = [int(line.split()[0]) for line in answer.out.splitlines()[1:]]
    assert found == [n for n in range(len(documents)) if wanted in documents.text(n)]
    assert 5 in found
    answer = mlp_memory("documents", f"--workdir={small_run}", "--split=test")
    assert len(answer.out.splitlines()) == len(open_documents(job, "test")) + 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trace"], "give --row=N or --prompt=TEXT"),
        (["trace", "--row=-1"], r"--row = -1: train has rows 0 to \d+"),
        (["trace", "--row=99999999"], r"--row = 99999999: train has rows 0 to \d+"),
        (["trace", "--row=LAST"], "is the last of document 0 and has no next token"),
        (
            ["trace", "--row=3", "--split=nowhere"],
            "nowhere: use one of train, validation, test, other",
        ),
        (["trace", "--prompt= "], "--prompt is empty"),
        (["trace", "--prompt=a", "--continue=0"], "--continue = 0: give 1 or more"),
        (["trace", "--prompt=a", "--neighbors=0"], "--neighbors = 0: give 1 or more"),
        (["trace", "--prompt=a", "--interpolation=1.5"], "interpolation = 1.5"),
        (["documents", "--containing=Ωnowhere"], "no document of train holds 'Ωnowhere'"),
        (["documents", "--containing="], "--containing is empty"),
        (["documents", "--split=nowhere"], "--split = nowhere: use one of"),
    ],
)
def test_what_cannot_be_traced_is_one_line(small_run, job, capsys, words, message):
    last = int(job.stream("train").bounds_D1[1]) - 1
    words = [words[0], f"--workdir={small_run}", *(word.replace("LAST", str(last)) for word in words[1:])]
    args = parser().parse_args(words)
    with pytest.raises(UserError, match=message) as caught:
        (show_trace if args.stage == "trace" else show_documents)(args, job)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


def test_a_refusal_ends_the_command_with_exit_code_2(small_run, mlp_memory):
    answer = mlp_memory("trace", f"--workdir={small_run}")
    assert (answer.code, answer.out) == (2, "")
    assert answer.error == "error: trace: nothing to trace, give --row=N or --prompt=TEXT\n"


@pytest.mark.parametrize(
    ("folder", "words"),
    [
        ("targets", ["targets is missing", "retrieve"]),
        ("index", ["index is missing", "index"]),
        ("datastore", ["datastore is missing", "embed"]),
        ("corpus", ["corpus/train is missing", "tokenize"]),
        ("memory", ["memory is missing", "distill"]),
    ],
)
def test_what_is_missing_is_named_with_what_makes_it(workdir, folder, words):
    job = Job(Directory(workdir), load_config([], [], Directory(workdir)))
    (workdir / folder).rename(workdir / "elsewhere")
    with pytest.raises(UserError) as caught:
        trace(job, prompts=["abc"])
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)


def test_another_decoder_than_the_targets_were_made_with_is_refused(workdir):
    manifest = workdir / "decoder/manifest.json"
    changed = json.loads(manifest.read_text())
    changed["config"]["pretrain"]["seed"] = 12345
    manifest.write_text(json.dumps(changed))
    job = Job(Directory(workdir), load_config([], [], Directory(workdir)))
    for what in ({"rows": [3]}, {"prompts": ["abc"]}):
        with pytest.raises(UserError, match=r"datastore was made from decoder \w+, this decoder is \w+"):
            trace(job, **what)


def test_before_the_memory_is_there_training_rows_are_traced_with_the_decoders_word_alone(workdir):
    (workdir / "memory").rename(workdir / "elsewhere")
    job = Job(Directory(workdir), load_config([], [], Directory(workdir)))
    (found,) = trace(job, [3])["rows"]
    assert set(found["log_prob"]) == {"base"}
    assert found["drawn_on"]
    assert found["difference"] < 2**-10
