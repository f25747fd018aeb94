"""Writes the tables of docs/scale.md: every recipe on every topology it is meant for, by `plan distill`.

make scale                          all of them, about half an hour on two cores
make scale ARGS="h100-8 v5p-64"     these topologies; the other rows stay as runs/scale has them
"""

import datetime
import json
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
PLANS, PAGE = REPOSITORY / "runs/scale", REPOSITORY / "docs/scale.md"
BEGIN, END = "<!-- made by `make scale` -->\n", "<!-- end -->\n"

NAMES = {
    "paper_gpt2_small_wikitext103": "124 M for GPT-2 small",
    "paper_gpt2_medium_wikitext103": "354 M for GPT-2 medium",
    "paper_gpt2_large_wikitext103": "773 M for GPT-2 large",
    "paper_llama2_7b_wikipedia": "1.2 B for Llama-2-7B",
    "paper_mistral_7b_wikipedia": "1.5 B for Mistral-7B",
    "memory_10b_wikipedia": "10 B for Llama-3.1-70B",
}
GPT2 = tuple(name for name in NAMES if "gpt2" in name)
SEVEN_B = ("paper_llama2_7b_wikipedia", "paper_mistral_7b_wikipedia")
TEN_B = ("memory_10b_wikipedia",)

# Topology -> recipes with what is set beside recipe and scale file: parts of a step, where one will do.
CASES = {
    "v5e-16": {**dict.fromkeys(GPT2, 1), SEVEN_B[1]: None},
    "v5e-256": {SEVEN_B[1]: 1, TEN_B[0]: None},
    "v5p-64": {GPT2[2]: 1, **dict.fromkeys(SEVEN_B, 1), TEN_B[0]: None},
    "v5p-2048": {SEVEN_B[1]: None, TEN_B[0]: None},
    "h100-8": {**dict.fromkeys(GPT2, 1), SEVEN_B[1]: None},
    "h100-64": {SEVEN_B[1]: 1, TEN_B[0]: None},
}


def plan(topology: str, recipe: str, accumulate: int | None) -> None:
    """One plan into `PLANS`; what does not fit leaves its line there in place of figures."""
    file = PLANS / f"{topology}.{recipe}.json"
    scale = topology.replace("-", "_")
    words = [
        f"--topology={topology}",
        f"--gin_file=gin_configs/recipes/{recipe}.gin",
        f"--gin_file=gin_configs/scale/{scale}.gin",
        *([f"--gin=distill.accumulate={accumulate}"] if accumulate else []),
    ]
    print("plan distill", *words, flush=True)
    file.unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", "mlp_memory", "plan", "distill", *words, f"--json={file}"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    if done.returncode not in (0, 2):
        sys.exit(done.stderr)
    found = (
        json.loads(file.read_text()) if done.returncode == 0 else {"refused": done.stderr.splitlines()[-1]}
    )
    stamp = {"commit": _commit(), "date": f"{datetime.date.today()}", "accumulate": accumulate}
    file.write_text(json.dumps({**found, **stamp}, indent=1))
    print(done.stdout or found["refused"], flush=True)


def _commit() -> str:
    words = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.strip()


def tables() -> str:
    """All plans as Markdown: what a chip holds and does, and what a recipe takes."""
    plans = [
        (topology, recipe, json.loads((PLANS / f"{topology}.{recipe}.json").read_text()))
        for topology, recipes in CASES.items()
        for recipe in recipes
    ]
    first = [
        "| topology | memory | GB of a chip's GB | parameters, optimizer, batch, rest "
        "| FLOPs a step: model, compiled | collectives a chip and step: GB (count) |",
        "|---|---|---|---|---|---|",
    ]
    second = [
        "| topology | memory | products at peak | HBM | network | compiler | step | MFU | rows/s | days "
        "| cost |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for topology, recipe, found in plans:
        start = f"| {topology} | {NAMES[recipe]}{', in one part' if found['accumulate'] else ''} "
        if "refused" in found:
            first.append(f"{start}| {found['refused']} | | | |")
            continue
        first.append(start + _held(found))
        second.append(start + _times(found))
    made = {(found["date"], found["commit"]) for _, _, found in plans}
    made = "; ".join(f"{date}, commit {commit}" for date, commit in sorted(made))
    return "\n".join([*first, "", *second, "", f"`make scale`, {made}.", ""])


def _held(found: dict) -> str:
    giga, memory = 1e9, found["memory"]
    parts = ", ".join(
        f"{memory[name] / giga:.1f}" for name in ("parameters", "optimizer", "batch", "temporary")
    )
    sent = ", ".join(
        f"{c['kind']} {c['bytes'] / giga:,.1f} ({c['count']:,})"
        for c in found["collectives"]
        if c["bytes"] > 1e8
    )
    fits = "" if found["fits"] else "**no**: "
    return (
        f"| {fits}{memory['total'] / giga:.1f} of {found['memory_limit'] / giga:.0f} | {parts} "
        f"| {found['model_flops']:.3g}, {found['compiled_flops'] * found['chips']:.3g} | {sent} |"
    )


def _times(found: dict) -> str:
    given = found["compiler_seconds"] is not None
    at_best = "" if given else "≤ "
    alone = " | ".join(f"{1000 * found[f'{name}_seconds']:,.0f} ms" for name in ("compute", "hbm", "network"))
    compiler = f"{1000 * found['compiler_seconds']:,.0f} ms" if given else "–"
    return (
        f"| {alone} | {compiler} | {'' if given else '≥ '}{1000 * found['step_seconds']:,.0f} ms "
        f"| {at_best}{found['mfu']:.0%} | {at_best}{found['units_per_second']:,.0f} "
        f"| {'' if given else '≥ '}{found['days']:.2f} | {'' if given else '≥ '}${found['dollars']:,.0f} |"
    )


def main() -> None:
    """Plans what the command line names, then writes the page."""
    wanted = sys.argv[1:] or list(CASES)
    if unknown := set(wanted) - set(CASES):
        sys.exit(f"no such topology here: {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    PLANS.mkdir(parents=True, exist_ok=True)
    for topology in wanted:
        for recipe, accumulate in CASES[topology].items():
            plan(topology, recipe, accumulate)
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{tables()}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
