"""Trains a model with DeepSpeed at ZeRO stages 0 to 3. This is the only module that imports DeepSpeed.

The fp32 weights, moments and averages that a rank holds are available as *pieces*: views of a range of a named
parameter. Checkpoints and gathering use pieces, and so do not depend on the stage.
"""

import logging
import math
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dico_t2i.config import ClusterConfig, OptimizerConfig, TrainConfig
from dico_t2i.models import Network
from dico_t2i.plan.buffers import bucket_size, gradient_bytes, overlaps
from dico_t2i.runs.checkpoint import Piece
from dico_t2i.runs.kinds import MOMENTS, WEIGHT
from dico_t2i.training.eight_bit import Adam8bitEMA
from dico_t2i.training.optimizer import AdamWEMA, Matrix, MuonEMA
from dico_t2i.training.ranks.distributed import World

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TORCH_EXTENSIONS_DIR", os.path.expanduser("~/.cache/dico_t2i/extensions"))  # noqa: PTH111

import deepspeed
from deepspeed.ops import __compatible_ops__
from deepspeed.runtime import compiler
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

# On CPUs DeepSpeed would compile an operator for shared-memory collectives at start-up, which gloo does not need.
__compatible_ops__["deepspeed_shm_comm"] = False
# DeepSpeed compiles its own Muon, which nothing here uses, and would import all of torch's compiler for that.
compiler.compile = lambda: compiler.dummy_decorator
# Its operators for experts, which nothing here uses, would import Triton, also where there is no GPU.
if "triton" not in sys.modules:
    sys.modules["triton"] = None  # type: ignore[assignment]
    with suppress(ImportError):  # a version of DeepSpeed without them
        import_module("deepspeed.ops.triton_ops")
    del sys.modules["triton"]
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it warns about every optimizer that it does not know


