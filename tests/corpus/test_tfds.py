from pathlib import Path

import pytest

from mlp_memory.artifacts import UserError
from mlp_memory.corpus.config import CorpusConfig
from mlp_memory.corpus.documents import fingerprints, input_files, read_group
from mlp_memory.corpus.split import read_split, scan


@pytest.fixture
def texts(make_text) -> dict[str, list[str]]:
    return {"train": [make_text(9) for _ in range(23)], "test": [make_text(9) for _ in range(11)]}


@pytest.fixture
def data_dir(tmp_path, texts) -> Path:
    """A dataset as TFDS stores it: each split in two files."""
    import tensorflow as tf
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "stars": tf.int64})
    folder = tmp_path / "tiny_texts/1.2.0"
    folder.mkdir(parents=True)
    infos = []
    for split, own in texts.items():
        files = tfds.core.ShardedFileTemplate(
            data_dir=folder, dataset_name="tiny_texts", split=split, filetype_suffix="tfrecord"
        )
        shards = [own[:4], own[4:]]
        for number, shard in enumerate(shards):
            path = folder / f"tiny_texts-{split}.tfrecord-{number:05}-of-00002"
            with tf.io.TFRecordWriter(str(path)) as writer:
                for text in shard:
                    example = features.encode_example({"text": text, "stars": 3})
                    writer.write(features.serialize_example(example))
        lengths = [len(shard) for shard in shards]
        infos.append(
            tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=0, filename_template=files)
        )
    tfds.folder_dataset.write_metadata(data_dir=str(folder), features=features, split_infos=infos)
    return tmp_path


def config_for(data_dir: Path, train: str = "train", **values) -> CorpusConfig:
    values = {"tfds_name": "tiny_texts:1.2.0", "tfds_data_dir": str(data_dir)} | values
    return CorpusConfig("tfds", train, **values)


def read(config: CorpusConfig) -> list[str]:
    return list(read_group(config, input_files(config), "train"))


def test_the_splits_of_a_dataset_feed_the_splits_of_the_corpus(data_dir, texts):
    config = config_for(data_dir, "train[:12]", validation_files="train[12:]", test_files="test")
    files = input_files(config)
    facts = scan(config, files)
    wanted = {"train": texts["train"][:12], "validation": texts["train"][12:], "test": texts["test"]}
    for split, own in wanted.items():
        assert list(read_split(config, files, split, facts)) == own
    assert read(config_for(data_dir, "train+test", tfds_name="tiny_texts")) == texts["train"] + texts["test"]
    stored = {path.name for path in data_dir.rglob("*.tfrecord*")}
    assert {Path(name).name for name in fingerprints(config, files)} == stored


def test_what_is_not_there_is_told_in_one_line_and_nothing_is_downloaded(data_dir):
    cases = [
        ({"train": "nope"}, "no split 'nope' (its splits: test, train)"),
        ({"train": "train[:x]"}, "no split 'train[:x]'"),
        ({"text_field": "body"}, "no feature 'body' (its features: stars, text)"),
        ({"text_field": "stars"}, "not text"),
        ({"tfds_name": "tiny_texts:3.0.0"}, "cannot be opened"),
        ({"tfds_name": "no such name"}, "cannot be opened"),
        ({"tfds_name": "imdb_reviews"}, "tfds_download = True"),
    ]
    for values, words in cases:
        with pytest.raises(UserError) as caught:
            read(config_for(data_dir, **values))
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kept", [0.0, 0.5, 1.0])
def test_a_file_cut_off_is_an_error_also_between_two_records(data_dir, kept):
    last = max(data_dir.rglob("*-train.*"))
    data = last.read_bytes()
    # Kept 1.0: cut after the first record, whose length comes first, with 16 bytes of its frame.
    first = int.from_bytes(data[:8], "little") + 16
    last.write_bytes(data[: first if kept == 1.0 else int(kept * len(data))])
    with pytest.raises(UserError, match=r"row \d+: cannot be read") as caught:
        read(config_for(data_dir))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "named"),
    [({"tfds_name": None}, "tfds_name"), ({"tfds_name": 3}, "3"), ({"tfds_download": 1}, "tfds_download")],
)
def test_bad_settings_are_named(tmp_path, values, named):
    with pytest.raises(UserError, match=named):
        config_for(tmp_path, **values)
