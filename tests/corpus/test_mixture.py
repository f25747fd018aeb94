import dataclasses
import itertools

import pytest

from mlp_memory.artifacts import Directory, UserError, config_dict
from mlp_memory.corpus.config import SPLITS, CorpusConfig, PartConfig
from mlp_memory.corpus.documents import fingerprints, input_files
from mlp_memory.corpus.split import interleave, read_split, scan
from mlp_memory.corpus.stream import TokenStream
from mlp_memory.corpus.tokenize import tokenize
from mlp_memory.corpus.vocabulary import Vocabulary


@pytest.fixture
def parts(tmp_path, rng, make_text, write_jsonl):
    """Three sources of 2,400, 1,200 and 300 documents; texts say which."""

    def make(**values):
        made = {}
        for name, count in (("large", 2400), ("middle", 1200), ("small", 300)):
            texts = [f"{name} {rng.random()} {make_text(rng.randrange(1, 9))}" for _ in range(count)]
            path = write_jsonl(tmp_path / f"{name}.jsonl", texts)
            own = {key: value[name] if isinstance(value, dict) else value for key, value in values.items()}
            made[name] = PartConfig("jsonl", str(path), **own)
        return made

    return make


def read_all(config: CorpusConfig):
    files = input_files(config)
    facts = scan(config, files)
    return facts, {split: list(read_split(config, files, split, facts)) for split in SPLITS}


def test_without_rates_every_document_of_every_part_stands_once(parts):
    made = parts()
    facts, splits = read_all(CorpusConfig("mixture", parts=made))
    for name, part in made.items():
        _, alone = read_all(CorpusConfig("jsonl", part.train_files))
        for split in SPLITS:
            assert [text for text in splits[split] if text.startswith(name)] == alone[split]
            assert facts[split].parts[name].documents == len(alone[split])
            assert facts[split].parts[name].bytes == sum(len(text.encode()) for text in alone[split])


def test_with_rates_bytes_are_in_their_proportion_and_the_scarcest_part_is_whole(parts):
    rates = {"large": 4.0, "middle": 2.0, "small": 1.0}
    made = parts(rate=rates)
    facts, splits = read_all(CorpusConfig("mixture", parts=made))
    train = facts["train"].parts
    assert train["small"].fraction == 1.0
    assert len(set(splits["train"])) == len(splits["train"])
    for name, rate in rates.items():
        # A hash keeps a share of 180 or more documents of random lengths: 9 % off at one sigma.
        assert train[name].bytes / train["small"].bytes == pytest.approx(rate, rel=0.5)
        whole = read_all(CorpusConfig("jsonl", made[name].train_files))[1]
        for split in ("validation", "test"):
            assert [text for text in splits[split] if text.startswith(name)] == whole[split]
        assert {text for text in splits["train"] if text.startswith(name)} <= set(whole["train"])


def test_any_stretch_of_the_stream_is_mixed(parts):
    facts, splits = read_all(CorpusConfig("mixture", parts=parts()))
    longest = max(len(text.encode()) for text in splits["train"])
    read = dict.fromkeys(facts["train"].parts, 0)
    for text in splits["train"]:
        read[text.split()[0]] += len(text.encode())
        shares = [read[name] / facts["train"].parts[name].bytes for name in read]
        assert max(shares) - min(shares) <= longest / facts["train"].parts["small"].bytes


def test_interleaving_keeps_each_order_and_does_not_read_ahead(rng):
    counts = {name: rng.randrange(1, 40) for name in "abc"}
    texts = {name: [name * rng.randrange(1, 9) for _ in range(count)] for name, count in counts.items()}
    pulled = []

    def pull(name):
        for text in texts[name]:
            pulled.append(text)
            yield text

    sizes = {name: sum(map(len, own)) for name, own in texts.items()}
    found = []
    for text in interleave({name: pull(name) for name in texts}, sizes):
        found.append(text)
        assert pulled == found
    for name, own in texts.items():
        assert [text for text in found if text[0] == name] == own


def test_the_fraction_of_the_corpus_counts_on_top_of_the_parts(parts):
    made = parts(fraction=0.5)
    facts, _ = read_all(CorpusConfig("mixture", parts=made, fraction=0.5))
    assert {part.fraction for part in facts["train"].parts.values()} == {0.25}


