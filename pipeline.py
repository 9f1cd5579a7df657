"""A checkpoint as an object to call, in the manner of diffusers.

    import torch
    from pipeline import SplitMeanFlowPipeline

    pipe = SplitMeanFlowPipeline.from_pretrained("checkpoints/student-mnist.safetensors").to("cuda")
    image = pipe(class_labels=[7], num_inference_steps=1, generator=torch.manual_seed(0)).images[0]
"""

import math
import re
from collections.abc import Sequence
from numbers import Integral, Number, Real
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor

from models import DiT, SiT, build_network, from_pretrained
from utils.autoencoder import load_autoencoder
from utils.checkpoints import load_network, save_model_folder
from utils.data import to_pixels
from utils.guidance import guided_velocity
from utils.sampling import sample_average_velocity, sample_velocity


class PipelineOutput(NamedTuple):
    """images: a list of PIL images, an array (B, H, W, C) uint8, or a tensor (B, C, H, W) in [-1, 1], as `output_type` asked."""

    images: list[Image.Image] | np.ndarray | Tensor


class SplitMeanFlowPipeline:
    """Images from a student in 1, 2, 4, ... evaluations, or from a teacher by its ODE.

    Args:
        network: a student's or teacher's.
        information: "kind" ("student" or "teacher") and "classes" (their names, none if unconditional); whatever else is
            there is kept and saved with the network.
        autoencoder: of a network of latents: hub id or folder; None for where it was in training.
    """

    def __init__(self, network: DiT | SiT, information: dict[str, Any], autoencoder: str | None = None):
        self.network, self.information = network.eval().requires_grad_(False), information
        self.autoencoder = load_autoencoder(information.get("autoencoder"), autoencoder, self.device)

    @classmethod
    def from_pretrained(cls, source: str | Path, autoencoder: str | None = None, **hub_arguments) -> Self:
        """Load a model folder, a Hub id, or anything else that sample.py takes (a safetensors file, a run folder).

        Args:
            source: see above.
            autoencoder: as above.
            hub_arguments: revision, token, cache_dir, local_files_only, force_download.

        Raises:
            FileNotFoundError, CheckpointError: a path that holds no model.
            ValueError: a network's own `save_pretrained`, which does not say what it is.
            OSError: a Hub id that cannot be downloaded.
        """
        path = Path(source)
        if path.exists() and not (path / "model.safetensors").is_file():
            network, metadata = load_network(path, build_network)
            return cls(network, {key: value for key, value in metadata.items() if key != "architecture"}, autoencoder)
        if not path.exists() and (not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(source)) or path.suffix == ".safetensors"):
            raise FileNotFoundError(f"no model at {source}; a Hub id has the form user/name")
        if not path.exists() and (file := path.with_name(f"{path.name}.safetensors")).is_file():
            raise FileNotFoundError(f"no model at {source}; {file} is there")
        network, config = from_pretrained(source, **hub_arguments)
        if "kind" not in config:
            raise ValueError(f"{source} holds a network alone, without its kind and classes; release.py and save_pretrained of a pipeline "
                             "write those too")
        return cls(network, {key: value for key, value in config.items() if key not in network.architecture}, autoencoder)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, model.safetensors and, if there is none, a short model card."""
        save_model_folder(Path(folder), self.network, {"architecture": self.network.architecture, **self.information})

    def to(self, device: torch.device | str) -> Self:
        """Move network and autoencoder."""
        self.network.to(device)
        self.autoencoder.to(device)
        return self

    @property
    def device(self) -> torch.device:
        return self.network.position.device

    @property
    def classes(self) -> list[str]:
        return self.information["classes"]

    def labels(self, class_labels: int | str | Sequence[int | str] | Tensor | None, batch_size: int) -> Tensor:
        """Class indices (B,) from numbers or names, or a single one; None for `batch_size` images without a class.

        Raises:
            ValueError: an unknown class.
        """
        if class_labels is None:
            return torch.full((batch_size,), self.network.null_class)
        given = class_labels.tolist() if isinstance(class_labels, Tensor) else class_labels
        labels = [given] if isinstance(given, Number | str) else list(given)
        known = {**{i: i for i in range(self.network.null_class)}, **{name: i for i, name in enumerate(self.classes)}}
        unknown = [label for label in labels if not isinstance(label, Integral | str) or label not in known]
        if unknown or not labels:
            allowed = f"{', '.join(self.classes)}, or 0 to {len(self.classes) - 1}" if self.classes else "no classes: use None"
            raise ValueError(f"class_labels {unknown or labels}: this model knows {allowed}")
        return torch.tensor([known[label] for label in labels])

    def noise(self, count: int, generator: Generator | Sequence[Generator] | None) -> Tensor:
        """(count, C, H, W) standard Gaussian, drawn on the generator's device; a list gives each image its own."""
        if not isinstance(generator, Generator | Sequence | None):
            raise ValueError(f"generator {generator!r}: must be a torch.Generator, one for each image, or None")
        if isinstance(generator, Sequence):
            if len(generator) != count:
                raise ValueError(f"{len(generator)} generators for {count} images; give one, or one for each image")
            return torch.cat([self.noise(1, each) for each in generator])
        device = generator.device if generator is not None else self.device
        return torch.randn(count, *self.network.shape, generator=generator, device=device).to(self.device)

    @torch.no_grad()
    def __call__(self, class_labels: int | str | Sequence[int | str] | Tensor | None = None, num_inference_steps: int | None = None,
                 generator: Generator | Sequence[Generator] | None = None, guidance_scale: float | None = None,
                 output_type: Literal["pil", "np", "pt"] = "pil", batch_size: int = 1, noise_scale: float = 1.0) -> PipelineOutput:
        """Draw images.

        Args:
            class_labels: one image each, class numbers or names, or a single one; None: no class, which a student of images with
                classes has not learnt (it learns its teacher's guided velocity, of a class), so that its images are poorer.
            num_inference_steps: None for 1 with a student and 25 with a teacher.
            generator: of the noise; one for all images, or one for each.
            guidance_scale: None for 1 with a teacher, its own with a student, which may have learned others to choose from.
            output_type: see `PipelineOutput`.
            batch_size: number of images if `class_labels` is None.
            noise_scale: size of the noise to start from, above 0; it is 1 in training, and a little above it images vary more.

        Raises:
            ValueError: a class, a number of steps or images, a guidance or noise scale, a generator or an output type that there is not.
        """
        student = self.information["kind"] == "student"
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type {output_type!r}: use pil, np or pt")
        if num_inference_steps is None:
            num_inference_steps = 1 if student else 25
        for name, value in (("num_inference_steps", num_inference_steps), ("batch_size", batch_size)):
            if not isinstance(value, Integral) or value < 1:
                raise ValueError(f"{name} {value!r}: must be a whole number, at least 1")
        if guidance_scale is not None and not (isinstance(guidance_scale, Real) and math.isfinite(guidance_scale)):
            raise ValueError(f"guidance_scale {guidance_scale!r}: must be a finite number, or None")
        if not (isinstance(noise_scale, Real) and 0 < noise_scale < math.inf):
            raise ValueError(f"noise_scale {noise_scale!r}: must be a number above 0")
        if not student and guidance_scale not in (None, 1) and not self.classes:
            raise ValueError(f"guidance_scale {guidance_scale}: this model has no classes to guide to; use None")
        u = self.network.at_guidance(guidance_scale) if student else None
        y = self.labels(class_labels, batch_size).to(self.device)
        z = noise_scale * self.noise(len(y), generator)
        if student:
            x = sample_average_velocity(u, z, y, num_inference_steps)
        else:
            v = guided_velocity(self.network.velocity, self.network.null_class, 1.0 if guidance_scale is None else guidance_scale)
            x = sample_velocity(v, z, y, num_inference_steps)
        x = self.autoencoder.decode(x)
        if output_type == "pt":
            return PipelineOutput(x.clamp(-1, 1))
        pixels = to_pixels(x).permute(0, 2, 3, 1).cpu().numpy()                     # (B, H, W, C)
        if output_type == "np":
            return PipelineOutput(pixels)
        return PipelineOutput([Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image) for image in pixels])
