"""The order of a head's coordinates under rotary positions.

Meta's code and llama.cpp rotate neighbouring coordinates (0, 1), (2, 3); Hugging Face's and
ours the first half with the second, (0, E/2), (1, E/2 + 1). Rows of the query and key
projections are permuted between the two.
"""

import numpy as np


def halves_from_pairs(weight_OxI: np.ndarray, heads: int) -> np.ndarray:
    """Query or key weights [heads·E, in] for halves, from ones for neighbouring pairs."""
    out, rest = weight_OxI.shape[0], weight_OxI.shape[1:]
    return weight_OxI.reshape(heads, out // heads // 2, 2, *rest).swapaxes(1, 2).reshape(out, *rest)
