"""Text after a prompt, by the models of a workdir."""

from collections.abc import Iterator

from mlp_memory.inference.continuation import continuation
from mlp_memory.inference.next_token import Predictor
from mlp_memory.job import Job


def continuations(job: Job, prompt: str, model: str) -> Iterator[tuple[str, Iterator[str]]]:
    """Text after a prompt, piece by piece, per model: "base", "base_plus_memory", "joint" or "both".

    λ is the one the trainings found best on validation.
    """
    config, vocabulary = job.config, job.vocabulary()
    for name in ("base", "base_plus_memory") if model == "both" else (model,):
        decoder, made = job.decoder("joint" if name == "joint" else "pretrain")
        memory, weight = None, 0.0
        if name != "base":
            memory, distilled = job.memory()
            weight = (made if name == "joint" else distilled).facts["validation"]["validation_lambda"]
        predictor = Predictor(decoder, memory, weight, job.embed_config.tap, job.embed_config.context)
        yield name, continuation(predictor, vocabulary, prompt, config.generate)
