"""Networks in the form of the Hugging Face Hub: a folder with config.json, model.safetensors and a model card."""

from pathlib import Path
from typing import TYPE_CHECKING, Self

from huggingface_hub import PyTorchModelHubMixin, constants, hf_hub_download
from safetensors.torch import load_file

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

SHORT_CARD = """---
license: mit
library_name: splitmeanflow
tags: [splitmeanflow, flow-matching, diffusion-transformer]
---

A {name} of [SplitMeanFlow](https://arxiv.org/abs/2507.16884): `{name}.from_pretrained(...)`. t = 0 is data, t = 1 is noise.
"""


class HubModel(PyTorchModelHubMixin):
    """`from_pretrained(folder or hub id)`, `save_pretrained(folder)` and `push_to_hub(id)` of huggingface_hub, for a network.

    config.json holds the constructor's arguments; what else a caller puts there is passed over. Weights are read strictly
    and never unpickled.
    """

    @classmethod
    def _from_pretrained(cls, *, model_id: str, revision: str | None, cache_dir: str | Path | None, force_download: bool,
                         local_files_only: bool, token: str | bool | None, **architecture) -> Self:
        """Called by `from_pretrained` with what config.json says.

        Raises:
            FileNotFoundError: a folder without config.json or model.safetensors.
            OSError: an id that cannot be downloaded, with the hub's reason.
            RuntimeError: weights that do not fit.
        """
        folder = Path(model_id)

        def fetch(name: str) -> Path | str:
            if folder.is_dir():
                if not (folder / name).is_file():
                    raise FileNotFoundError(f"{folder} holds no {name}; a model folder has config.json and model.safetensors")
                return folder / name
            return hf_hub_download(model_id, name, revision=revision, cache_dir=cache_dir, force_download=force_download,
                                   token=token, local_files_only=local_files_only)

        if not architecture:                    # the mixin passes over a config.json that it cannot get; say why
            fetch(constants.CONFIG_NAME)
        weights = load_file(fetch(constants.SAFETENSORS_SINGLE_FILE))
        network = cls(**architecture)
        network.load_state_dict(weights)
        return network.eval()

    def _save_pretrained(self, save_directory: Path) -> None:
        weights = save_directory / constants.SAFETENSORS_SINGLE_FILE
        weights.touch()                         # readable by whom the umask lets; safetensors leaves it to its owner alone
        mode = weights.stat().st_mode
        super()._save_pretrained(save_directory)
        weights.chmod(mode)

    def generate_model_card(self, *args, **kwargs) -> "ModelCard":
        """The card of a network saved by itself; `release.py` writes one that knows the run."""
        from huggingface_hub import ModelCard

        return ModelCard(SHORT_CARD.format(name=type(self).__name__))
