"""Split networks among the processes by PyTorch's FSDP2, for models whose weights, gradients and optimizer state do not fit on one
device. What is saved is whole, so a run may continue with any number of processes, split or not.
"""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from utils.distributed import Ranks


def shard(ranks: Ranks, *networks: nn.Module) -> None:
    """Keep only this process's share of each weight. Layer by layer the whole is gathered when it is needed, in float32.

    Gradients arrive averaged over the ranks. From now on every rank must take part in each call of these networks.

    Args:
        networks: alike on all ranks, with `layers`, the modules to gather one by one.
    """
    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    for network in networks:
        for layer in network.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(network, mesh=mesh, reshard_after_forward=True)     # not the default of a root, whose weights an EMA updates next


def whole(tensor: Tensor) -> Tensor:
    """The tensor that the ranks hold together; all must call. A plain tensor is whole already."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def split_like(tensor: Tensor, other: Tensor) -> Tensor:
    """This rank's share of a whole tensor, alike on all ranks, if `other` is split; the tensor itself if not."""
    if not isinstance(other, DTensor):
        return tensor
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None)


def whole_weights(network: nn.Module) -> Mapping[str, Tensor]:
    """state_dict of the whole network; of a split one, on rank 0 only, in host memory, and all ranks must call."""
    if not isinstance(network, FSDPModule):
        return network.state_dict()
    return get_model_state_dict(network, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def load_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Strictly load a whole state_dict, alike on all ranks.

    Raises:
        RuntimeError: it does not fit.
    """
    if isinstance(network, FSDPModule):
        set_model_state_dict(network, dict(weights), options=StateDictOptions(full_state_dict=True))
    else:
        network.load_state_dict(weights)
