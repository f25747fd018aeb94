"""A training step of the memory against the dense-target formulation, in PyTorch and in JAX.

    make benchmark-distill                          8,192 rows, V = 50,257, d = 768, 6 blocks, m = 128
    make benchmark-distill ARGS="--what=growth"     how each grows with V, m, rows and layers
    make benchmark-distill ARGS="--what=head"       the head alone, against its three products alone
    make benchmark-distill ARGS="--what=feed"       steps fed from disk against one batch used again

The contenders start from the same parameters and see the same rows; loss and gradients are compared at
full size before anything is timed (not with --unchecked, where each starts from its own: for memories
whose gradients are too large to be written down). Each runs in processes of its own, which take turns, so
that a slow moment of the machine strikes all alike and each has a peak memory of its own. "Dense" makes a
[rows, V] float32 teacher, as the reference release does, then KL divergence and cross-entropy as PyTorch
has them; leaner forms of the same stand beside it. Writes OUT.json and OUT.md.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from steps import JaxStep, Sizes, TorchStep, make_data, peak_bytes, relative

OURS = "sparse, JAX"
PEER = "dense, PyTorch"
# glibc told to give nothing back to the system: every step else asks for gigabytes of fresh pages.
KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "1000000000000", "MALLOC_TOP_PAD_": "268435456"}
CONTENDERS: dict[str, Callable[[Sizes], Any]] = {
    OURS: lambda sizes: JaxStep(sizes, "sparse"),
    f"{OURS}, in one part": lambda sizes: JaxStep(dataclasses.replace(sizes, parts=1), "sparse"),
    "dense, JAX": lambda sizes: JaxStep(dataclasses.replace(sizes, parts=1), "dense"),
    PEER: lambda sizes: TorchStep(sizes, twice=True),
    f"{PEER}, one log-softmax": lambda sizes: TorchStep(sizes, twice=False),
    f"{PEER}, one log-softmax, memory kept": lambda sizes: TorchStep(sizes, twice=False),
}
PEAK_BF16 = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
"""Dense bfloat16 FLOP/s by the maker's data sheets, for devices whose name holds the key."""


def start(name: str, folder: Path) -> Any:
    """A contender with the run's rows and, where contenders are compared, its parameters."""
    settings = json.loads((folder / "settings.json").read_text())
    contender = CONTENDERS[name](Sizes(**settings["sizes"]))
    if settings["checked"]:
        parameters = folder / "parameters.npz"
        if not parameters.exists():  # the first one's are everybody's
            np.savez(parameters, **contender.parameters())
        with np.load(parameters) as file:
            contender.load(dict(file))
    with np.load(folder / "data.npz") as file:
        contender.place(dict(file))
    return contender


def take_steps(name: str, folder: Path, steps: int) -> dict[str, Any]:
    """What a contender's process does: seconds of each step after one that compiles, and the peak."""
    contender = start(name, folder)
    losses, seconds, cpu = [contender.step()], [], []
    for _ in range(steps):
        before, cpu_before = time.perf_counter(), time.process_time()
        losses.append(contender.step())
        seconds.append(time.perf_counter() - before)
        cpu.append(time.process_time() - cpu_before)
    return {"seconds": seconds, "cpu": cpu, "losses": losses, "peak": peak_bytes()}


def check(name: str, folder: Path, steps: int) -> dict[str, Any]:
    """Loss and gradients of a contender against those of this project's step."""
    contender = start(name, folder)
    loss, gradients = contender.loss_and_gradients()
    kept = folder / "gradients.npz"
    if not kept.exists():
        np.savez(kept, loss=loss, **gradients)
    with np.load(kept) as file:
        wanted = {key: file[key] for key in file if key != "loss"}
        difference = max(relative(gradients[key], value) for key, value in wanted.items())
        return {"loss": abs(loss - file["loss"]) / float(file["loss"]), "gradients": difference}


