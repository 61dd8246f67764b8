"""Config sections of the cluster that a run is launched on or planned for."""

from __future__ import annotations

from pydantic import StrictBool, model_validator

from dico_t2i.config.base import NonNegative, Positive, PositiveFloat, Section
from dico_t2i.config.yaml12 import AnyText, Flag, Text


class HardwareConfig(Section):
    """What `dico plan` reckons with: one device, and the wires between them. Decimal units."""

    name: Text = "H100"
    memory_gb: PositiveFloat = 80.0
    peak_tflops: PositiveFloat = 650.0  # of bf16 matrix products, as measured rather than as advertised
    memory_gb_s: PositiveFloat = 2900.0
    link_gb_s: PositiveFloat = 350.0  # of one device to others of its node, each way
    network_gb_s: PositiveFloat = 40.0  # of one device to other nodes, each way
    disk_gb_s: PositiveFloat = 1.0  # of one node to the file system of checkpoints


class ClusterConfig(Section):
    """Where a run is launched (cluster/launch.py) and planned for (`dico plan`); a profile file holds these keys."""

    nodes: Positive = 1
    gpus_per_node: NonNegative = 8  # 0: train on CPUs
    tasks_per_node: Positive | None = None  # none: one per GPU, or one on a node without
    cpus_per_task: Positive = 8
    mem: Text | None = None  # of a node, as sbatch understands it: 400G; 0 is all
    partition: Text | None = None
    account: Text | None = None
    qos: Text | None = None
    constraint: Text | None = None
    time: Text = "24:00:00"  # limit, as sbatch understands it: minutes, H:M:S or days-H:M:S
    exclusive: Flag = False
    # Further options, as typed: {reservation: lab, mail-user: me}; true: one without a value, false: left out.
    sbatch: dict[str, AnyText | StrictBool] = {}
    srun: tuple[Text, ...] = ()  # further options of srun: [--mpi=none]
    cpu_bind: Text | None = None  # of srun: cores, none, ...
    setup: tuple[Text, ...] = ()  # lines of shell before anything else: module load, source ...
    env: dict[str, AnyText] = {}  # of every rank, as typed: {NCCL_SOCKET_IFNAME: ib0}
    container: Text | None = None  # an image for srun --container-image (pyxis)
    container_mounts: tuple[Text, ...] = ()
    python: Text | None = None  # on the nodes; none: the one that launches
    signal_lead_s: Positive | None = None  # before the time limit; none: from measured saves and steps
    max_requeues: NonNegative = 100
    hardware: HardwareConfig = HardwareConfig()

    @property
    def ranks_per_node(self) -> int:
        return self.tasks_per_node or max(1, self.gpus_per_node)

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    @model_validator(mode="after")
    def _one_process_per_gpu(self) -> ClusterConfig:
        if self.gpus_per_node and self.tasks_per_node not in (None, self.gpus_per_node):
            raise ValueError(
                f"tasks_per_node: {self.tasks_per_node} with gpus_per_node: {self.gpus_per_node};"
                " there is one process per GPU, leave tasks_per_node out"
            )
        return self
