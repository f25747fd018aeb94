"""A lossless SentencePiece vocabulary out of the train split.

Byte-pair merges rather than a unigram model: on enwiki2015-small both need the same
number of tokens (739,796 and 740,235 for 2.56 MB at 4,096 pieces), the merges train in
0.3 s instead of 4.3 s, and they count in integers, so nothing depends on float rounding.
"""

import io
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from mlp_memory.artifacts import UserError, first_line

# Merges are learned from at most this much text, spread evenly over the split: more
# changes few pieces and costs memory (about 10 bytes a byte).
SAMPLE_BYTES = 50_000_000
# SentencePiece leaves lines above 4,192 bytes out; a character has at most 4.
_LINE_CHARACTERS = 1000

# SentencePiece writes a space as U+2581, so a U+2581 in the text would come back as a
# space. A rule inside the model sends it through U+F8FD (private use) and back.
_ENCODE_RULES = "2581\tF8FD 31\nF8FD\tF8FD 30\n"
_DECODE_RULES = "F8FD 31\t2581\nF8FD 30\tF8FD\n"


def train(texts: Iterable[str], num_bytes: int, vocab_size: int) -> bytes:
    """The serialised model.

    The same texts give the same bytes, in any process.

    Args:
      texts: documents of the train split.
      num_bytes: their size in UTF-8, which sets how densely they are sampled.
      vocab_size: pieces in all.

    Raises:
      UserError: the text is too small or too varied for that many pieces.
    """
    share = min(1.0, SAMPLE_BYTES / max(num_bytes, 1))
    model = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder:
        encode_rules, decode_rules = Path(folder, "encode.tsv"), Path(folder, "decode.tsv")
        encode_rules.write_text(_ENCODE_RULES)
        decode_rules.write_text(_DECODE_RULES)
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_sample(_lines(texts), share),
                model_writer=model,
                model_type="bpe",
                vocab_size=vocab_size,
                normalization_rule_tsv=str(encode_rules),
                denormalization_rule_tsv=str(decode_rules),
                byte_fallback=True,
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                user_defined_symbols=["\n"],
                pad_id=0,
                unk_id=1,
                bos_id=2,
                eos_id=3,
                num_threads=1,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise UserError(_explain(error, vocab_size)) from error
    return _without_paths(model.getvalue())


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), _LINE_CHARACTERS):
                yield line[start : start + _LINE_CHARACTERS]


def _sample(lines: Iterable[str], share: float) -> Iterator[str]:
    """Every (1/share)-th line, evenly; all of them for share 1."""
    for number, line in enumerate(lines):
        if int((number + 1) * share) > int(number * share):
            yield line


def _explain(error: RuntimeError, vocab_size: int) -> str:
    text = str(error).replace("\n", " ")
    if match := re.search(r"too high \(\d+\).*<= (\d+)", text):
        return (
            f"vocab_size = {vocab_size} is too large for the train split: "
            f"set it to {match.group(1)} or less, or give more text"
        )
    if match := re.search(r"smaller than required_chars\. \d+ vs (\d+)", text):
        return (
            f"vocab_size = {vocab_size} is too small for the characters of the train split: "
            f"set it to {match.group(1)} or more"
        )
    if "sentences_.empty()" in text:
        return "the train split has no text but line ends: give files that hold text"
    return f"SentencePiece cannot train a vocabulary of {vocab_size} pieces: {first_line(RuntimeError(text))}"


def _without_paths(model: bytes) -> bytes:
    """The model less the names of the rule files, which differ from run to run."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    for spec in (proto.normalizer_spec, proto.denormalizer_spec):
        spec.ClearField("normalization_rule_tsv")
    return proto.SerializeToString(deterministic=True)
