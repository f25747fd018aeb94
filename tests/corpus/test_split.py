import pytest

from mlp_memory.artifacts import UserError
from mlp_memory.corpus.config import SPLITS, CorpusConfig
from mlp_memory.corpus.documents import input_files
from mlp_memory.corpus.split import read_split, scan
from mlp_memory.corpus.split import split_of as split_of_source


def config_for(**values) -> CorpusConfig:
    return CorpusConfig(source="jsonl", train_files="t", **values)


def split_of(text: str, group: str, config: CorpusConfig) -> str | None:
    given = {split for split in SPLITS if getattr(config, f"{split}_files")}
    return split_of_source(text, group, config, given, config.fraction)


def test_shares_are_what_was_asked_for(rng):
    config = config_for(validation_fraction=0.2, test_fraction=0.1)
    splits = [split_of(f"{rng.random()}", "train", config) for _ in range(5000)]
    for split, share in zip(SPLITS, (0.7, 0.2, 0.1)):
        deviation = (5000 * share * (1 - share)) ** 0.5
        assert abs(splits.count(split) - 5000 * share) < 6 * deviation


def test_a_smaller_fraction_is_a_subset_and_leaves_the_held_out_alone(rng):
    texts = [f"{rng.random()}" for _ in range(2000)]
    whole, half, tenth = (
        {text: split_of(text, "train", config_for(fraction=f)) for text in texts} for f in (1.0, 0.5, 0.1)
    )
    assert all(whole[t] == half[t] for t in texts if half[t] is not None)
    assert all(half[t] == tenth[t] for t in texts if tenth[t] is not None)
    assert {t for t in texts if whole[t] != "train"} == {
        t for t in texts if tenth[t] in ("validation", "test")
    }
    train = sum(split == "train" for split in whole.values())
    kept = sum(split == "train" for split in half.values())
    assert abs(kept - train / 2) < 6 * (train / 4) ** 0.5


def test_given_files_decide_their_split(rng):
    texts = [f"{rng.random()}" for _ in range(300)]
    both = config_for(validation_files="v", test_files="s")
    assert all(split_of(text, group, both) == group for text in texts for group in SPLITS)
    one = config_for(validation_files="v")
    assert {split_of(text, "train", one) for text in texts} == {"train"}
    halves = [split_of(text, "validation", one) for text in texts]
    assert set(halves) == {"validation", "test"}
    assert abs(halves.count("test") - 150) < 6 * 75**0.5
    test_only = config_for(test_files="s", validation_fraction=0.3)
    assert {split_of(text, "train", test_only) for text in texts} == {"train", "validation"}
    assert {split_of(text, "test", test_only) for text in texts} == {"test"}


def test_every_document_is_in_exactly_one_split_and_order_does_not_matter(
    tmp_path, rng, make_text, write_jsonl
):
    texts = [make_text(5) for _ in range(200)]
    texts += rng.choices(texts, k=30) + [""] * 3
    found = []
    for _ in range(2):
        rng.shuffle(texts)
        path = write_jsonl(tmp_path / "a.jsonl", texts)
        config = CorpusConfig("jsonl", str(path), validation_fraction=0.3, test_fraction=0.3)
        files = input_files(config)
        facts = scan(config, files)
        splits = {split: list(read_split(config, files, split, facts)) for split in SPLITS}
        assert sorted(text for s in splits.values() for text in s) == sorted(filter(None, texts))
        assert len({text for s in splits.values() for text in set(s)}) == sum(
            len(set(s)) for s in splits.values()
        )
        for split in SPLITS:
            assert facts[split].documents == len(splits[split])
            assert facts[split].bytes == len("".join(splits[split]).encode())
            assert facts[split].words == sum(len(text.split()) for text in splits[split])
        assert sum(f.empty_documents for f in facts.values()) == 3
        found.append({split: sorted(splits[split]) for split in SPLITS})
    assert found[0] == found[1]


def test_train_texts_repeated_in_held_out_files_are_counted(tmp_path, rng, make_text, write_jsonl):
    train, validation, test = ([make_text(6) for _ in range(n)] for n in (30, 8, 9))
    held = {"validation": validation + train[:3] + train[:2], "test": test + train[2:4]}
    train += train[:5]
    paths = {
        name: str(write_jsonl(tmp_path / f"{name}.jsonl", texts))
        for name, texts in [("train", train), *held.items()]
    }
    config = CorpusConfig("jsonl", paths["train"], paths["validation"], paths["test"])
    facts = scan(config, input_files(config))
    for name in held:
        assert facts[name].duplicated_documents == sum(text in set(train) for text in held[name])
    assert facts["train"].duplicated_documents == 0


@pytest.mark.parametrize(
    ("texts", "values", "named"),
    [
        (["", "", ""], {}, "no document with text"),
        ([], {}, "no document with text"),
        (["a", "b", "c"], {"validation_fraction": 0}, "validation_fraction"),
        (["a", "b", "c"], {"validation_fraction": 0.9999, "test_fraction": 0}, "train split is empty"),
        (["a"], {"test_fraction": 0.0, "validation_fraction": 0.9}, "split is empty"),
    ],
)
def test_empty_corpora_and_splits_are_refused_with_what_to_change(
    tmp_path, write_jsonl, texts, values, named
):
    config = CorpusConfig("jsonl", str(write_jsonl(tmp_path / "a.jsonl", texts)), **values)
    with pytest.raises(UserError) as caught:
        scan(config, input_files(config))
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_empty_split_from_files_names_the_files(tmp_path, write_jsonl):
    train = str(write_jsonl(tmp_path / "t.jsonl", ["a", "b"]))
    one = str(write_jsonl(tmp_path / "one.jsonl", ["x"]))
    empty = str(write_jsonl(tmp_path / "empty.jsonl", [""]))
    for config, named in [
        (CorpusConfig("jsonl", train, one), "validation and test share validation_files"),
        (CorpusConfig("jsonl", train, one, empty), "test_files hold no text"),
        (CorpusConfig("jsonl", train, empty, one), "validation_files hold no text"),
        (
            CorpusConfig("jsonl", train, one, str(write_jsonl(tmp_path / "s.jsonl", ["s"])), fraction=1e-9),
            "raise fraction",
        ),
    ]:
        with pytest.raises(UserError, match=named):
            scan(config, input_files(config))
