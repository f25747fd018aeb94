"""The seqio task that turns texts into token ids.

Importing it imports TensorFlow: call `quiet_tensorflow` first.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import seqio
import tensorflow as tf

from mlp_memory.artifacts import UserError
from mlp_memory.corpus.vocabulary import Vocabulary


class SeqioVocabulary(seqio.Vocabulary):
    """A `Vocabulary` as seqio knows one: every kind of tokenizer has the same ids here and outside.

    seqio pads with id 0, which here may be a token like any other: rows are never padded.
    """

    def __init__(self, vocabulary: Vocabulary):
        super().__init__(extra_ids=0)
        self._vocabulary = vocabulary

    @property
    def bos_id(self) -> int:
        return self._vocabulary.bos

    @property
    def eos_id(self) -> int:
        return self._vocabulary.eos

    @property
    def unk_id(self) -> None:
        """None: ids outside the vocabulary are errors."""
        return None

    @property
    def _base_vocab_size(self) -> int:
        return self._vocabulary.size

    def _encode(self, s: str) -> list[int]:
        return self._vocabulary.encode(s)

    def _decode(self, ids: Sequence[int]) -> str:
        return self._vocabulary.decode(ids)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        def encode(text: tf.Tensor) -> np.ndarray:
            return np.array(self._vocabulary.encode(text.numpy().decode()), np.int32)

        ids_T = tf.py_function(encode, [s], tf.int32)
        ids_T.set_shape([None])
        return ids_T

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        return tf.py_function(lambda ids_T: self._vocabulary.decode(ids_T.numpy()), [ids], tf.string)


def make_task(vocabulary: Vocabulary, read: Callable[[], Iterable[str]]) -> seqio.Task:
    """A task with the feature "targets": int32 [tokens] of one document, bos and eos around.

    Args:
      vocabulary: what encodes.
      read: the documents, which keep their order; called anew for each pass over the dataset.
    """

    def dataset_fn(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        if shuffle_files:
            raise ValueError("the order of the rows is part of the corpus")
        return tf.data.Dataset.from_generator(
            lambda: ({"targets": text} for text in read()),
            output_signature={"targets": tf.TensorSpec((), tf.string)},
        )

    @seqio.map_over_dataset
    def add_borders(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        return {"targets": tf.concat([[vocabulary.bos], example["targets"], [vocabulary.eos]], axis=0)}

    def tokenize(dataset: tf.data.Dataset, output_features: dict[str, seqio.Feature]) -> tf.data.Dataset:
        return seqio.preprocessors.tokenize(dataset, output_features, copy_pretokenized=False)

    return seqio.Task(
        "corpus",
        source=seqio.FunctionDataSource(dataset_fn, splits=("unit",), caching_permitted=False),
        preprocessors=[tokenize, add_borders],
        output_features={"targets": seqio.Feature(SeqioVocabulary(vocabulary), add_eos=True, dtype=tf.int32)},
    )


class Encoder:
    """Encodes lists of texts through one dataset: TensorFlow never frees one whole, 10 MB each."""

    def __init__(self, vocabulary: Vocabulary):
        # TensorFlow would otherwise take all memory of the accelerators that JAX needs.
        if tf.config.get_visible_devices("GPU"):
            tf.config.set_visible_devices([], "GPU")
        self._texts: Sequence[str] = ()
        task = make_task(vocabulary, lambda: self._texts)
        self._dataset = task.get_dataset(sequence_length=None, split="unit", shuffle=False)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids, int32 [tokens], of each text, bos and eos around, in the order of the texts.

        Raises:
          UserError: a text cannot be encoded (memory, say).
        """
        self._texts = texts
        try:
            return [example["targets"] for example in self._dataset.as_numpy_iterator()]
        except tf.errors.OpError as error:
            reason = error.message.strip().splitlines()[0][:200]
            raise UserError(f"a text cannot be encoded: {reason}") from error
        finally:
            self._texts = ()
