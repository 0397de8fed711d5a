"""`fedsim tune`: a sweep over config values, each trial a whole federation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from fedsim.cli_options import ConfigCommand, config_options, current_overrides
from fedsim.report.console import make_console, show_rows, shown_path

OWN_OPTIONS = ("output", "storage")  # config options that a sweep has others for, or none
WITH_RESUME = ("folder", "retry_failed")  # what `--resume` goes with

Start = Callable[[str, Path, Path | None, Mapping[str, Any], Mapping[str, Any]], bool]
"""Starts a sweep: search space, folder, config file, changes of the config, settings of the sweep."""
GoOn = Callable[[Path, bool], bool]
"""Continues a sweep: folder, whether failed trials are tried again."""
Spaces = Callable[[], list[list[str]]]
"""Returns the shipped search spaces: name, title, what is varied."""


SCHEDULERS, SEARCHES = click.Choice(["asha", "none", "pbt"]), click.Choice(["grid", "random", "optuna"])
FOLDER, COUNT = click.Path(path_type=Path, file_okay=False), click.IntRange(min=1)
OPTIONS = (
    click.option("--output", type=FOLDER, help="Folder of the sweep."),
    click.option("--config", type=click.Path(path_type=Path), help="Config that the trials begin with."),
    click.option("--trials", type=COUNT, help="Number of trials.  [default: a whole grid, else 16; pbt 4]"),
    click.option("--scheduler", type=SCHEDULERS, default="asha", show_default=True),
    click.option("--search", type=SEARCHES, default="random", show_default=True),
    click.option("--concurrent", type=COUNT, help="Trials at a time, each with its share of the CPUs."),
    click.option(
        "--max-failures", type=click.IntRange(min=0), default=2, show_default=True, help="Retries of a trial."
    ),
    click.option("--grace-rounds", type=COUNT, default=2, show_default=True, help="asha: least rounds."),
    click.option(
        "--reduction-factor",
        type=click.FloatRange(min=1, min_open=True),
        default=3.0,
        show_default=True,
        help="asha: one trial of so many goes on.",
    ),
    click.option("--pbt-interval", type=COUNT, default=3, show_default=True, help="pbt: rounds between changes."),
    click.option("--resume", "folder", type=FOLDER, help="Continue the sweep in this folder."),
    click.option("--retry-failed", is_flag=True, help="With --resume: try failed trials again."),
    click.option("--list", "listing", is_flag=True, help="Show the search spaces that come with fedsim."),
)


def tune_command(start: Start, go_on: GoOn, spaces: Spaces) -> click.Command:
    """Make the command; what runs a sweep is given from outside, for this layer does not know Ray."""

    def tune(space: str | None, output: Path | None, listing: bool, **options: Any) -> None:
        """Try values of the config, each trial a federation of its own, and find the best by validation MRR.

        SPACE is a YAML or Python file with `space`: config paths, each with the values to try, or the name of one that
        comes with fedsim. Several trials share the cluster. Other config options hold for all trials; --seed is that
        of the search too. A sweep that was stopped or killed goes on with --resume.

        \b
        Examples:
          fedsim tune --list
          fedsim tune overview --trials 16 --output runs/sweep
          fedsim tune space.yaml --search grid --scheduler none --federation.num_rounds 5 --output runs/grid
          fedsim tune directions --scheduler pbt --trials 4 --output runs/population
          fedsim tune --resume runs/sweep
        """
        if listing:
            show_rows("Search spaces", ["space", "what", "varies"], spaces(), make_console())
            return
        folder = options["folder"]
        if folder is not None:
            _refuse_beside_resume()
            well = _carry_out(lambda: go_on(folder, options["retry_failed"]), folder)
        else:
            if space is None:
                raise click.UsageError("give a search space (--list shows those that come with fedsim), or --resume")
            if output is None:
                raise click.UsageError("give --output, the folder of the sweep")
            changes, settings = current_overrides(), _settings(options)
            well = _carry_out(lambda: start(space, output, options["config"], changes, settings), output)
        if not well:
            click.get_current_context().exit(1)

    function: Callable[..., Any] = config_options(tune)
    for option in reversed(OPTIONS):
        function = option(function)
    command = click.command(cls=ConfigCommand)(click.argument("space", required=False, metavar="[SPACE]")(function))
    command.params = [option for option in command.params if option.expose_value or option.name not in OWN_OPTIONS]
    return command


def _settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options as `tune.plan.Settings` has them."""
    names = ("scheduler", "search", "concurrent", "max_failures", "grace_rounds", "reduction_factor")
    return {name: options[name] for name in names} | {
        "num_trials": options["trials"],
        "interval": options["pbt_interval"],
    }


def _carry_out(work: Callable[[], bool], folder: Path) -> bool:
    try:
        return work()
    except KeyboardInterrupt:
        click.echo(f"interrupted; continue with: fedsim tune --resume {shown_path(folder)}", err=True)
        click.get_current_context().exit(130)


def _refuse_beside_resume() -> None:
    """Refuse options beside `--resume`: the sweep goes on as it was begun."""
    context = click.get_current_context()
    given = context.command.params
    for option in given:
        by_user = context.get_parameter_source(option.name or "") == click.core.ParameterSource.COMMANDLINE
        if by_user and option.name not in WITH_RESUME:
            raise click.UsageError(f"{option.opts[0]} beside --resume: a sweep goes on as it was begun; leave it out")
