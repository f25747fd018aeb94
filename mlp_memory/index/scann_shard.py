"""ScaNN: centres and codebooks trained on a sample; a shard's files written, loaded, searched.

The only importer of scann. A shard is a k-means tree whose leaves hold 4-bit codes of the
residuals, and the keys themselves for reordering; one of few rows is the keys alone, searched by
brute force. ScaNN reads its files from the shard's folder `scann`: its configuration
(`scann_config.pb`), the lifted keys (`dataset.npy`, or rounded ones), each row's leaf
(`datapoint_to_token.npy`) and codes (`hashed_dataset.npy`), the tree
(`serialized_partitioner.pb`) and the codebook (`ah_codebook.pb`).
"""

import contextlib
import dataclasses
import importlib
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mlp_memory.artifacts import Directory, Manifest, UserError, first_line, peek
from mlp_memory.index.codec import NORM_CODES, Codebook, Space, half_sqnorm, nearest_leaves, norm_target
from mlp_memory.npz import FAULTS, read_npy
from mlp_memory.parallel.fleet import usable_cores

GAPS = "rows_without_key.npy"
SPACE = "mean.npy"
FOLDER = "scann"
# ScaNN searches so many queries together; a batch of fewer than about ten takes another path, whose
# candidates differ here and there. Filled up to _LEAST_QUERIES, a query's rows are its own.
_BATCH_QUERIES = 256
_LEAST_QUERIES = 32
_TRAINING_ITERATIONS = 12
_COPIED_BYTES = 1 << 26
_CONFIG, _MULTIPLIERS = "scann_config.pb", "int8_multipliers.npy"
_TREE, _BOOK, _LEAVES, _CODES = (
    "serialized_partitioner.pb",
    "ah_codebook.pb",
    "datapoint_to_token.npy",
    "hashed_dataset.npy",
)
_ASSETS = {
    _BOOK: "AH_CENTERS",
    _TREE: "PARTITIONER",
    _LEAVES: "TOKENIZATION_NPY",
    _CODES: "AH_DATASET_NPY",
    "dataset.npy": "DATASET_NPY",
    "bfloat16_dataset.npy": "BF16_DATASET_NPY",
    "int8_dataset.npy": "INT8_DATASET_NPY",
    _MULTIPLIERS: "INT8_MULTIPLIERS_NPY",
}
_DATASETS = {
    "float32": ("dataset.npy", "<f4"),
    "bfloat16": ("bfloat16_dataset.npy", "<i2"),
    "int8": ("int8_dataset.npy", "|i1"),
}


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a sample gave, for any number of shards.

    Attributes:
      space: of the dot product.
      codebook: None for brute force.
      files: ScaNN's, by name: its configuration and, with a codebook, the tree and the codebook.
    """

    space: Space
    codebook: Codebook | None
    files: dict[str, bytes]

    @property
    def leaves(self) -> int:
        """Of the tree; 0 for brute force."""
        return len(self.codebook.centres_LxD) if self.codebook else 0


def brute_force(sample_SxD: np.ndarray) -> Trained:
    """No tree and no codes: every key is compared."""
    text = 'num_neighbors: 1 distance_measure { distance_measure: "DotProductDistance" } brute_force {}'
    return Trained(Space.of(sample_SxD), None, {_CONFIG: _parse(text).SerializeToString(deterministic=True)})


@dataclasses.dataclass(frozen=True)
class Tree:
    """A k-means tree over a sample: the space, the leaves' centres_LxD (float32), ScaNN's file."""

    space: Space
    centres_LxD: np.ndarray
    file: bytes


def train_tree(sample_SxD: np.ndarray, leaves: int, reorder_dtype: str = "float32") -> Tree:
    """A tree of so many leaves, over keys that are kept as `reorder_dtype`.

    The same sample gives the same tree in any process: k-means++ starts from a fixed seed (ScaNN's
    random start has none), and one thread sums in one order.

    Raises:
      UserError: ScaNN refuses the sample or the number.
    """
    space = Space.of(sample_SxD, reorder_dtype)
    builder = _builder(sample_SxD - space.mean_D)
    builder.tree(
        leaves,
        leaves,
        training_sample_size=len(sample_SxD),
        training_iterations=_TRAINING_ITERATIONS,
        random_init=False,
    )
    builder.score_brute_force()
    tree = _scann("partitioning.partitioner_pb2").SerializedPartitioner.FromString(
        _built(builder, f"{leaves} leaves")[_TREE]
    )
    root = tree.kmeans.kmeans_tree.root
    if [child.leaf_id for child in root.children] != list(range(len(root.centers))):
        raise RuntimeError("ScaNN numbers its leaves in another order than its centres")
    centres_LxD = np.array([centre.dimension for centre in root.centers], np.float32)
    for centre, half in zip(root.centers, half_sqnorm(centres_LxD).tolist()):
        centre.dimension.extend([-half] + [0.0] * (NORM_CODES - 1))
    return Tree(space, centres_LxD, tree.SerializeToString(deterministic=True))


def train_codes(tree: Tree, sample_SxD: np.ndarray, dimensions_per_block: int) -> Trained:
    """Codes of so many dimensions each, for the residuals to a tree's centres.

    Raises:
      UserError: ScaNN refuses the sample or the number.
    """
    lifted_SxE = tree.space.keys(sample_SxD)
    leaf_S = nearest_leaves(lifted_SxE, tree.centres_LxD)
    residual_SxD = lifted_SxE[:, :-NORM_CODES] - tree.centres_LxD[leaf_S]
    width = min(dimensions_per_block, residual_SxD.shape[1])
    book = _train_book(residual_SxD, width)
    left_S = lifted_SxE[:, -NORM_CODES] + half_sqnorm(tree.centres_LxD)[leaf_S]
    norm_words = np.zeros((NORM_CODES, 16), np.float32)
    for code in range(NORM_CODES):
        target_S = norm_target(left_S, code)
        of_code = _train_book(target_S[:, None], 1).subspace_centers[0]
        book.subspace_centers.append(of_code)
        norm_words[code] = [word.feature_value_float[0] for word in of_code.center]
        left_S = left_S - norm_words[code][np.abs(target_S[:, None] - norm_words[code]).argmin(1)]
    words = [[word.feature_value_float for word in block.center] for block in book.subspace_centers]
    codewords = np.zeros((len(words) - NORM_CODES, 16, width), np.float32)
    for b, of_block in enumerate(words[:-NORM_CODES]):
        codewords[b, :, : len(of_block[0])] = of_block
    files = {
        _CONFIG: _tree_config(lifted_SxE, tree, width),
        _TREE: tree.file,
        _BOOK: book.SerializeToString(deterministic=True),
    }
    return Trained(tree.space, Codebook(tree.centres_LxD, codewords, norm_words), files)


def _train_book(residual_SxD: np.ndarray, width: int) -> Any:
    """ScaNN's codebook of blocks of so many dimensions, 16 words each."""
    builder = _builder(np.ascontiguousarray(residual_SxD))
    builder.score_ah(width, training_sample_size=len(residual_SxD))
    file = _built(builder, f"{width} dimensions per block")[_BOOK]
    book = _scann("proto.centers_pb2").CentersForAllSubspaces.FromString(file)
    for block in book.subspace_centers:
        if len(block.center) != 16:
            raise RuntimeError(f"ScaNN made {len(block.center)} codewords of a block, not 16")
    return book


