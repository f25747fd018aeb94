"""What decoder, memory and their mixture say after a text or a row's context, and what that rests on."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mlp_memory.corpus.stream import TokenStream
from mlp_memory.corpus.vocabulary import Vocabulary
from mlp_memory.inference.next_token import NextToken, Predictor
from mlp_memory.inference.texts import GrowingText

_TOP = 5
_SHOWN_TOKENS = 40

FindEvidence = Callable[[np.ndarray, np.ndarray], list[dict[str, Any]]]
"""States [Q, D] and the token asked about at each -> `evidence.described` of each."""


def rows_predictions(
    stream: TokenStream,
    rows: np.ndarray,
    predictor: Predictor,
    vocabulary: Vocabulary,
    evidence: FindEvidence | None = None,
) -> list[dict[str, Any]]:
    """The most likely next tokens at rows of a stream, each read as a text that ends there.

    Args:
      stream: a split.
      rows: rows of it that have a next token.
      predictor: decoder and memory at some λ.
      vocabulary: names tokens.
      evidence: finds what lies near; None where there is no datastore, or another evidence.

    Returns:
      For each row its document, its `predicted` with the true next token as `next`, and what the
      evidence says of that token.
    """
    contexts = [_context(stream, int(row), predictor.context) for row in rows]
    said = [predictor(tokens) for tokens in contexts]
    labels = [int(stream.labels(row, row + 1)[0]) for row in map(int, rows)]
    samples = [
        {
            "row": int(row),
            "document": int(stream.document_ids(row, row + 1)[0]),
            **predicted(tokens, each, label, vocabulary),
        }
        for row, tokens, each, label in zip(rows, contexts, said, labels)
    ]
    return _with_evidence(samples, said, labels, evidence)


def prompt_predictions(
    prompts: Sequence[str], tokens: int, predictor: Predictor, vocabulary: Vocabulary, evidence: FindEvidence
) -> list[dict[str, Any]]:
    """The likeliest tokens after each text, one after the other, and what each rests on.

    Args:
      prompts: beginnings of documents.
      tokens: how many to go on for; fewer where the document ends.
      predictor, vocabulary, evidence: as for `rows_predictions`.

    Returns:
      For each prompt "prompt", "continuation" (text) and "predictions": `predicted` of each token with
      the likeliest one of the mixture as `next`, and what the evidence says of that token.
    """
    texts, ranges, said, labels, samples = [], [], [], [], []
    for prompt in prompts:
        read, first = [vocabulary.bos, *vocabulary.encode(prompt)], len(said)
        growing = GrowingText(vocabulary, read, ())
        while len(said) < first + tokens and labels[first:][-1:] != [vocabulary.eos]:
            said.append(predictor(read))
            labels.append(int(np.argmax(said[-1].mixture_NxV)))
            samples.append(predicted(read[-predictor.context :], said[-1], labels[-1], vocabulary))
            read = [*read, labels[-1]]
            growing.add(labels[-1])
        texts.append(growing.whole)
        ranges.append(slice(first, len(said)))
    found = _with_evidence(samples, said, labels, evidence)
    return [
        {"prompt": prompt, "continuation": text, "predictions": found[its]}
        for prompt, text, its in zip(prompts, texts, ranges)
    ]


def predicted(context: list[int], said: NextToken, token: int, vocabulary: Vocabulary) -> dict[str, Any]:
    """What the models say after a context, and of one token in particular, plain JSON.

    Args:
      context: the tokens read; the last of them are told.
      said: of one position.
      token: the one asked about.
      vocabulary: names tokens.

    Returns:
      "context" (text), "next" (the token's piece), "log_prob" of it under "base", "memory" and "mixture",
      nats, the likeliest tokens of each, [piece, probability], and "lambda", the memory's share; of
      "base" alone where there is no memory.
    """
    log_probs = {"base": said.base_NxV}
    if said.memory_NxV is not None:
        log_probs |= {"memory": said.memory_NxV, "mixture": said.mixture_NxV}

    def top(log_prob_V: np.ndarray) -> list[list[Any]]:
        order = np.argsort(-log_prob_V, kind="stable")[:_TOP]
        return [[vocabulary.piece(int(t)), float(np.exp(log_prob_V[t]))] for t in order]

    return {
        "context": vocabulary.decode(context[-_SHOWN_TOKENS:]),
        "next": vocabulary.piece(token),
        "log_prob": {name: float(log_prob_V[token]) for name, log_prob_V in log_probs.items()},
        **{name: top(log_prob_V) for name, log_prob_V in log_probs.items()},
        **({} if said.weight_N is None else {"lambda": float(said.weight_N)}),
    }


def _context(stream: TokenStream, row: int, most: int) -> list[int]:
    """The last tokens of the row's document that it has read, its own among them."""
    document = int(stream.document_ids(row, row + 1)[0])
    first = max(int(stream.bounds_D1[document]), row + 1 - most)
    return stream.tokens[first : row + 1].astype(int).tolist()


def _with_evidence(
    samples: list[dict[str, Any]], said: list[NextToken], labels: list[int], evidence: FindEvidence | None
) -> list[dict[str, Any]]:
    """One search for all: each goes through the whole index."""
    if evidence is None or not samples:
        return samples
    found = evidence(np.stack([np.float32(each.tap_NxD) for each in said]), np.array(labels))
    return [sample | each for sample, each in zip(samples, found)]
