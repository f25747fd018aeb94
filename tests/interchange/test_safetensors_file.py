"""The writer against the library's own, byte for byte."""

import io

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from mlp_memory.interchange.safetensors_file import DTYPES, TensorSpec, in_file_order, write

NAMES = ["w", "väl", 'a "quoted" \\ name', "tab\tand \x7f", "𝄞", "h.10.x", "h.9.x"]


def random_tensors(rng: np.random.Generator) -> dict[str, np.ndarray]:
    found = {}
    for i in range(int(rng.integers(0, 30))):
        dtype = list(DTYPES.values())[rng.integers(len(DTYPES))]
        shape = tuple(map(int, rng.integers(0, 5, rng.integers(0, 4))))
        values = rng.integers(0, 2, shape)
        as_type = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
        found[f"{NAMES[rng.integers(len(NAMES))]}{i}"] = np.asarray(values, as_type)
    return found


@pytest.mark.parametrize("trial", range(20))
def test_a_file_is_the_one_that_the_library_writes(trial: int, rng: np.random.Generator) -> None:
    tensors = random_tensors(rng)
    specs = {name: TensorSpec(array.shape, array.dtype.name) for name, array in tensors.items()}
    made, file = [], io.BytesIO()

    def make(name: str) -> np.ndarray:
        made.append(name)
        return tensors[name]

    write(file, specs, make)
    assert made == in_file_order(specs)
    assert file.getvalue() == safetensors.numpy.save(tensors, metadata={"format": "pt"})


def test_a_tensor_that_is_not_what_was_said_is_refused() -> None:
    specs = {"w": TensorSpec((2, 3), "float32")}
    for wrong in (np.zeros((3, 2), np.float32), np.zeros((2, 3))):
        with pytest.raises(ValueError, match=r"'w' is float\d\d .*, not"):
            write(io.BytesIO(), specs, lambda _, wrong=wrong: wrong)
