"""The command line, and the one place that puts fedsim, Ray and the console together.

Commands import what they need when they run: `fedsim --help` loads neither torch nor Ray.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fedsim.benchmark_commands import benchmark_command
from fedsim.cli_options import ConfigCommand, config_options, current_overrides
from fedsim.config import dump_config, load_config
from fedsim.dashboard_commands import dashboard
from fedsim.data_commands import data
from fedsim.errors import FedSimError
from fedsim.report.console import ConsoleObserver, make_console, show_candidates, show_result, shown_path
from fedsim.report_commands import finish_with_report, report
from fedsim.storage_commands import OUTPUT, RunPath, fetch, local_run, store
from fedsim.tune_commands import tune_command

if TYPE_CHECKING:
    from fedsim.benchmark.execution import Outcomes
    from fedsim.benchmark.plan import Cell
    from fedsim.config import Config
    from fedsim.federated.runtime import RuntimeFactory
    from fedsim.results import RoundSummary, RunInfo, RunResult

logger = logging.getLogger(__name__)

RUN_FOLDER = RunPath()


class _InterruptedRunError(Exception):
    """Ctrl-C during a run, with the folder from which it can go on."""

    def __init__(self, folder: Path | None) -> None:
        super().__init__(f"interrupted; continue with: fedsim resume {shown_path(folder)}" if folder else "interrupted")


class _StderrHandler(logging.Handler):
    """Writes warnings to what stderr is now, so that they appear above a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(f"{record.levelname.lower()}: {self.format(record)}", err=True)


class _RunLog(logging.FileHandler):
    """A run's log file."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "run.log", encoding="utf-8")
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        if not isinstance(sys.exc_info()[1], OSError):  # a full disk is told by the file that the run needs
            super().handleError(record)


class _LoggedObserver(ConsoleObserver):
    """The console, and the run's log file as soon as there is a run folder."""

    folder: Path | None = None
    log: _RunLog | None = None
    reports = False

    def run_started(self, info: RunInfo) -> None:
        self.folder, self.reports = info.folder, info.config.report.html
        self.log = _RunLog(info.folder)
        logging.getLogger().addHandler(self.log)
        logger.info("starting with round %d of %d; %s", info.start_round, info.num_rounds, "; ".join(info.placement))
        super().run_started(info)

    def round_finished(self, summary: RoundSummary) -> None:
        seconds = ", ".join(f"{phase} {value:.2f} s" for phase, value in summary.seconds.items())
        mrr = "none" if summary.valid_mrr is None else f"{summary.valid_mrr:.4f}"
        loss = "none" if summary.loss is None else f"{summary.loss:.4f}"
        logger.info("round %d: loss %s, valid MRR %s; %s", summary.round_num, loss, mrr, seconds)
        super().round_finished(summary)

    def message(self, text: str) -> None:
        logger.info(text)
        super().message(text)

    def close(self) -> None:
        super().close()
        if self.log is not None:
            logging.getLogger().removeHandler(self.log)
            with contextlib.suppress(OSError):  # the last lines, on a full disk
                self.log.close()
            self.log = None


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="fedsim")
def commands() -> None:
    """Federated multimodal knowledge graph completion on Ray.

    `fedsim run` with no arguments is the main job: three institutions, each a Ray actor with its own knowledge graph,
    half of whose texts and pictures are hidden, learn together with MMFeD3-HidE.
    """


def _run_on_ray(cells: Sequence[Cell], **options: Any) -> Outcomes:
    """Run the cells of a benchmark as Ray tasks."""
    from actors.benchmark import run_on_ray

    return run_on_ray(cells, **options)


commands.add_command(data)
commands.add_command(dashboard)


def _start_sweep(*args: Any) -> bool:
    """Start a sweep."""
    from tune.commands import start_sweep

    return start_sweep(*args)


def _resume_sweep(folder: Path, retry_failed: bool) -> bool:
    """Continue a sweep."""
    from tune.commands import resume_sweep

    return resume_sweep(folder, retry_failed)


def _search_spaces() -> list[list[str]]:
    """List the search spaces that come with fedsim."""
    from tune.commands import list_spaces

    return list_spaces()


commands.add_command(benchmark_command(_run_on_ray))
commands.add_command(tune_command(_start_sweep, _resume_sweep, _search_spaces))
commands.add_command(fetch)
commands.add_command(store)
commands.add_command(report)


@commands.command(cls=ConfigCommand)
@click.argument("config", required=False, metavar="[CONFIG.yaml]", type=click.Path(path_type=Path))
@config_options
def run(config: Path | None) -> None:
    """Run an experiment.

    It is the default config, changed by CONFIG.yaml, changed by the options.

    \b
    Examples:
      fedsim run
      fedsim run --federation.num_rounds 20 --data.num_clients 5
      fedsim run experiment.yaml --runtime.kind in_process --output runs/trial
    """
    resolved = load_config(config, current_overrides())
    from fedsim import simulation

    _observe(lambda observer: simulation.run(resolved, _runtime_factory(resolved), observer))


