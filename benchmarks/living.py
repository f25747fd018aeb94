"""What updates are worth: added and deleted documents against memories made again from scratch.

    python benchmarks/living.py documents --workdir=runs/living
    python benchmarks/living.py facts --workdir=runs/living_facts

`documents`: articles of another kind, 5 % of the corpus, are added to the memory of a Wikipedia corpus.
Its peer is retrained on everything: the same decoder, all keys, index, teachers and memory made anew.
Perplexity of decoder + memory on held-out text of both kinds, λ tuned on the old kind's validation part
as always, and the seconds of each stage.

`deletion`, after `documents`: the added documents deleted again from the memory retrained on everything, made
anew or only trained on. The peer is the memory before, which never saw them: loss at the deleted
documents' own rows, and validation perplexity.

`facts`: invented entities (mlp_memory/evaluation/facts.py), told in some words and asked in others. Some
are known from the start, some are added, some of the known deleted. Peers: retrained on everything, and
a memory that never saw the deleted ones. Of each group of facts: how often the right answer of ten is
the likeliest, its probability among the ten, and how much of that is the person's own (`own_share`).

`index`, after `documents`: the new rows as a shard of their own, against ScaNN's own way of
taking them into the index that is there (`upsert`, in memory, the whole index then written again).

Everything goes through the command line; a run that was stopped goes on.
"""

import argparse
import json
import lzma
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from mlp_memory.artifacts import Directory
from mlp_memory.evaluation.facts import Entity, Question, invent
from mlp_memory.evaluation.harness.models import Models
from mlp_memory.index.codec import Space
from mlp_memory.index.exact import exact_search
from mlp_memory.index.extend import extend_index
from mlp_memory.index.neighbors import recall_at_k
from mlp_memory.index.scann_shard import load
from mlp_memory.index.search import open_index
from mlp_memory.index.shards import single_rows
from mlp_memory.job import Job
from mlp_memory.memory.score import memory_log_probs
from mlp_memory.recipes import load_config
from mlp_memory.workdir import seconds_by_stage

MADE_AGAIN = ("embed", "index", "retrieve", "distill")
SYSTEMS = ("base", "base_plus_memory", "knn_lm_exact")
ALONE = [f"--gin={name}.enabled = False" for name in ("joint", "gate", "baseline")]


def command(*words: object) -> None:
    """Runs `python -m mlp_memory WORDS`."""
    print("+", *words, flush=True)
    subprocess.run([sys.executable, "-m", "mlp_memory", *map(str, words)], check=True)


def stages(workdir: Path, names: tuple[str, ...], *flags: str) -> None:
    """Does these stages."""
    for name in names:
        command(name, f"--workdir={workdir}", *flags)


def decoder_stage(flags: list[str]) -> str:
    """The stage that makes a recipe's decoder: "pretrain" or "import"."""
    given = [flag.removeprefix("--").split("=", 1) for flag in flags]
    files, bindings = ([value for name, value in given if name == kind] for kind in ("gin_file", "gin"))
    return Job(Directory("."), load_config(files, bindings, None)).made_by("decoder")


def update(base: Path, output: Path, *flags: str) -> Path:
    """The update's workdir."""
    command("update", f"--workdir={base}", f"--output={output}", *flags)
    return output


def retrained(updated: Path, output: Path, flags: list[str]) -> Path:
    """A workdir with an update's stream and decoder, all else made from scratch."""
    for name in ("corpus", "decoder"):
        if not (output / name).exists():
            shutil.copytree(updated / name, output / name)
    stages(output, MADE_AGAIN, *flags)
    return output


