"""Which process of a job this one is, as its environment tells."""

import dataclasses
import os
import re

from mlp_memory.artifacts import UserError, first_line


@dataclasses.dataclass(frozen=True)
class Place:
    """This process's place in a job.

    Attributes:
      address: host:port where process 0 calls the roll.
      count: processes of the job.
      index: number of this one.
      local_device_ids: the devices it takes of its host; None for all.
      names: hosts that the cluster has told, by process.
    """

    address: str
    count: int
    index: int
    local_device_ids: list[int] | None = None
    names: dict[int, str] = dataclasses.field(default_factory=dict)


def find_place(timeout: float) -> Place | None:
    """This process's place as the environment tells it; None where it is alone.

    MLP_MEMORY_COORDINATOR=host:port, MLP_MEMORY_PROCESSES and MLP_MEMORY_PROCESS come first; the last
    may be left to the JOB_COMPLETION_INDEX of a Kubernetes Indexed Job. Without them Cloud TPU, SLURM and
    Open MPI are recognised, by JAX. MLP_MEMORY_PROCESSES=1 alone says that there are no others.

    Args:
      timeout: seconds that a cluster's name service may take.

    Raises:
      UserError: the variables do not fit together, or the cluster does not answer.
    """
    coordinator, processes = (os.environ.get(f"MLP_MEMORY_{n}") for n in ("COORDINATOR", "PROCESSES"))
    if coordinator or processes:
        return _place_given(coordinator, processes)
    if not _in_cluster():
        return None
    from jax._src.clusters import ClusterEnv  # JAX has no public name for it

    try:
        address, count, index, devices = ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, max(1, int(timeout))
        )
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        raise UserError(
            f"the cluster does not tell this process its place ({first_line(error)}): set "
            "MLP_MEMORY_COORDINATOR, MLP_MEMORY_PROCESSES and MLP_MEMORY_PROCESS, or MLP_MEMORY_PROCESSES=1"
        ) from error
    if count is None or count == 1:
        return None
    return Place(address, count, index, devices, _names_told(count))


def _place_given(coordinator: str | None, processes: str | None) -> Place | None:
    index = os.environ.get("MLP_MEMORY_PROCESS", os.environ.get("JOB_COMPLETION_INDEX"))
    if processes == "1":
        return None
    try:
        count, number = int(processes or ""), int(index or "")
    except ValueError as error:
        raise UserError(
            "MLP_MEMORY_COORDINATOR needs MLP_MEMORY_PROCESSES and MLP_MEMORY_PROCESS as whole numbers"
        ) from error
    if not re.fullmatch(r".+:\d+", coordinator or ""):
        raise UserError(f"MLP_MEMORY_COORDINATOR = {coordinator!r}: give host:port of process 0")
    if not 0 <= number < count:
        raise UserError(f"MLP_MEMORY_PROCESS = {number}: give 0 to {count - 1}, one of each")
    return Place(coordinator, count, number)


def _in_cluster() -> bool:
    """Whether to ask JAX about the cluster: what it asks in turn can take long where there is none."""
    several = int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_STEP_NODELIST" in os.environ
    several |= int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1")) > 1
    if several or "," in os.environ.get("TPU_PROCESS_ADDRESSES", os.environ.get("TPU_WORKER_HOSTNAMES", "")):
        return True
    from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm

    return running_in_cloud_tpu_vm and "TPU_SKIP_MDS_QUERY" not in os.environ


def _names_told(count: int) -> dict[int, str]:
    """Hosts by process, where the cluster has a list of them."""
    nodes = expand_nodes(os.environ.get("SLURM_STEP_NODELIST", ""))
    if not os.environ.get("SLURM_DISTRIBUTION", "block").startswith("block"):
        nodes = []
    nodes = nodes or [name for name in os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",") if name]
    if not nodes or count % len(nodes):
        return {}
    return {process: nodes[process // (count // len(nodes))] for process in range(count)}


def expand_nodes(text: str) -> list[str]:
    """Names of a SLURM node list: "a[01-03,7],b" is a01, a02, a03, a7, b."""
    found = []
    for name, ranges in re.findall(r"([^,\[\]]+)(?:\[([^\]]*)\])?", text):
        if not ranges:
            found.append(name)
        for part in filter(None, ranges.split(",")):
            first, _, last = part.partition("-")
            width, stop = len(first), int(last or first)
            found += [f"{name}{number:0{width}d}" for number in range(int(first), stop + 1)]
    return found