class Engine:
    """A model in training, with forward, backward, step, and access to its fp32 state."""

    def __init__(
        self,
        model: Network,
        train: TrainConfig,
        optimizer: OptimizerConfig,
        batching: tuple[int, int],
        world: World,
        cluster: ClusterConfig,
    ) -> None:
        """batching: samples per rank and pass, and passes per step. cluster: by its rates the buffers are chosen."""
        self.world, self.stage = world, train.zero_stage
        self.overlaps = overlaps(self.stage, world.size)
        self.shapes = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
        model.to(world.device)
        if train.compile == "blocks":
            model.compile_blocks()
        self.adam = _optimizer(model, optimizer)
        self.engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=self.adam,
            config=_deepspeed_config(train, optimizer, batching) | {"zero_optimization": self._zero(train, cluster)},
            dist_init_required=False,
        )
        self.adam.veto = self._unusable
        self.adam.deferred = world.device.type == "cuda"
        if isinstance(self.adam, MuonEMA):
            self.adam.matrices, self.adam.divided = self._matrices(self.adam), self.stage > 0 and world.size > 1
        self.limit = math.inf  # steps with a larger gradient norm are skipped
        self.skipped = torch.tensor(False, device=world.device)
        self._norm = torch.tensor(math.nan, device=world.device)

    def _zero(self, train: TrainConfig, cluster: ClusterConfig) -> dict[str, Any]:
        """DeepSpeed's settings of ZeRO, of which stage 0 reads none.

        No stage reads ``allgather_bucket_size``: stages 1 and 2 gather all weights at once, stage 3 those of a module.
        """
        if self.stage == 0:
            return {"stage": 0}
        sizes = [shape.numel() for shape in self.shapes.values()]
        return {
            "stage": self.stage,
            "overlap_comm": self.overlaps,
            "reduce_bucket_size": bucket_size(sizes, gradient_bytes(train), cluster),
            # Otherwise stages 1 and 2 wait for the device before they send a bucket, instead of once after a pass.
            "contiguous_gradients": True,
            "zero_hpz_partition_size": train.zero_group or 1,
        }

    @property
    def model(self) -> nn.Module:
        """The module to call in the forward pass."""
        return self.engine

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch's mean loss; gradients are averaged over micro-batches and ranks.

        If ``overlaps``, DeepSpeed waits for the device at the end of the passes in which it sends gradients: at stage 1
        the last one of a step, at stages 2 and 3 each one.
        """
        self.engine.backward(loss)

    def step(self, lr: float) -> Tensor:
        """End a micro-batch, and update after the last one of a step.

        Returns the norm of the last gradient before clipping. A step whose gradient norm is not finite, or above
        ``limit``, changes nothing and sets ``skipped``. Norm and ``skipped`` are zero-dimensional tensors on the
        device, and this code does not wait for them. DeepSpeed itself waits at stage 3, at stages 1 and 2 in fp32, and
        when it clips.
        """
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()
            return self._norm
        for group in self.adam.param_groups:
            group["lr"] = lr
        if self.stage == 0:
            gradients = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
            self._norm = torch.nn.utils.get_total_norm(gradients)
        self.engine.step()
        self.skipped, self._norm = self._unusable(), self._global_norm()
        return self._norm

    def _global_norm(self) -> Tensor:
        """The gradient norm over all ranks; inf if DeepSpeed found that it is not finite."""
        if self.stage == 0:
            return self._norm
        return torch.as_tensor(self.engine.optimizer._global_grad_norm, device=self.world.device)

    def _unusable(self) -> Tensor:
        """Whether the gradient would damage the weights."""
        norm = self._global_norm()
        return ~(norm.isfinite() & (norm <= self.limit))

    def materialize(self, step: int) -> None:
        """Create the optimizer state of step ``step``, to be filled through ``pieces``."""
        self.adam.materialize(self._flat_weights(), step)

    @property
    def optimizer_steps(self) -> int:
        """The number of updates so far, without skipped steps."""
        state = next(iter(self.adam.state.values()), None)
        return int(state["step"]) if state else 0

    def pieces(self) -> Iterator[Piece]:
        """All fp32 state that this rank holds, as views in the model's order, after ``materialize`` or a first step."""
        for name, parameter in self._trained():
            located = self._locate(parameter)
            if located is not None:
                flat, offset, start, numel = located
                held = {key: self.adam.part(flat, key, offset, offset + numel) for key in self.adam.state_names(flat)}
                yield Piece(name, start, {WEIGHT: flat.data.view(-1)[offset : offset + numel], **held})

    def owned_pieces(self) -> Iterator[Piece]:
        """The pieces that this rank writes to a checkpoint: all ranks together hold each element exactly once."""
        for piece in self.pieces():
            if self.stage > 0:
                yield piece
                continue
            share = -(-piece.numel // self.world.size)
            begin, end = self.world.rank * share, min(piece.numel, (self.world.rank + 1) * share)
            if begin < end:
                yield piece.narrow(begin, end)

    def held_bytes(self) -> dict[str, int]:
        """The bytes that this rank keeps between steps, by part, with the names of ``plan.Memory``."""
        parameters = [getattr(p, "ds_tensor", p) for p in self.engine.module.parameters()]
        masters = self._flat_weights() if self.stage > 0 else []
        states = [tensor for state in self.adam.state.values() for tensor in state.items()]
        return {
            "weights": sum(p.nbytes for p in parameters),
            "master_weights": sum(m.nbytes for m in masters),
            "moments": sum(tensor.nbytes for name, tensor in states if name in MOMENTS),
            "averages": sum(tensor.nbytes for name, tensor in states if name not in (*MOMENTS, "step")),
        }

    def publish_weights(self) -> None:
        """Copy the fp32 pieces, after a change of their values, into the weights that the forward pass uses."""
        self.adam.settle()
        zero = self.engine.optimizer
        if self.stage in (1, 2):
            zero.update_lp_params()
        elif self.stage == 3:
            for index in range(len(zero.fp16_groups)):
                zero._reassign_or_swap_out_partitioned_parameters(index)
            zero.invalidate_secondary_tensor()  # the copies within groups of ranks
            stale = [p for p in zero.persistent_parameters if p.ds_status == ZeroParamStatus.AVAILABLE]
            if stale:  # before the first pass there are none, and its trace has to see all of them gathered
                stale[0].all_gather(stale)

    def gather(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """Yield whole parameters of one kind ("weight", "ema_0.9999", ...) on every rank, one at a time; collective."""
        pieces = {piece.name: piece for piece in self.owned_pieces()}
        for name, shape in self.shapes.items():
            whole = torch.zeros(shape.numel(), device=self.world.device)
            piece = pieces.get(name)
            if piece is not None:
                whole[piece.start : piece.start + piece.numel] = piece.tensors[kind]
            dist.all_reduce(whole)
            yield name, whole.view(shape)

    def frozen(self) -> Iterator[tuple[str, Tensor]]:
        """Yield whole parameters that are not trained, as the forward pass uses them, one at a time; collective."""
        for name, parameter in self.engine.module.named_parameters():
            if not parameter.requires_grad:
                with deepspeed.zero.GatheredParameters([parameter], enabled=self.stage == 3):
                    yield name, parameter.data

    def distance(self, kind: str) -> float:
        """The distance of an average ("ema_0.9999") from the weights, ||weight - average|| / ||weight||; collective."""
        squares = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        for piece in self.owned_pieces():
            weight = piece.tensors[WEIGHT]
            squares[0] += (weight - piece.tensors[kind]).square().sum()
            squares[1] += weight.square().sum()
        dist.all_reduce(squares)
        return math.sqrt(squares[0].item() / squares[1].item())

    def close(self) -> None:
        """Release what DeepSpeed holds, so that another engine can follow in this process."""
        self.engine.destroy()

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that are trained: all, or those of an adapter."""
        return ((name, p) for name, p in self.engine.module.named_parameters() if p.requires_grad)

    def _matrices(self, optimizer: MuonEMA) -> dict[Tensor, list[Matrix]]:
        """The matrices that Muon updates, by the flat tensor in which this rank keeps its parts of them."""
        found = {name: p for name, p in self._trained() if name in optimizer.names}
        if self.stage == 0:
            return {p: [Matrix(p.shape, 0, 0, p.numel())] for p in found.values()}
        places = {name: self._locate(p) for name, p in found.items()}
        flat = optimizer.param_groups[-1]["params"][0]
        return {flat: [Matrix(self.shapes[n], *(place[1:] if place else (0, 0, 0))) for n, place in places.items()]}

    def _flat_weights(self) -> list[Tensor]:
        if self.stage == 0:
            return [parameter for _, parameter in self._trained()]
        if self.stage == 3:
            return list(self.engine.optimizer.fp32_partitioned_groups_flat)
        return list(self.engine.optimizer.single_partition_of_fp32_groups)

    def _locate(self, parameter: Any) -> tuple[Tensor, int, int, int] | None:
        """Where this rank keeps a parameter's fp32 copy: flat tensor, offset in it, start in the parameter, count."""
        if self.stage == 0:
            return parameter, 0, 0, parameter.numel()
        zero: Any = self.engine.optimizer
        if self.stage == 3:
            group, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
            share = parameter.ds_tensor.ds_numel  # equal on all ranks; on the last one a part may be padding
            start = self.world.rank * share
            numel = min(share, parameter.ds_numel - start)
            return (zero.fp32_partitioned_groups_flat[group], offset, start, numel) if numel > 0 else None
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
        source, target = mapping.hp_fragment_address, mapping.lp_fragment_address
        return flat, source.start, target.start, source.numel


def _optimizer(network: Network, config: OptimizerConfig) -> AdamWEMA:
    """The optimizer of the parameters that require gradients."""
    if config.kind == "muon":
        return MuonEMA(network, config)
    trained = [p for p in network.parameters() if p.requires_grad]
    return (Adam8bitEMA if config.kind == "adamw_8bit" else AdamWEMA)(trained, config)


def _deepspeed_config(train: TrainConfig, optimizer: OptimizerConfig, batching: tuple[int, int]) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": batching[0],
        "gradient_accumulation_steps": batching[1],
        "gradient_clipping": optimizer.clip,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**62,
    }
    if train.precision == "bf16":
        # At stage 0 DeepSpeed's bf16 optimizer makes a wrong first step; autocast with fp32 weights does not.
        if train.zero_stage == 0:
            config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
        else:  # our optimizer skips steps whose norm is not finite, so DeepSpeed's check, which waits, is off
            config["bf16"] = {"enabled": True, "check_grad_overflow": False}
    return config
