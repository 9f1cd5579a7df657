"""How a script ends: a mistake of its user in one line, a bug with its traceback."""

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent


def is_told(error: Exception) -> bool:
    """Whether an error's message is meant for the user: a `raise` of this project made it, or one of its lines asked the system in vain.

    What Python, PyTorch, ... raised on their own comes from a bug, or only its traceback says what it was about.
    """
    last = traceback.extract_tb(error.__traceback__)[-1]
    ours = Path(last.filename).is_relative_to(ROOT) and "site-packages" not in Path(last.filename).parts       # .venv lies in ROOT
    return ours and (isinstance(error, OSError) or (last.line or "").startswith("raise "))


def run_script(main: Callable[[], None]) -> None:
    """Call a script's main.

    Raises:
        SystemExit: it raised an error that `is_told`; with the line "error: ...", and of several processes with which one it was.
    """
    try:
        return main()
    except (ValueError, OSError, RuntimeError) as error:
        if not is_told(error):
            raise
        line = f"error: {error}" if os.environ.get("RANK", "0") == "0" else f"error in process {os.environ['RANK']}: {error}"
    sys.exit(line)                                          # only now: an error keeps the progress bars on its way open
