"""A workdir's systems as benchmarks use them: scores at every λ, answers at one, loaded when asked for."""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mlp_memory.artifacts import UserError
from mlp_memory.corpus.vocabulary import Vocabulary
from mlp_memory.decoder.config import DecoderConfig
from mlp_memory.evaluation.harness.names import SYSTEM
from mlp_memory.inference.config import GenerateConfig
from mlp_memory.inference.continuations import MEMORY, ContinuationScorer, Scored
from mlp_memory.inference.knn_lm import KnnSteps
from mlp_memory.inference.next_token import Mixture
from mlp_memory.inference.sampling import Filters
from mlp_memory.joint.gate import Gate
from mlp_memory.language_model import LanguageModel
from mlp_memory.targets.knn import SparseTargets

if TYPE_CHECKING:
    from mlp_memory.job import Job
    from mlp_memory.targets.knn_lm import Neighbors

_UNBOUNDED = 2048
_STAGES = {"base": ("pretrain", "gate"), "joint": ("joint", "joint_gate")}
Weight = float | str


class Models:
    """The systems of a workdir.

    Args:
      job: the workdir.
      systems: those wanted.
      context: longest window; 0 for the decoder's own.
      batch_tokens: read at once.
      batch: prompts continued at once.
    """

    def __init__(self, job: "Job", systems: Sequence[str], context: int, batch_tokens: int, batch: int):
        self._job, self._systems = job, tuple(systems)
        self.vocabulary: Vocabulary = job.vocabulary()
        self.context = _window(DecoderConfig(**job.manifest("decoder").facts["model"]), context)
        self._batch_tokens, self._batch = batch_tokens, batch
        self._count = functools.cache(self._counted)

    def partners(self, decoder: str) -> tuple[str, ...]:
        """What a decoder is mixed with in the systems."""
        of = [SYSTEM[name].partner for name in self._systems if SYSTEM[name].decoder == decoder]
        return tuple(dict.fromkeys(partner for partner in of if partner))

    def encode(self, context: str, continuation: str) -> tuple[list[int], int]:
        """Tokens of both, from the beginning of a document, and where the continuation's begin.

        As in lm-eval, space at the end of the context goes to the continuation, and where the border falls
        inside a token that token is the continuation's.
        """
        before = context.rstrip()
        continuation = context[len(before) :] + continuation
        whole = self._tokens(before + continuation)
        return whole, max(1, min(len(self._tokens(before)), len(whole) - 1))

    def count_tokens(self, context: str, continuation: str) -> int:
        """Tokens that `encode` gives the continuation."""
        return self._count(context, continuation)

    def is_long(self, context: str, continuation: str) -> bool:
        """Whether a text is read through more than one window."""
        return len(self.encode(context, continuation)[0]) - 1 > self.context

    def is_cut(self, prompt: str, max_tokens: int) -> bool:
        """Whether only the end of a prompt is read before so many tokens are generated."""
        return len(self._tokens(prompt)) > max(1, self.context - max_tokens)

    def score(self, decoder: str, pairs: Sequence[tuple[str, str]]) -> Scored:
        """Each continuation after its context, under the decoder and its partners."""
        mixture = self._mixture(decoder)
        mixture.interpolate(self._gate(decoder) or 0.0)
        return self._scorer(decoder)([self.encode(*pair) for pair in pairs])

    def generate(
        self, system: str, weight: Weight, prompts: Sequence[str], stop: tuple[str, ...], max_tokens: int
    ) -> list[str]:
        """The greedy continuation of each prompt; of prompts that are too long the end is read."""
        found = [""] * len(prompts)
        places = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
        model = self._model_at(system, weight)
        settings = {"stop": stop, "max_tokens": max_tokens, "context": max(1, self.context - max_tokens)}
        for at in range(0, len(places), self._batch):
            chosen = places[at : at + self._batch]
            # Filled up, so that every batch has one shape.
            filled = [prompts[place] for place in [*chosen, *chosen[-1:] * (self._batch - len(chosen))]]
            for place, text in zip(chosen, model.generate(filled, **settings)):
                found[place] = text
        return found

    def _counted(self, context: str, continuation: str) -> int:
        tokens, start = self.encode(context, continuation)
        return len(tokens) - start

    def _tokens(self, text: str) -> list[int]:
        return [self.vocabulary.bos, *self.vocabulary.encode(text)]

    @functools.cached_property
    def _memory(self) -> Any:
        return self._job.memory()[0]

    @functools.cached_property
    def _neighbors(self) -> "Neighbors":
        return self._job.neighbors()

    @functools.cached_property
    def _temperature(self) -> float:
        return float(self._job.manifest("targets").facts["temperature"])

    @functools.cache  # noqa: B019 (a Models lives as long as its process)
    def _gate(self, decoder: str) -> Gate | None:
        gated = any(SYSTEM[name].gated and SYSTEM[name].decoder == decoder for name in self._systems)
        name = _STAGES[decoder][1]
        if not gated:
            return None
        if (gate := self._job.gate(name)) is None:
            raise UserError(f"benchmark.systems: there is no {name}, run {name} first")
        return gate

    @functools.cache  # noqa: B019
    def _decoder(self, decoder: str) -> Any:
        return self._job.decoder(_STAGES[decoder][0])[0]

    @functools.cache  # noqa: B019
    def _mixture(self, decoder: str, alone: bool = False) -> Mixture:
        from mlp_memory.training.loop import compute_dtype

        memory = self._memory if MEMORY in self.partners(decoder) and not alone else None
        return Mixture(self._decoder(decoder), memory, 0.0, self._job.embed_config.tap, compute_dtype("auto"))

    @functools.cache  # noqa: B019
    def _scorer(self, decoder: str) -> ContinuationScorer:
        searched = [partner for partner in self.partners(decoder) if partner != MEMORY]
        neighbors = {partner: self._distribution(partner) for partner in searched}
        return ContinuationScorer(self._mixture(decoder), self.context, neighbors, self._batch_tokens)

    def _distribution(self, partner: str) -> Callable[[np.ndarray], SparseTargets]:
        neighbors = self._neighbors
        search = neighbors.resident if partner == "knn_lm_exact" else neighbors.scann
        return lambda taps: neighbors.distribution(search, taps, self._temperature)

    def _model_at(self, system: str, weight: Weight) -> LanguageModel:
        wanted = SYSTEM[system]
        if wanted.partner in (None, MEMORY):
            model = self._language_model(wanted.decoder, wanted.partner)
            if wanted.partner == MEMORY:
                model.mixture.interpolate(self._gate(wanted.decoder) if weight == "gate" else weight)
            return model
        model, steps = self._knn_model(wanted.partner)
        steps.weight = float(weight)
        return model

    @functools.cache  # noqa: B019
    def _language_model(self, decoder: str, partner: str | None) -> LanguageModel:
        mixture = self._mixture(decoder, alone=partner is None)
        return LanguageModel(mixture, self.vocabulary, GenerateConfig(), self.context)

    @functools.cache  # noqa: B019
    def _knn_model(self, partner: str) -> tuple[LanguageModel, KnnSteps]:
        mixture, config = self._mixture("base", alone=True), GenerateConfig()
        steps = KnnSteps(mixture, Filters.of(config), self._distribution(partner), 0.0)
        return LanguageModel(mixture, self.vocabulary, config, self.context, lambda *_: steps), steps


class SystemAt:
    """One system at one λ, as `adapter.HarnessModel` takes it.

    Args:
      models: of the workdir.
      system: its name.
      weight: λ, or "gate".
    """

    def __init__(self, models: Models, system: str, weight: Weight = 0.0):
        self._models, self._system, self._weight = models, system, weight

    def log_likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation after its context, in nats, and whether it is greedy."""
        wanted = SYSTEM[self._system]
        log_prob_R, greedy_R = self._models.score(wanted.decoder, pairs).at(wanted.partner, self._weight)
        return list(zip(log_prob_R.tolist(), greedy_R.tolist()))

    def generate(self, prompts: Sequence[str], stop: tuple[str, ...], max_tokens: int) -> list[str]:
        """The greedy continuation of each prompt."""
        return self._models.generate(self._system, self._weight, prompts, stop, max_tokens)


def _window(decoder: DecoderConfig, context: int) -> int:
    """The longest window that a decoder may be read through.

    Raises:
      UserError: it has fewer positions.
    """
    most = decoder.max_positions if decoder.positions == "learned" else max(context, _UNBOUNDED)
    if context > most:
        raise UserError(f"benchmark.context = {context}: the decoder has {most} positions")
    return context or most
