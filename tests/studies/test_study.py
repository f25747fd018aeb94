import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mlp_memory.artifacts import Directory, UserError, peek, require
from mlp_memory.evaluation.sections import Findings
from mlp_memory.recipes import load_config
from mlp_memory.studies.conclude import conclude
from mlp_memory.studies.curves import read_curve
from mlp_memory.studies.measure import read_measured
from mlp_memory.studies.results import outcomes
from mlp_memory.studies.sharing import _take
from mlp_memory.studies.study import Study
from mlp_memory.targets.interpolation import best_lambda, mixture_rows

REPOSITORY = Path(__file__).parents[2]


def make(study: Study) -> list[tuple[str, str]]:
    """Does all of a study in this process; returns the pieces in order."""
    done = []
    while piece := study.next_piece():
        assert piece not in done, "made twice"
        job, stage = study.open(*piece)
        stage.work(job, job.workdir / stage.folder)
        done.append(tuple(piece))
    return done


@pytest.fixture(scope="session")
def studied(recipe, tmp_path_factory) -> tuple[Path, dict[str, list[tuple[str, str]]]]:
    """A workdir in which studies were made one after the other, and the pieces of each."""
    workdir, made = tmp_path_factory.mktemp("studied"), {}
    for name in ("k", "scaling", "overfitting", "teacher", "mixer"):
        study = Study(name, [recipe], [], Directory(workdir))
        made[name] = make(study)
        conclude(study)
    return workdir, made


def opened(recipe: str, name: str, workdir: Path, *bindings: str) -> Study:
    return Study(name, [recipe], list(bindings), Directory(workdir))


def copied(workdir: Path, tmp_path: Path) -> Path:
    """A copy with its links, which are relative, as links."""
    return Path(shutil.copytree(workdir, tmp_path / "copy", symlinks=True))


def findings_of(workdir: Path, name: str) -> Findings:
    folder = workdir / "studies" / name
    return Findings.from_json(json.loads((folder / "findings.json").read_text()))


def test_nothing_that_variants_or_studies_have_alike_is_made_twice(studied):
    _, made = studied
    base = ["tokenize", "pretrain", "embed", "index", "retrieve", "distill", "measure"]
    assert made["k"] == [
        *(("recipe", stage) for stage in base),
        *(("k_2", stage) for stage in ("index", "retrieve", "distill", "measure")),
    ]  # k_8 is the recipe's own
    assert made["scaling"] == [
        *(("memory_1x16", stage) for stage in base if stage != "tokenize"),
        *(("decoder_1x16", stage) for stage in ("pretrain", "measure")),
    ]
    assert made["overfitting"] == [(name, "curve") for name in ("memory", "memory_ce", "decoder")]
    assert made["teacher"] == [  # its larger decoder, here a smaller one, is the scaling study's
        ("decoder_1x16", "measure"),
        *(("from_1x16", stage) for stage in ("adopt", "distill", "measure")),
    ]
    assert made["mixer"] == [("transformer", stage) for stage in ("distill_mixer", "measure")]


def test_a_finished_study_has_nothing_to_do_and_concludes_alike_again(studied, recipe):
    workdir, made = studied
    for name in made:
        folder = workdir / "studies" / name
        before = {file: (folder / file).read_bytes() for file in ("results.json", "findings.json")}
        study = opened(recipe, name, workdir)
        assert study.next_piece() is None
        text = conclude(study)
        assert before == {file: (folder / file).read_bytes() for file in before}
        for claim in findings_of(workdir, name).claims:
            assert claim.claim in text
            assert claim.held in ("yes", "no", "unclear")
            assert f"study {name} --workdir={workdir}" in claim.command


def test_shared_artifacts_are_relative_links_that_move_with_the_workdir(studied, recipe, tmp_path):
    workdir, _ = studied
    link = workdir / "studies/k/k_8/targets"
    assert link.is_symlink()
    assert not os.path.isabs(os.readlink(link))
    moved = copied(workdir, tmp_path)
    assert (moved / "studies/k/k_8/targets").resolve().is_relative_to(moved)
    assert opened(recipe, "k", moved).next_piece() is None


