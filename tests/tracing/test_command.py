from types import SimpleNamespace

import pytest

from mlp_memory.artifacts import UserError
from mlp_memory.tracing.command import show_documents, trace


@pytest.fixture
def job(stream_of, vocabulary):
    """A workdir whose corpus has a deleted document and is all there is."""
    stream = stream_of(["A first text", "A text taken out", ""], deleted=(1,))
    config = SimpleNamespace(corpus=SimpleNamespace(elsewhere={"news": None}))
    return SimpleNamespace(config=config, stream=lambda split: stream, vocabulary=lambda: vocabulary)


def test_a_row_of_a_deleted_document_and_a_documents_last_row_are_told_apart(job):
    bounds = job.stream("train").bounds_D1
    for row in (int(bounds[1]), int(bounds[2]) - 1):
        with pytest.raises(UserError, match=f"--row = {row}: document 1 is deleted"):
            trace(job, [0, row])
    with pytest.raises(UserError, match=f"--row = {bounds[1] - 1} is the last of document 0 and has no next"):
        trace(job, [int(bounds[1]) - 1])


def test_documents_of_texts_elsewhere_are_listed_and_unknown_names_refused(job, capsys):
    show_documents(SimpleNamespace(split="news", containing=None), job)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == ["0", "1", "2"]
    with pytest.raises(UserError, match="--split = old: use one of train, validation, test, news"):
        show_documents(SimpleNamespace(split="old", containing=None), job)
    with pytest.raises(UserError, match="no document of train holds 'taken out'"):
        show_documents(SimpleNamespace(split="train", containing="taken out"), job)
