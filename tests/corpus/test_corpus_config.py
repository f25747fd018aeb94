import json

import pytest

from mlp_memory.artifacts import UserError, config_dict
from mlp_memory.corpus.config import CorpusConfig


@pytest.mark.parametrize("given", ["a.jsonl", ["a.jsonl"], ("a.jsonl",)])
def test_one_path_a_list_and_a_tuple_are_the_same_files(given):
    config = CorpusConfig(source="jsonl", train_files=given)
    assert config == CorpusConfig(source="jsonl", train_files=("a.jsonl",))
    assert json.loads(json.dumps(config_dict(config)))["train_files"] == ["a.jsonl"]


def test_no_files_are_an_empty_tuple():
    assert CorpusConfig(train_files=None, test_files=[]).train_files == ()


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"source": "wiki"}, "wiki"),
        ({"source": "jsonl"}, "train_files"),
        ({"train_files": "a.jsonl"}, "python_docs"),
        ({"test_files": "a.jsonl"}, "test_files"),
        ({"source": "text", "train_files": 3}, "3"),
        ({"source": "text", "train_files": ["a", 3]}, "3"),
        ({"source": "text", "train_files": ""}, "empty path"),
        ({"text_field": ""}, "text_field"),
        ({"fraction": 0}, "fraction"),
        ({"fraction": 1.5}, "1.5"),
        ({"fraction": float("nan")}, "nan"),
        ({"fraction": "half"}, "half"),
        ({"fraction": True}, "True"),
        ({"validation_fraction": -0.1}, "-0.1"),
        ({"test_fraction": 1.0}, "test_fraction"),
        ({"validation_fraction": 0.5, "test_fraction": 0.5}, "smaller than 1"),
        ({"vocab_size": 261}, "261"),
        ({"vocab_size": 300.0}, "300.0"),
        ({"vocab_file": ""}, "vocab_file"),
        ({"vocab_file": 7}, "7"),
        ({"chunk_rows": 0}, "chunk_rows"),
    ],
)
def test_bad_values_are_named_on_one_line(values, named):
    with pytest.raises(UserError) as caught:
        CorpusConfig(**values)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