def write_texts(path: Path, texts: list[str]) -> Path:
    """JSON lines, a document each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def seconds(workdir: Path, names: tuple[str, ...]) -> dict[str, float]:
    """What stages took."""
    found = seconds_by_stage(Directory(workdir))
    return {name: found.get(name, 0.0) for name in names}


def perplexities(workdir: Path, splits: tuple[str, ...], flags: list[str]) -> dict[str, dict[str, float]]:
    """Of each system, by split."""
    command("evaluate", f"--workdir={workdir}", *flags)
    results = json.loads((workdir / "reports/results.json").read_text())
    return {split: {system: results[split]["perplexity"][system] for system in SYSTEMS} for split in splits}


def documents(args: argparse.Namespace, flags: list[str]) -> None:
    """Prints the table of the documents experiment."""
    workdir = Path(args.workdir)
    with lzma.open(args.add, "rt") as file:
        texts = [json.loads(line)["text"] for line in file]
    base = workdir / "base"
    decoder = decoder_stage(flags)
    stages(base, ("tokenize", decoder), *flags)
    wanted = args.share * Job(Directory(base), load_config([], [], Directory(base))).stream("train").num_bytes
    added, size = [], 0
    while size < wanted:
        added.append(texts[len(added)])
        size += len(added[-1].encode())
    new = write_texts(workdir / "new.jsonl", added)
    stages(base, MADE_AGAIN, *flags)
    updated = update(base, workdir / "updated", f"--add={new}", *flags)
    again = retrained(updated, workdir / "retrained", flags)
    rows = {}
    for name, folder in {"base": base, "updated": updated, "retrained": again}.items():
        rows[name] = perplexities(folder, ("test", "new"), flags)
    print(json.dumps(rows, indent=1))
    print(f"added {len(added)} documents, {size:,} bytes")
    spent = seconds(updated, ("tokenize", decoder, *MADE_AGAIN))
    # The stream of both was tokenised by the update: the base's stands for the whole one.
    whole = seconds(base, ("tokenize",)) | seconds(again, MADE_AGAIN)
    for name in spent:
        print(f"{name:10} update {spent[name]:8.1f} s   retraining {whole.get(name, 0):8.1f} s")
    ratio = sum(spent.values()) / sum(whole.values())
    print(f"update {sum(spent.values()):.0f} s = {ratio:.1%} of retraining's {sum(whole.values()):.0f} s")


def deletion(args: argparse.Namespace, flags: list[str]) -> None:
    """Prints the table of the deletion experiment."""
    workdir = Path(args.workdir)
    words = (f"--delete={workdir / 'new.jsonl'}", *flags)
    found = {"never saw them": workdir / "base", "before": workdir / "retrained"}
    for how in ("trained_on", "from_scratch"):
        folder = workdir / f"deleted_{how}"
        found[how] = update(workdir / "retrained", folder, *words, f"--gin=update.memory = '{how}'")
    jobs = {name: Job(Directory(w), load_config([], [], Directory(w))) for name, w in found.items()}
    stream, states = jobs["before"].stream("train"), jobs["before"].states()
    first, last = len(jobs["never saw them"].stream("train")), len(stream)
    asks = stream.has_next(first, last)
    taps_NxD, labels_N = np.asarray(states[first:last], np.float32)[asks], stream.labels(first, last)[asks]
    for name, job in jobs.items():
        memory, made = job.memory()
        log_prob_N = memory_log_probs(memory, taps_NxD, labels_N, job.mesh, np.float32)
        line = f"loss at the deleted rows {-log_prob_N.mean():.4f}"
        perplexity = made.facts["validation"]["validation_perplexity"]
        spent = sum(seconds(found[name], MADE_AGAIN).values())
        print(f"{name:16} {line}  base + memory, validation {perplexity:.2f}  {spent:.0f} s")


def asked(workdir: Path, questions: list[Question]) -> dict[str, np.ndarray]:
    """The probability of each answer among the ten, [Q, 10], by system."""
    job = Job(Directory(workdir), load_config([], [], Directory(workdir)))
    models = Models(job, SYSTEMS, 128, 4096, 16)
    pairs = [(q.asked, f" {answer}") for q in questions for answer in q.answers]
    scored = models.score("base", pairs)
    weight = job.manifest("memory").facts["validation"]["validation_lambda"]
    knn = job.manifest("targets").facts["temperature_choice"].get("lambda", 0.25)
    found = {}
    for name, partner, at in (
        ("base", None, 0.0),
        ("knn", "knn_lm_exact", knn),
        ("memory", "memory", weight),
        ("memory alone", "memory", 1.0),
    ):
        log_prob_QxA = scored.at(partner, at)[0].reshape(len(questions), -1)
        prob_QxA = np.exp(log_prob_QxA - log_prob_QxA.max(axis=1, keepdims=True))
        found[name] = prob_QxA / prob_QxA.sum(axis=1, keepdims=True)
    return found


def own_share(prob_QxA: np.ndarray, right_Q: np.ndarray, entities: int) -> np.ndarray:
    """The right answer's probability less that of the same answer in the same question of the other entities.

    What is common to all of them, because an answer is a likely word, is not counted; of who is unknown
    it is 0 on average. [Q]; every entity is asked the same questions in the same order.
    """
    prob_ExQxA = prob_QxA.reshape(entities, -1, prob_QxA.shape[1])
    right_ExQ = right_Q.reshape(entities, -1)
    entity_ExQ, question_ExQ = np.indices(right_ExQ.shape)
    own_ExQ = prob_ExQxA[entity_ExQ, question_ExQ, right_ExQ]
    all_ExQ = prob_ExQxA.sum(axis=0)[question_ExQ, right_ExQ]
    return (own_ExQ - (all_ExQ - own_ExQ) / (entities - 1)).reshape(-1)


def figure(values_Q: np.ndarray, entities: int) -> str:
    """The mean and its 95 % interval, percentile bootstrap over entities; questions are in their order."""
    mean_E = values_Q.reshape(entities, -1).mean(axis=1)
    rng = np.random.default_rng(0)
    means = mean_E[rng.integers(0, entities, (2000, entities))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return f"{mean_E.mean():.4f} ({low:.4f} ... {high:.4f})"


def facts(args: argparse.Namespace, flags: list[str]) -> None:
    """Prints the table of the facts experiment.

    The workdirs that only give others their stream train their memory for two steps.
    """
    brief = [*flags, "--gin=distill.steps = 2", "--gin=distill.eval_every = 2", "--gin=distill.warmup = 1"]
    workdir, groups = Path(args.workdir), {}
    every: list[Entity] = []
    for number, name in enumerate(("known", "added", "deleted")):
        groups[name] = invent(args.entities, number, every)
        every += groups[name]
    files = {
        name: write_texts(workdir / f"{name}.jsonl", [entity.document(0) for entity in group])
        for name, group in groups.items()
    }
    start = workdir / "start"
    made = ("tokenize", decoder_stage(flags), *MADE_AGAIN)
    stages(start, made, *brief)
    told = update(start, workdir / "told", f"--add={files['known']}", f"--add={files['deleted']}", *brief)
    base = retrained(told, workdir / "base", flags)
    never = update(start, workdir / "never_told", f"--add={files['known']}", *brief)
    found = {
        "base": base,
        "added": update(base, workdir / "added", f"--add={files['added']}", *flags),
        "deleted": update(base, workdir / "deleted", f"--delete={files['deleted']}", *flags),
        "deleted, trained on": update(
            base,
            workdir / "deleted_trained_on",
            f"--delete={files['deleted']}",
            *flags,
            "--gin=update.memory = 'trained_on'",
        ),
    }
    found["retrained with added"] = retrained(found["added"], workdir / "retrained", flags)
    found["never saw deleted"] = retrained(never, workdir / "never", flags)
    print("probability of the right answer among ten, how often it is the likeliest, the person's own share")
    given: dict[tuple[str, str, str], tuple[np.ndarray, ...]] = {}
    for name, folder in found.items():
        for group, entities in groups.items():
            questions = [question for entity in entities for question in entity.questions()]
            right = np.array([question.right for question in questions])
            for system, prob_QxA in asked(folder, questions).items():
                prob_Q, first_Q = prob_QxA[np.arange(len(right)), right], prob_QxA.argmax(axis=1) == right
                given[name, group, system] = prob_Q, first_Q, own_share(prob_QxA, right, args.entities)
                line = "  ".join(figure(values_Q, args.entities) for values_Q in given[name, group, system])
                print(f"{name:22} {group:8} {system:13} {line}", flush=True)
    print("differences of the same, paired")
    for name, peer in (
        ("added", "retrained with added"),
        ("deleted", "never saw deleted"),
        ("deleted, trained on", "never saw deleted"),
    ):
        for group in groups:
            for system in ("memory", "memory alone"):
                ours, theirs = given[name, group, system], given[peer, group, system]
                line = "  ".join(figure(a.astype(float) - b, args.entities) for a, b in zip(ours, theirs))
                print(f"{name} less {peer:22} {group:8} {system:13} {line}", flush=True)
    for name, folder in found.items():
        print(f"{name:22} {perplexities(folder, ('test',), flags)}", flush=True)
    for name, folder in found.items():
        spent = seconds(folder, made)
        print(f"{name:22} {sum(spent.values()):6.0f} s  {spent}")


def index(args: argparse.Namespace) -> None:
    """Prints seconds and recall of both ways of making an index of more rows."""
    workdir, scratch = Path(args.workdir), Path(args.workdir) / "scratch"
    jobs = [
        Job(Directory(workdir / name), load_config([], [], Directory(workdir / "base")))
        for name in ("base", "updated")
    ]
    (old, stream), keys = (job.stream("train") for job in jobs), jobs[1].keys()
    found, valid_N = jobs[0].manifest("index"), stream.has_next(0, len(stream))
    k, config = jobs[0].config.retrieve.k, jobs[0].config.index
    rng = np.random.default_rng(0)
    asked = {
        "old": rng.choice(np.flatnonzero(valid_N[: len(old)]), 256, replace=False),
        "new": len(old) + rng.choice(np.flatnonzero(valid_N[len(old) :]), 256, replace=False),
    }
    queries = {name: single_rows(keys, np.sort(rows)) for name, rows in asked.items()}
    truth = {name: exact_search(keys, valid_N, rows, k) for name, rows in queries.items()}

    shutil.rmtree(scratch, ignore_errors=True)
    start = time.perf_counter()
    extend_index(
        Directory(scratch / "shard"),
        jobs[0].workdir / "index",
        found,
        len(old),
        keys,
        "new",
        stream,
        config,
        k,
    )
    print(f"a shard of its own: {time.perf_counter() - start:.1f} s, its recall measured")
    extended = open_index(Directory(scratch / "shard"), keys, valid_N)
    for name, rows in queries.items():
        recall = recall_at_k(extended.search(rows, k)[0], truth[name][0])
        print(f"  recall@{k} of {name} rows {recall:.4f}")

    folder = workdir / "base/index/shard-00000"
    rows_P = np.flatnonzero(valid_N)
    space = Space(np.load(folder / "mean.npy"))
    start = time.perf_counter()
    searcher = load(folder / "scann", list(range(int(valid_N[: len(old)].sum()))))
    added = rows_P[rows_P >= len(old)]
    lifted = space.keys(np.asarray(keys[len(old) : len(stream)])[added - len(old)])
    searcher.reserve(len(rows_P))
    searcher.upsert(list(range(len(rows_P) - len(added), len(rows_P))), lifted, 256)
    inserted = time.perf_counter()
    (scratch / "scann").mkdir(parents=True)
    searcher.serialize(str(scratch / "scann"), relative_path=True)
    print(f"upsert: {inserted - start:.1f} s, written again in {time.perf_counter() - inserted:.1f} s")
    for name, rows in queries.items():
        lifted = space.queries(rows)
        limits = (found.facts["reorder"], found.facts["leaves_to_search"])
        places, _ = searcher.search_batched_parallel(lifted, k, max(limits[0], k), limits[1])
        recall = recall_at_k(rows_P[np.asarray(places, np.int64)], truth[name][0])
        print(f"  recall@{k} of {name} rows {recall:.4f}")


def main() -> None:
    """Runs one experiment."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("documents", "deletion", "facts", "index"))
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--gin_file", default="gin_configs/studies/enwiki_small_cpu.gin")
    parser.add_argument("--gin", action="append", default=[])
    parser.add_argument("--add", default="../shared/data/corpora/wikinews/train.jsonl.xz")
    parser.add_argument("--held_out", default="../shared/data/corpora/wikinews/validation.jsonl.xz")
    parser.add_argument("--share", type=float, default=0.05, help="of the corpus' bytes that is added")
    parser.add_argument("--entities", type=int, default=40, help="of each group of facts")
    args = parser.parse_args()
    flags = [f"--gin_file={args.gin_file}", *ALONE, *(f"--gin={binding}" for binding in args.gin)]
    if args.what == "index":
        index(args)
    elif args.what == "facts":
        facts(args, flags)
    else:
        part = ["corpus.elsewhere = {'new': @new/part()}", "new/part.source = 'jsonl'"]
        part += [f"new/part.train_files = ['{args.held_out}']"]
        run = documents if args.what == "documents" else deletion
        run(args, [*flags, *(f"--gin={binding}" for binding in part)])


if __name__ == "__main__":
    main()
