"""Texts of a TensorFlow dataset that is prepared on this machine, or may be downloaded.

It imports tensorflow_datasets, and with it TensorFlow, only when a corpus names such a dataset.
"""

import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlp_memory.artifacts import UserError, first_line
from mlp_memory.corpus.config import SourceConfig
from mlp_memory.corpus.quiet import quiet_tensorflow


def values(config: SourceConfig, split: str) -> Iterator[tuple[int, bytes]]:
    """(example from 1, UTF-8) of `split`, "train[:90%]" say, in the order they are stored.

    Raises:
      UserError: the dataset or split is not there, has no such text, or is damaged.
    """
    builder, where = _builder(config), f"{config.tfds_name}, {split}"
    expected = _split_info(config, split).num_examples
    _check_feature(builder, where, config.text_field)
    import tensorflow as tf
    import tensorflow_datasets as tfds

    # TensorFlow would otherwise take all memory of the accelerators that JAX needs.
    if tf.config.get_visible_devices("GPU"):
        tf.config.set_visible_devices([], "GPU")
    number, reason = 0, ""
    try:
        # One file after the other, whatever the number of cores.
        in_order = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
        dataset = builder.as_dataset(split=split, shuffle_files=False, read_config=in_order)
        for example in dataset.as_numpy_iterator():
            number += 1
            yield number, example[config.text_field]
    except tf.errors.OpError as error:
        reason = error.message.strip().splitlines()[0][:200]
    if reason or number != expected:
        raise UserError(
            f"{where}, row {number + 1}: cannot be read ({reason or f'{expected} rows should be there'}): "
            f"delete {builder.data_path} and prepare it again"
        )


def split_files(config: SourceConfig, split: str) -> list[Path]:
    """The stored files of a split (see `values`)."""
    return sorted({Path(path) for path in _split_info(config, split).filepaths})


def _split_info(config: SourceConfig, split: str) -> Any:
    builder = _builder(config)
    try:
        return builder.info.splits[split]
    except (ValueError, KeyError) as error:
        known = ", ".join(sorted(builder.info.splits)) or "none"
        raise UserError(
            f"{config.tfds_name} has no split {split!r} (its splits: {known}): set train_files"
        ) from error


def _check_feature(builder: Any, where: str, name: str) -> None:
    import tensorflow as tf

    features = builder.info.features
    if name not in features:
        known = ", ".join(sorted(features)[:8]) or "none"
        raise UserError(f"{where}, row 1: no feature {name!r} (its features: {known}): set text_field")
    if features[name].shape != () or tf.as_dtype(features[name].dtype) != tf.string:
        raise UserError(f"{where}, row 1: feature {name!r} is {features[name]!r}, not text: set text_field")


def _builder(config: SourceConfig) -> Any:
    return _open(config.tfds_name, config.tfds_data_dir, config.tfds_download)


@functools.cache
def _open(name: str, data_dir: str | None, download: bool) -> Any:
    quiet_tensorflow()
    import tensorflow_datasets as tfds

    folder = os.path.expanduser(data_dir) if data_dir else None
    shown = data_dir or "~/tensorflow_datasets"
    try:
        builder = tfds.builder(name, data_dir=folder)
    except Exception as error:  # of many kinds, from unknown names to damaged metadata
        raise UserError(
            f"tfds_name {name!r} cannot be opened in {shown} ({first_line(error)}): "
            "check the name, NAME/CONFIG:VERSION, and tfds_data_dir"
        ) from error
    if builder.is_prepared():
        return builder
    if not download:
        raise UserError(
            f"tfds_name {name!r} is not in {shown}: set tfds_data_dir to where it is, "
            "or tfds_download = True to fetch it"
        )
    try:
        builder.download_and_prepare()
    except Exception as error:  # networks, disks, checksums, missing libraries
        raise UserError(f"tfds_name {name!r} cannot be prepared in {shown} ({first_line(error)})") from error
    return builder
