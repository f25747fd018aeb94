import pytest

from mlp_memory.inference.texts import GrowingText


class Letters:
    """Token n is the n-th letter; 99 and 98 together are one two-byte character."""

    def decode(self, tokens):
        data = b"".join({99: b"\xc3", 98: b"\xa9"}.get(t, bytes([97 + t % 26])) for t in tokens)
        return data.decode(errors="replace")


def grown(tokens, stop=()):
    text, pieces, ended = GrowingText(Letters(), [0, 1], stop), [], False
    for token in tokens:
        ended = text.add(token)
        pieces.append(text.take())
        if ended:
            break
    pieces.append(text.rest())
    assert "".join(pieces) == text.whole
    return text.whole, pieces, ended


def test_characters_of_several_tokens_come_out_whole():
    assert grown([2, 99, 98, 3])[:2] == ("céd", ["c", "", "é", "d", ""])
    assert grown([2, 99])[:2] == ("c\ufffd", ["c", "", "\ufffd"])


@pytest.mark.parametrize(
    ("stop", "pieces"),
    [
        (("efg",), ["c", "d", "", "", "", ""]),
        (("zz", "de"), ["c", "", "", ""]),
        (("eg",), ["c", "d", "", "ef", "g", "h", ""]),
        (("h", "defgh"), ["c", "", "", "", "", "", ""]),
    ],
)
def test_a_stop_text_ends_the_text_and_no_part_of_it_is_shown(stop, pieces):
    assert grown([2, 3, 4, 5, 6, 7], stop)[1] == pieces
