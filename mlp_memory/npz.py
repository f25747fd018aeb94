"""NumPy's files as data from anywhere: no pickles, and no array larger than the bytes that hold it.

`np.load` allocates what a header claims, and unpacks what an archive claims to be packed.
"""

import io
import math
import zipfile
import zlib

import numpy as np

from mlp_memory.artifacts import first_line

FAULTS = (ValueError, KeyError, TypeError, OSError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError)
"""What `read_npz` and `read_npy` raise for a damaged file."""


def read_npz(data: bytes) -> dict[str, np.ndarray]:
    """The arrays of a file that `np.savez` wrote, unpacked archives alone.

    Raises:
      One of `FAULTS`: it is damaged.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("it is packed, as np.savez does not write it")
        if sum(member.file_size for member in members) > len(data):
            raise ValueError("its arrays are longer than the file")
        return {member.filename.removesuffix(".npy"): read_npy(archive.read(member)) for member in members}


def read_npy(data: bytes) -> np.ndarray:
    """The array of a file that `np.save` wrote.

    Raises:
      One of `FAULTS`: it is damaged, claims more than there is, or holds Python objects.
    """
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version} of NumPy's format")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        shape, _, dtype = read(file)
    except Exception as error:  # the header is a Python literal, of which a parser makes what it will
        raise ValueError(f"its header is damaged ({first_line(error)})") from error
    left = len(data) - file.tell()
    if dtype.hasobject or not dtype.itemsize or math.prod(shape) * dtype.itemsize != left:
        raise ValueError(f"an array {dtype} of shape {shape} in {left} bytes")
    file.seek(0)
    return np.load(file, allow_pickle=False)
