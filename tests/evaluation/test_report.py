"""Properties of the report page and of the table, on synthetic results."""

import copy
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlp_memory.artifacts import Directory, UserError
from mlp_memory.evaluation.plots import MAX_POINTS, lambda_plot, stage_plot, thin
from mlp_memory.evaluation.report import headline, report_html, write_report
from mlp_memory.evaluation.table import (
    DASH,
    SYSTEMS,
    format_count,
    format_figure,
    format_flops,
    markdown_table,
    results_table,
)
from mlp_memory.shown import visible_piece
from mlp_memory.targets.certificate import certify_search, complete
from mlp_memory.targets.config import RetrieveConfig

PROGRAM = Path(__file__).with_name("synthetic.py")
spec = importlib.util.spec_from_file_location("synthetic", PROGRAM)
synthetic = importlib.util.module_from_spec(spec)
spec.loader.exec_module(synthetic)
HOSTILE, Page = synthetic.HOSTILE, synthetic.Page
synthetic_results, synthetic_curves = synthetic.synthetic_results, synthetic.synthetic_curves


def test_page_loads_nothing_and_runs_nothing() -> None:
    text = report_html(synthetic_results(), synthetic_curves())
    page = Page(text)
    assert "http:" not in text
    assert "https:" not in text
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert not {"script", "link", "img", "iframe", "object", "embed"} & set(page.tags)
    assert all(not name.startswith("on") and name != "src" for name, _ in page.attributes)
    assert all(value.startswith("#") for name, value in page.attributes if name == "href")
    assert page.tags.count("svg") == 6


def test_ids_are_unique_and_references_resolve() -> None:
    page = Page(report_html(synthetic_results(), synthetic_curves()))
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids)) > 100
    used = {value[1:] for name, value in page.attributes if name == "href"}
    used |= {m for _, value in page.attributes for m in re.findall(r"url\(#([^)]*)\)", value or "")}
    assert used <= set(ids)


def test_no_plot_colour_is_left_without_a_css_value() -> None:
    text = report_html(synthetic_results(), synthetic_curves())
    assert "#fe00" not in text
    assert "#000000" not in text
    used = set(re.findall(r"var\((--[a-z-]+)\)", text))
    assert used <= set(re.findall(r"(--[a-z-]+):", text))


def test_numbers_of_the_results_are_on_the_page() -> None:
    results = synthetic_results()
    text = "".join(Page(report_html(results, synthetic_curves())).text)
    for value in results["test"]["perplexity"].values():
        assert format_figure(value) in text
    for part in (
        "12.1%",
        "98.8%",
        "52,345",
        "0.961",
        "2.35 M",
        "6.91 M",
        "3.63 × 10¹⁴",
        "4,096",
        '"layers": 4',
    ):
        assert part in text, part


def test_page_is_the_same_bytes_in_another_process_and_key_order(tmp_path) -> None:
    results, curves = synthetic_results(), synthetic_curves()
    write_report(Directory(tmp_path), results, curves)
    here = (tmp_path / "index.html").read_bytes()
    payload = json.dumps([results, curves], sort_keys=True)
    (tmp_path / "matplotlibrc").write_text("font.size: 23\nsvg.fonttype: path\naxes.grid: False\n")
    code = (
        "import json,sys\nfrom mlp_memory.evaluation.report import report_html\n"
        "sys.stdout.buffer.write(report_html(*json.load(sys.stdin)).encode())"
    )
    settings = {"MATPLOTLIBRC": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "7"}
    other = subprocess.run(
        [sys.executable, "-c", code],
        input=payload.encode(),
        stdout=subprocess.PIPE,
        check=True,
        env={**os.environ, **settings},
    )
    assert other.stdout == here
    assert str(tmp_path).encode() not in here