def _tree_config(lifted_SxE: np.ndarray, tree: Tree, width: int) -> bytes:
    """The configuration of a tree over lifted keys, its codes and reordering."""
    builder, leaves = _builder(lifted_SxE), len(tree.centres_LxD)
    kept_as = _scann("scann_ops.py.scann_builder").ReorderType[tree.space.dtype.upper()]
    builder.tree(leaves, leaves).score_ah(width).reorder(1, quantize=kept_as)
    config = _parse(builder.create_config())
    dimension = lifted_SxE.shape[1] - NORM_CODES
    coding = config.hash.asymmetric_hash
    blocks = [(dimension // width, width), (1, dimension % width), (NORM_CODES, 1)]
    blocks = [(count, of_width) for count, of_width in blocks if count and of_width]
    coding.projection.Clear()
    coding.projection.projection_type = coding.projection.VARIABLE_CHUNK
    coding.projection.input_dim = dimension + NORM_CODES
    for count, of_width in blocks:
        coding.projection.variable_blocks.add(num_blocks=count, num_dims_per_block=of_width)
    # ScaNN's rule for one queue of candidates over all leaves, which is faster.
    coding.use_global_topn = sum(count for count, _ in blocks) <= 256
    return config.SerializeToString(deterministic=True)


def _builder(lifted_SxE: np.ndarray) -> Any:
    # The number of neighbours, here and of leaves in a tree, is a default: each search names its own.
    builder = _scann("scann_ops.py.scann_ops_pybind").builder(lifted_SxE, 1, "dot_product")
    return builder.set_n_training_threads(1)


def _built(builder: Any, what: str) -> dict[str, bytes]:
    """What the builder makes, as files."""
    with tempfile.TemporaryDirectory(prefix="mlp-memory-index-") as folder:
        try:
            with _quiet():
                builder.build().serialize(folder, relative_path=True)
        except (RuntimeError, ValueError) as error:
            keys = f"{builder.db.shape[0]} keys of {builder.db.shape[1]} dimensions"
            raise UserError(f"ScaNN refuses {keys} with {what}: {first_line(error)}") from error
        return {
            path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name in (_TREE, _BOOK)
        }


def _parse(text: str) -> Any:
    """ScaNN's configuration, of its text."""
    from google.protobuf import text_format

    return text_format.Parse(text, _scann("proto.scann_pb2").ScannConfig())


def write_shard(
    folder: Path, trained: Trained, blocks: Iterable[np.ndarray], positions: int, dimension: int
) -> None:
    """Writes the files of one shard into a local folder, block by block.

    Args:
      folder: exists.
      trained: codes its keys.
      blocks: float32 [R, D] keys, `positions` in all.
      positions: rows of the shard.
      dimension: D.
    """
    np.save(folder / SPACE, trained.space.mean_D)
    (folder / FOLDER).mkdir()
    for name, data in trained.files.items():
        (folder / FOLDER / name).write_bytes(data)
    space = trained.space
    dataset, dtype = _DATASETS[space.dtype]
    shapes = {dataset: ((positions, dimension + NORM_CODES), dtype)}
    if space.dtype == "int8":
        np.save(folder / FOLDER / _MULTIPLIERS, 1 / space.steps_E)
    if trained.codebook:
        shapes[_LEAVES] = ((positions,), "<i4")
        shapes[_CODES] = ((positions, len(trained.codebook.codewords_Bx16xP) + NORM_CODES), "|u1")
    with contextlib.ExitStack() as stack:
        files = {}
        for name, (shape, dtype) in shapes.items():
            files[name] = stack.enter_context((folder / FOLDER / name).open("wb"))
            header = {"descr": dtype, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(files[name], header)
        for block_RxD in blocks:
            lifted_RxE = space.keys(block_RxD)
            files[dataset].write(space.stored(lifted_RxE).data)
            if trained.codebook:
                leaves_R, codes_RxB = trained.codebook.encode(lifted_RxE)
                files[_LEAVES].write(leaves_R.data)
                files[_CODES].write(codes_RxB.data)


def keep_positions(folder: Path, keep_P: np.ndarray) -> None:
    """Removes positions from the files of a shard; files that are left empty go.

    Args:
      folder: of the shard. A file that changes is replaced, not written into.
      keep_P: bool, by position.
    """
    if not keep_P.any():
        shutil.rmtree(folder / FOLDER)
        (folder / SPACE).unlink()
        return
    kept_K = np.flatnonzero(keep_P)
    for name in (*(name for name, _ in _DATASETS.values()), _LEAVES, _CODES):
        path = folder / FOLDER / name
        if not path.is_file():
            continue
        found = np.load(path, mmap_mode="r", allow_pickle=False)
        step = max(_COPIED_BYTES // (found.itemsize * math.prod(found.shape[1:])), 1)
        with path.with_suffix(".new").open("wb") as file:
            header = {
                "descr": found.dtype.str,
                "fortran_order": False,
                "shape": (len(kept_K), *found.shape[1:]),
            }
            np.lib.format.write_array_header_1_0(file, header)
            for first in range(0, len(kept_K), step):
                file.write(np.ascontiguousarray(found[kept_K[first : first + step]]).data)
        path.with_suffix(".new").replace(path)


class ScannShard:
    """One shard, loaded. Memory: its keys and codes, 4.5·d bytes per row, less where keys are rounded."""

    def __init__(self, directory: Directory, leaves_to_search: int, reorder: int, extent: tuple[int, int]):
        """Loads it.

        Args:
          directory: of the shard.
          leaves_to_search, reorder: see `IndexConfig`.
          extent: its first row, and one past its last.

        Raises:
          UserError: a file is missing or damaged, or it is of other rows.
        """
        self.leaves_to_search, self.reorder = leaves_to_search, reorder
        manifest = peek(directory)
        if manifest is None or not manifest.finished:
            raise UserError(f"{directory} is missing: run `python -m mlp_memory index` first")
        self._where = str(directory)
        sizes = _sizes(directory, manifest, extent)
        start, stop = extent
        self._local = None
        if directory.is_local:
            path = directory.path
        else:
            self._local = tempfile.TemporaryDirectory(prefix="mlp-memory-index-")
            path = Path(self._local.name)
            for name in sizes:
                (path / name).parent.mkdir(exist_ok=True)
                (path / name).write_bytes(directory.read(name) or b"")
        for name, size in sizes.items():
            found = (path / name).stat().st_size if (path / name).is_file() else None
            if found != size:
                what = "is missing" if found is None else f"has {found} bytes, not {size}"
                raise UserError(f"{directory}/{name} {what}: delete {directory} and run `index` again")
        valid = np.ones(stop - start, bool)
        self._space, self._searcher = None, None
        try:
            gaps_G = read_npy((path / GAPS).read_bytes())
            if gaps_G.ndim != 1 or ((gaps_G < start) | (gaps_G >= stop)).any():
                raise ValueError(f"{GAPS} names rows elsewhere")
            valid[gaps_G - start] = False
            self._row_of_position = start + np.flatnonzero(valid)
            if len(self._row_of_position):
                self._space = Space(read_npy((path / SPACE).read_bytes()))
                self._searcher = load(path / FOLDER)
        except FAULTS as error:
            raise UserError(
                f"{directory} is damaged ({first_line(error)}): delete it and run `index` again"
            ) from error
        self.leaves: int = manifest.facts["leaves"]

    def search(self, queries_QxE: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """As `search.Index.search`, among the rows of the shard."""
        rows_Qxk = np.full((len(queries_QxE), k), -1, np.int64)
        sqdist_Qxk = np.full((len(queries_QxE), k), np.inf, np.float32)
        keys = len(self._row_of_position)
        if self._searcher is None or not len(queries_QxE):
            return rows_Qxk, sqdist_Qxk
        lifted_QxE = self._space.queries(queries_QxE)
        limits = (None, None)
        if self.leaves:
            limits = (
                min(max(self.reorder, k), keys),
                min(max(self.leaves_to_search, 1), self.leaves),
            )
        last_batch = len(lifted_QxE) % _BATCH_QUERIES
        filling = max(_LEAST_QUERIES - last_batch, 0) if last_batch else 0
        try:
            position_Qxc, dots_Qxc = self._searcher.search_batched_parallel(
                np.pad(lifted_QxE, ((0, filling), (0, 0)), mode="edge"),
                min(k, keys),
                *limits,
                batch_size=_BATCH_QUERIES,
            )
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{self._where} is damaged: {first_line(error)}; run `index` again") from error
        position_Qxc, dots_Qxc = position_Qxc[: len(lifted_QxE)], dots_Qxc[: len(lifted_QxE)]
        if position_Qxc.size and int(position_Qxc.max()) >= keys:
            raise UserError(f"{self._where} is damaged: it finds a row it does not have; run `index` again")
        # ScaNN pads with position 0 and NaN.
        found_Qxc = ~np.isnan(dots_Qxc)
        count = dots_Qxc.shape[1]
        sqdist_Qxk[:, :count] = np.where(found_Qxc, self._space.sqdist(lifted_QxE, dots_Qxc), np.inf)
        rows_Qxk[:, :count] = np.where(found_Qxc, self._row_of_position[position_Qxc.astype(np.int64)], -1)
        return rows_Qxk, sqdist_Qxk


def _sizes(directory: Directory, manifest: Manifest, extent: tuple[int, int]) -> dict[str, int]:
    """The files' sizes by name.

    Raises:
      UserError: it is no shard of these rows.
    """
    names = {GAPS, SPACE, *(f"{FOLDER}/{name}" for name in (*_ASSETS, _CONFIG))}
    sizes, leaves = manifest.facts["bytes"], manifest.facts["leaves"]
    whole = isinstance(sizes, dict) and names >= sizes.keys() and type(leaves) is int and leaves >= 0
    if not whole or manifest.facts["rows"] != list(extent):
        raise UserError(f"{directory}/manifest.json is damaged: delete {directory} and run `index` again")
    return sizes


def load(folder: Path, names: list[Any] | None = None) -> Any:
    """ScaNN's searcher over the files of a folder, with a thread for each core of this process.

    `names`, of its positions, are what its own insertions go by (benchmarks/living.py).

    Not by scann's own `load_searcher`, which unpickles a file of that folder.
    """
    files = [name for name in _ASSETS if (folder / name).is_file()]
    assets = "".join(f'assets {{ asset_type: {_ASSETS[name]} asset_path: "{name}" }}\n' for name in files)
    pybind = _scann("scann_ops.py.scann_ops_pybind")
    with _quiet():
        searcher = pybind.ScannSearcher(pybind.scann_pybind.ScannNumpy(str(folder), assets), names)
    searcher.set_num_threads(usable_cores())
    return searcher


def _scann(module: str) -> Any:
    """A module of scann, without TensorFlow.

    scann imports TensorFlow for its graph ops only, and goes on when there is none: hidden,
    the import takes 0.3 s instead of 7 and no GPU memory is claimed.
    """
    name = "tensorflow"
    hidden = name not in sys.modules
    if hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # Python's way to refuse an import
    try:
        return importlib.import_module(f"scann.{module}")
    finally:
        if hidden:
            del sys.modules[name]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the C++ library's log lines from standard error; shows them if the work fails."""
    sys.stderr.flush()
    original = os.dup(2)
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 2)
        try:
            yield
        except BaseException:
            log.seek(0)
            os.write(original, log.read())
            raise
        finally:
            os.dup2(original, 2)
            os.close(original)
