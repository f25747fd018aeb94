"""Findings of experiments: from the workdir to the page."""

import copy
import dataclasses
import html
import json
import re

import numpy as np
import pytest

from mlp_memory.artifacts import Directory, UserError, canonical_json
from mlp_memory.evaluation.page import draw, read_findings, read_results
from mlp_memory.evaluation.plots import line_plot
from mlp_memory.evaluation.report import report_html
from mlp_memory.evaluation.sections import Claim, Findings, Plot, Section, Series

BARE = {"schema": 1, "test": {"perplexity": {}}}


@pytest.fixture
def words(rng):
    """Makes texts of two random words."""
    return lambda: " ".join("".join(rng.choice(list("abcdefghij"), 7)) for _ in range(2))


def write(folder, findings: Findings) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "findings.json").write_text(json.dumps(findings.to_json()))


def texts_of(value) -> list[str]:
    """Every text in a findings' JSON but the outcomes of claims."""
    if isinstance(value, dict):
        return [text for key, part in value.items() if key != "held" for text in texts_of(part)]
    if isinstance(value, list | tuple):
        return [text for part in value for text in texts_of(part)]
    return [value] if isinstance(value, str) else []


def test_every_text_of_the_findings_is_on_the_page(synthetic, words, rng) -> None:
    findings = synthetic.synthetic_findings(words, rng)
    page = synthetic.Page(text := report_html(BARE, {}, findings=(findings,)))
    shown = " ".join("".join(page.text).split())
    for wanted in filter(None, texts_of(findings.to_json())):
        assert wanted in shown
    for word in ("held", "not held", "unclear", "4 claims: 1 held, 1 not held, 2 unclear."):
        assert word in shown
    assert page.tags.count("svg") == 3
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = {m for _, value in page.attributes for m in re.findall(r"url\(#([^)]*)\)", value or "")}
    used |= {value[1:] for name, value in page.attributes if name == "href"}
    assert used <= set(ids)
    assert "#fe00" not in text
    assert "#000000" not in text


def test_hostile_findings_and_samples_stay_text(synthetic, words, rng) -> None:
    def page(text) -> str:
        findings = synthetic.synthetic_findings(text, rng)
        results = synthetic.with_differing(synthetic.synthetic_results(), text)
        return report_html(results, {}, findings=(findings,)).encode("utf-8", "backslashreplace").decode()

    clean, hostile = synthetic.Page(page(words)), synthetic.Page(text := page(lambda: synthetic.HOSTILE))
    assert set(hostile.tags) <= set(clean.tags)
    assert {name for name, _ in hostile.attributes} <= {name for name, _ in clean.attributes}
    assert not re.search("[\u202e\x00]", text)
    assert "<b onload" not in text
    assert html.escape("<b onload=alert(1)>&amp;", quote=False) in text
    assert "{{ 7*7 }}" in "".join(hostile.text)


def test_a_page_drawn_again_is_the_same_and_shows_what_has_been_found_since(
    synthetic, words, rng, tmp_path
) -> None:
    workdir = Directory(tmp_path)
    (tmp_path / "decoder").mkdir()
    (tmp_path / "decoder/metrics.jsonl").write_text('{"step": 1, "loss": 5.0}\n{"step": 2, "loss": 4.0}\n')
    results = synthetic.with_differing(synthetic.synthetic_results(), words)
    draw(workdir, results)
    first = (tmp_path / "reports/index.html").read_bytes()
    assert b"Decoder, pretraining" in first
    (tmp_path / "reports/results.json").write_text(canonical_json(results))  # sorts its keys
    draw(workdir, read_results(workdir))
    assert (tmp_path / "reports/index.html").read_bytes() == first
    found = {
        name: synthetic.synthetic_findings(words, rng) for name in ("benchmarks", "studies/b", "studies/a")
    }
    for name, findings in found.items():
        write(tmp_path / name, findings)
    write(tmp_path / "studies/a/deeper", synthetic.synthetic_findings(words, rng))
    assert read_findings(workdir) == tuple(found[name] for name in ("benchmarks", "studies/a", "studies/b"))
    draw(workdir, read_results(workdir))
    again = (tmp_path / "reports/index.html").read_text()
    places = [again.index(f"<h2>{each.sections[0].title}</h2>") for each in read_findings(workdir)]
    assert places == sorted(places)


def test_a_training_that_these_results_are_not_of_has_no_curve(synthetic, tmp_path) -> None:
    (tmp_path / "joint").mkdir()
    (tmp_path / "joint/metrics.jsonl").write_text('{"step": 1, "loss": 5.0}\n')
    results = synthetic.synthetic_results()
    draw(Directory(tmp_path), results)
    assert "joint training</h3>" in (tmp_path / "reports/index.html").read_text()
    for system in ("joint", "joint_gated"):
        del results["test"]["perplexity"][system]
    draw(Directory(tmp_path), results)
    assert "joint training</h3>" not in (tmp_path / "reports/index.html").read_text()


def damaged(findings: dict) -> dict[str, object]:
    """Findings that cannot be shown, by what is wrong."""
    wrong = {
        name: copy.deepcopy(findings) for name in ("held", "cells", "points", "band", "unknown", "lacking")
    }
    wrong["held"]["claims"][0]["held"] = "perhaps"
    section = wrong["cells"]["sections"][0]
    section["tables"][0]["rows"][0] = ["one"]
    wrong["points"]["sections"][0]["plots"][0]["series"][0]["x_N"].pop()
    wrong["band"]["sections"][0]["plots"][0]["series"][0]["low_N"] = []
    wrong["unknown"]["claims"][0]["else"] = 1
    del wrong["lacking"]["sections"]
    return {**wrong, "list": [], "text": "text", "cut": None}


