"""Make the demo page's models: each student as an ONNX step with float16 weights, and a list of them.

    python -m demo.prepare                                              every released student
    python -m demo.prepare results/student-photos                       one of your own
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

import export
from evaluate import label
from utils.checkpoints import read_metadata, resolve_weights
from utils.config import is_vacant, parse_config
from utils.errors import run_script

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Config:
    students: Annotated[tuple[str, ...], tyro.conf.Positional] = ()     # files or run folders; empty: checkpoints/student-*.safetensors
    out: str = str(HERE / "public/models")                              # folder to write to; models already there are replaced


def describe(student: str, folder: Path) -> dict[str, Any]:
    """Export one student into the folder; what the page needs to know of it.

    Raises:
        ValueError: it is no student, has another one's name, or makes latents, which the page cannot decode.
    """
    source = resolve_weights(student)
    metadata = read_metadata(source)
    if metadata.get("autoencoder"):
        raise ValueError(f"{student} makes latents; the page shows pixels only")
    name = label(Path(student).resolve()).removeprefix("student-")
    file = folder / f"{name}.onnx"
    if file.exists():
        raise ValueError(f"{student}: another student has the name {name} too; rename one")
    architecture = metadata["architecture"]
    told = "guidance_range" in architecture
    export.main([str(source), str(file), "--form", "step", "--half", "True", "--guidance-input", str(told)])
    more = f" + {architecture['extra_blocks']} blocks" if "extra_blocks" in architecture else ""
    return {"name": name, "file": file.name, "bytes": file.stat().st_size,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest()[:16], "network": architecture["preset"] + more,
            "shape": [architecture["num_channels"], *[architecture["image_size"]] * 2], "classes": metadata["classes"],
            "guidance": {"range": architecture["guidance_range"], "usual": architecture["guidance_scale"]} if told else None}


def main(argv: Sequence[str] | None = None) -> None:
    cfg = parse_config(Config, argv, __doc__)
    released = sorted(HERE.parent.glob("checkpoints/student-*.safetensors"), key=lambda path: path.stat().st_size)
    students = cfg.students or tuple(map(str, released))                # the page starts with the first, so with the smallest
    if not students:
        raise ValueError("there is no checkpoints/student-*.safetensors; name a student")
    out = Path(cfg.out)
    if not is_vacant(out) and not (out / "models.json").is_file():
        raise ValueError(f"--out {out}: must be new, empty, or a folder that this program made")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".models-") as temporary:
        fresh = Path(temporary, "models")
        fresh.mkdir()
        models = [describe(student, fresh) for student in students]
        (fresh / "models.json").write_text(json.dumps(models, indent=2) + "\n")
        shutil.rmtree(out, ignore_errors=True)
        fresh.rename(out)
    print(f"{out}: {', '.join(model['name'] for model in models)}")


if __name__ == "__main__":
    run_script(main)