def in_a_process(what: str, name: str = "", **options: Any) -> dict[str, Any]:
    """What `device`, `check` or `take_steps` gives, called in a process of its own."""
    words = [sys.executable, __file__, f"--process={what}", f"--name={name}"]
    words += [f"--{option}={value}" for option, value in options.items()]
    environment = {**os.environ, **(KEPT if "kept" in name else {})}
    done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(sizes: Sizes, names: list[str], steps: int, rounds: int, checked: bool) -> dict[str, Any]:
    """Rows per second, peak bytes and agreement of each contender at one size."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        settings = {"sizes": dataclasses.asdict(sizes), "checked": checked}
        (folder / "settings.json").write_text(json.dumps(settings))
        np.savez(folder / "data.npz", **make_data(sizes))
        different = [name for name in names if "kept" not in name and "part" not in name]
        agreement = {name: in_a_process("check", name, folder=folder) for name in different if checked}
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for _ in range(rounds):
            for name in names:
                runs[name].append(in_a_process("take_steps", name, folder=folder, steps=steps))
    found = {}
    for name, several in runs.items():
        seconds = statistics.median(s for one in several for s in one["seconds"])
        found[name] = {
            "seconds": seconds,
            "all_seconds": [one["seconds"] for one in several],
            "cpu_seconds": statistics.median(s for one in several for s in one["cpu"]),
            "rows_per_second": sizes.rows / seconds,
            "peak_bytes": max(one["peak"] for one in several),
            "losses": several[0]["losses"],
            "differences": agreement.get(name),
        }
    return found


def grow(sizes: Sizes, names: list[str]) -> list[dict[str, Any]]:
    """V, m, rows and layers, each on its own, from an eighth of the rows."""
    small = dataclasses.replace(sizes, rows=max(sizes.rows // 8, 1))
    grid = {
        "vocab": [8192, 32768, 131072],
        "m": [16, 128, 512],
        "rows": [small.rows // 2, small.rows, 4 * small.rows],
        "layers": [2, 6, 18],
    }
    found = []
    for name, values in grid.items():
        for value in values:
            one = compare(dataclasses.replace(small, **{name: value}), names, 2, 1, checked=False)
            found.append({"what": name, "value": value, "contenders": one})
            print(growth_table([found[-1]]).splitlines()[-1], file=sys.stderr, flush=True)
    return found


def device(dtype: str) -> dict[str, Any]:
    """The device, and FLOP/s of a large product alone, the best of several: what a step could reach here."""
    import jax
    import jax.numpy as jnp

    size = 2048 if jax.default_backend() == "cpu" else 8192
    a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.dtype(dtype)) for i in range(2))
    product = jax.jit(lambda a, b: a @ b)
    product(a, b).block_until_ready()
    best = float("inf")
    for _ in range(20):
        before = time.perf_counter()
        product(a, b).block_until_ready()
        best = min(best, time.perf_counter() - before)
    return {"kind": jax.devices()[0].device_kind, "flops": 2 * size**3 / best}


def head_alone(sizes: Sizes, repeats: int) -> dict[str, float]:
    """Seconds of the head's loss and gradients, and of the three products of a dense head alone."""
    import jax
    import jax.numpy as jnp

    from mlp_memory.training.sparse_head import sparse_cross_entropy

    data, dtype = make_data(sizes), jnp.dtype(sizes.dtype)
    h_NxD = jnp.asarray(data["h"], dtype)
    w_DxV = jax.random.normal(jax.random.key(0), (sizes.dim, sizes.vocab), dtype) * 0.05
    target = jnp.asarray(data["token_ids"]), jnp.asarray(data["probs"])
    # The products of so many rows as give logits that fit into memory.
    rows = min(sizes.rows, max(1, (1 << 27) // sizes.vocab))
    products = jax.jit(lambda h, w: (z := h @ w, z @ w.T, h.T @ z)[1:])
    head = jax.jit(jax.value_and_grad(sparse_cross_entropy, (0, 1)))
    calls = {
        "head": lambda: head(h_NxD, w_DxV, *target),
        "products": lambda: products(h_NxD[:rows], w_DxV),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            before = time.perf_counter()
            jax.block_until_ready(call())
            if turn:
                seconds[name].append(time.perf_counter() - before)
    found = {name: statistics.median(values) for name, values in seconds.items()}
    found["products"] *= sizes.rows / rows
    return found


def feed(sizes: Sizes, block_rows: int, steps: int) -> dict[str, float]:
    """Seconds of a step whose batch is read from disk, and of one whose batch is there already."""
    from mlp_memory.arrays import ArrayReader, ChunkWriter
    from mlp_memory.artifacts import ArraySpec, Directory, begin, peek
    from mlp_memory.corpus.stream import TokenStream
    from mlp_memory.memory.distill import TargetSource
    from mlp_memory.memory.states import StoredStates
    from mlp_memory.training.batches import Batches

    n = 4 * sizes.rows
    data = make_data(dataclasses.replace(sizes, rows=n))
    small = np.uint16 if sizes.vocab <= 1 << 16 else np.uint32
    with tempfile.TemporaryDirectory() as place:

        def write(name: str, **arrays: np.ndarray) -> Directory:
            directory = Directory(f"{place}/{name}")
            specs = {k: ArraySpec.in_blocks(a.shape, a.dtype.name, 16384) for k, a in arrays.items()}
            facts = {"vocab_size": sizes.vocab, "words": 0, "bytes": 0}
            writer = ChunkWriter(directory, begin(directory, name, {}, {}, specs))
            for chunk in range(len(writer)):
                a, b = writer.rows(chunk)
                writer.write(chunk, **{k: values[a:b] for k, values in arrays.items()})
            writer.finish(**facts)
            return directory

        keys = write("datastore", keys=data["h"].astype(np.float16))
        teacher = {"token_ids": data["token_ids"].astype(small), "probs": data["probs"].astype(np.float16)}
        tokens = write("train", tokens=data["labels"].astype(small))
        stream = TokenStream(peek(tokens), ArrayReader(tokens, "tokens"), np.array([0, n]))
        states = StoredStates(ArrayReader(keys, "keys"))
        source = TargetSource(stream, states, write("targets", **teacher), block_rows)
        contender = JaxStep(sizes, "sparse")
        batches = Batches(source, sizes.rows // block_rows, seed=0).from_step(0)
        found: dict[str, list[float]] = {"fed": [], "resident": []}
        contender.place(next(batches))
        for turn in range(steps + 1):
            for kind, seconds in found.items():
                before = time.perf_counter()
                if kind == "fed":
                    contender.place(next(batches))
                contender.step()
                if turn:
                    seconds.append(time.perf_counter() - before)
    return {kind: statistics.median(values) for kind, values in found.items()}


def steps_table(sizes: Sizes, found: dict[str, Any], rate: float) -> str:
    """Each contender with its ratios to the peer."""
    reference = PEER if PEER in found else next(iter(found))
    peer = found[reference]
    lines = [
        f"| step | rows/s | ÷ {reference} | core s a step | peak memory | ÷ {reference} | MFU | "
        "difference of loss, of gradients |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for name, one in found.items():
        speed = one["rows_per_second"] / peer["rows_per_second"]
        memory = one["peak_bytes"] / peer["peak_bytes"]
        mfu = sizes.flops() / one["seconds"] / rate
        differences = one["differences"] and [f"{x:.1e}" for x in one["differences"].values()]
        cells = [
            name,
            f"{one['rows_per_second']:,.0f}",
            f"{speed:.2f}",
            f"{one['cpu_seconds']:.1f}",
            f"{one['peak_bytes'] / 1e9:.2f} GB",
            f"{memory:.2f}",
            f"{mfu:.0%}",
            ", ".join(differences or ["–"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def growth_table(found: list[dict[str, Any]]) -> str:
    """A line for each size, a column for each contender."""
    names = list(found[0]["contenders"])
    lines = ["| | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    for one in found:
        cells = [
            f"{c['rows_per_second']:,.0f} rows/s, {c['peak_bytes'] / 1e9:.2f} GB"
            for c in one["contenders"].values()
        ]
        lines.append(f"| {one['what']} = {one['value']:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def steps(
    sizes: Sizes, names: list[str], count: int, rounds: int, checked: bool
) -> tuple[dict[str, Any], str]:
    """The comparison at one size, and its table."""
    where = in_a_process("device", dtype=sizes.dtype)
    found = compare(sizes, names, count, rounds, checked)
    kind, measured = where["kind"], where["flops"]
    sheet = next((rate for key, rate in PEAK_BF16.items() if key in kind), None)
    rate, of = (sheet, "by the data sheet") if sheet else (measured, "of a large square product alone")
    alone = f"; a large square product alone reaches {measured / 1e9:,.0f}" if sheet else ""
    note = f"MFU: of {rate / 1e9:,.0f} GFLOP/s {of} ({kind}{alone}); {sizes.flops() / 1e12:.2f} TFLOP a step"
    text = f"{steps_table(sizes, found, rate)}\n\n{note}"
    return {"device": where, "peak_flops": rate, "contenders": found}, text


def main() -> None:
    """Measures what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--what", choices=("steps", "growth", "head", "feed"), default="steps")
    parser.add_argument("--rows", type=int, default=8192, help="of a step")
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--ffn", type=int, default=0, help="width inside a block; 0 for four times dim")
    parser.add_argument("--m", type=int, default=128, help="tokens of a teacher")
    parser.add_argument("--style", choices=("gpt2", "llama"), default="gpt2")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--remat", choices=("none", "dots", "full"), default="none")
    parser.add_argument("--parts", type=int, default=8, help="distill.accumulate of this project's step")
    parser.add_argument("--steps", type=int, default=3, help="timed, of a process")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each contender")
    parser.add_argument("--contenders", default=";".join(CONTENDERS), help="separated by semicolons")
    parser.add_argument("--unchecked", action="store_true", help="no comparison of losses and gradients")
    parser.add_argument("--block_rows", type=int, default=16, help="as distill.block_rows, for feed")
    parser.add_argument("--out", default="runs/distill_benchmark")
    parser.add_argument("--process", choices=("device", "check", "take_steps"), help=argparse.SUPPRESS)
    parser.add_argument("--name", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.process:
        given = (arguments.name, arguments.folder, arguments.steps)
        work = {"check": check, "take_steps": take_steps}.get(arguments.process)
        print(json.dumps(work(*given) if work else device(arguments.dtype)))
        return
    arguments.ffn = arguments.ffn or 4 * arguments.dim
    sizes = Sizes(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(Sizes)})
    names = arguments.contenders.split(";")
    if arguments.what == "steps":
        found, text = steps(sizes, names, arguments.steps, arguments.rounds, not arguments.unchecked)
    elif arguments.what == "growth":
        found = grow(sizes, names)
        text = growth_table(found)
    elif arguments.what == "head":
        found = head_alone(sizes, arguments.steps)
        share = found["products"] / found["head"]
        text = f"head {found['head']:.3f} s, its products alone {found['products']:.3f} s: {share:.0%}"
    else:
        found = feed(sizes, arguments.block_rows, arguments.steps)
        slower = found["fed"] / found["resident"] - 1
        text = f"step fed from disk {found['fed']:.3f} s, resident {found['resident']:.3f} s: {slower:+.1%}"
    settings = dataclasses.asdict(sizes)
    text = ", ".join(f"{k} {v}" for k, v in settings.items()) + f"\n\n{text}"
    Path(arguments.out).parent.mkdir(parents=True, exist_ok=True)
    Path(f"{arguments.out}.json").write_text(json.dumps({"sizes": settings, "found": found}, indent=1) + "\n")
    Path(f"{arguments.out}.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
