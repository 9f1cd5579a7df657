"""Which teacher a student learns from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from utils.autoencoder import same_autoencoder
from utils.checkpoints import RELEASED, CheckpointError, is_finished, read_metadata, resolve_weights, step_folders
from utils.config import place, read_config
from utils.data import NAMES, Images
from utils.latents import Latents


def find_teacher(teacher: str | None, results_dir: str, data: str, image_size: int, kept: Path | None = None) -> Path:
    """The file of a teacher's EMA weights.

    Args:
        teacher: a file, checkpoint folder or run folder; None for the newest teacher run in `results_dir` on the same data
            and size, a finished one if there is any, else `kept`, else the released one.
        kept: where an earlier start of the run, which saved nothing, may have left a copy of its teacher.

    Raises:
        FileNotFoundError, CheckpointError: `teacher` is given and is none.
        ValueError: it is not given, and there is none for this data, or a run's config.json is broken.
    """
    if teacher is not None:
        return resolve_weights(teacher)
    runs, sizes = [], []
    for file in Path(results_dir).glob("*/config.json"):
        config = read_config(file)
        of_data = config.get("stage") == "teacher" and place(config.get("data")) == place(data)
        if not of_data or not (folders := step_folders(file.parent / "checkpoints")):
            continue
        path = folders[-1] / "ema.safetensors"
        try:
            size = read_metadata(path)["architecture"]["image_size"]
        except (FileNotFoundError, PermissionError):
            continue                                        # it cannot be of use; an earlier checkpoint must be asked for
        except CheckpointError:
            size = image_size                               # whoever loads it is told
        if size == image_size:
            runs.append((is_finished(file.parent / "checkpoints", config["steps"]), path.stat().st_mtime, path))
        else:
            sizes.append(f"{file.parent} has size {size}")
    if runs:
        return max(runs)[-1]
    if kept and kept.is_file():
        return kept
    released = RELEASED / f"teacher-{Path(data).stem}.safetensors"
    if data in NAMES and released.is_file():
        return released
    script = "train_teacher_mnist.py" if data in ("mnist", "digits") else "train_teacher.py"
    raise ValueError(f"no teacher for --data {data} of size {image_size}: none in {results_dir}"
                     + (f" ({', '.join(sorted(sizes))}: say so with --image-size)" if sizes else "")
                     + f", none released{f' ({released})' if data in NAMES else ''}. Run python {script} --data {data}, with the "
                     "--image-size of this command if it has one, or name a teacher with --teacher")


def same_classes(metadata: dict[str, Any], classes: list[str]) -> bool:
    """Whether these are a network's classes, in its order; of one that was imported without their names, whether they are as many."""
    theirs = metadata["classes"]
    nameless = "imported_from" in metadata["config"] and theirs == [str(i) for i in range(len(theirs))]
    return theirs == classes or (nameless and len(theirs) == len(classes))


def check_teacher(path: Path, metadata: dict, images: Images | Latents, model: str | None) -> None:
    """Raise ValueError unless the file is a teacher's and fits the data's size, channels, classes (see `same_classes`) and autoencoder,
    and --model if given."""
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
    if not same_classes(metadata, images.classes):
        raise ValueError(f"--teacher {path} knows the classes {', '.join(metadata['classes'])}, in this order; --data {images.name} has "
                         f"{', '.join(images.classes)}")
    if not same_autoencoder(metadata.get("autoencoder"), images.autoencoder):
        raise ValueError(f"--teacher {path} was trained on latents of {metadata.get('autoencoder')}, --data {images.name} has those of "
                         f"{images.autoencoder} (None: pixels, or imported without import_teacher.py --data)")


def num_noises_of(path: Path, config: dict[str, Any], note: Callable[[str], None]) -> int:
    """How many noises a student's image chooses from (`utils.flow.choose_noise`): as many as its teacher's; config: the teacher's."""
    if config.get("noise_candidates", 1) > 1:
        note(f"note: the images of teacher {path} had the nearest of {config['noise_candidates']} noises, which no flag makes any more; "
             "those of this student get any noise (docs/noise.md)")
    return config.get("num_noises", 1)


def note_other_teacher(start: str, metadata: dict[str, Any], teacher_id: str, note: Callable[[str], None]) -> None:
    """Say so if the student that a run starts from learnt from another teacher; students of old files do not tell.

    Args:
        start, metadata: the student's path and metadata.
        teacher_id: `utils.checkpoints.weights_id` of this run's teacher.
    """
    if metadata.get("teacher", teacher_id) != teacher_id:
        note(f"note: the student --start-from {start} learnt from teacher {metadata['teacher']}, this run's teacher is {teacher_id}. "
             "Without --start-from it would start as its own teacher, which served better (docs/recipe.md, Where a student starts)")