def test_parts_split_on_their_own(tmp_path, rng, write_jsonl):
    paths = {
        name: write_jsonl(tmp_path / f"{name}.jsonl", [f"{name}{n}" for n in range(60)]) for name in "abc"
    }
    with_files = PartConfig("jsonl", str(paths["a"]), str(paths["b"]), str(paths["b"]).replace("b.", "?."))
    with pytest.raises(UserError, match=r"p/\w+_files and in p/\w+_files"):
        input_files(CorpusConfig("mixture", parts={"p": with_files}))
    held = PartConfig("jsonl", str(paths["a"]), (), str(paths["b"]), validation_fraction=0.0)
    hashed = PartConfig("jsonl", str(paths["c"]), validation_fraction=0.4, test_fraction=0.0)
    _, splits = read_all(CorpusConfig("mixture", parts={"held": held, "hashed": hashed}))
    assert splits["test"] == [f"b{n}" for n in range(60)]
    assert {text[0] for text in splits["validation"]} == {"c"}
    assert {text[0] for text in splits["train"]} == {"a", "c"}


def test_texts_that_are_held_out_in_one_part_and_trained_on_in_another_are_counted(tmp_path, write_jsonl):
    texts = [f"text {n}" for n in range(100)]
    train = write_jsonl(tmp_path / "train.jsonl", texts)
    test = write_jsonl(tmp_path / "test.jsonl", [*texts[:7], "new"])
    other = write_jsonl(tmp_path / "other.jsonl", [f"other {n}" for n in range(50)])
    facts, _ = read_all(
        CorpusConfig(
            "mixture",
            parts={
                "one": PartConfig("jsonl", str(train), validation_fraction=0, test_fraction=0),
                "two": PartConfig("jsonl", str(other), test_files=str(test), validation_fraction=0.2),
            },
        )
    )
    assert facts["test"].duplicated_documents == 7


def test_the_order_in_which_parts_are_given_does_not_matter(parts):
    made = parts(rate={"large": 1, "middle": 1, "small": 1})
    configs = [CorpusConfig("mixture", parts=dict(order)) for order in itertools.permutations(made.items())]
    assert len({str(config_dict(config)) for config in configs}) == 1
    assert config_dict(configs[0])["parts"]["small"]["rate"] == 1
    assert len({tuple(read_all(config)[1]["train"]) for config in configs[::3]}) == 1


def test_every_file_and_the_version_of_python_are_fingerprinted(parts):
    made = parts() | {"docs": PartConfig("python_docs")}
    config = CorpusConfig("mixture", parts=made)
    wanted = {"python", *(file for part in made.values() for file in part.train_files)}
    assert set(fingerprints(config, input_files(config))) == wanted


def test_tokenizing_a_mixture_records_its_parts_and_refuses_other_rates_and_other_texts(tmp_path, parts):
    made = parts(rate={"large": 4, "middle": 2, "small": 1})
    config = CorpusConfig("mixture", parts=made, vocab_size=300)
    directory = Directory(tmp_path / "corpus")
    tokenize(directory, config)
    facts, splits = read_all(config)
    vocabulary = Vocabulary.load(directory / "vocabulary")
    for split in SPLITS:
        stream = TokenStream.open(directory / split)
        bounds = zip(stream.bounds_D1, stream.bounds_D1[1:])
        assert [vocabulary.decode(stream.tokens[a:b]) for a, b in bounds] == splits[split]
        assert stream.manifest.facts["parts"] == {
            name: dataclasses.asdict(part) for name, part in facts[split].parts.items()
        }
        assert stream.manifest.facts["word_count"] == stream.word_count == "whitespace"
    tokenize(directory, config)
    rates = {name: dataclasses.replace(part, rate=1) for name, part in made.items()}
    with pytest.raises(UserError, match=r"parts\.large\.rate"):
        tokenize(directory, dataclasses.replace(config, parts=rates))
    with open(made["small"].train_files[0], "a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(UserError, match=r"inputs.*small"):
        tokenize(directory, config)


def test_words_of_parts_that_count_differently_say_so(tmp_path, parts):
    path = tmp_path / "wiki.tokens"
    path.write_text(" \n = A = \n \n text \n" * 40)
    wiki = PartConfig("wikitext", str(path), validation_fraction=0.0, test_fraction=0.0)
    facts, _ = read_all(CorpusConfig("mixture", parts={**parts(), "wiki": wiki}))
    assert facts["train"].word_count == "whitespace+wikitext"
    assert facts["train"].parts["wiki"].words == 40 * 8


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"source": "mixture"}, "needs parts"),
        ({"source": "mixture", "parts": [PartConfig()]}, "parts"),
        ({"source": "mixture", "parts": {"a": 3}}, "parts"),
        ({"source": "mixture", "parts": {"a/b": PartConfig()}}, "a/b"),
        ({"source": "mixture", "parts": {"a": PartConfig(rate=1), "b": PartConfig()}}, "'b' has no rate"),
        ({"source": "mixture", "parts": {"a": PartConfig()}, "train_files": "x"}, "train_files"),
        ({"source": "python_docs", "parts": {"a": PartConfig()}}, "parts"),
    ],
)
def test_bad_mixtures_are_named_on_one_line(values, named):
    with pytest.raises(UserError) as caught:
        CorpusConfig(**values)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rate", [0, -1, float("inf"), float("nan"), "2", True])