def test_an_artifact_with_another_parent_is_not_shared(studied, recipe, tmp_path):
    workdir = copied(studied[0], tmp_path)
    study = opened(recipe, "style", workdir, "pretrain.seed = 1")
    assert study.next_piece() == ("recipe", "pretrain")
    variant = workdir / "studies/style/recipe"
    assert (variant / "corpus").is_symlink()
    assert not (variant / "decoder").exists()
    # A decoder of the same settings that came out otherwise: what is made from the other one does not fit.
    shutil.copytree(workdir / "studies/k/recipe/decoder", variant / "decoder")
    manifest = json.loads((variant / "decoder/manifest.json").read_text())
    manifest["facts"]["step"] += 1
    (variant / "decoder/manifest.json").write_text(json.dumps(manifest))
    assert opened(recipe, "style", workdir).next_piece() == ("recipe", "embed")
    assert not (variant / "datastore").exists()


def test_a_link_that_leads_nowhere_or_to_what_was_made_otherwise_is_replaced(studied, recipe, tmp_path):
    workdir = copied(studied[0], tmp_path)
    variant = workdir / "studies/k/k_8"
    (variant / "targets").unlink()
    (variant / "targets").symlink_to("../k_2/targets")
    (variant / "datastore").unlink()
    (variant / "datastore").symlink_to("gone")
    assert opened(recipe, "k", workdir).next_piece() is None
    assert (variant / "datastore").resolve() == (workdir / "studies/k/recipe/datastore").resolve()
    assert (variant / "targets").resolve() == (workdir / "studies/k/recipe/targets").resolve()


def test_where_links_cannot_be_an_artifact_is_copied_its_manifest_last(studied, tmp_path, monkeypatch):
    source, target = Directory(studied[0] / "studies/k/recipe/targets"), Directory(tmp_path / "targets")
    for directory in (source, target):
        assert directory.kvstore
        directory.is_local = False  # as a bucket is, behind the same reads and writes
    written = []

    def write(name: str, data: bytes) -> None:
        written.append(name)
        Directory.write(target, name, data)

    monkeypatch.setattr(target, "write", write)
    _take(source, target)
    assert written[-1] == "manifest.json"
    assert sorted(written) == source.names()
    assert all(source.read(name) == target.read(name) for name in written)


def test_a_variant_that_was_made_otherwise_is_refused(studied, recipe):
    study = opened(recipe, "k", studied[0], "distill.seed = 1")
    with pytest.raises(UserError, match=r"distill.seed = 0, now it is 1: delete"):
        study.next_piece()


def test_figures_are_those_of_the_measured_rows(studied, recipe):
    workdir, _ = studied
    study = opened(recipe, "k", workdir)
    numbers = json.loads((workdir / "studies/k/results.json").read_text())["variants"]
    assert set(numbers) == {"recipe", "k_2", "k_8"}
    nll = {}
    for name, found in numbers.items():
        job = study.job(study.variants[name])
        validation, test = (read_measured(job, split).log_probs for split in ("validation", "test"))
        weight, _ = best_lambda(validation["base"], validation["base_memory"])
        nll[name] = mixture_rows(test["base"], test["base_memory"], weight)
        assert found["lambda"] == weight
        assert found["test"]["perplexity"]["base_plus_memory"] == pytest.approx(np.exp(nll[name].mean()))
        assert found["test"]["scored_tokens"] == len(nll[name])
        low, high = found["test"]["interval"]["base"]
        assert low <= found["test"]["perplexity"]["base"] <= high
        for model, folder in (("base", "decoder"), ("memory", "memory")):
            facts = require(job.workdir / folder, "").facts
            assert found["parameters"][model] == facts["parameters"]
            assert found["training_flops"][model] == facts["train_flops"]
    assert numbers["k_8"]["difference_to_recipe"] == {"nats": 0.0, "interval": [0.0, 0.0]}
    gap = numbers["k_2"]["difference_to_recipe"]["nats"]
    assert gap == pytest.approx((nll["k_2"] - nll["recipe"]).mean())
    assert numbers["k_2"]["teacher"]["k"] == 2


