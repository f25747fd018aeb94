import numpy as np
import pytest

from mlp_memory.tracing.documents import Documents
from mlp_memory.tracing.text import documents_text


def slow_title(text: str) -> str:
    """The first line that is not blank, of the whole text; 80 characters of it."""
    line = text.lstrip().split("\n")[0].strip()
    return line if len(line) <= 80 else line[:79].rstrip() + "…"


def test_a_title_is_the_first_line_however_long_and_wherever_reading_stops(rng, vocabulary, stream_of):
    parts = ["a", "Ω", "中", "😀", " ", "word ", "\n", "\r\n", "\t", "longer words here "]
    texts = []
    for _ in range(300):
        weights = rng.dirichlet(np.full(len(parts), 0.4))
        texts.append("".join(rng.choice(parts, rng.integers(0, 400), p=weights)))
    texts += ["", " \n\n ", "x" * 80, "x" * 81, "abc" + " " * 200 + "def", "\n" * 500 + "Late title\nrest"]
    documents = Documents(stream_of(texts), vocabulary)
    assert len(documents) == len(texts)
    for number in rng.permutation(len(texts)).tolist():
        assert documents.title(number) == slow_title(texts[number])
        assert documents.text(number) == texts[number]
    assert max(len(documents.title(number)) for number in range(len(texts))) == 80


def test_a_position_is_its_document_with_the_text_around_and_never_of_another(
    rng, vocabulary, stream_of, random_text
):
    texts = [random_text() for _ in range(20)]
    stream = stream_of(texts)
    documents = Documents(stream, vocabulary)
    for row in rng.choice(np.flatnonzero(stream.has_next(0, len(stream))), 60).tolist():
        number = max(d for d in range(20) if stream.bounds_D1[d] <= row)
        at = row - int(stream.bounds_D1[number])  # of the document's tokens, bos the first
        position = documents.position(row)
        assert position["document"] == documents.of_row(row) == number
        assert position["title"] == slow_title(texts[number])
        assert position["before"] == texts[number][max(at - 24, 0) : at]
        ends = at == len(texts[number])
        assert position["next"] == ("</s>" if ends else texts[number][at].replace(" ", "▁"))
        assert position["after"] == texts[number][at + 1 : at + 9]


def test_documents_are_listed_with_their_tokens_and_deleted_ones_without_a_word_of_theirs(
    vocabulary, stream_of
):
    texts = ["Anarchism\nis a", "Secret words", "", "Algebra is secret"]
    documents = Documents(stream_of(texts, deleted=(1,)), vocabulary)
    assert [documents.is_deleted(number) for number in range(4)] == [False, True, False, False]
    lines = list(documents_text(documents.listed()))
    assert [line.split(maxsplit=2) for line in lines] == [
        ["number", "tokens", "title"],
        ["0", str(len(texts[0]) + 2), "Anarchism"],
        ["1", "–", "(deleted)"],
        ["2", "2", "(no text)"],
        ["3", str(len(texts[3]) + 2), "Algebra is secret"],
    ]


@pytest.mark.parametrize(
    ("text", "numbers"), [("is", [0, 3]), ("ecret", [3]), ("SECRET", []), ("sm\nis", [0])]
)
def test_those_that_hold_a_text_are_found_by_number_and_never_a_deleted_one(
    vocabulary, stream_of, text, numbers
):
    texts = ["Anarchism\nis a", "Secret words", "", "Algebra is secret"]
    documents = Documents(stream_of(texts, deleted=(1,)), vocabulary)
    assert [each.number for each in documents.listed(text)] == numbers


def test_a_hostile_title_stays_on_its_line(vocabulary, stream_of):
    documents = Documents(stream_of(["\x1b[2Jtitle\u202egnp\rover\x07"]), vocabulary)
    (_, line) = documents_text(documents.listed())
    assert line.isprintable()
    assert "\\u001b[2Jtitle\\u202egnp\\u000dover\\u0007" in line
