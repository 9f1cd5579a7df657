"""Ctrl-C and SIGTERM as a polite request: finish this update, save, leave."""

import signal
from types import FrameType

from torch.distributed import is_torchelastic_launched


class StopRequest:
    """While entered, the first SIGINT or SIGTERM only sets `signal_number`. After it Ctrl-C acts as usual, and SIGTERM changes nothing;
    under torchrun neither does: it forwards both to processes that a scheduler may have told already, and ends them after 30 s itself."""

    def __init__(self) -> None:
        self.signal_number: int | None = None

    def __enter__(self) -> "StopRequest":
        self.previous = {number: signal.signal(number, self.request) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def request(self, number: int, _: FrameType | None) -> None:
        self.signal_number = self.signal_number or number
        if not is_torchelastic_launched():
            signal.signal(signal.SIGINT, self.previous[signal.SIGINT])

    def __bool__(self) -> bool:
        return self.signal_number is not None
