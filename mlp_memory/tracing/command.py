"""The commands `trace` and `documents`."""

import argparse
import contextlib
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlp_memory import artifacts
from mlp_memory.artifacts import Directory, UserError, canonical_json
from mlp_memory.corpus.config import SPLITS
from mlp_memory.inference.next_token import Predictor
from mlp_memory.job import Job
from mlp_memory.language_model import LanguageModel, language_model
from mlp_memory.tracing.documents import Documents
from mlp_memory.tracing.evidence import Evidence
from mlp_memory.tracing.predictions import prompt_predictions, rows_predictions
from mlp_memory.tracing.teacher import Teacher
from mlp_memory.tracing.text import documents_text, trace_text

SCHEMA = 1


def show_trace(args: argparse.Namespace, job: Job) -> None:
    """Prints what `trace` finds, and writes it as JSON where a file is named."""
    found = trace(job, args.rows, args.prompts, args.split, args.tokens, args.neighbors, args.interpolation)
    if args.json is not None:
        file = Path(args.json).absolute()
        Directory(file.parent).write(file.name, canonical_json(found).encode())
    with _while_read():
        print(trace_text(found, shutil.get_terminal_size().columns))


def show_documents(args: argparse.Namespace, job: Job) -> None:
    """Prints a line for each document, as it is found.

    Raises:
      UserError: none holds the text asked for.
    """
    if args.containing == "":
        raise UserError("--containing is empty: give a text to look for, or leave it out")
    lines = 0
    with _while_read():
        for line in documents_text(open_documents(job, args.split).listed(args.containing)):
            lines += 1
            print(line, flush=True)
    if not lines:
        raise UserError(
            f"no document of {args.split} holds {args.containing!r}: upper and lower case count, as do spaces"
        )


@contextlib.contextmanager
def _while_read() -> Iterator[None]:
    """Printing ends quietly where whoever reads, `head` say, has seen enough."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def open_documents(job: Job, split: str) -> Documents:
    """The documents of a split or of a text elsewhere.

    Raises:
      UserError: there is none of that name, or the corpus is not made yet.
    """
    names = (*SPLITS, *job.config.corpus.elsewhere)
    if split not in names:
        raise UserError(f"--split = {split}: use one of {', '.join(names)}")
    return Documents(job.stream(split), job.vocabulary())


def trace(
    job: Job,
    rows: Sequence[int] = (),
    prompts: Sequence[str] = (),
    split: str = "train",
    tokens: int = 5,
    shown: int = 8,
    interpolation: float | str | None = None,
) -> dict[str, Any]:
    """What rows and continuations of texts rest on, plain JSON.

    Args:
      job: the workdir.
      rows: of the split, each with a next token. Of train the neighbours are those that teach the row
        (`teacher.Teacher`), of another split the nearest to it.
      prompts: beginnings of documents, continued by the likeliest tokens.
      split: whose rows.
      tokens: of a continuation, at most.
      shown: positions told of, each with its text.
      interpolation: λ; None for the best on validation, "gate" for the λ of each token.

    Returns:
      "schema", "split", "k", "temperature", "rows" (`predictions.rows_predictions`, each with its document's
      title) and "prompts" (`predictions.prompt_predictions`). Training rows whose memory is not made yet
      have the decoder's word alone.

    Raises:
      UserError: a row or a prompt cannot be traced, or something is not made yet, or was made from what
        is no longer there.
    """
    _check(rows, prompts, tokens, shown)
    documents = open_documents(job, split)
    _check_rows(documents, rows, split)
    facts = _searchable(job)
    train = documents if split == "train" else open_documents(job, "train")
    keys = job.keys()
    index = job.index(keys)
    model = _model(job, bool(prompts) or split != "train", interpolation)
    predictor = Predictor(model.mixture, job.embed_config.context)
    near = (train, keys, index.search, facts["k"], facts["temperature"], shown)
    row_Q = np.array(rows, np.int64)
    evidence = Evidence(*near) if split != "train" else None
    found = rows_predictions(documents.stream, row_Q, predictor, model.vocabulary, evidence)
    if split == "train":
        taught = Teacher(job.workdir / "targets", train, keys, index, shown)(row_Q)
        found = [said | by for said, by in zip(found, taught)]
    supporting = Evidence(*near, supporting_first=True)
    return {
        "schema": SCHEMA,
        "split": split,
        "k": facts["k"],
        "temperature": facts["temperature"],
        "rows": [{"title": documents.title(each["document"]), **each} for each in found],
        "prompts": prompt_predictions(prompts, tokens, predictor, model.vocabulary, supporting),
    }


def _model(job: Job, needs_memory: bool, interpolation: float | str | None) -> LanguageModel:
    """Decoder and memory; the decoder alone where the memory is not made yet and nothing needs it."""
    if not needs_memory and artifacts.peek(job.workdir / "memory") is None:
        return language_model(job, "base")
    job.manifest("memory")
    return language_model(job, "base_plus_memory", interpolation)


def _check(rows: Sequence[int], prompts: Sequence[str], tokens: int, shown: int) -> None:
    if not rows and not prompts:
        raise UserError("trace: nothing to trace, give --row=N or --prompt=TEXT")
    if any(not prompt.strip() for prompt in prompts):
        raise UserError("--prompt is empty: give the beginning of a text")
    for name, value in (("--continue", tokens), ("--neighbors", shown)):
        if value < 1:
            raise UserError(f"{name} = {value}: give 1 or more")


def _check_rows(documents: Documents, rows: Sequence[int], split: str) -> None:
    stream = documents.stream
    for row in rows:
        if not 0 <= row < len(stream):
            raise UserError(f"--row = {row}: {split} has rows 0 to {len(stream) - 1}")
        if stream.has_next(row, row + 1)[0]:
            continue
        number = documents.of_row(row)
        if documents.is_deleted(number):
            raise UserError(f"--row = {row}: document {number} is deleted, nothing is learned from it")
        raise UserError(f"--row = {row} is the last of document {number} and has no next token: give another")


def _searchable(job: Job) -> dict[str, Any]:
    """The facts of the targets, once datastore and index are known to be what they were made from.

    Raises:
      UserError: one of them is missing or was made from something else.
    """
    if job.config.pretrained.memory:
        raise UserError("trace: the memory was imported, so there is no datastore to look into")
    job.manifest("datastore")
    job.manifest("index")
    return job.manifest("targets").facts
