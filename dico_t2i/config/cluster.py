"""Config sections for the cluster that a run is launched on or planned for."""

from __future__ import annotations

from pydantic import StrictBool, model_validator

from dico_t2i.config.base import NonNegative, Positive, PositiveFloat, Section
from dico_t2i.config.yaml12 import AnyText, Flag, Text


class HardwareConfig(Section):
    """The devices and the connections between them, in decimal units. `dico plan` computes with them."""

    name: Text = "H100"  # The name of the device, shown in the plan.
    memory_gb: PositiveFloat = 80.0  # The memory of one device.
    peak_tflops: PositiveFloat = 650.0  # The rate of bf16 matrix products, as measured and not as advertised.
    memory_gb_s: PositiveFloat = 2900.0  # The bandwidth of a device's memory.
    link_gb_s: PositiveFloat = 350.0  # The bandwidth from one device to the others of its node, in each direction.
    network_gb_s: PositiveFloat = 40.0  # The bandwidth from one device to other nodes, in each direction.
    # The time of an all-reduce of a few bytes over all devices, in microseconds. Training computes from it, from the
    # bandwidths and from the number of parameters how many gradients it sends together.
    latency_us: PositiveFloat = 30.0
    disk_gb_s: PositiveFloat = 1.0  # The write rate of one node to the file system that holds the checkpoints.


class ClusterConfig(Section):
    """The cluster that cluster/launch.py launches on and `dico plan` plans for. A profile file holds these keys."""

    nodes: Positive = 1  # The number of nodes.
    gpus_per_node: NonNegative = 8  # The number of GPUs of each node; 0 trains on CPUs.
    # The number of ranks on each node; with none it is one for each GPU, or one on a node without GPUs.
    tasks_per_node: Positive | None = None
    cpus_per_task: Positive = 8  # The number of CPU cores for each rank.
    mem: Text | None = None  # The memory of each node in sbatch's notation, such as 400G; 0 asks for all of it.
    partition: Text | None = None  # The SLURM partition; with none SLURM chooses its default.
    account: Text | None = None  # The SLURM account that is charged.
    qos: Text | None = None  # The SLURM quality of service.
    constraint: Text | None = None  # The features that nodes must have, in sbatch's notation.
    time: Text = "24:00:00"  # The time limit in sbatch's notation: minutes, H:M:S or days-H:M:S.
    exclusive: Flag = False  # Reserves whole nodes for the job.
    # Further options of sbatch, such as {reservation: lab, mail-user: me}; an option that is true is passed without a
    # value, and one that is false is left out.
    sbatch: dict[str, AnyText | StrictBool] = {}
    srun: tuple[Text, ...] = ()  # Further options of srun, such as [--mpi=none].
    cpu_bind: Text | None = None  # How srun binds ranks to cores (its --cpu-bind): cores, none, ...
    setup: tuple[Text, ...] = ()  # Shell lines that run before anything else, such as module load or source.
    # Environment variables of every rank, passed as they are typed, such as {NCCL_SOCKET_IFNAME: ib0}.
    env: dict[str, AnyText] = {}
    container: Text | None = None  # The image for srun's --container-image (pyxis).
    # The folders that are mounted into the container, for srun's --container-mounts.
    container_mounts: tuple[Text, ...] = ()
    python: Text | None = None  # The Python interpreter on the nodes; with none it is the one that launches.
    # How many seconds before the time limit the run saves and stops; with none it follows from the measured duration of
    # saves.
    signal_lead_s: Positive | None = None
    max_requeues: NonNegative = 100  # How many times the job is requeued before it gives up.
    hardware: HardwareConfig = HardwareConfig()  # The hardware that `dico plan` computes with.

    @property
    def ranks_per_node(self) -> int:
        return self.tasks_per_node or max(1, self.gpus_per_node)

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def rate(self) -> float:
        """Bytes per second that each device sends in a ring of all devices, over the slowest link."""
        network = self.hardware.network_gb_s * self.ranks_per_node  # each device of a node sends its share
        link = self.hardware.link_gb_s
        return 1e9 * (link if self.nodes == 1 else min(network, link))

    @model_validator(mode="after")
    def _one_process_per_gpu(self) -> ClusterConfig:
        if self.gpus_per_node and self.tasks_per_node not in (None, self.gpus_per_node):
            raise ValueError(
                f"tasks_per_node: {self.tasks_per_node} with gpus_per_node: {self.gpus_per_node};"
                " there is one process for each GPU, so leave tasks_per_node out"
            )
        return self
