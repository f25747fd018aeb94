"""The sizes of a mesh."""

import dataclasses

from mlp_memory.artifacts import UserError
from mlp_memory.settings import check_whole

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
