"""The sizes of a mesh, the waits for other hosts, and who does the units of embed and retrieve."""

import dataclasses

from mlp_memory.artifacts import UserError, runtime
from mlp_memory.settings import check_positive, check_whole

AXES = ("slice", "data", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis.

    Attributes:
      data: copies of the model that read different batch parts; -1 takes what is left.
      fsdp: devices that share parameters and optimizer state, and split the batch too.
      tensor: devices that split heads, feed-forward and vocabulary.
      slice: data-parallel groups joined by the data-centre network only.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    slice: int = 1

    def sizes(self, devices: int) -> tuple[int, int, int, int]:
        """Axis sizes in the order of `AXES`.

        Raises:
          UserError: they do not multiply to the number of devices.
        """
        check_whole(self, {"slice": 1, "fsdp": 1, "tensor": 1, "data": -1})
        fixed = self.slice * self.fsdp * self.tensor
        data = devices // fixed if self.data == -1 else self.data
        if data * fixed != devices or data < 1:
            raise UserError(
                f"mesh slice={self.slice} data={self.data} fsdp={self.fsdp} tensor={self.tensor} "
                f"does not fit {devices} device(s): set mesh.data=-1 or other sizes"
            )
        return (self.slice, data, self.fsdp, self.tensor)

    def of_one_process(self, devices: int) -> "MeshConfig":
        """For work that one process of several does: as many model parts if its devices allow, or none."""
        fits = devices % (self.fsdp * self.tensor) == 0
        return MeshConfig(fsdp=self.fsdp, tensor=self.tensor) if fits else MeshConfig()


@dataclasses.dataclass(frozen=True)
class HostsConfig:
    """How long the processes of a job wait for each other.

    Attributes:
      start_timeout: seconds until the processes that came give up on those that did not.
      heartbeat_timeout: seconds of silence (a dead network, a host without power) after which a
        process counts as lost. One whose connection breaks, because it died, is lost at once.
    """

    start_timeout: float = runtime(300.0)
    heartbeat_timeout: float = runtime(60.0)

    def __post_init__(self):
        check_positive(self, "start_timeout", "heartbeat_timeout")


@dataclasses.dataclass(frozen=True)
class FleetConfig:
    """Who does the work of embed and retrieve, which comes in units (see `fleet.run_units`).

    Attributes:
      runner: "in_process", or an Apache Beam runner: "DirectRunner" for processes of this
        machine, "FlinkRunner", "SparkRunner", "DataflowRunner".
      workers: processes at work.
      options: more flags for Beam, as on a command line: ("--flink_master=host:8081",).
      attempts: pipelines started for the same units before the run gives up. A worker that is
        killed ends a pipeline, and the next one does what is missing.
      patience: seconds without a finished unit after which a pipeline is taken to hang.
    """

    runner: str = runtime("in_process")
    workers: int = runtime(1)
    options: tuple[str, ...] = runtime(())
    attempts: int = runtime(3)
    patience: float = runtime(3600.0)

    def __post_init__(self):
        check_whole(self, {"workers": 1, "attempts": 1})
        check_positive(self, "patience")
        if not isinstance(self.runner, str) or not self.runner:
            raise UserError(f'fleet.runner = {self.runner!r}: give "in_process" or the name of a Beam runner')
        if not all(isinstance(option, str) and option.startswith("--") for option in self.options):
            raise UserError(f'fleet.options = {self.options!r}: give flags, ("--name=value",)')
        if self.in_process and self.workers > 1:
            raise UserError(
                f'fleet.workers = {self.workers} with fleet.runner = "in_process": '
                'set fleet.runner = "DirectRunner" for so many processes'
            )

    @property
    def in_process(self) -> bool:
        return self.runner == "in_process"
