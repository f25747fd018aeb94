"""From hidden states to what is stored of a key, and from that to the space that is searched."""

import dataclasses
import io

import numpy as np

from mlp_memory.artifacts import Directory, Manifest, UserError, as_dtype, digest, first_line
from mlp_memory.datastore.config import EmbedConfig
from mlp_memory.npz import FAULTS, read_npz

CODEC_NAME = "codec.npz"
_CODES = 127
# Shares of a dimension's largest value tried as the largest code.
_CLIPS = 2.0 ** (-np.arange(25) / 6)
_FIT_ROWS = 4096


@dataclasses.dataclass(frozen=True)
class Codec:
    """How a hidden state becomes a key.

    The searched space is h itself, or (h − mean)·components where these are given; what is
    stored is its rounding to `dtype`, for "int8" the code round(x / scale) within ±127.
    Products are summed in float64 and rounded once, so a row's key hardly depends on how many
    rows are projected together.

    Attributes:
      dtype: of the stored key.
      mean_D, components_DxE: float32 or None.
      scale_E: float32, for "int8" only.
      explained: share of the sample's variance that the E dimensions hold.
      clipped: share of the sample's values beyond ±127 scales.
    """

    dtype: str
    mean_D: np.ndarray | None = None
    components_DxE: np.ndarray | None = None
    scale_E: np.ndarray | None = None
    explained: float = 1.0
    clipped: float = 0.0

    def key_dim(self, dim: int) -> int:
        """E, dimensions of a key of a hidden state of `dim` dimensions."""
        return dim if self.components_DxE is None else self.components_DxE.shape[1]

    def project(self, states_NxD: np.ndarray) -> np.ndarray:
        """Hidden states in the searched space, [N, E] float32, not rounded to `dtype`."""
        if self.mean_D is None:
            return states_NxD.astype(np.float32, copy=False)
        centred_NxD = states_NxD.astype(np.float64) - self.mean_D
        if self.components_DxE is not None:
            centred_NxD = centred_NxD @ self.components_DxE.astype(np.float64)
        return centred_NxD.astype(np.float32)

    def encode(self, states_NxD: np.ndarray) -> np.ndarray:
        """What is stored of hidden states, [N, E] of `dtype`."""
        projected_NxE = self.project(states_NxD)
        if self.scale_E is None:
            return projected_NxE.astype(as_dtype(self.dtype))
        return _codes(projected_NxE, self.scale_E)

    def decode(self, stored_NxE: np.ndarray) -> np.ndarray:
        """Stored keys in the searched space, [N, E] float32."""
        keys_NxE = stored_NxE.astype(np.float32)
        return keys_NxE if self.scale_E is None else keys_NxE * self.scale_E

    def to_bytes(self) -> bytes:
        """The arrays as an npz file, the same bytes for the same arrays."""
        file, arrays = io.BytesIO(), {"explained": self.explained, "clipped": self.clipped}
        for name in ("mean_D", "components_DxE", "scale_E"):
            if getattr(self, name) is not None:
                arrays[name] = getattr(self, name)
        np.savez(file, **{name: np.asarray(value) for name, value in arrays.items()})
        return file.getvalue()

    def _check_shapes(self) -> None:
        mean_D, components_DxE, scale_E = self.mean_D, self.components_DxE, self.scale_E
        arrays = [array for array in (mean_D, components_DxE, scale_E) if array is not None]
        if components_DxE is not None and (mean_D is None or components_DxE.ndim != 2):
            raise ValueError("its components are not those of a mean")
        wanted = [mean_D.shape] if mean_D is not None else []
        wanted += [(*mean_D.shape, components_DxE.shape[1])] if components_DxE is not None else []
        keys = wanted[-1][-1:] if wanted else ()
        wanted += [keys] if scale_E is not None else []
        if [array.shape for array in arrays] != wanted or any(array.dtype != np.float32 for array in arrays):
            raise ValueError("its arrays do not fit each other")

    @classmethod
    def from_bytes(cls, dtype: str, data: bytes, where: str) -> "Codec":
        try:
            found = read_npz(data)
            explained, clipped = float(found.pop("explained")), float(found.pop("clipped"))
            codec = cls(dtype, **found, explained=explained, clipped=clipped)
            codec._check_shapes()
            return codec
        except FAULTS as error:
            raise UserError(
                f"{where} is damaged ({first_line(error)}): delete its folder and run embed again"
            ) from error


