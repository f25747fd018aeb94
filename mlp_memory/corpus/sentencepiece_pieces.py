"""A SentencePiece model out of a list of pieces, as other formats keep them."""

from collections.abc import Sequence

from sentencepiece import sentencepiece_model_pb2

from mlp_memory.artifacts import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""What a piece is; the numbers are SentencePiece's own."""


def from_pieces(
    pieces: Sequence[str],
    scores: Sequence[float],
    kinds: Sequence[int],
    unk: int,
    bos: int,
    eos: int,
    add_dummy_prefix: bool,
    where: str,
) -> bytes:
    """A serialised byte-pair model with byte fallback that changes no text.

    Args:
      pieces: by id; U+2581 stands for a space.
      scores: by id; of two merges the one with the higher score comes first.
      kinds: by id, `NORMAL` and so on.
      unk, bos, eos: ids; −1 for none.
      add_dummy_prefix: whether a text begins as if there were a space before it.
      where: the file, for messages.

    Raises:
      UserError: lists of different lengths, an id outside them, or a piece twice.
    """
    if not len(pieces) == len(scores) == len(kinds):
        raise UserError(
            f"{where}: {len(pieces)} pieces, {len(scores)} scores and {len(kinds)} kinds: the file is damaged"
        )
    if wrong := [i for i in (unk, bos, eos) if not -1 <= i < len(pieces)]:
        raise UserError(f"{where}: token {wrong[0]} of a vocabulary of {len(pieces)}: the file is damaged")
    seen: dict[str, int] = {}
    model = sentencepiece_model_pb2.ModelProto()
    for index, (piece, score, kind) in enumerate(zip(pieces, scores, kinds)):
        if not piece or piece in seen:
            raise UserError(
                f"{where}: piece {index} is {piece!r}, empty or there before: the file is damaged"
            )
        seen[piece] = index
        model.pieces.add(piece=piece, score=score, type=kind)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type = sentencepiece_model_pb2.TrainerSpec.BPE
    trainer.vocab_size = len(pieces)
    trainer.byte_fallback = BYTE in kinds
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = unk, bos, eos, -1
    for name, index in (("unk_piece", unk), ("bos_piece", bos), ("eos_piece", eos)):
        if index >= 0:
            setattr(trainer, name, pieces[index])
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = add_dummy_prefix
    normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    return model.SerializeToString(deterministic=True)
