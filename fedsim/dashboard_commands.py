"""`fedsim dashboard ...`: the Grafana dashboard of runs on Ray."""

from __future__ import annotations

import os
import tempfile
from importlib import resources
from pathlib import Path

import click

from fedsim.errors import RunError
from fedsim.report.console import shown_path

FILE_NAME = "fedsim_grafana_dashboard.json"  # as Ray names its own
FOLDER_VARIABLE = (
    "RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR"  # Ray's, for the folder that its Grafana provisioning reads
)


@click.group()
def dashboard() -> None:
    """Watch runs in Grafana."""


@dashboard.command()
@click.argument("folder", required=False, metavar="[DIR]", type=click.Path(path_type=Path))
def export(folder: Path | None) -> None:
    """Write the Grafana dashboard of fedsim into DIR.

    Without DIR it goes where the Grafana settings that Ray writes look for dashboards: to the folder that
    RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR names, else to that of the Ray session of this machine.
    """
    target = (folder or _folder_of_ray()) / FILE_NAME
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(resources.files("fedsim.report").joinpath("grafana_dashboard.json").read_bytes())
    except OSError as err:
        raise RunError(f"{target} cannot be written: {err.strerror}; give another DIR") from err
    click.echo(f"written: {shown_path(target)}")


def _folder_of_ray() -> Path:
    """Find the folder of dashboards that Ray's provisioning of Grafana reads.

    Raises:
        RunError: if no Ray session of this machine has one.
    """
    named = os.environ.get(FOLDER_VARIABLE)
    if named:
        return Path(named)
    root = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()) / "ray"
    folder = root / "session_latest" / "metrics" / "grafana" / "dashboards"
    if not folder.is_dir():
        raise RunError(
            f"no Ray session with a dashboard has run on this machine (there is no {folder}); start the cluster first, "
            f"or give DIR"
        )
    return folder
