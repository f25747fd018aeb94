"""A workdir's models as one thing that continues and scores texts."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from mlp_memory.artifacts import UserError
from mlp_memory.corpus.vocabulary import Vocabulary
from mlp_memory.inference.beam import BeamSearch
from mlp_memory.inference.config import MODELS, GenerateConfig
from mlp_memory.inference.generate import Steps, generate
from mlp_memory.inference.next_token import Mixture
from mlp_memory.inference.prompts import fitted
from mlp_memory.inference.sampling import Filters
from mlp_memory.inference.scoring import Scorer
from mlp_memory.inference.texts import GrowingText

if TYPE_CHECKING:
    from mlp_memory.job import Job


class Likelihood(NamedTuple):
    """Of a text: its log-probability in nats, its tokens, and whether each was the likeliest."""

    log_prob: float
    tokens: int
    greedy: bool


class LanguageModel:
    """Continues and scores texts.

    Args:
      mixture: decoder and memory, or a decoder alone.
      vocabulary: of both.
      config: how texts are continued, unless a call says otherwise.
      context: longest window that texts are scored through.
      steps: makes the programs that continue, of the mixture and filters; where it is not `Steps`, there are
        no beams and no scores.
    """

    def __init__(
        self,
        mixture: Mixture,
        vocabulary: Vocabulary,
        config: GenerateConfig,
        context: int,
        steps: Callable[[Mixture, Filters], Steps] = Steps,
    ):
        self.mixture, self.vocabulary, self.config = mixture, vocabulary, config
        self._programs: dict[Any, Any] = {}
        self._steps = steps
        self._scorer = Scorer(mixture, context)

    def generate(self, prompts: str | Sequence[str], **settings: Any) -> str | list[str]:
        """What follows each prompt; a prompt alone gives its text alone.

        Args:
          prompts: beginnings of documents, of any lengths.
          settings: of `GenerateConfig`, for this call.

        Raises:
          UserError: an impossible setting.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        config = self._with(settings)
        tokens = [fitted(self._encoded(text), config, self.mixture.config) for text in texts]
        if not texts:
            found = []
        elif config.beams > 1:
            hypotheses = self._beam_search(config)(tokens, self.vocabulary.eos, config)
            found = [self._text(prompt, best[0].tokens) for prompt, best in zip(tokens, hypotheses)]
        else:
            growing = [GrowingText(self.vocabulary, prompt, config.stop) for prompt in tokens]
            for _ in self._pieces(tokens, growing, config):
                pass
            found = [text.whole for text in growing]
        return found[0] if isinstance(prompts, str) else found

    def stream(self, prompt: str, **settings: Any) -> Iterator[str]:
        """What follows a prompt, piece by piece; characters spelt by several tokens come out whole."""
        config = self._with(settings)
        if config.beams > 1:
            yield self.generate(prompt, **settings)
            return
        tokens = fitted(self._encoded(prompt), config, self.mixture.config)
        text = GrowingText(self.vocabulary, tokens, config.stop)
        for _ in self._pieces([tokens], [text], config):
            yield text.take()
        yield text.rest()

    def log_likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        """log p(continuation | context) of each (context, continuation); both together begin a document."""
        self._without_search("scores")
        counts, sequences = [], []
        for context, continuation in pairs:
            whole = self._encoded(context + continuation)
            sequences.append(whole)
            # Where the border falls inside a token, the token counts as the continuation's.
            counts.append(min(len(self._encoded(context)), len(whole) - 1))
        found = []
        for start, scores in zip(counts, self._scorer(sequences)):
            log_prob_T, likeliest_T = scores.log_prob_T[start - 1 :], scores.likeliest_T[start - 1 :]
            total = float(log_prob_T.astype("float64").sum())
            found.append(Likelihood(total, len(log_prob_T), bool(likeliest_T.all())))
        return found

    def score(self, texts: Sequence[str]) -> list[Likelihood]:
        """log p(text) of whole documents, their end not counted."""
        return self.log_likelihoods([("", text) for text in texts])

    def _without_search(self, what: str) -> None:
        if self._steps is not Steps:
            raise UserError(f"kNN-LM continues texts only: for {what} take another model")

    def _with(self, settings: dict[str, Any]) -> GenerateConfig:
        try:
            return dataclasses.replace(self.config, **settings)
        except TypeError as error:
            names = ", ".join(field.name for field in dataclasses.fields(GenerateConfig))
            raise UserError(f"no such setting ({error}); there are: {names}") from error

    def _encoded(self, text: str) -> list[int]:
        return [self.vocabulary.bos, *self.vocabulary.encode(text)]

    def _text(self, prompt: list[int], tokens: list[int]) -> str:
        text = GrowingText(self.vocabulary, prompt, ())
        for token in tokens:
            text.add(token)
        return text.whole

    def _pieces(
        self, prompts: list[list[int]], texts: list[GrowingText], config: GenerateConfig
    ) -> Iterator[list[tuple[int, int]]]:
        filters = Filters.of(config)
        if filters not in self._programs:
            self._programs[filters] = self._steps(self.mixture, filters)
        steps, eos = self._programs[filters], self.vocabulary.eos
        return generate(steps, prompts, eos, config, lambda row, tokens: texts[row].add(tokens[-1]))

    def _beam_search(self, config: GenerateConfig) -> BeamSearch:
        self._without_search("beams")
        key = (Filters.of(config), config.beams)
        if key not in self._programs:
            self._programs[key] = BeamSearch(self.mixture, *key)
        return self._programs[key]


