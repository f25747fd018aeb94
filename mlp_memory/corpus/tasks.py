"""The seqio task that turns texts into token ids; the one module that imports TensorFlow."""

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from mlp_memory.artifacts import UserError
from mlp_memory.corpus.config import SPLITS

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # its errors are raised; its notices only hide ours

import seqio
import tensorflow as tf

# SentencePiece takes 45 bytes of memory a character and slows down on long texts, so longer
# documents are encoded in parts, several at a time.
SEGMENT_CHARACTERS = 1 << 16


def make_task(
    read: Callable[[str], Iterable[str]], model_file: Path, bos: int, eos: int, cut_long: bool
) -> seqio.Task:
    """A task with the feature "targets": int32 [tokens] of one document, or of a part of it.

    The first part of a document starts with bos, the last ends with eos, and "last" says
    which that is. Parts keep the order of the text.

    Args:
      read: the texts of a split, none empty.
      model_file: a SentencePiece model on this machine.
      bos, eos: token ids.
      cut_long: whether the vocabulary lets long documents be cut after newlines.
    """

    def dataset_fn(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        if shuffle_files:
            raise ValueError("the order of the rows is part of the corpus")

        def generate() -> Iterator[dict[str, object]]:
            for text in read(split):
                parts = cut(text, SEGMENT_CHARACTERS) if cut_long else [text]
                for number, part in enumerate(parts):
                    yield {"targets": part, "first": number == 0, "last": number == len(parts) - 1}

        flag = tf.TensorSpec((), tf.bool)
        return tf.data.Dataset.from_generator(
            generate,
            output_signature={"targets": tf.TensorSpec((), tf.string), "first": flag, "last": flag},
        )

    @seqio.map_over_dataset
    def add_borders(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        ids = example["targets"]
        opening = tf.fill([tf.cast(example["first"], tf.int32)], tf.constant(bos, ids.dtype))
        closing = tf.fill([tf.cast(example["last"], tf.int32)], tf.constant(eos, ids.dtype))
        return {"targets": tf.concat([opening, ids, closing], axis=0), "last": example["last"]}

    def tokenize(dataset: tf.data.Dataset, output_features: dict[str, seqio.Feature]) -> tf.data.Dataset:
        return seqio.preprocessors.tokenize(dataset, output_features, copy_pretokenized=False)

    vocabulary = seqio.SentencePieceVocabulary(str(model_file))
    return seqio.Task(
        "corpus",
        source=seqio.FunctionDataSource(dataset_fn, splits=SPLITS, caching_permitted=False),
        preprocessors=[tokenize, add_borders],
        output_features={"targets": seqio.Feature(vocabulary, add_eos=True, dtype=tf.int32)},
    )


def cut(text: str, characters: int) -> list[str]:
    """Parts of a text that together are the text, each cut after a newline where it is long.

    A part is longer than `characters` only up to the next newline.
    """
    parts, start = [], 0
    while len(text) - start > characters:
        end = text.find("\n", start + characters - 1) + 1
        if not end or end == len(text):
            break
        parts.append(text[start:end])
        start = end
    return [*parts, text[start:]]


def encode(task: seqio.Task, split: str) -> Iterator[tuple[np.ndarray, bool]]:
    """Token ids (int32) in the order of the texts, and whether a document ends there.

    Raises:
      UserError: a text could not be read (the files changed since they were checked).
    """
    # TensorFlow would otherwise take all memory of the accelerators that JAX needs.
    if tf.config.get_visible_devices("GPU"):
        tf.config.set_visible_devices([], "GPU")
    try:
        dataset = task.get_dataset(sequence_length=None, split=split, shuffle=False)
        for example in dataset.as_numpy_iterator():
            yield example["targets"], bool(example["last"])
    except tf.errors.OpError as error:
        raise UserError(
            f"the {split} texts cannot be read any more ({error.message.strip().splitlines()[0][:200]}): "
            "were the files changed? Run tokenize again"
        ) from error
