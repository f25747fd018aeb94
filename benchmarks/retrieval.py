"""Neighbour search compared: exact, ScaNN as the index stage chooses it, and FAISS, in one run.

    python benchmarks/retrieval.py --workdir=runs/enwiki --k=1024 --out=runs/retrieval
    python benchmarks/retrieval.py --workdir=runs/enwiki --k=1024 --sizes=125000,250000,500000,721000

The same keys, queries and threads for all; every search is repeated and the repeats are interleaved, so
that a slow moment of the machine strikes all alike. Queries are sampled rows, each row itself excluded.
Without a workdir keys are a mixture of Gaussians. Writes OUT.json, OUT.md and OUT.png.
"""

import argparse
import dataclasses
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mlp_memory.arrays import ArrayReader
from mlp_memory.artifacts import Directory, peek
from mlp_memory.corpus.stream import TokenStream
from mlp_memory.index.config import IndexConfig
from mlp_memory.index.exact import exact_search
from mlp_memory.index.neighbors import exclude_self, recall_at_k
from mlp_memory.index.search import Index, open_index
from mlp_memory.index.stage import build_index
from mlp_memory.targets.temperature import median_spread

Found = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass
class Data:
    """Keys with their stream: [N, D] float32, bool [N], int [N]."""

    keys_NxD: np.ndarray
    valid_N: np.ndarray
    labels_N: np.ndarray
    what: str

    def __len__(self) -> int:
        return len(self.keys_NxD)

    def has_next(self, start: int, stop: int) -> np.ndarray:
        return self.valid_N[start:stop]

    def document_ids(self, start: int, stop: int) -> np.ndarray:
        return np.append(0, np.cumsum(~self.valid_N))[start:stop]

    def first(self, rows: int) -> "Data":
        return Data(self.keys_NxD[:rows], self.valid_N[:rows], self.labels_N[:rows], self.what)


def read(workdir: str | None, rows: int, dimension: int) -> Data:
    """The workdir's first rows, or a mixture of 4,000 Gaussians."""
    if workdir:
        stream = TokenStream.open(Directory(workdir) / "corpus/train")
        keys = ArrayReader(Directory(workdir) / "datastore", "keys")
        rows = min(rows or len(stream), len(stream))
        valid_N, labels_N = stream.has_next(0, rows), stream.labels(0, rows)
        return Data(
            np.asarray(keys[0:rows]).astype(np.float32), valid_N, labels_N, f"keys of {Path(workdir).name}"
        )
    rng, rows = np.random.default_rng(0), rows or 300_000
    centres = rng.normal(size=(4000, dimension)) * 2
    which_N = rng.integers(0, len(centres), rows)
    keys_NxD = (centres[which_N] + rng.normal(size=(rows, dimension))).astype(np.float32)
    labels_N = (which_N * 7 + rng.integers(0, 5, rows)) % 1000
    return Data(keys_NxD, rng.random(rows) > 0.002, labels_N, "a mixture of 4,000 Gaussians")


@dataclasses.dataclass
class Point:
    """One search: its name and parameters, seconds of every repeat, and what it found.

    `seconds` are by the clock, `core_seconds` of all threads; the latter say the same beside other work.
    """

    system: str
    parameters: str
    search: Callable[[], Found]
    seconds: list[float] = dataclasses.field(default_factory=list)
    core_seconds: list[float] = dataclasses.field(default_factory=list)
    recall: float = 0.0
    total_variation: float = 0.0