@commands.command()
@click.argument("run", metavar="RUN", type=RunPath(stored=True))
@click.option("--output", type=OUTPUT, help="Folder for a run that is fetched.  [default: runs/<name of the copy>]")
def resume(run: Path | str, output: Path | None) -> None:
    """Continue an interrupted or killed run.

    It goes on from its last checkpoint and ends with the numbers of an unbroken run. RUN is its folder, or the URI of
    its stored copy, from which it goes on here.
    """
    folder = local_run(run, output)
    stored = _run_config(folder)
    from fedsim import simulation

    factory = _runtime_factory(stored)
    _observe(lambda observer: simulation.resume(folder, factory, observer))


@commands.command()
@click.argument("folder", metavar="RUN", type=RUN_FOLDER)
def evaluate(folder: Path) -> None:
    """Evaluate the final models of a run again."""
    _run_config(folder)
    from fedsim import simulation

    show_result(simulation.evaluate(folder), make_console())


@commands.command()
@click.argument("folder", metavar="RUN", type=RUN_FOLDER)
@click.option("--client", type=click.IntRange(min=0), default=0, show_default=True, help="The client that answers.")
@click.option("--head", help="Head entity, by key or label; asks for tails.")
@click.option("--tail", help="Tail entity, by key or label; asks for heads.")
@click.option("--relation", required=True, help="Relation, by key or label.")
@click.option("--top", type=click.IntRange(min=1), default=10, show_default=True, help="Number of candidates shown.")
def predict(folder: Path, client: int, head: str | None, tail: str | None, relation: str, top: int) -> None:
    """Ask the model of one client for tails or heads.

    With --head it answers (head, relation, ?), with --tail (?, relation, tail).

    \b
    Example:
      fedsim predict runs/trial --client 0 --head guitar --relation hypernym
    """
    if (head is None) == (tail is None):
        raise click.UsageError("give --head (to ask for tails) or --tail (to ask for heads), one of the two")
    _run_config(folder)
    from fedsim import prediction

    if head is not None:
        candidates = prediction.predict(folder, client, head, relation, "tail", top)
        question = f"({head}, {relation}, ?)"
    else:
        assert tail is not None
        candidates = prediction.predict(folder, client, tail, relation, "head", top)
        question = f"(?, {relation}, {tail})"
    show_candidates(f"client {client} answers {question}", candidates, make_console())


@commands.command(name="config", cls=ConfigCommand)
@click.argument("config", required=False, metavar="[CONFIG.yaml]", type=click.Path(path_type=Path))
@config_options
def show_config(config: Path | None) -> None:
    """Print the resolved config with comments.

    The output is YAML that `fedsim run` takes.
    """
    click.echo(dump_config(load_config(config, current_overrides()), comments=True), nl=False)


def main(args: Sequence[str] | None = None) -> int:
    """Run a command and turn every problem that the user can mend into one message.

    Returns:
        The exit code: 0, 2 for an error, 130 for Ctrl-C.
    """
    _set_up_logging()
    try:
        status = commands.main(args=args, prog_name="fedsim", standalone_mode=False)
    except click.ClickException as err:
        err.show()
        return 2
    except FedSimError as err:
        return _fail(str(err))
    except _InterruptedRunError as err:
        click.echo(str(err), err=True)
        return 130
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return 130
    except OSError as err:
        if err.errno is None:
            raise
        return _fail(_explain_os_error(err))
    return status if isinstance(status, int) else 0


def _observe(work: Callable[[_LoggedObserver], RunResult]) -> None:
    """Run `work` with a console, keep what stopped it in the run's log, and print its result."""
    observer = _LoggedObserver()
    with closing(observer):
        try:
            result = work(observer)
        except KeyboardInterrupt:
            logger.info("interrupted")
            raise _InterruptedRunError(observer.folder) from None
        except Exception:
            logger.info("stopped", exc_info=True)
            raise
        logger.info("finished; test MRR %.4f with the models of round %d", result.test.mrr, result.best_round)
    show_result(result, observer.console)
    if observer.reports:
        finish_with_report(result.folder)


def _runtime_factory(config: Config) -> RuntimeFactory:
    """Choose the runtime; the only place that imports `actors`."""
    if config.runtime.kind == "ray":
        from actors.runtime import ray_runtime

        return ray_runtime
    from fedsim.federated.runtime import InProcessRuntime

    return InProcessRuntime


def _run_config(folder: Path) -> Config:
    """Read the config of a run folder."""
    from fedsim.run_folder import RunFolder

    return RunFolder.open(folder)[1]


def _set_up_logging() -> None:
    root = logging.getLogger()
    if not any(isinstance(handler, _StderrHandler) for handler in root.handlers):
        handler = _StderrHandler(level=logging.WARNING)
        root.addHandler(handler)
    logging.getLogger("fedsim").setLevel(logging.INFO)
    logging.getLogger("actors").setLevel(logging.INFO)
    logging.captureWarnings(True)


def _fail(message: str) -> int:
    click.echo(f"error: {message}", err=True)
    return 2


def _explain_os_error(err: OSError) -> str:
    place = f"{err.filename}: " if err.filename else ""
    if err.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{place}no space left on the disk; free some and continue with `fedsim resume RUN`"
    return f"{place}{err.strerror or err}"


if __name__ == "__main__":
    sys.exit(main())