def test_the_teachers_certificate_is_shown_where_there_is_one() -> None:
    results = synthetic_results()
    assert "How good is the teacher" not in report_html(results, {})
    rng = np.random.default_rng()
    lists = np.arange(12).reshape(3, 4), np.sort(rng.random((3, 4), np.float32), axis=1)
    certificate = certify_search(
        lists,
        lists,
        np.arange(12, dtype=np.int32),
        1.0,
        RetrieveConfig(k=4),
        choice={"how": "<b>given</b>"},
        candidates=5,
        shards=[(0, 12)],
        scored_rows=12,
    )
    copy = {"document": 3, "rows": [5, 9], "share": 0.75, "train_document": 17, "train_rows": [40, 60]}
    test = {"scored": 50, "covered_share": 0.06, "documents": 4, "copy_count": 1, "copies": [copy]}
    train = {"documents": 30, "copies": 0, "copied_share": 0.0, "pairs": []}
    audit = {"ngram": 13, "splits": {"test": test}, "train": train}
    results["certificate"] = complete(certificate, [(np.ones(12, np.float32), np.full(12, 4))], audit)
    page = report_html(results, {})
    assert "How good is the teacher" in page
    assert "<dt>recall@4</dt><dd>1.0000 (95 %: 1.0000 … 1.0000)" in page
    assert "test document 3 (rows 5..8) is 75 % contained in train document 17 (rows 40..59)" in page
    assert "&lt;b&gt;given" in page


def test_hostile_text_stays_text() -> None:
    results = synthetic_results()
    for sample in results["samples"]:
        sample["context"] = sample["next"] = HOSTILE
        for name in ("base", "memory", "teacher", "mixture"):
            sample[name] = [[HOSTILE, 0.5], ["\n", 0.2]]
    results["config"] = {HOSTILE: HOSTILE}
    results["corpus"] = {HOSTILE: HOSTILE, "list": [HOSTILE]}
    curves = {HOSTILE: [{"step": 1, "loss": 2.0, "validation_perplexity": 7.0}]}
    clean = Page(report_html(synthetic_results(), synthetic_curves()))
    text = report_html(results, curves).encode("utf-8", "backslashreplace").decode()
    page = Page(text)
    assert set(page.tags) <= set(clean.tags)
    assert {name for name, _ in page.attributes} <= {name for name, _ in clean.attributes}
    assert "\u202e" not in text
    assert "\x00" not in text
    assert "\\u202e" in text
    assert "{{ 7*7 }}" in "".join(page.text)


@pytest.mark.parametrize("absent", [*SYSTEMS, "all but base", "everything"])
def test_absent_systems_have_no_row(absent: str) -> None:
    results = synthetic_results()
    gone = {"all but base": set(SYSTEMS) - {"base"}, "everything": set(SYSTEMS)}.get(absent, {absent})
    for split in ("test", "validation"):
        for system in gone:
            del results[split]["perplexity"][system]
            del results[split]["details"][system]
    for system in gone & set(results["lambda_curves"]["validation"]):
        del results["lambda_curves"]["validation"][system]
    Page(report_html(results, {}))
    lines = {line.split("│")[1].strip(): line for line in results_table(results).splitlines() if "│" in line}
    assert lines.keys() == {"system", *(label for system, label in SYSTEMS.items() if system not in gone)}


def test_a_figure_that_is_not_finite_is_a_dash() -> None:
    results = synthetic_results()
    results["test"]["perplexity"]["joint"] = float("inf")
    row = next(line for line in results_table(results).splitlines() if line.startswith("│ joint"))
    assert row.split("│")[2].strip() == DASH


def test_page_needs_only_a_schema_and_a_split() -> None:
    page = Page(report_html({"schema": 1, "test": {"perplexity": {}}}, {"pretrain": []}))
    assert "svg" not in page.tags