class Judge:
    """Sampled queries, their true neighbours, and the distributions these make at τ."""

    def __init__(self, data: Data, queries: int, k: int, temperature: float):
        self.data, self.k = data, k
        rng = np.random.default_rng(1)
        self.asked_Q = np.sort(rng.choice(np.flatnonzero(data.valid_N), queries, replace=False))
        self.queries_QxD = np.ascontiguousarray(data.keys_NxD[self.asked_Q])
        found = exact_search(data.keys_NxD, data.valid_N, self.queries_QxD, k + 1)
        self.rows_Qxk, self.sqdist_Qxk = exclude_self(*found, self.asked_Q, k)
        self.tau = temperature or median_spread(self.sqdist_Qxk)
        self._true = self._distributions(self.rows_Qxk, self.sqdist_Qxk)

    def _distributions(self, rows_Qxk: np.ndarray, sqdist_Qxk: np.ndarray) -> list[dict[int, float]]:
        weight_Qxk = np.exp(-(sqdist_Qxk - sqdist_Qxk.min(1, keepdims=True)) / self.tau).astype(np.float64)
        weight_Qxk = np.where(rows_Qxk >= 0, weight_Qxk, 0)
        weight_Qxk /= weight_Qxk.sum(1, keepdims=True)
        made = []
        for rows, weights in zip(rows_Qxk, weight_Qxk):
            tokens, inverse = np.unique(self.data.labels_N[rows], return_inverse=True)
            made.append(dict(zip(tokens.tolist(), np.bincount(inverse, weights).tolist())))
        return made

    def judge(self, found: Found) -> tuple[float, float]:
        """Recall@k and mean total variation to the exact distributions."""
        rows_Qxk, sqdist_Qxk = exclude_self(*found, self.asked_Q, self.k)
        made = self._distributions(rows_Qxk, sqdist_Qxk)
        distance = [
            sum(abs(a.get(token, 0) - b.get(token, 0)) for token in {*a, *b}) / 2
            for a, b in zip(self._true, made)
        ]
        return recall_at_k(rows_Qxk, self.rows_Qxk), float(np.mean(distance))


def index_config(arguments: argparse.Namespace) -> IndexConfig:
    """All left to the index stage but the goal."""
    return IndexConfig(target_recall=arguments.target_recall)


def exact_point(data: Data, judge: Judge) -> Point:
    """This project's exact search."""

    def search() -> Found:
        return exact_search(data.keys_NxD, data.valid_N, judge.queries_QxD, judge.k + 1)

    return Point("exact", "float32", search)


def scann_point(index: Index, judge: Judge, leaves: int, reorder: int, system: str) -> Point:
    """A search of the product's index with such settings."""

    def search() -> Found:
        for s in range(index.shards):
            shard = index.shard(s)
            shard.leaves_to_search, shard.reorder = leaves, reorder
        return index.search(judge.queries_QxD, judge.k + 1)

    return Point(system, f"leaves {leaves}, reorder {reorder}", search)


