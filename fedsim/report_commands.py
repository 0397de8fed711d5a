"""`fedsim report`: the report of a run, a benchmark or a sweep, at any time; and the one that ends other commands."""

from __future__ import annotations

import logging
from pathlib import Path

import click

from fedsim.report.console import shown_path

logger = logging.getLogger(__name__)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--output", type=click.Path(path_type=Path, dir_okay=False), help="The file.  [default: FOLDER/report.html]"
)
def report(folder: Path, output: Path | None) -> None:
    """Write the report of a run, a benchmark or a sweep as one HTML file.

    It needs no network, and shows what there is of one that is not finished.

    \b
    Examples:
      fedsim report runs/trial
      fedsim report runs/imputers --output imputers.html
    """
    from fedsim.report import write_report

    written = write_report(folder, output)
    click.echo(f"Written: {shown_path(written.absolute())}")


def finish_with_report(folder: Path) -> None:
    """Write the report at the end of a run, a benchmark or a sweep; what goes wrong with it costs nothing else.

    The work is done and saved: a defect here becomes a warning that names the command to try again.
    """
    from fedsim.report import write_report

    try:
        written = write_report(folder)
    except Exception as err:  # whatever it is, the results are there
        text = " ".join(str(err).split()) or type(err).__name__
        logger.warning("no report was written: %s; try again with: fedsim report %s", text, shown_path(folder))
        logger.info("why no report was written", exc_info=True)
    else:
        click.echo(f"Report: {shown_path(written.absolute())}")
