"""Gather loss values on the device without waiting for it: means for the log, and the first step that was not finite."""

import torch
from torch import Tensor

from utils.distributed import Ranks


class NonFiniteError(RuntimeError):
    """A loss or gradient was infinite or not a number."""


class Meter:
    """Collects named scalars of each step; reading them is the only moment that waits for the device.

    `record` returns at once. Should a value be non-finite, the optimizer is told on the device to leave the weights as they
    are, at this step and at all later ones, until the next `read` raises.
    """

    def __init__(self, names: list[str], ranks: Ranks):
        self.names, self.ranks = names, ranks
        self.bad = torch.zeros((), dtype=torch.bool, device=ranks.device)
        self.bad_step = torch.zeros((), device=ranks.device, dtype=torch.float64)
        self.bad_values = torch.zeros(len(names), device=ranks.device, dtype=torch.float64)
        self.reset()

    def reset(self) -> None:
        self.total = torch.zeros(len(self.names), device=self.ranks.device, dtype=torch.float64)
        self.count = 0

    @torch.no_grad()
    def record(self, step: int, **values: Tensor) -> Tensor:
        """Add one step's scalars, one for each name. Returns a device bool: True means that the update must not happen."""
        row = torch.stack([values[name].detach().double() for name in self.names])
        first = ~row.isfinite().all() & ~self.bad
        self.bad_step = torch.where(first, float(step), self.bad_step)
        self.bad_values = torch.where(first, row, self.bad_values)
        self.bad = self.bad | first
        self.total += row
        self.count += 1
        return self.bad

    def read(self) -> dict[str, float]:
        """Means since the last reading, over steps and ranks; then start anew.

        Raises:
            NonFiniteError: some value was not finite; names the first such step and its values.
        """
        gathered = self.ranks.gather(torch.cat([self.bad_step[None], self.bad_values, self.total / self.count])).tolist()
        bad = min((row for row in gathered if row[0] > 0), default=None, key=lambda row: row[0])
        if bad is not None:
            parts = ", ".join(f"{name}={value:.6g}" for name, value in zip(self.names, bad[1:]))
            raise NonFiniteError(f"step {bad[0]:.0f} is not finite: {parts}. The update was not made, and nothing was saved since")
        self.reset()
        means = torch.tensor([row[1 + len(self.names) :] for row in gathered], dtype=torch.float64).mean(0)
        return dict(zip(self.names, means.tolist()))
