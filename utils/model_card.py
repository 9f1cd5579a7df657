"""The model card of a released folder, written from what the run recorded."""

import json
import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from utils.config import public_path
from utils.guidance import guidance_in_words
from utils.json_lines import read_lines
from utils.report import weights_name

USE = """```python
import torch
from pipeline import SplitMeanFlowPipeline     # in a clone of the project

pipe = SplitMeanFlowPipeline.from_pretrained("{name}")
images = pipe({call}, generator=torch.manual_seed(0)).images
```"""


def read_json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else None


def training_lines(run: Path, config: dict[str, Any], step: int) -> list[str]:
    """How the weights came about: command, device, time and versions of a run folder, as far as it has them."""
    if "imported_from" in config:
        return [f"These weights were trained elsewhere and imported from `{config['imported_from']}` (sha256 {config['sha256']})."]
    lines = [f"Trained for {step} updates of {config['global_batch_size']} images of `{config['data']}`, with seed {config['seed']}."]
    for start in read_json(run / "environment.json") or []:
        flags = ["=".join(map(public_path, flag.split("="))) for flag in start["command"][1:]]
        command = shlex.join(["python", Path(start["command"][0]).name, *flags])
        lines.append(f"\n    {command}\n\nran on {start['device']}, in {start['processes']} process(es), with torch {start['torch']}, "
                     f"commit {start['git_commit'] or 'unknown'}, from step {start['after_step']}.")
    if rows := read_lines(run / "metrics.jsonl"):
        seconds = rows[-1].get("seconds")
        lines += [f"\nTraining took {seconds:.0f} s."] if seconds else []
    return lines


def numbers_of(evaluation: Path, weights: str) -> str:
    """The table that evaluate.py wrote into a folder, if it is of these weights (`report.weights_name`)."""
    table, metrics = (evaluation / name for name in ("table.md", "metrics.json"))
    if not (table.is_file() and metrics.is_file()):
        raise FileNotFoundError(f"{evaluation} holds no table.md and metrics.json; make them with evaluate.py")
    protocol = read_json(metrics)["protocol"]
    if "samples" in protocol:
        raise ValueError(f"{evaluation} is of samples of a {protocol['samples']}, not of what this network makes; use evaluate.py")
    measured = protocol.get("weights", "of an older evaluate.py, which did not say")
    if measured != weights:
        raise ValueError(f"{evaluation} is of the weights {measured}, not of these, {weights}; make it anew with evaluate.py")
    text = table.read_text().strip()
    for key in protocol.keys() & {"checkpoint", "data"}:
        text = text.replace(f"{key} {protocol[key]}", f"{key} {public_path(protocol[key])}")
    return text


def model_card(name: str, metadata: dict[str, Any], weights: str, run: Path, evaluation: Path | None) -> str:
    """Markdown with the front matter that the Hub reads.

    Args:
        name: what `from_pretrained` takes: the folder's name, or the Hub id.
        metadata: of the weights: kind, architecture, classes, config, step.
        weights: `checkpoints.weights_id` of what the card is about.
        run: the folder of the training run.
        evaluation: the folder that evaluate.py wrote, whose table is the card's; None: the card says that there is none.

    Raises:
        FileNotFoundError: `evaluation` is not what evaluate.py wrote.
        ValueError: it is of other weights, or too old to say of which.
    """
    config, architecture, kind = metadata["config"], metadata["architecture"], metadata["kind"]
    student = kind == "student"
    front = {"license": "mit", "library_name": "splitmeanflow", "pipeline_tag": "unconditional-image-generation",
             "tags": ["splitmeanflow", "flow-matching", "diffusion-transformer", *(["few-step"] if student else [])]}
    if config["data"] in ("mnist", "cifar10"):
        front["datasets"] = [config["data"]]
    size = "latents" if metadata.get("autoencoder") else "images"
    size += f" {architecture['image_size']} x {architecture['image_size']} x {architecture['num_channels']}"
    classes = metadata["classes"]
    more = f" with {architecture['extra_blocks']} more blocks" if "extra_blocks" in architecture else ""
    more += ", a share of its input in its output" if architecture.get("input_skip") else ""
    call = f"class_labels=[{classes[0]!r}]" if classes else "batch_size=4"
    if config.get("guidance_range"):
        call += f", guidance_scale={config['guidance_scale']:g}"
    what = ("Few-step student: makes an image in 1, 2 or 4 network evaluations. Its teacher's guidance, "
            f"{guidance_in_words(config)}, is part of it and takes no further evaluations." if student else
            "Flow-matching teacher: predicts the velocity of an ODE, to be solved in some 25 steps, with or without guidance.")
    numbers = (numbers_of(evaluation, weights_name(weights, metadata)) if evaluation else
               "None: this card was made without an evaluation by `evaluate.py`.")
    return "\n".join([
        "---", ModelCardData(**front).to_yaml().strip(), "---", "", f"# {name}", "",
        f"{what} Method: [SplitMeanFlow, arXiv 2507.16884](https://arxiv.org/abs/2507.16884). t = 0 is data, t = 1 is noise.", "",
        f"Network {architecture['preset']}{more}, {size}, "
        + (f"{len(classes)} classes: {', '.join(classes)}." if classes else "unconditional."), "",
        "## Use", "", USE.format(name=name, call=call + (", num_inference_steps=1" if student else "")), "",
        "## Numbers", "", numbers, "",
        "## Training", "",
        *([f"The mean of the weights {', '.join(metadata['mean_of'])}, of runs that may differ, is released here. "
           "The rest of this section is about the first.", ""]
          if "mean_of" in metadata else []),
        *training_lines(run, config, metadata["step"]), "",
        "| setting | value |", "|---|---|", *(f"| {key} | {value} |" for key, value in config.items()), ""])
