"""Config sections for the cluster that a run is launched on or planned for."""

from __future__ import annotations

from pydantic import StrictBool, model_validator

from dico_t2i.config.base import NonNegative, NonNegativeFloat, Positive, PositiveFloat, Probability, Section
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
    # How long a message takes from one device to the next in a node, in microseconds. `dico plan` computes from it and
    # from the next key how collectives become slower with the number of devices.
    link_hop_us: PositiveFloat = 2.0
    network_hop_us: PositiveFloat = 8.0  # How long a message takes from one node to the next, in microseconds.
    disk_gb_s: PositiveFloat = 1.0  # The write rate of one node to the file system that holds the checkpoints.


class ReliabilityConfig(Section):
    """How often a cluster fails, how long its jobs wait and start, and times of a run; for `dico plan --simulate`."""

    # The mean time between two losses of one node, in hours. SLURM then requeues the job. On a published cluster of
    # 2,048 nodes with 8 H100 each, 419 unexpected stops in 54 days are one in 6,300 hours of a node.
    node_mtbf_hours: PositiveFloat = 6300.0
    # The mean time between two crashes of one rank on a node that stays whole, in hours; with none there are none. The
    # job's supervisor decides what follows.
    rank_mtbf_hours: PositiveFloat | None = None
    # The part of the losses and crashes that the other ranks notice only after train.hang_timeout_s.
    hang_share: Probability = 0.0
    rack_nodes: Positive = 4  # The number of nodes of a rack, which are lost together.
    # The mean time between two losses of one rack, in hours; with none only single nodes are lost.
    rack_mtbf_hours: PositiveFloat | None = None
    # The number of nodes that can take the place of lost ones; with none there is always one.
    spare_nodes: NonNegative | None = None
    repair_hours: NonNegativeFloat = 24.0  # How long a lost node is away.
    # The mean time between two preemptions of the job, in hours; with none it is never preempted.
    preemption_hours: PositiveFloat | None = None
    # The seconds between the signal of a preemption and its end. Ranks that need longer to save lose the steps since
    # their last checkpoint.
    preemption_grace_s: NonNegativeFloat = 30.0
    queue_minutes: NonNegativeFloat = 10.0  # The mean wait in the queue before each start, exponentially distributed.
    requeue_s: NonNegativeFloat = 120.0  # The seconds for which SLURM holds a job back that is requeued.
    relaunch_hours: NonNegativeFloat = 8.0  # The mean time until somebody launches a job again that has given up.
    # A file with a number on each line, which is how many times the usual duration a step of one rank took. Each step
    # waits for its slowest rank. With none all ranks are equally fast.
    slow_steps: Text | None = None
    start_s: NonNegativeFloat = 60.0  # The seconds from the start of a job to its first step, without loading.
    # The seconds of verifying and loading a checkpoint; with none they follow from its size and hardware.disk_gb_s.
    load_s: NonNegativeFloat | None = None
    # The seconds from the beginning of a save until the checkpoint is complete; with none they follow from its size and
    # hardware.disk_gb_s.
    save_s: NonNegativeFloat | None = None
    # The seconds for which a save pauses training; with none they are those of a copy to host memory at 3 GB/s for each
    # device, or save_s if checkpoints are not written in the background.
    pause_s: NonNegativeFloat | None = None
    step_s: PositiveFloat | None = None  # The seconds of a step; with none they are those of the plan, a lower bound.


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
    reliability: ReliabilityConfig = ReliabilityConfig()  # The failures and waits that `dico plan --simulate` draws.

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
