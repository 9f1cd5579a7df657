"""Metrics and pictures on comet.com, or in an archive for it."""

import logging
from pathlib import Path
from typing import Any


def start_comet(mode: str, folder: Path, name: str, note: Any) -> Any:
    """A comet.com experiment: online if a key is configured and mode is "auto", otherwise an archive in `folder`/comet.

    Returns:
        The experiment, or None if mode is "off", or if comet_ml is not installed and mode is "auto".
    """
    if mode == "off":
        return None
    try:
        import comet_ml  # slow to import, and optional
    except ModuleNotFoundError:
        if mode == "offline":
            raise ValueError("--comet offline: comet_ml is not installed; install it or use --comet off") from None
        note("comet_ml is not installed: metrics go to the run folder only")
        return None
    logging.getLogger("comet_ml").setLevel(logging.ERROR)   # it has many notices
    online = mode == "auto" and bool(comet_ml.config.get_config("comet.api_key"))
    (folder / "comet").mkdir(exist_ok=True)
    settings = comet_ml.ExperimentConfig(
        name=name, offline_directory=str(folder / "comet"), log_code=False, log_graph=False, log_git_patch=False, parse_args=False,
        auto_param_logging=False, auto_metric_logging=False, auto_output_logging=False, auto_log_co2=False, display_summary_level=0,
        log_env_details=False,
    )
    experiment = comet_ml.start(online=online, project_name="splitmeanflow", experiment_config=settings)
    if online and not experiment.alive:
        note("comet.com cannot be reached or refuses the key: writing an offline archive instead")
        experiment = comet_ml.start(online=False, project_name="splitmeanflow", experiment_config=settings)
    return experiment