@pytest.mark.parametrize("results", [{}, {"schema": 2, "test": {"perplexity": {}}}, {"schema": 1}])
def test_results_of_another_shape_are_refused_in_one_line(results: dict[str, Any]) -> None:
    for function in (results_table, markdown_table, headline):
        with pytest.raises(UserError, match="run evaluate again") as caught:
            function(results)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("memory", "words"),
    [(180.0, "lowers perplexity by 19.8%"), (224.31, "makes no difference"), (230.0, "did not help")],
)
def test_headline_says_whether_memory_helped(memory: float, words: str) -> None:
    results = synthetic_results()
    results["test"]["perplexity"]["base_plus_memory"] = memory
    verdict, _ = headline(results)
    assert words in verdict
    assert ("lowers" in verdict) == (memory < 224)


def test_headline_tells_the_unwelcome() -> None:
    results = synthetic_results()
    figures = results["test"]["perplexity"]
    figures |= {"joint": 199.0, "decoder_equal_params": 150.0, "knn_lm_exact": 230.0}
    results["test"]["details"]["base_plus_memory"]["lambda"] = 0.0
    text = " ".join(headline(results)[1])
    assert "Joint training did not help" in text
    assert "not the better use" in text
    assert "no gain to recover" in text
    assert "best λ on validation was 0" in text


def test_terminal_table_is_aligned_and_markdown_has_every_column() -> None:
    lines = results_table(synthetic_results()).splitlines()
    framed = [line for line in lines if line[0] in "┌│├└"]
    assert len(framed) == len(SYSTEMS) + 4
    assert len({len(line) for line in framed}) == 1
    rows = markdown_table(synthetic_results()).splitlines()
    assert {row.count("|") for row in rows} == {7}
    assert [row for row in rows if "**" in row] == [row for row in rows if row.startswith("| joint, gated ")]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, DASH),
        (float("inf"), DASH),
        (2.2434, "2.243"),
        (22.436, "22.44"),
        (224.31, "224.3"),
        (12345.6, "12,346"),
    ],
)
def test_perplexities_show_four_significant_digits(value: float | None, text: str) -> None:
    assert format_figure(value) == text


def test_counts_round_into_the_next_unit() -> None:
    counts = {
        812: "812",
        9120: "9,120",
        12_345: "12.3 k",
        999_900: "1.00 M",
        2_345_678: "2.35 M",
        1.55e9: "1.55 B",
    }
    assert {n: format_count(n) for n in counts} == counts
    assert format_flops(3.634e14) == "3.63 × 10¹⁴"


def test_whitespace_and_controls_of_pieces_are_visible() -> None:
    assert visible_piece("▁a b\n\t") == "␣a␣b⏎⇥"
    assert visible_piece("\u202e\u200b\x07") == "\\u202e\\u200b\\u0007"
    assert visible_piece("") == "∅"


def test_thinned_curves_keep_their_mean_and_range() -> None:
    rng = np.random.default_rng()
    for count in (1, MAX_POINTS, MAX_POINTS + 1, 5 * MAX_POINTS, int(rng.integers(700, 9000))):
        series = [(float(i), float(v)) for i, v in enumerate(rng.normal(size=count))]
        points = thin(series)
        assert len(points) == min(count, MAX_POINTS)
        assert points == sorted(points)
        if count % MAX_POINTS == 0:
            np.testing.assert_allclose(np.mean(points, 0), np.mean(series, 0), atol=1e-9)
        if count <= MAX_POINTS:
            assert points == series


def test_steps_written_twice_after_an_interruption_do_not_change_the_plot() -> None:
    rows = synthetic_curves()["joint"]
    interrupted = [*copy.deepcopy(rows[:170]), *rows[120:]]
    for row in interrupted[120:170]:
        row["loss"] += 3.0
    assert stage_plot("joint", "t", interrupted) == stage_plot("joint", "t", rows)


def test_figures_that_are_not_finite_are_left_out_of_plots() -> None:
    rows = [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": None}, {"loss": 1.0}]
    assert stage_plot("joint", "t", rows) is None
    assert lambda_plot({"lambdas": [0, 0.5], "joint": [None, float("inf")]}) is None
    assert lambda_plot({"lambdas": [0, 0.5], "joint": [9.0, float("inf")]}) is not None
