"""The tokenizer that comes out of a GGUF file against the one that went in."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import tokenizers

from mlp_memory.corpus.json_tokenizer import byte_names
from mlp_memory.corpus.vocabulary import Vocabulary
from mlp_memory.interchange.gguf_file import GgufFile

DATA = Path(__file__).parents[3] / "shared/data/tokenizers"
TEXTS = [
    "Hello world, it's 2024 and they're 12345 tokens' worth\n\n  of text\t\n.",
    "naïve café 中文 😀 \u0301 <|endoftext|> <s>\x00",
    "    indented()\n\treturn x1y22z333\r\n",
]


def write(path: Path, tokens: list[str], merges: list[str], eos: int, pre: str) -> Vocabulary:
    """A GGUF of GPT-2's metadata and this tokenizer, as llama.cpp's converter writes it -> what is read."""
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_block_count(1)
    writer.add_embedding_length(4)
    writer.add_head_count(1)
    writer.add_context_length(8)
    writer.add_layer_norm_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    control = gguf.TokenType.CONTROL
    writer.add_token_types([control if i == eos else gguf.TokenType.NORMAL for i in range(len(tokens))])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(eos)
    writer.add_eos_token_id(eos)
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Vocabulary(GgufFile(path).files, str(path))


def assert_same(found: Vocabulary, wanted: Vocabulary, texts: list[str]) -> None:
    assert (found.size, found.bos, found.eos) == (wanted.size, wanted.bos, wanted.eos)
    for text in texts:
        assert found.encode(text) == wanted.encode(text)
        assert found.decode(found.encode(text)) == text


@pytest.mark.parametrize("pre", ["gpt-2", "default", "smollm", "llama-bpe", "qwen2"])
def test_ids_are_those_of_the_pre_tokenizer_that_the_file_names(pre, tmp_path, rng):
    words = [f" {''.join(rng.choice(list('abcdef123'), 4))}" for _ in range(50)]
    trained = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=pre == "llama-bpe"))
    steps = {
        "smollm": [tokenizers.pre_tokenizers.Digits(individual_digits=True)],
        "llama-bpe": [split(r"\p{N}{1,3}")],
        "qwen2": [split(r"\p{N}")],
    }
    own = pre in ("llama-bpe", "qwen2")
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not own)
    trained.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([*steps.get(pre, []), level])
    trained.decoder = tokenizers.decoders.ByteLevel()
    if pre == "qwen2":
        trained.normalizer = tokenizers.normalizers.NFC()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=350,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(byte_names()),
        show_progress=False,
    )
    texts = [" ".join(rng.choice(words, 30)) for _ in range(20)] + ([] if pre == "qwen2" else TEXTS)
    trained.train_from_iterator(texts, trainer)
    table = json.loads(trained.to_str())
    vocab = sorted(table["model"]["vocab"], key=table["model"]["vocab"].get)
    merges = [" ".join(pair) for pair in table["model"]["merges"]]
    found = write(tmp_path / "m.gguf", vocab, merges, vocab.index("<|endoftext|>"), pre)
    assert_same(found, Vocabulary({"tokenizer.json": trained.to_str().encode()}, "it"), texts)


def split(digits: str) -> tokenizers.pre_tokenizers.PreTokenizer:
    """Llama 3's and Qwen2's pattern, which differ in how many digits go together."""
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
    rest = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    return tokenizers.pre_tokenizers.Split(
        tokenizers.Regex(f"{words}|{digits}{rest}"), behavior="isolated", invert=False
    )


@pytest.mark.skipif(not DATA.exists(), reason="needs shared/data/tokenizers")
def test_gpt2s_own_tokenizer_gives_its_ids(tmp_path):
    vocab = json.loads((DATA / "gpt2_encoder.json").read_text())
    merges = (DATA / "gpt2_vocab.bpe").read_text().splitlines()[1:]
    found = write(tmp_path / "m.gguf", sorted(vocab, key=vocab.get), merges, 50256, "gpt-2")
    assert found.encode("Hello world") == [15496, 995]
    assert_same(found, Vocabulary.from_path(str(DATA / "gpt2_encoder.json")), TEXTS)