def test_measured_rows_are_what_the_ordinary_reader_says(studied, recipe):
    study = opened(recipe, "k", studied[0])
    job = study.job(study.variants["k_2"])
    held_out = job.held_out(study.recipe.evaluate.max_rows)
    found = read_measured(job, "validation").log_probs
    np.testing.assert_allclose(found["base"], held_out.base_log_prob_N, atol=1e-5)


def test_findings_have_a_table_of_every_variant_and_the_scaling_plot_its_fits(studied):
    workdir, _ = studied
    ablation = findings_of(workdir, "k").sections[0]
    assert [row[0] for row in ablation.tables[0].rows] == ["recipe", "2", "8"]
    assert ablation.plots[0].series[0].x_N == (2.0, 8.0)
    scaling = findings_of(workdir, "scaling")
    assert [row[0] for row in scaling.sections[0].tables[0].rows] == [
        "1x16, no memory",
        "1x16 + memory",
        scaling.sections[0].tables[0].rows[2][0],
    ]
    numbers = json.loads((workdir / "studies/scaling/results.json").read_text())
    assert "fit" not in numbers  # of one size
    memory, alone = (numbers["variants"][f"{name}_1x16"] for name in ("memory", "decoder"))
    for counted in ("parameters", "training_flops"):
        # Shapes this small come in coarse steps.
        assert sum(alone[counted].values()) == pytest.approx(sum(memory[counted].values()), rel=0.1)


def test_a_curve_has_its_checks_and_its_last_losses_are_the_published_models(studied, recipe):
    workdir, _ = studied
    study = opened(recipe, "overfitting", workdir)
    for name, variant in study.variants.items():
        job = study.job(variant)
        checks, manifest = read_curve(job), peek(job.workdir / "curve")
        assert [check.step for check in checks] == [checks[0].step * n for n in (1, 2)]
        # So few steps come as near to an epoch as whole steps between checks do.
        assert checks[-1].epochs == pytest.approx(1.0, rel=0.3)
        assert checks[0].epochs == pytest.approx(checks[-1].epochs / 2)
        for check in checks:
            tokens = check.samples["test"]["tokens"].sum()
            assert 0 < tokens <= study.recipe.evaluate.max_rows
            assert set(check.samples["train"]) - {"tokens"} == (
                {"alone"} if name == "decoder" else {"alone", "mixture"}
            )
        chosen_by = "alone" if name == "decoder" else "mixture"
        best = min(checks, key=lambda check: check.validation[chosen_by])
        if best.step == manifest.facts["step"]:
            assert best.validation[chosen_by] == manifest.facts["validation"]["validation_loss"]
    results = json.loads((workdir / "studies/overfitting/results.json").read_text())
    assert set(results["memory_rise_less"]) == {"decoder", "memory_ce"}
    assert set(results["rises"]) == {*study.variants, "memory_with_decoder", "memory_ce_with_decoder"}


def test_a_curve_is_the_ordinary_training_at_a_constant_rate(studied, recipe):
    """The first check of a curve is what that many ordinary steps give."""
    workdir, _ = studied
    study = opened(recipe, "overfitting", workdir)
    job = study.job(study.variants["memory"])
    first = read_curve(job)[0]
    from mlp_memory.job import Job
    from mlp_memory.pipeline import find_stage

    bindings = [
        f"distill.steps = {first.step}",
        f"distill.eval_every = {first.step}",
        'distill.decay = "constant"',
    ]
    config = load_config([recipe], bindings, None)
    other = Job(Directory(job.workdir.path.parent / "ordinary"), config)
    other.workdir.path.mkdir()
    for folder in ("corpus", "decoder", "datastore", "index", "targets"):
        (other.workdir.path / folder).symlink_to(f"../memory/{folder}")
    find_stage("distill").work(other, other.workdir / "memory")
    found = require(other.workdir / "memory", "").facts["validation"]["validation_loss"]
    assert found == pytest.approx(first.validation["mixture"], rel=1e-6)


