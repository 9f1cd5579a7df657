"""Files of one JSON object a line, which grow by a line at a time."""

import json
from pathlib import Path
from typing import Any


def read_lines(file: Path) -> list[dict[str, Any]]:
    """All rows but torn ones, as of a full disk; none if the file is not there."""
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []


def add_line(file: Path, row: dict[str, Any]) -> None:
    """Append a row; on a line of its own even after a torn one."""
    with open(file, "a+") as lines:
        lines.seek(max(0, lines.tell() - 1))
        lines.write("\n" * (lines.read() not in ("", "\n")) + json.dumps(row) + "\n")
