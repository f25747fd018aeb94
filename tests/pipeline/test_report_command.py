"""The report of a finished run, drawn again with what has been found since."""

import json

import numpy as np
import pytest

from mlp_memory.arrays import ArrayReader
from mlp_memory.artifacts import Directory
from mlp_memory.corpus.stream import TokenStream
from mlp_memory.decoder.windows import read, spread
from mlp_memory.evaluation.config import EvaluateConfig
from mlp_memory.evaluation.sections import Claim, Findings, Section

FINDINGS = Findings(
    (Claim("A claim of a study.", "42", "41", "40 … 42", "unclear", "small", "make study"),),
    (Section("A study", ("What it found.",)),),
)


@pytest.fixture(scope="module")
def results(small_run):
    return json.loads((small_run / "reports/results.json").read_text())


def test_drawn_again_the_page_is_what_evaluate_wrote_and_then_shows_new_findings(workdir, mlp_memory):
    page = workdir / "reports/index.html"
    before = page.read_text()
    words = ("report", f"--workdir={workdir}")
    answer = mlp_memory(*words)
    assert answer.code == 0, answer.error
    assert answer.out == f"report: {page}\n"
    assert page.read_text() == before
    (workdir / "studies/one").mkdir(parents=True)
    (workdir / "studies/one/findings.json").write_text(json.dumps(FINDINGS.to_json()))
    answer = mlp_memory(*words)
    assert answer.code == 0, answer.error
    assert answer.seconds < 20
    assert "A claim of a study." not in before
    for text in ("A claim of a study.", "<h2>A study</h2>", "What it found."):
        assert text in page.read_text()
    status = mlp_memory("status", f"--workdir={workdir}")
    assert all(line.endswith("done") for line in status.out.splitlines()[2:])


def test_damaged_findings_stop_the_report_and_an_evaluation_before_its_work(workdir, mlp_memory):
    (workdir / "benchmarks").mkdir()
    (workdir / "benchmarks/findings.json").write_text('{"claims": []')
    for path in (workdir / "reports/manifest.json", workdir / "reports/results.json"):
        path.rename(path.with_suffix(".kept"))
    before = sorted(workdir.rglob("*"))
    answer = mlp_memory("evaluate", f"--workdir={workdir}")
    assert answer.code == 2
    assert answer.error.splitlines()[-1].startswith(f"error: {workdir}/benchmarks/findings.json is damaged")
    assert not (workdir / "reports/results.json").exists()
    assert {path.name for path in set(workdir.rglob("*")) - set(before)} <= {"manifest.json"}
    answer = mlp_memory("report", f"--workdir={workdir}")
    assert answer.code == 2
    assert answer.error.splitlines()[-1].startswith(f"error: {workdir}/benchmarks/findings.json is damaged")
    (workdir / "benchmarks/findings.json").unlink()
    answer = mlp_memory("report", f"--workdir={workdir}")
    assert answer.code == 2
    assert "run `python -m mlp_memory evaluate` first, or a study" in answer.error


def test_studies_alone_have_a_report(tmp_path, mlp_memory):
    (tmp_path / "studies/one").mkdir(parents=True)
    (tmp_path / "studies/one/findings.json").write_text(json.dumps(FINDINGS.to_json()))
    answer = mlp_memory("report", f"--workdir={tmp_path}")
    assert answer.code == 0, answer.error
    page = (tmp_path / "reports/index.html").read_text()
    for text in ("A claim of a study.", "<h2>A study</h2>", "What it found."):
        assert text in page
    assert "Perplexity on the" not in page


def test_differing_samples_are_the_extremes_of_the_scored_rows(results, small_run):
    stream = TokenStream.open(Directory(small_run / "corpus/test"))
    ranges = spread(len(stream), results["config"]["evaluate"]["max_rows"])
    scored = read(stream.has_next, ranges)
    row_N, document_N = (read(column, ranges)[scored] for column in (np.arange, stream.document_ids))
    rows = Directory(small_run / "reports/rows/test")
    readers = [ArrayReader(rows, name) for name in ("base", "base_memory")]
    base_N, memory_N = (np.float64(reader[0 : len(reader)])[scored] for reader in readers)
    weight = results["test"]["details"]["base_plus_memory"]["lambda"]
    gain_N = np.log(weight * np.exp(memory_N) + (1 - weight) * np.exp(base_N)) - base_N
    effects = [sample["effect"] for sample in results["differing"]]
    most = EvaluateConfig().traces // 2
    assert effects == sorted(effects)
    assert all(1 <= effects.count(effect) <= most for effect in ("better", "worse"))
    better, worse = (next(s for s in results["differing"] if s["effect"] == e) for e in ("better", "worse"))
    assert better["row"] == row_N[gain_N.argmax()]
    elsewhere = document_N != better["document"]
    assert worse["row"] == row_N[elsewhere][gain_N[elsewhere].argmin()]
    assert gain_N.max() > 0 > gain_N[elsewhere].min()


def test_samples_show_the_training_positions_that_the_teacher_drew_on(results, small_run):
    train = TokenStream.open(Directory(small_run / "corpus/train"))
    samples = [*results["samples"], *results["differing"]]
    assert len(results["samples"]) == 2
    for sample in samples:
        weights = [position["weight"] for position in sample["drawn_on"]]
        assert len(weights) == 5
        assert weights == sorted(weights, reverse=True)
        assert 0 < sum(weights) <= 1 + 1e-6
        for position in sample["drawn_on"]:
            assert train.has_next(position["row"], position["row"] + 1)[0]
            assert train.document_ids(position["row"], position["row"] + 1)[0] == position["document"]
        likeliest = max(sample["teacher"], key=lambda pair: pair[1])
        ahead = sum(p["weight"] for p in sample["drawn_on"] if p["next"] == likeliest[0])
        assert ahead <= likeliest[1] + 1e-5
        shares = [each["share"] for each in sample["documents"]]
        assert shares == sorted(shares, reverse=True)
        assert (sum(shares) == pytest.approx(1)) == (sample["other_documents"] == 0)
    page = (small_run / "reports/index.html").read_text()
    assert page.count("Which training positions the teacher drew on") == len(samples)


def test_the_claims_of_the_run_are_on_its_page(small_run):
    page = (small_run / "reports/index.html").read_text()
    for text in ("10.42 → 9.58", "10.16 → 9.58", "claimed, no figure", "kNN-LM 9.43"):
        assert text in page
