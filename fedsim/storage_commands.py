"""`fedsim fetch` and `fedsim store`, and how commands name a run: by its folder, or by the URI of its stored copy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fedsim.report.console import shown_path
from fedsim.run_storage import RunStorage, fetch_run, is_uri

OUTPUT = click.Path(path_type=Path)


class RunPath(click.Path):
    """A run's folder; where a command takes the URI of a stored run as well, that as a text.

    Args:
        stored: take URIs.
    """

    def __init__(self, *, stored: bool = False) -> None:
        super().__init__(path_type=Path, file_okay=False)
        self.stored = stored

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the folder, or the URI."""
        if not (isinstance(value, str) and is_uri(value)):
            return super().convert(value, param, ctx)
        if not self.stored:
            self.fail(f"{value} is the URI of a stored run; get it with `fedsim fetch {value}`", param, ctx)
        return value


def local_run(run: Path | str, output: Path | None) -> Path:
    """Return the folder of a run that is to go on; a stored one is fetched."""
    if isinstance(run, str):
        folder = fetch_run(run, output, unfinished=True)
        click.echo(f"fetched {run} into {shown_path(folder.absolute())}")
        return folder
    if output is not None:
        raise click.UsageError("--output is for a run that is fetched from a URI; this one has its folder")
    return run


@click.command()
@click.argument("uri", metavar="URI")
@click.option("--output", type=OUTPUT, help="The folder to make.  [default: runs/<name of the copy>]")
def fetch(uri: str, output: Path | None) -> None:
    """Make a run folder of a stored run, to evaluate it or to look at it.

    \b
    Example:
      fedsim fetch s3://bucket/runs/trial
    """
    if not is_uri(uri):
        raise click.UsageError(f"'{uri}' is not a URI; write for example s3://bucket/runs/trial")
    click.echo(f"fetched {uri} into {shown_path(fetch_run(uri, output).absolute())}")


@click.command()
@click.argument("folder", metavar="RUN", type=RunPath())
@click.option("--storage", help="URI of the copy.  [default: that of the run's config]")
def store(folder: Path, storage: str | None) -> None:
    """Bring the stored copy of a run up to date.

    A run does so itself after each checkpoint; this is for a copy that could not be reached, or a new one.
    """
    from fedsim.config import make_config
    from fedsim.run_folder import RunFolder

    config = RunFolder.open(folder)[1]
    uri = config.storage if storage is None else make_config({}, {"storage": storage}).storage
    if uri is None:
        raise click.UsageError(f"the run in {folder} has no storage in its config; give --storage")
    RunStorage(uri).push(folder.absolute())
    click.echo(f"{folder} is stored at {uri}")