def open_codec(directory: Directory, manifest: Manifest) -> Codec:
    """The codec of a finished datastore.

    Raises:
      UserError: its file is gone or not what the manifest says.
    """
    dtype, wanted = manifest.config["embed"]["key_dtype"], manifest.facts.get("codec")
    if wanted is None:
        return Codec(dtype)
    data = directory.read(CODEC_NAME)
    if data is None or digest(data) != wanted:
        state = "is gone" if data is None else "is damaged"
        raise UserError(f"{directory}/{CODEC_NAME} {state}: delete {directory} and run embed again")
    return Codec.from_bytes(dtype, data, f"{directory}/{CODEC_NAME}")


def fit(config: EmbedConfig, sample_SxD: np.ndarray) -> Codec:
    """The codec of a config, fitted on sampled hidden states.

    Components are the eigenvectors of the sample's covariance with the largest eigenvalues,
    each with its entry of largest size positive. The scale of a dimension is the one, of 25
    from its largest value down to a sixteenth of it, whose codes have the least squared error.

    Args:
      config: what is wanted of the keys.
      sample_SxD: float32. Memory: 4·S·(D + E) bytes and 8·D² for the covariance.

    Raises:
      UserError: more dimensions are asked for than states have or the sample has rows.
    """
    rows, dim = sample_SxD.shape
    if config.key_dim > min(rows, dim):
        what = f"hidden states have {dim} dimensions" if config.key_dim > dim else f"there are {rows} rows"
        raise UserError(f"embed.key_dim = {config.key_dim} is too many: {what}")
    mean_D = sample_SxD.mean(axis=0, dtype=np.float64)
    components_DxE, explained = None, 1.0
    if config.key_dim:
        components_DxE, explained = _principal(sample_SxD, mean_D, config.key_dim)
    codec = Codec(config.key_dtype, mean_D.astype(np.float32), components_DxE, explained=explained)
    if config.key_dtype != "int8":
        return codec
    scale_E, clipped = _scales(codec.project(sample_SxD))
    return dataclasses.replace(codec, scale_E=scale_E, clipped=clipped)


def _principal(sample_SxD: np.ndarray, mean_D: np.ndarray, count: int) -> tuple[np.ndarray, float]:
    """The first `count` principal components, [D, count], and their share of the variance."""
    covariance_DxD = np.zeros((len(mean_D), len(mean_D)))
    for start in range(0, len(sample_SxD), _FIT_ROWS):
        centred_SxD = sample_SxD[start : start + _FIT_ROWS] - mean_D
        covariance_DxD += centred_SxD.T @ centred_SxD
    values_D, vectors_DxD = np.linalg.eigh(covariance_DxD)
    vectors_DxE = vectors_DxD[:, ::-1][:, :count]
    largest_E = np.abs(vectors_DxE).argmax(axis=0)
    vectors_DxE = vectors_DxE * np.sign(vectors_DxE[largest_E, np.arange(count)])
    values_D = np.maximum(values_D[::-1], 0)
    return vectors_DxE.astype(np.float32), float(values_D[:count].sum() / (values_D.sum() or 1.0))


def _scales(values_SxE: np.ndarray) -> tuple[np.ndarray, float]:
    """The scale of each dimension, and the share of all values that its codes clip."""
    largest_E = np.abs(values_SxE).max(axis=0)
    largest_E[largest_E == 0] = 1.0
    tried_CxE = (_CLIPS[:, None] * largest_E / _CODES).astype(np.float32)
    error_CxE = np.zeros(tried_CxE.shape)
    for start in range(0, len(values_SxE), _FIT_ROWS):
        part_SxE = values_SxE[start : start + _FIT_ROWS]
        for error_E, scale_E in zip(error_CxE, tried_CxE):
            decoded_SxE = _codes(part_SxE, scale_E).astype(np.float32) * scale_E
            error_E += ((part_SxE - decoded_SxE) ** 2).sum(axis=0, dtype=np.float64)
    scale_E = tried_CxE[error_CxE.argmin(axis=0), np.arange(len(largest_E))]
    return scale_E, float((np.abs(values_SxE) > (_CODES + 0.5) * scale_E).mean())


def _codes(values_NxE: np.ndarray, scale_E: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values_NxE / scale_E), -_CODES, _CODES).astype(np.int8)
