"""A program: exact search on meshes of this process's devices.

python search_on_meshes.py INPUT.npz OUTPUT MESH..., MESH as "data=2,fsdp=2,tensor=2". OUTPUT/MESH.npz
gets the neighbours of every k in INPUT's `ks`, with superblocks of INPUT's `superblock_rows`.
"""

import sys
from pathlib import Path

import numpy as np

from mlp_memory.index import exact
from mlp_memory.parallel.config import MeshConfig
from mlp_memory.parallel.mesh import make_mesh


def main() -> None:
    output = Path(sys.argv[2])
    output.mkdir(exist_ok=True)
    with np.load(sys.argv[1]) as file:
        given = dict(file)
    exact._SUPERBLOCK_ROWS, exact._BLOCK_ROWS = int(given["superblock_rows"]), 512
    for text in sys.argv[3:]:
        sizes = {name: int(size) for name, size in (part.split("=") for part in text.split(","))}
        mesh, found = make_mesh(MeshConfig(**sizes)), {}
        for k in given["ks"].tolist():
            rows, sqdist = exact.exact_search(given["keys"], given["valid"], given["queries"], k, mesh)
            found |= {f"rows {k}": rows, f"sqdist {k}": sqdist}
        np.savez(output / f"{text}.npz", **found)


if __name__ == "__main__":
    main()
