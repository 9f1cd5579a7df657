"""Which teacher a student learns from."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from utils.autoencoder import same_autoencoder
from utils.checkpoints import resolve_weights, step_folders
from utils.data import NAMES, PATH_SIZE, Images
from utils.latents import Latents, is_latents

RELEASED = Path(__file__).parent.parent / "checkpoints"


def find_teacher(teacher: str | None, results_dir: str, data: str, image_size: int) -> Path:
    """The file of a teacher's EMA weights.

    Args:
        teacher: a file, checkpoint folder or run folder; None for the newest teacher run in `results_dir` on the same data
            and size, else the released one.

    Raises:
        FileNotFoundError, CheckpointError: `teacher` is given and is none.
        ValueError: it is not given, and there is none for this data.
    """
    if teacher is not None:
        return resolve_weights(teacher)
    runs = []
    for file in Path(results_dir).glob("*/config.json"):
        config = json.loads(file.read_text())
        size = config.get("image_size") or (image_size if data in NAMES or is_latents(Path(data)) else PATH_SIZE)      # as `load_data`
        same = config.get("stage") == "teacher" and config["data"] == data and size == image_size
        if same and (folders := step_folders(file.parent / "checkpoints")):
            runs.append(folders[-1] / "ema.safetensors")
    if runs:
        return max(runs, key=lambda path: path.stat().st_mtime)
    released = RELEASED / f"teacher-{Path(data).stem}.safetensors"
    if released.is_file():
        return released
    script = "train_teacher_mnist.py" if data in ("mnist", "digits") else "train_teacher.py"
    raise ValueError(f"no teacher for --data {data}: none in {results_dir}, none released ({released}). "
                     f"Run python {script} --data {data} first, or name one with --teacher")


def check_teacher(path: Path, metadata: dict, images: Images | Latents, model: str | None) -> None:
    """Raise ValueError unless the file is a teacher's and fits the data's size, channels, classes (names, in order) and autoencoder, and
    --model if given."""
    if metadata["kind"] != "teacher":
        raise ValueError(f"--teacher {path} is a {metadata['kind']}; a student needs a teacher")
    architecture = metadata["architecture"]
    if model not in (None, architecture["preset"]):
        raise ValueError(f"--model {model}: the student has the size of its teacher {path}, which is {architecture['preset']}")
    trained = (architecture["num_channels"], architecture["image_size"], architecture["num_classes"])
    wanted = (images.shape[0], images.shape[1], len(images.classes))
    if trained != wanted:
        raise ValueError("--teacher {} was trained on {} channels, size {}, {} classes; --data {} has {} channels, size {}, {} classes"
                         .format(path, *trained, images.name, *wanted))
    theirs = metadata["classes"]
    if theirs != images.classes and theirs != [str(i) for i in range(len(theirs))]:      # numbers: imported without names
        raise ValueError(f"--teacher {path} knows the classes {', '.join(theirs)}, in this order; --data {images.name} has "
                         f"{', '.join(images.classes)}")
    if not same_autoencoder(metadata.get("autoencoder"), images.autoencoder):
        raise ValueError(f"--teacher {path} was trained on latents of {metadata.get('autoencoder')}, --data {images.name} has those of "
                         f"{images.autoencoder} (None: pixels)")


def note_other_teacher(start: str, metadata: dict[str, Any], teacher_id: str, note: Callable[[str], None]) -> None:
    """Say so if the student that a run starts from learnt from another teacher; students of old files do not tell.

    Args:
        start, metadata: the student's path and metadata.
        teacher_id: `utils.checkpoints.weights_id` of this run's teacher.
    """
    if metadata.get("teacher", teacher_id) != teacher_id:
        note(f"note: the student --start-from {start} learnt from teacher {metadata['teacher']}, this run's teacher is {teacher_id}. "
             "Without --start-from it would start as its own teacher, which served better (docs/method.md, Where a student starts)")
