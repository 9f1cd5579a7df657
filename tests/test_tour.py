"""notebooks/tour.ipynb runs from top to bottom, and what it says of the method holds when it does."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"


def printed(notebook: nbformat.NotebookNode) -> str:
    """All text output, in order."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


def percents(text: str, line: str) -> list[float]:
    """The percentages in the line that begins so."""
    found = next(each for each in text.splitlines() if each.startswith(line))
    return [float(number) for number in re.findall(r"([\d.]+)%", found)]


@pytest.fixture(scope="module")
def ran():
    notebook = nbformat.read(FOLDER / "tour.ipynb", as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}).execute()
    return notebook


def test_it_runs_without_a_word_on_stderr(ran):
    outputs = [output for cell in ran.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 6


def test_one_step_lands_along_u_and_misses_along_v(ran):
    text = printed(ran)
    assert percents(text, "many small steps along v")[0] > 97 and percents(text, "one step along u")[0] > 97
    assert percents(text, "one step along v")[0] < 5


def test_mistakes_of_direction_show(ran):
    text = printed(ran)
    assert min(percents(text, "right")) > 97
    for mistake in ("length t - r passed for r", "r and t exchanged", "time reversed", "wrong sign"):
        assert percents(text, mistake)[0] < 50, mistake     # at one step


def test_the_student_beats_eulers_method_and_its_digits_are_read(ran):
    text = printed(ran)
    for num_steps, least in ((1, 80), (2, 85), (4, 92)):
        student, euler = percents(text, f"{num_steps} evaluations: student")
        assert student > max(least, euler)
        reads = next(line for line in text.splitlines() if line.startswith(f"{num_steps} evaluations: an independent classifier reads"))
        digits = [int(digit) for digit in reads.split("reads")[1].split()]
        assert sum(digit == i for i, digit in enumerate(digits)) >= 9
    assert float(re.search(r"correlation of their logarithms ([\d.]+)", text)[1]) > 0.7


def test_what_is_committed_is_small_and_of_no_machine():
    text = (FOLDER / "tour.ipynb").read_text()
    assert len(text) < 700_000 and not re.search(r"(/home|/root|/opt|/usr|/tmp|/work|/Users|[A-Z]:\\\\)[/\\]", text)
    notebook = nbformat.reads(text, as_version=4)
    assert "within 3 sd" in printed(notebook)               # it shows its results without being run
    assert not [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs if output.get("name") == "stderr"]
