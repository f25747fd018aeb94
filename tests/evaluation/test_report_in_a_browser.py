"""The report as a browser shows it, on a phone and on a desk."""

import html

import numpy as np
import pytest

from mlp_memory.artifacts import Directory
from mlp_memory.evaluation.report import write_report

SIZES = {"phone": (390, 844), "desk": (1280, 800)}

BROKEN = """<!doctype html><meta charset="utf-8"><title>broken</title><body><main>
<p style="width: 3000px">wide</p>
<div style="overflow-x: auto"><p style="width: 3000px">in its own box</p></div>
<svg viewBox="0 0 9 9" style="display: none"></svg><img src="missing.png">
<script>console.error("spoken"); undefinedFunction();</script></main>"""


@pytest.fixture(scope="module")
def pages(synthetic, tmp_path_factory):
    """Reports with ordinary and with hostile texts, the latter long and without a place to break."""
    folder, rng = tmp_path_factory.mktemp("pages"), np.random.default_rng()

    def words() -> str:
        return " ".join("".join(rng.choice(list("abcdefghij"), rng.integers(1, 12))) for _ in range(9))

    texts = {
        "ordinary": words,
        "hostile": lambda: synthetic.HOSTILE,
        "unbroken": lambda: "".join(rng.choice(list("MWabc"), 120)),
    }
    for name, text in texts.items():
        results = synthetic.with_differing(synthetic.synthetic_results(), text)
        findings = (synthetic.synthetic_findings(text, rng), synthetic.synthetic_findings(words, rng))
        write_report(Directory(folder / name), results, synthetic.synthetic_curves(), findings=findings)
    (folder / "broken.html").write_text(BROKEN)
    return folder


@pytest.fixture(scope="module")
def sights(browsing, pages):
    """What one browser saw of each page at each size."""
    program = browsing.find_browser()
    if program is None:
        names = ", ".join(browsing.NAMES)
        pytest.skip(f"no browser: none of {names} is on the path (Debian: apt-get install chromium)")
    seen = {}
    with browsing.Browser(program) as browser:
        for size, (width, height) in SIZES.items():
            for name in ("ordinary", "hostile", "unbroken"):
                page = pages / name / "index.html"
                seen[name, size] = page, browser.look(page, width, height, phone=size == "phone")
            seen["broken", size] = pages, browser.look(pages / "broken.html", width, height, size == "phone")
        seen["ordinary", "dark"] = (
            page,
            browser.look(pages / "ordinary/index.html", *SIZES["phone"], dark=True),
        )
    return seen


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["ordinary", "hostile", "unbroken"])
def test_the_report_renders_without_errors_and_fits(sights, name: str, size: str) -> None:
    page, sight = sights[name, size]
    assert sight.errors == []
    assert sight.requests == [page.as_uri()]
    assert sight.width <= SIZES[size][0]
    assert sight.beyond == []
    assert sight.scrolled <= sight.width
    assert len(sight.plots) == 6 + 2 * 3
    for left, right, width, height, shown in sight.plots:
        assert shown
        assert 0 <= left < right <= sight.width
        assert width > 200
        assert height > 60
    for text in (
        "What the paper claims",
        "not held",
        "Where the memory helped most",
        "61%",
        "17% 31 other documents",
    ):
        assert text in sight.text


@pytest.mark.parametrize("size", SIZES)
def test_hostile_text_is_shown_and_not_done(sights, size: str) -> None:
    _, sight = sights["hostile", size]
    assert "<b onload=alert(1)>" in sight.text
    assert html.escape("<b onload") not in sight.text


def test_the_dark_page_has_no_errors(sights) -> None:
    _, sight = sights["ordinary", "dark"]
    assert sight.errors == []
    assert len(sight.plots) == 12


@pytest.mark.parametrize("size", SIZES)
def test_a_broken_page_is_seen_to_be_broken(sights, size: str) -> None:
    folder, sight = sights["broken", size]
    assert any("spoken" in error for error in sight.errors)
    assert any("undefinedFunction" in error for error in sight.errors)
    assert (folder / "missing.png").as_uri() in sight.requests
    assert len(sight.beyond) == 1
    assert "wide" in sight.beyond[0]
    assert sight.scrolled > 1500
    assert [shown for *_, shown in sight.plots] == [False]
