"""The evaluate stage: scores the held-out splits, writes results.json and the report."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from mlp_memory import artifacts
from mlp_memory.artifacts import Directory, Manifest
from mlp_memory.corpus.config import SPLITS
from mlp_memory.corpus.stream import TokenStream
from mlp_memory.corpus.vocabulary import Vocabulary
from mlp_memory.datastore.config import EmbedConfig
from mlp_memory.decoder.windows import read, spread
from mlp_memory.evaluation.config import EvaluateConfig
from mlp_memory.evaluation.evaluate import summarize
from mlp_memory.evaluation.samples import differing_rows, spread_rows
from mlp_memory.evaluation.score import Systems, arrays_of, score_split
from mlp_memory.targets.interpolation import mixture_rows
from mlp_memory.targets.knn_lm import temperatures
from mlp_memory.tracing.documents import Documents
from mlp_memory.tracing.evidence import Evidence
from mlp_memory.tracing.predictions import rows_predictions


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What evaluation reads.

    Attributes:
      config: what to evaluate.
      streams: "validation", "test" and the texts elsewhere.
      vocabulary: names tokens.
      systems: loads every model; called only if rows are still to be scored or sampled.
      embed: how rows are read.
      targets, index: facts of these artifacts; None where kNN-LM is not compared.
      trained: facts of each model, by the stage that trains one; "joint" and "baseline" may be absent.
      draw: writes the report page of what results.json holds (`page.draw`).
      settings: the resolved config, for the record.
      corpus: facts of each split.
      certificate: of the targets (targets/certificate.py); None where they have none.
      gates: facts of "gate" and "joint_gate", where they were fitted.
      train: whose rows the neighbours are; None where there are none.
    """

    config: EvaluateConfig
    streams: dict[str, TokenStream]
    vocabulary: Vocabulary
    systems: Callable[[], Systems]
    embed: EmbedConfig
    targets: dict[str, Any] | None
    index: dict[str, Any] | None
    trained: dict[str, dict[str, Any]]
    draw: Callable[[dict[str, Any]], None]
    settings: dict[str, Any]
    corpus: dict[str, dict[str, Any]]
    certificate: dict[str, Any] | None = None
    gates: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    train: TokenStream | None = None


def evaluate(directory: Directory, manifest: Manifest, inputs: Inputs) -> dict[str, Any]:
    """Writes WORKDIR/reports and returns what results.json holds."""
    config, targets, trained = inputs.config, inputs.targets, inputs.trained
    grid, k = (temperatures(targets), targets["k"]) if targets else ((), 0)
    scored, documents, words = {}, {}, {}
    for split, stream in inputs.streams.items():
        ranges = spread(len(stream), config.max_rows)
        rows = sum(stop - start for start, stop in ranges)
        models = ("joint" in trained, "baseline" in trained, bool(inputs.gates))
        arrays = arrays_of(len(grid), *models, rows, config.chunk_rows)
        scored[split] = score_split(
            directory / f"rows/{split}",
            split,
            inputs.systems,
            arrays,
            stream,
            ranges,
            manifest.config,
            manifest.parents,
        )
        documents[split] = read(stream.document_ids, ranges)[read(stream.has_next, ranges)]
        words[split] = words_of(stream, len(documents[split]))
    results = summarize(scored, documents, words, grid, k, config.bootstrap)
    for split, stream in inputs.streams.items():
        results[split]["word_count"] = stream.word_count
    names = {"base": "pretrain", "memory": "distill", "joint": "joint", "decoder_equal_params": "baseline"}
    results |= {
        "schema": 1,
        "parameters": {
            n: trained[s]["parameters"] for n, s in names.items() if n != "joint" and s in trained
        },
        "training_flops": {
            n: trained[s]["train_flops"] for n, s in names.items() if "train_flops" in trained.get(s, {})
        },
        **_samples(inputs, results, scored["test"]),
        "elsewhere": [name for name in inputs.streams if name not in SPLITS],
        "gates": {
            name: {k: v for k, v in facts.items() if k != "gate"} for name, facts in inputs.gates.items()
        },
        "config": inputs.settings,
        "corpus": inputs.corpus,
    }
    if targets and inputs.index:
        results["recall"] = {"k": inputs.index["recall_k"], "value": inputs.index["recall"]}
        results["teacher"] = {name: value for name, value in targets.items() if name != "temperature_choice"}
        results["certificate"] = inputs.certificate
    directory.write("results.json", artifacts.canonical_json(results).encode())
    inputs.draw(results)
    artifacts.finish(directory, manifest)
    return results


def words_of(stream: TokenStream, scored_rows: int) -> int:
    """Words that so many scored rows of a split spell, at the split's words per scored row.

    All scored rows together predict every token of every text and the end of every
    document, so the whole split has exactly its own words, and a part its share of them:
    per-word perplexity is per-token perplexity to the power of tokens per word.
    """
    return max(1, round(stream.words * scored_rows / max(stream.num_scored, 1)))


def _samples(
    inputs: Inputs, results: dict[str, Any], scored: dict[str, np.ndarray]
) -> dict[str, list[dict[str, Any]]]:
    """ "samples", spread over the test split, and "differing", where the memory changed most."""
    config = inputs.config
    if not config.samples and not config.traces:
        return {"samples": [], "differing": []}
    systems, stream = inputs.systems(), inputs.streams["test"]
    weight = results["test"]["details"]["base_plus_memory"]["lambda"]
    ranges = spread(len(stream), config.max_rows)
    has_next = read(stream.has_next, ranges)
    rows_N = read(np.arange, ranges)[has_next]
    documents_N = read(stream.document_ids, ranges)[has_next]
    gain_N = -mixture_rows(scored["base"], scored["base_memory"], weight) - scored["base"]
    chosen = differing_rows(gain_N, rows_N, documents_N, -(-config.traces // 2))
    rows = np.concatenate([spread_rows(stream, config.samples), *chosen.values()])
    predictor, evidence = systems.predictor(weight, inputs.embed), None
    if (neighbors := systems.neighbors) is not None:
        documents = Documents(inputs.train, inputs.vocabulary)
        k, tau = inputs.targets["k"], inputs.targets["temperature"]
        evidence = Evidence(documents, neighbors.keys, neighbors.scann, k, tau)
    found = rows_predictions(stream, rows, predictor, inputs.vocabulary, evidence)
    effects = [kind for kind, rows in chosen.items() for _ in rows]
    differing = [{"effect": kind, **sample} for kind, sample in zip(effects, found[config.samples :])]
    return {"samples": found[: config.samples], "differing": differing}