def test_targets_are_adopted_with_their_true_parents(studied, recipe):
    workdir, _ = studied
    teacher, student = (workdir / "studies/teacher" / name for name in ("decoder_1x16", "from_1x16"))
    theirs, ours = (require(Directory(folder / "targets"), "") for folder in (teacher, student))
    assert ours.checksums == theirs.checksums
    assert ours.parents == {"corpus/train": theirs.parents["corpus/train"]}
    assert ours.config["taken_from"] == theirs.fingerprint
    memory = require(Directory(student / "memory"), "")
    assert memory.parents["targets"] == ours.fingerprint
    assert (
        memory.parents["datastore"]
        == require(Directory(workdir / "studies/k/recipe/datastore"), "").fingerprint
    )
    found = {o.variant.name: o for o in outcomes(opened(recipe, "teacher", workdir))}
    np.testing.assert_array_equal(found["from_1x16"].nll["base"], found["recipe"].nll["base"])
    assert not np.array_equal(found["from_1x16"].nll["memory"], found["recipe"].nll["memory"])


def test_targets_over_another_train_stream_are_refused(studied, recipe, tmp_path):
    workdir = copied(studied[0], tmp_path)
    study = opened(recipe, "teacher", workdir)
    manifest = workdir / "studies/teacher/decoder_1x16/targets/manifest.json"
    found = json.loads(manifest.read_text())
    found["parents"]["corpus/train"] = "0" * 12
    manifest.write_text(json.dumps(found))
    job, stage = study.open("from_1x16", "adopt")
    with pytest.raises(UserError, match="rows would not be the same positions"):
        stage.work(job, job.workdir / "elsewhere")


def start(*words: object, log: Path) -> subprocess.Popen:
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "mlp_memory", *map(str, words)],
            env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPOSITORY)},
            stdout=file,
            stderr=file,
        )


def test_a_killed_study_goes_on_where_it_stopped(studied, recipe, tmp_path):
    workdir, log = copied(studied[0], tmp_path), tmp_path / "log"
    variant = workdir / "studies/k/k_2"
    for folder in ("memory", "measure"):
        shutil.rmtree(variant / folder)
    (workdir / "studies/k/results.json").unlink()
    words = ("study", "k", f"--workdir={workdir}", f"--gin_file={recipe}")
    process, deadline = start(*words, log=log), time.monotonic() + 300
    while not any(variant.glob("memory/steps/[1-9]*")):
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (variant / "memory/model").exists()
    process = start(*words, log=log)
    assert process.wait(300) == 0, log.read_text()[-3000:]
    text = log.read_text()
    assert "Traceback" not in text
    assert "More neighbours make a better memory" in text
    # The memory was begun twice, went on, and was measured; nothing else was made.
    pieces = [line.split(": ")[1] for line in text.splitlines() if line.startswith("--- ")]
    assert pieces == ["distill", "distill", "measure"]
    assert "distill: goes on from step" in text
    assert (variant / "config.gin").read_text().count("retrieve.k = 2") == 1
    again, before = (
        json.loads((folder / "studies/k/results.json").read_text())["variants"]["k_2"]["test"]["perplexity"]
        for folder in (workdir, studied[0])
    )
    # Programs that tests start are compiled otherwise than those in this process.
    assert again == pytest.approx(before, rel=1e-2)


def test_the_command_line_tells_in_one_line_what_is_wrong(recipe, tmp_path):
    log = tmp_path / "log"
    words = ("study", "alpha", f"--workdir={tmp_path / 'w'}", f"--gin_file={recipe}")
    assert start(*words, "--gin=study.alphas = (2.0,)", log=log).wait(120) == 2
    assert log.read_text().count("\n") == 1
    assert "variant alpha_2.0: distill.alpha = 2.0 must lie in [0, 1]" in log.read_text()
    assert not (tmp_path / "w").exists()