def test_a_rate_is_a_number_above_0(rate):
    with pytest.raises(UserError, match="rate"):
        PartConfig(rate=rate)


def test_a_part_without_train_text_is_named(tmp_path, parts, write_jsonl):
    empty = PartConfig("jsonl", str(write_jsonl(tmp_path / "e.jsonl", [""])), rate=1)
    config = CorpusConfig("mixture", parts={**parts(rate=1), "empty": empty})
    with pytest.raises(UserError, match="part 'empty'"):
        scan(config, input_files(config))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no file matches"),
        (b'{"text": "fine"}\n{"txt": "x"}\n', "broken.jsonl, line 2: no field 'text'"),
        (b'{"text": "fine"}\n\xff\n', "broken.jsonl, line 2: byte 0xff is not UTF-8"),
        (b"not packed", "broken.jsonl.gz, line 1: cannot be read"),
    ],
)
@pytest.mark.parametrize("rate", [None, 1])
def test_what_is_wrong_with_a_part_names_the_part(tmp_path, parts, content, words, rate):
    path = tmp_path / ("broken.jsonl.gz" if content == b"not packed" else "broken.jsonl")
    if content is not None:
        path.write_bytes(content)
    made = {**parts(rate=rate), "books": PartConfig("jsonl", str(path), rate=rate)}
    with pytest.raises(UserError) as caught:
        tokenize(Directory(tmp_path / "corpus"), CorpusConfig("mixture", parts=made))
    assert str(caught.value).startswith('corpus.parts["books"]: ')
    assert words in str(caught.value)
    assert str(caught.value).count("corpus.parts") == 1
    assert "\n" not in str(caught.value)


def test_a_mixture_in_gin_is_the_one_in_python_and_survives_its_saved_config(tmp_path, write_jsonl):
    import gin

    from mlp_memory.recipes import load_config

    path = write_jsonl(tmp_path / "a.jsonl", ["x"])
    recipe = tmp_path / "mix.gin"
    recipe.write_text(
        'corpus.source = "mixture"\ncorpus.parts = {"my-docs": @docs/part(), "a": @a/part()}\n'
        'docs/part.source = "python_docs"\ndocs/part.rate = 3\n'
        f'a/part.source = "jsonl"\na/part.train_files = "{path}"\na/part.rate = 1.5\n'
    )
    parts = {"a": PartConfig("jsonl", str(path), rate=1.5), "my-docs": PartConfig(rate=3)}
    config = load_config([str(recipe)], [], Directory(tmp_path))
    assert config.corpus == CorpusConfig("mixture", parts=parts)
    Directory(tmp_path / "w").write("config.gin", gin.operative_config_str().encode())
    assert load_config([], [], Directory(tmp_path / "w")) == config
    for binding, words in (
        ("a/part.rte = 1", "did you mean 'rate'"),
        ("a/prt.rate = 1", "did you mean 'part'"),
        ("a/part.rate = -1", "^a/part: rate = -1: give a number above 0$"),
        ("a/part.train_files = []", "^a/part: source 'jsonl' needs train_files"),
        ("corpus.fraction = 2", "^fraction = 2: give a number"),
    ):
        with pytest.raises(UserError, match=words):
            load_config([str(recipe)], [binding], Directory(tmp_path))