def language_model(
    job: "Job", model: str, interpolation: float | str | None = None, dtype: str = "auto"
) -> LanguageModel:
    """A workdir's decoder, with its memory where `model` says so.

    Args:
      job: the workdir.
      model: one of `MODELS`.
      interpolation: λ; None for the best on validation, "gate" for the λ of each token.
      dtype: of the computation; "auto" is bfloat16 on accelerators, float32 on CPU.

    Raises:
      UserError: something is not made yet, or impossible.
    """
    from mlp_memory.training.loop import compute_dtype

    if model not in MODELS:
        raise UserError(f"model {model!r}: use one of {', '.join(MODELS)}")
    number = isinstance(interpolation, int | float) and 0 <= interpolation < 1
    if interpolation not in (None, "gate") and not number:
        raise UserError(f"interpolation = {interpolation!r}: give a number in [0, 1) or 'gate'")
    embed = job.embed_config
    if model.startswith("knn_lm"):
        return _knn_lm(job, model, interpolation)
    decoder, made = job.decoder("joint" if model == "joint" else "pretrain")
    memory, weight = None, 0.0
    stage = "joint_gate" if model == "joint" else "gate"
    if model != "base":
        memory, distilled = job.memory()
        best = (made if model == "joint" else distilled).facts["validation"]["validation_lambda"]
        weight = best if interpolation is None else interpolation
        if interpolation == "gate" and (weight := job.gate(stage)) is None:
            raise UserError(f"interpolation 'gate': there is none, run {stage} first (gate.enabled = True)")
    mixture = Mixture(decoder, memory, weight, embed.tap, compute_dtype(dtype))
    return LanguageModel(mixture, job.vocabulary(), job.config.generate, embed.context)


def _knn_lm(job: "Job", model: str, interpolation: float | str | None) -> LanguageModel:
    """The decoder with its datastore, searched at each step; λ and τ are the targets' choice."""
    from mlp_memory.inference.knn_lm import KnnSteps

    if interpolation == "gate":
        raise UserError(f"model {model!r} has no gate: give interpolation a number, or leave it out")
    facts, neighbors, embed = job.manifest("targets").facts, job.neighbors(), job.embed_config
    weight = facts["temperature_choice"].get("lambda", 0.25) if interpolation is None else interpolation
    search = neighbors.resident if model == "knn_lm_exact" else neighbors.scann
    mixture = Mixture(job.decoder()[0], None, 0.0, embed.tap)

    def steps(mixture: Mixture, filters: Filters) -> KnnSteps:
        tau = facts["temperature"]
        return KnnSteps(mixture, filters, lambda taps: neighbors.distribution(search, taps, tau), weight)

    return LanguageModel(mixture, job.vocabulary(), job.config.generate, embed.context, steps)
