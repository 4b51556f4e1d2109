"""The processes that train a model together, and what they tell one another."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass
class Processes:
    """
    The processes that train a model together; by default one alone.

    Args:
        rank (`int`): of this process.
        count (`int`): number of processes.
        local_rank (`int`): of this process in its node.
        local_count (`int`): processes of this node.
        gather (`Callable`, *optional*):
            concatenates tensors of one shape of all processes, on the CPU; `None` for one process.
        broadcast (`Callable`, *optional*): gives every process the tensor of the first one; `None` for one process.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1
    gather: Callable[[torch.Tensor], torch.Tensor] | None = None
    broadcast: Callable[[torch.Tensor], torch.Tensor] | None = None

    @classmethod
    def of_torch(cls, device: torch.device) -> Processes:
        """
        The processes of the default group of `torch.distributed`, if there is one.

        Args:
            device (`torch.device`): where the model is.

        Raises:
            ValueError: if a launcher started several processes and they do not know one another yet.
        """
        launched = int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1
        ready = dist.is_available() and dist.is_initialized()
        if launched > 1 and not ready:
            raise ValueError(
                f"the launcher started {launched} processes, which do not know one another: make the Accelerator, or "
                "call torch.distributed.init_process_group(), before the distiller."
            )
        if not ready or dist.get_world_size() == 1:
            return cls()
        rank, count = dist.get_rank(), dist.get_world_size()
        local_rank = int(os.environ.get("LOCAL_RANK", rank))
        local_count = int(os.environ.get("LOCAL_WORLD_SIZE", count))

        def gather(tensor: torch.Tensor) -> torch.Tensor:
            sent = tensor.to(device).contiguous()
            received = [torch.empty_like(sent) for _ in range(count)]
            dist.all_gather(received, sent)
            return torch.cat(received).cpu()

        def broadcast(tensor: torch.Tensor) -> torch.Tensor:
            dist.broadcast(tensor, src=0)
            return tensor

        return cls(rank, count, local_rank, local_count, gather, broadcast)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of equal tensors of all processes. Every process must call this."""
        if self.gather is None:
            return tensor
        return self.gather(tensor.unsqueeze(0)).sum(dim=0).to(tensor.device)

    def gather_parts(self, parts: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """
        What each process has under the same names. Every process must call this.

        Args:
            parts (`dict[str, torch.Tensor]`):
                with at least one dimension; the processes agree on all sizes but the first.

        Returns:
            `list[dict]`: the tensors of each process, on the CPU.
        """
        if self.gather is None:
            return [parts]
        result: list[dict[str, torch.Tensor]] = [{} for _ in range(self.count)]
        for name in sorted(parts):
            tensor = parts[name].detach().contiguous()
            lengths = self.gather(torch.tensor([len(tensor)])).tolist()
            values = tensor.reshape(-1).view(torch.uint8)  # not every backend sends every type
            row = math.prod(tensor.shape[1:]) * tensor.element_size()
            sent = values.new_zeros(max(lengths) * row)
            sent[: len(values)] = values
            received = self.gather(sent).view(self.count, -1)
            for part, length, whole in zip(result, lengths, received, strict=True):
                part[name] = whole[: length * row].clone().view(tensor.dtype).view(length, *tensor.shape[1:])
        return result
