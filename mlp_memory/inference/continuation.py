"""Text after a prompt, as it grows."""

from collections.abc import Iterator

from mlp_memory.corpus.vocabulary import Vocabulary
from mlp_memory.inference.config import GenerateConfig
from mlp_memory.inference.generate import generate
from mlp_memory.inference.next_token import Predictor


def continuation(
    predictor: Predictor, vocabulary: Vocabulary, prompt: str, config: GenerateConfig
) -> Iterator[str]:
    """What follows `prompt` in a document, piece by piece.

    Characters spelt by several byte tokens come out whole.
    """
    tokens = [vocabulary.bos, *vocabulary.encode(prompt)]
    shown = vocabulary.decode(tokens)
    for token in generate(predictor, tokens, vocabulary.eos, config):
        tokens.append(token)
        text = vocabulary.decode(tokens)
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
