"""One process or many: `python train_teacher.py` and `torchrun --nproc-per-node=8 train_teacher.py` train alike.

DistributedDataParallel is not used, because each loss calls the network several times, which its hooks do not expect. The
training loop averages the gradients itself, by one all-reduce per update.
"""

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Ranks:
    """This process among all, and its device."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def batch_size(self) -> int:
        """Images at a time where nothing is learned: enough to fill a GPU, few enough to stay in a CPU's cache (twice as fast)."""
        return 500 if self.device.type == "cuda" else 50

    def rows(self, batch: Tensor) -> Tensor:
        """This rank's rows of a global batch: every world_size-th, so that a leading share stays a leading share.

        Contiguous: a view would keep the whole batch in memory.
        """
        return batch[self.rank :: self.world_size].contiguous()

    def count(self, num: int) -> int:
        """How many of the first num rows of a global batch are this rank's."""
        return len(range(self.rank, num, self.world_size))

    def autocast(self, wanted: bool = True) -> torch.autocast:
        """bfloat16 arithmetic over float32 weights on CUDA, if wanted; plain float32 elsewhere.

        Without autocast's cache of weights: one made by a target's pass, without gradient, would serve the next pass too
        and cut off its gradient.
        """
        return torch.autocast(self.device.type, torch.bfloat16, enabled=wanted and self.device.type == "cuda", cache_enabled=False)

    def average_gradients(self, network: nn.Module) -> None:
        """Replace each gradient by its mean over the ranks, with one all-reduce of one flat buffer.

        A network that is split among the ranks (`utils.sharding`) has averaged them already.
        """
        if self.world_size == 1:
            return
        from torch.distributed.tensor import DTensor  # slow to import

        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        if isinstance(gradients[0], DTensor):
            return
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        parts = (flat / self.world_size).split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [part.view_as(gradient) for part, gradient in zip(parts, gradients)])

    def gather(self, values: Tensor) -> Tensor:
        """Stack a tensor that has the same shape on every rank: (world_size, ...)."""
        if self.world_size == 1:
            return values[None]
        values = values.contiguous()
        result = [torch.empty_like(values) for _ in range(self.world_size)]
        dist.all_gather(result, values)
        return torch.stack(result)

    def agree(self, flag: bool) -> bool:
        """True if any rank says so. Waits for the device: call it where the loop waits anyway."""
        return bool(self.gather(torch.tensor([float(flag)], device=self.device)).any())

    def check_same(self, what: str, number: int, form: str = "d") -> None:
        """Raise ValueError on every rank unless all of them have this number; form: how to print it."""
        numbers = self.gather(torch.tensor([number], device=self.device)).flatten().tolist()
        if len(set(numbers)) > 1:
            shown = ", ".join(f"{each:{form}}" for each in numbers)
            raise ValueError(f"{what} differs from process to process: {shown}. Every host needs the same images and teacher, and to go on "
                             "must see the same --results-dir, in a folder that they share")

    def wait(self) -> None:
        """Return once every rank has come here."""
        if self.world_size > 1:
            dist.barrier()


def start(device: str, shard: bool = False) -> Ranks:
    """Join the other processes if torchrun started several, and choose the device.

    Args:
        device: "auto" (CUDA where there is one), "cuda", "cuda:1", "cpu", ...
        shard: whether networks are to be split among the processes (`utils.sharding`).

    Raises:
        ValueError: no such device, one for several processes, CUDA where there is none, or one process and nothing to split among.
    """
    world_size, local_rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    if shard and world_size == 1:
        raise ValueError("--shard True: there is one process, and nothing to split among; start several with torchrun")
    try:
        chosen = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    except RuntimeError:
        chosen = None
    if chosen is None or chosen.type not in ("cuda", "cpu"):
        raise ValueError(f"--device {device}: must be auto, cuda, cuda:1, ..., or cpu")
    if chosen.index is not None and world_size > 1:
        raise ValueError(f"--device {device}: {world_size} processes would share it; with cuda each has its own")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: this machine has no CUDA device; use --device cpu")
    if chosen.type == "cuda":
        chosen = torch.device("cuda", local_rank if chosen.index is None else chosen.index)
        torch.cuda.set_device(chosen)
        torch.set_float32_matmul_precision("high")
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", device_id=chosen if chosen.type == "cuda" else None)
    return Ranks(dist.get_rank() if world_size > 1 else 0, world_size, chosen)


def device_name(device: torch.device) -> str:
    """Type and name, and of a CPU its number of cores."""
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    about = Path("/proc/cpuinfo")                           # of Linux, where Python knows the architecture only
    names = re.findall(r"^model name\s*: (.+)", about.read_text(), re.MULTILINE) if about.exists() else []
    return f"cpu: {names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def finish() -> None:
    """Leave the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()
