"""Which devices talk to each other in a collective, in the notations that XLA prints."""

import re

import numpy as np

_IOTA = r"\[([\d,]+)\](?:<=\[([\d,]+)\](?:T\(([\d,]+)\))?)?"


def replica_groups(attributes: str, devices: int) -> np.ndarray | None:
    """Positions in the program's device order, [groups, members]; None where the line names no groups.

    Args:
      attributes: what follows a collective's operands.
      devices: of the program; an empty list of groups is one group of all.

    Raises:
      ValueError: a notation that is not known.
    """
    if "replica_groups=" not in attributes:
        return None
    text = attributes.split("replica_groups=", 1)[1]
    if text.startswith("{}"):
        return np.arange(devices)[None]
    if text.startswith("{"):
        groups = re.findall(r"\{([\d,]+)\}", text[: text.index("}}") + 1])
        return np.array([_numbers(group) for group in groups])
    if found := re.match(_IOTA, text):
        return _iota(found)
    # mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}: groups run along the named axes.
    if found := re.match(r"mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", text):
        return _along_axes(*found.groups())
    raise ValueError(f"replica_groups in a notation that is not known: {text[:120]}")


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _iota(found: re.Match) -> np.ndarray:
    sizes, source, order = found.groups()
    source = _numbers(source or sizes)
    array = np.arange(np.prod(source)).reshape(source)
    return (array.transpose(_numbers(order)) if order else array).reshape(_numbers(sizes))


def _along_axes(mesh: str, ids: str | None, named: str) -> np.ndarray:
    names, sizes = zip(*re.findall(r"'([^']+)'=(\d+)", mesh))
    sizes = [int(size) for size in sizes]
    order = np.arange(np.prod(sizes))
    if ids:
        # [4,2]T(1,0) numbers a 4 x 2 array and transposes it; what is listed stands as it is.
        if found := re.match(r"\[([\d,]+)\](?:<=\[[\d,]+\])?T\(([\d,]+)\)", ids):
            shape = _numbers(found.group(1))
            order = np.arange(np.prod(shape)).reshape(shape).transpose(_numbers(found.group(2))).reshape(-1)
        else:
            order = np.array(_numbers(ids.strip("[]{}")))
    moved = [names.index(name) for name in re.findall(r"'([^']+)'", named)]
    kept = [axis for axis in range(len(names)) if axis not in moved]
    members = int(np.prod([sizes[axis] for axis in moved]))
    return order.reshape(sizes).transpose(*kept, *moved).reshape(-1, members)