def faiss_points(data: Data, judge: Judge, threads: int, quick: bool) -> tuple[list[Point], dict[str, float]]:
    """IndexIVFPQ, the same refined, and its fast-scan form refined, over a grid; seconds of the builds."""
    import faiss

    faiss.omp_set_num_threads(threads)
    kept = np.flatnonzero(data.valid_N)
    keys_PxD = np.ascontiguousarray(data.keys_NxD[kept])
    dimension, k, root = keys_PxD.shape[1], judge.k, math.isqrt(len(keys_PxD))
    points, builds = [], {}

    def searching(index: Any, make: Callable[[int], Any], nprobe: int) -> Callable[[], Found]:
        def search() -> Found:
            sqdist, position = index.search(judge.queries_QxD, k + 1, params=make(nprobe))
            rows = np.where(position >= 0, kept[position], -1)
            # Its estimates of a distance may be below 0.
            return rows, np.where(position >= 0, np.maximum(sqdist, 0), np.inf).astype(np.float32)

        return search

    def plain(nprobe: int) -> Any:
        return faiss.SearchParametersIVF(nprobe=nprobe)

    def refined(factor: float) -> Callable[[int], Any]:
        return lambda nprobe: faiss.IndexRefineSearchParameters(
            k_factor=factor, base_index_params=plain(nprobe)
        )

    widths = [dimension // 2] if quick else [dimension // 2, dimension // 4]
    kinds = [(width, root, f"PQ{width}", "IVFPQ") for width in widths]
    if not quick:
        kinds.append((widths[0], 2 * root, f"PQ{widths[0]}", "IVFPQ"))
    kinds.append((widths[0], root, f"PQ{widths[0]}x4fs", "IVFPQ fast scan"))
    for _, nlist, code, system in kinds:
        start = time.perf_counter()
        base = faiss.index_factory(dimension, f"IVF{nlist},{code}")
        base.train(keys_PxD[:: max(len(keys_PxD) // 100_000, 1)])
        base.add(keys_PxD)
        builds[f"IVF{nlist},{code}"] = time.perf_counter() - start
        refine = faiss.IndexRefineFlat(base, faiss.swig_ptr(keys_PxD))
        for share in (0.05, 0.1, 0.2, 0.4):
            nprobe = max(round(share * nlist), 1)
            if system == "IVFPQ":
                points.append(
                    Point(system, f"nlist {nlist}, {code}, nprobe {nprobe}", searching(base, plain, nprobe))
                )
            for factor in (1.5, 2.0, 4.0):
                name = f"nlist {nlist}, {code}, nprobe {nprobe}, k_factor {factor}"
                points.append(Point(f"{system} + refine", name, searching(refine, refined(factor), nprobe)))
    return points, builds


def measure(points: list[Point], judge: Judge, repeats: int) -> None:
    """Every point `repeats` times, in rounds; once before, where something is compiled or loaded."""
    for point in {point.system: point for point in points}.values():
        point.search()
    for number in range(repeats):
        for point in points:
            start, core_start = time.perf_counter(), time.process_time()
            found = point.search()
            point.seconds.append(time.perf_counter() - start)
            point.core_seconds.append(time.process_time() - core_start)
            if number == 0:
                point.recall, point.total_variation = judge.judge(found)


def cost(point: Point, cores: bool = False) -> float:
    """Median seconds of a search, by the clock or of all cores."""
    return statistics.median(point.core_seconds if cores else point.seconds)


def frontier(points: list[Point], cores: bool = False) -> list[Point]:
    """Points that no other beats in both recall and speed, by rising recall."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (-p.recall, cost(p, cores))):
        if not kept or cost(point, cores) < cost(kept[-1], cores):
            kept.append(point)
    return kept[::-1]


def cost_at(points: list[Point], recall: float, cores: bool) -> float | None:
    """Seconds of a frontier at a recall, the logarithm interpolated; None beyond its reach."""
    curve = [(p.recall, math.log(cost(p, cores))) for p in frontier(points, cores)]
    if recall > curve[-1][0]:
        return None
    return math.exp(float(np.interp(recall, *zip(*curve))))


def compare(data: Data, arguments: argparse.Namespace) -> None:
    """One table and plot of all systems."""
    judge = Judge(data, arguments.queries, arguments.k, arguments.temperature)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        build_index(Directory(folder), data.keys_NxD, "benchmark", data, index_config(arguments), arguments.k)
        builds = {"ScaNN": time.perf_counter() - start}
        facts = peek(Directory(folder)).facts
        index = open_index(Directory(folder), data.keys_NxD, data.valid_N)
        exact = exact_point(data, judge)
        chosen = (facts["leaves_to_search"], facts["reorder"])
        ours = scann_point(index, judge, *chosen, "ScaNN, as chosen")
        points = [exact, ours]
        for leaves_factor in (0.4, 0.7, 1.0, 1.5, 2.2):
            for reorder_factor in (0.7, 1.0, 1.5, 2.5):
                leaves, reorder = (round(a * b) for a, b in zip(chosen, (leaves_factor, reorder_factor)))
                points.append(scann_point(index, judge, max(leaves, 1), reorder, "ScaNN"))
        peers, peer_builds = faiss_points(data, judge, arguments.threads, arguments.quick)
        points += peers
        measure(points, judge, arguments.repeats)
    queries = len(judge.asked_Q)
    by_system: dict[str, list[Point]] = {}
    for point in points:
        by_system.setdefault(point.system, []).append(point)
    ratios: dict[str, list[float | None]] = {}
    for name, those in by_system.items():
        if name == "exact" or name.startswith("IVFPQ"):
            # Exact search has one point, of recall 1.
            others = [
                cost(exact, cores) if name == "exact" else cost_at(those, ours.recall, cores)
                for cores in (False, True)
            ]
            times = [
                other / cost(ours, cores) if other else None for other, cores in zip(others, (False, True))
            ]
            ratios[name] = times
    rows = [
        {
            "system": p.system,
            "parameters": p.parameters,
            "recall": round(p.recall, 4),
            "queries_per_second": round(queries / cost(p), 1),
            "slowest": round(queries / max(p.seconds), 1),
            "fastest": round(queries / min(p.seconds), 1),
            "queries_per_core_second": round(queries / cost(p, cores=True), 1),
            "total_variation": round(p.total_variation, 5),
        }
        for p in points
    ]
    result = {
        "data": data.what,
        "rows": len(data),
        "dimension": data.keys_NxD.shape[1],
        "k": judge.k,
        "queries": queries,
        "threads": arguments.threads,
        "repeats": arguments.repeats,
        "temperature": judge.tau,
        "index": {name: value for name, value in facts.items() if name != "tuning"},
        "build_seconds": {**builds, **peer_builds},
        "ratios": ratios,
        "points": rows,
    }
    write(arguments.out, result, table(result, by_system))
    plot(Path(f"{arguments.out}.png"), result)


def table(result: dict[str, Any], by_system: dict[str, list[Point]]) -> str:
    """Each system's frontier, and the ratios."""
    best = {(p.system, p.parameters) for those in by_system.values() for p in frontier(those)}
    lines = [
        f"{result['data']}: N = {result['rows']:,}, d = {result['dimension']}, k = {result['k']}, "
        f"{result['queries']} queries, {result['threads']} threads, median of {result['repeats']} repeats.",
        "",
        "| system | parameters | recall | queries/s | queries per core-second | total variation |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in result["points"]:
        if (row["system"], row["parameters"]) in best:
            figures = (f"{row[name]:,.0f}" for name in ("queries_per_second", "queries_per_core_second"))
            cells = (row["system"], row["parameters"], f"{row['recall']:.4f}", *figures)
            lines.append("| " + " | ".join((*cells, f"{row['total_variation']:.4f}")) + " |")
    lines.append("")
    for name, (clock, cores) in result["ratios"].items():
        said = (
            f"{clock:.1f} x by the clock, {cores:.1f} x by core time"
            if clock and cores
            else "out of its reach"
        )
        lines.append(f"- ScaNN as chosen to {name} at its recall: {said}")
    builds = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in result["build_seconds"].items())
    return "\n".join([*lines, f"- builds: {builds}", ""])


def scaling(data: Data, arguments: argparse.Namespace) -> None:
    """Cost of building and of searching every row, against the number of rows."""
    rows = []
    for size in sorted({min(int(size), len(data)) for size in arguments.sizes.split(",")}):
        part = data.first(size)
        judge = Judge(part, arguments.queries, arguments.k, arguments.temperature)
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            build_index(
                Directory(folder), part.keys_NxD, "benchmark", part, index_config(arguments), arguments.k
            )
            build = time.perf_counter() - start
            facts = peek(Directory(folder)).facts
            index = open_index(Directory(folder), part.keys_NxD, part.valid_N)
            point = scann_point(index, judge, facts["leaves_to_search"], facts["reorder"], "ScaNN")
            exact = exact_point(part, judge)
            measure([point, exact], judge, arguments.repeats)
        per_query = cost(point) / arguments.queries
        rows.append(
            {
                "rows": size,
                "build_seconds": round(build, 1),
                "microseconds_per_query": round(1e6 * per_query, 1),
                "search_all_seconds": round(size * per_query, 1),
                "exact_all_seconds": round(size * cost(exact) / arguments.queries, 1),
                "recall": round(point.recall, 4),
                **{n: facts[n] for n in ("leaves", "dimensions_per_block", "leaves_to_search", "reorder")},
            }
        )
        print(rows[-1], flush=True)
    fits = {}
    for name in ("search_all_seconds", "exact_all_seconds"):
        slope, intercept = np.polyfit(np.log([r["rows"] for r in rows]), np.log([r[name] for r in rows]), 1)
        predicted = {n: math.exp(intercept + slope * math.log(float(n))) for n in (1e8, 5e9)}
        fits[name] = {"exponent": slope, "hours": {f"{n:.0e}": s / 3600 for n, s in predicted.items()}}
    lines = [
        f"{data.what}, d = {data.keys_NxD.shape[1]}, k = {arguments.k}, {arguments.threads} threads.",
        "",
        "| rows | leaves, dimensions a code, leaves searched, reordered | build s | µs a query "
        "| all rows s | exact, all rows s | recall |",
        "|---:|---|---:|---:|---:|---:|---:|",
    ]
    for r in rows:
        setting = f"{r['leaves']}, {r['dimensions_per_block']}, {r['leaves_to_search']}, {r['reorder']}"
        lines.append(
            f"| {r['rows']:,} | {setting} | {r['build_seconds']} | {r['microseconds_per_query']} | "
            f"{r['search_all_seconds']} | {r['exact_all_seconds']} | {r['recall']} |"
        )
    for name, fit in fits.items():
        hours = ", ".join(f"{h:,.0f} h at {n} rows" for n, h in fit["hours"].items())
        lines.append(f"\n{name}: exponent {fit['exponent']:.2f}; extrapolated, not measured: {hours}.")
    result = {"data": data.what, "k": arguments.k, "threads": arguments.threads, "sizes": rows, "fits": fits}
    write(arguments.out, result, "\n".join([*lines, ""]))


def write(out: str, result: dict[str, Any], text: str) -> None:
    """OUT.json and OUT.md."""
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(f"{out}.json").write_text(json.dumps(result, indent=1) + "\n")
    Path(f"{out}.md").write_text(text)
    print(text)


def plot(path: Path, result: dict[str, Any]) -> None:
    """Recall against queries per second, a line along each system's best."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for system in dict.fromkeys(row["system"] for row in result["points"]):
        rows = sorted(
            (r for r in result["points"] if r["system"] == system), key=lambda r: r["recall"], reverse=True
        )
        best, fastest = [], 0.0
        for row in rows:
            if row["queries_per_second"] > fastest:
                best.append((row["recall"], row["queries_per_second"]))
                fastest = row["queries_per_second"]
        single = len(rows) == 1
        axes.plot(*zip(*best), marker="*" if single else ".", markersize=13 if single else 6, label=system)
    axes.set_yscale("log")
    axes.set_xlim(left=0.85)
    axes.set_xlabel(f"recall@{result['k']}")
    axes.set_ylabel(f"queries per second, {result['threads']} threads")
    axes.set_title(f"N = {result['rows']:,}, d = {result['dimension']}", fontsize=10)
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--workdir", help="whose datastore to search; synthetic keys without")
    parser.add_argument("--rows", type=int, default=0, help="first rows only; 0 = all (300,000 synthetic)")
    parser.add_argument("--dimension", type=int, default=192, help="of synthetic keys")
    parser.add_argument("--k", type=int, default=1024)
    parser.add_argument("--target-recall", type=float, default=0.96, help="index.target_recall")
    parser.add_argument("--queries", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 = the median spread of distances")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--quick", action="store_true", help="fewer FAISS indexes")
    parser.add_argument("--sizes", help="rows, comma-separated: cost against size instead")
    parser.add_argument("--out", default="runs/retrieval", help="of the results, without suffix")
    arguments = parser.parse_args()
    data = read(arguments.workdir, arguments.rows, arguments.dimension)
    (scaling if arguments.sizes else compare)(data, arguments)


if __name__ == "__main__":
    main()