@pytest.mark.parametrize(
    "what", ["held", "cells", "points", "band", "unknown", "lacking", "list", "text", "cut"]
)
def test_damaged_findings_are_told_in_one_line_with_their_place(
    synthetic, words, rng, tmp_path, what
) -> None:
    whole = synthetic.synthetic_findings(words, rng)
    write(tmp_path / "studies/depth", whole)
    assert read_findings(Directory(tmp_path)) == (whole,)
    value = damaged(json.loads(json.dumps(whole.to_json())))[what]
    text = json.dumps(value) if what != "cut" else json.dumps(whole.to_json())[:-9]
    (tmp_path / "studies/depth/findings.json").write_text(text)
    with pytest.raises(UserError, match=r"studies/depth/findings\.json is damaged") as caught:
        read_findings(Directory(tmp_path))
    assert "\n" not in str(caught.value)


def test_results_that_are_missing_or_damaged_are_told(tmp_path) -> None:
    with pytest.raises(UserError, match="is missing"):
        read_results(Directory(tmp_path))
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports/results.json").write_text("[1, 2")
    with pytest.raises(UserError, match="is damaged"):
        read_results(Directory(tmp_path))


def plot_of(*series: Series, **settings) -> Plot:
    return Plot("title", "x", "y", series, **settings)


def test_points_that_an_axis_cannot_show_are_left_out_and_counted() -> None:
    series = Series("a", (0.0, 1.0, 2.0, 3.0), (1.0, float("nan"), 5.0, -2.0))
    linear = line_plot(plot_of(series), "p")
    assert linear.notes == ("Left out: 1 point, not finite.",)
    both = line_plot(plot_of(series, log_x=True, log_y=True), "p")
    assert both.notes[0].startswith("Left out: 3 points")
    banded = dataclasses.replace(
        series, y_N=(1.0, 1.0, 1.0, 1.0), low_N=(0.5, 0.0, 0.5, 0.5), high_N=(2.0,) * 4
    )
    assert line_plot(plot_of(banded, log_y=True), "p").notes[0].startswith("Left out: 1 point,")
    nothing = line_plot(plot_of(dataclasses.replace(series, y_N=(None,) * 4)), "p")
    assert nothing.svg is None
    assert nothing.notes == ("Left out: 4 points, not finite.",)
    page = report_html(
        BARE, {}, findings=(Findings((), (Section("s", (), (), (plot_of(Series("a", (), ())),)),)),)
    )
    assert "No point can be drawn." in page


def test_a_joined_line_goes_by_x_and_a_cloud_does_not_depend_on_it() -> None:
    x_N, y_N = np.arange(1.0, 8), np.array([3.0, 1, 4, 1, 5, 9, 2])
    order = np.random.default_rng().permutation(7)
    line = line_plot(plot_of(Series("a", tuple(x_N), tuple(y_N))), "p")
    assert line == line_plot(plot_of(Series("a", tuple(x_N[order]), tuple(y_N[order]))), "p")
    assert line != line_plot(plot_of(Series("a", tuple(x_N), tuple(y_N), line=False)), "p")


def test_a_band_more_lines_than_colours_and_a_hidden_name_are_drawn() -> None:
    one = Series("_hidden", (1.0, 2.0), (3.0, 4.0))
    assert "_hidden" in line_plot(plot_of(one), "p").svg
    banded = dataclasses.replace(one, low_N=(2.0, 3.0), high_N=(4.0, 5.0))
    assert "opacity: 0.16" in line_plot(plot_of(banded), "p").svg
    assert "opacity: 0.16" not in line_plot(plot_of(one), "p").svg
    many = [Series(f"line {i}", (1.0, 2.0), (float(i), i + 1.0)) for i in range(30)]
    svg = line_plot(plot_of(*many), "p").svg
    assert all(f"line {i}" in svg for i in range(30))


def test_large_numbers_of_an_axis_are_short() -> None:
    svg = line_plot(plot_of(Series("a", (1e6, 9e7), (20.0, 30.0)), log_x=True), "p").svg
    assert re.search(r">10 M<", svg)
    assert "e+0" not in svg


def test_findings_survive_json() -> None:
    claim = Claim("c", "p", "o", "i", "no", "s", "r")
    findings = Findings((claim,), (Section("s", ("t",), (), (plot_of(Series("a", (1.0,), (2.0,))),)),))
    assert Findings.from_json(json.loads(json.dumps(findings.to_json()))) == findings


def test_an_axis_of_whole_numbers_has_no_tick_between_them() -> None:
    y_N = (1.0, 2.0, 3.0, 4.0)
    whole, parts = (
        line_plot(plot_of(Series("a", x_N, y_N)), "p").svg
        for x_N in ((0.0, 1.0, 2.0, 3.0), (0.0, 0.1, 0.3, 0.4))
    )
    ticks = re.findall(r"<text[^>]*>([^<]*\d[^<]*)</text>", whole)
    assert {"0", "1", "2", "3"} <= set(ticks)
    assert not any("." in tick for tick in ticks[: len(ticks) // 2])
    assert any("." in tick for tick in re.findall(r"<text[^>]*>([^<]*\d[^<]*)</text>", parts))
