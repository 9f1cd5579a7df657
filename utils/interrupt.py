"""Ctrl-C, SIGTERM and a closed terminal (SIGHUP) as a polite request: finish this update, save, leave."""

import signal
from types import FrameType

from torch.distributed import is_torchelastic_launched


class StopRequest:
    """While entered, the first SIGINT, SIGTERM or SIGHUP only sets `signal_number`. After it Ctrl-C acts as usual, and the others change
    nothing; under torchrun none does: it forwards them to processes that may have been told already, and ends them after 30 s itself."""

    def __init__(self) -> None:
        self.signal_number: int | None = None

    def __enter__(self) -> "StopRequest":
        numbers = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:     # Windows has none, nohup ignores it
            numbers.append(signal.SIGHUP)
        self.previous = {number: signal.signal(number, self.request) for number in numbers}
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
