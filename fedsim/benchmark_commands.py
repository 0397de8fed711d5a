"""`fedsim benchmark`: methods x data x missing rates x seeds in one table, and the tuning behind it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fedsim.cli_options import ConfigCommand, config_options, current_overrides
from fedsim.report.console import make_console, show_rows, shown_path
from fedsim.report_commands import finish_with_report

if TYPE_CHECKING:  # keeps torch out of `fedsim --help`
    from rich.console import Console

    from fedsim.benchmark.execution import Executor, Outcome, Outcomes
    from fedsim.benchmark.plan import Cell, Plan
    from fedsim.benchmark.recipes import TuningBudget
    from fedsim.benchmark.tuned import TrialKey

RayRunner = Callable[..., "Outcomes"]
"""`actors.benchmark.run_on_ray`."""

OWN_OPTIONS = ("seed", "output")  # config options that a benchmark has others for


def benchmark_command(run_on_ray: RayRunner) -> click.Command:
    """Make the command.

    Args:
        run_on_ray: runs cells on Ray; given from outside, for this layer does not know it.
    """

    @click.command(cls=ConfigCommand)
    @click.option("--group", "groups", multiple=True, metavar="NAME", help="Methods of this group; repeatable.")
    @click.option("--method", "methods", multiple=True, metavar="NAME", help="This method; repeatable.")
    @click.option("--data", multiple=True, default=["wn_noto"], show_default=True, help="Recipe; repeatable.")
    @click.option(
        "--rates", metavar="RATE,...", help="Missing rates: 0.3, client, client:0.3.  [default: the recipe's]"
    )
    @click.option("--seeds", type=click.IntRange(min=1), default=5, show_default=True, help="Seeds 0 .. n-1.")
    @click.option("--rounds", type=click.IntRange(min=1), help="Federation rounds.  [default: the recipe's]")
    @click.option("--output", type=click.Path(path_type=Path), help="Folder of runs and tables.")
    @click.option("--tuned", type=click.Path(path_type=Path), help="Tuned values.  [default: those of fedsim]")
    @click.option("--tune", is_flag=True, help="Tune the methods instead, with the recipe's budget; writes --tuned.")
    @click.option("--runtime", type=click.Choice(["ray", "in-process"]), default="ray", show_default=True)
    @click.option("--gpus-per-run", type=click.FloatRange(0, 1), default=0.0, show_default=True, help="Share of a GPU.")
    @click.option(
        "--hours-per-run",
        type=click.FloatRange(min=0, min_open=True),
        default=24.0,
        show_default=True,
        help="On Ray: a run that takes longer is ended and counts as failed.",
    )
    @click.option("--keep-models", is_flag=True, help="Keep checkpoints and models of finished runs.")
    @click.option("--list", "listing", is_flag=True, help="Show methods, groups and recipes.")
    @config_options
    def benchmark(
        groups: tuple[str, ...], methods: tuple[str, ...], output: Path | None, listing: bool, **options: Any
    ) -> None:
        """Run methods on data at several missing rates and seeds, and compare them in one table.

        All methods but the variants of ablations run unless groups or methods are named. Runs that are finished in the
        output folder are not done again and one that was stopped goes on, so the same command continues a benchmark.
        Other config options hold for every cell.

        \b
        Examples:
          fedsim benchmark --list
          fedsim benchmark --group a --data cn_visual --rates 0.3,0.6 --seeds 3 --output runs/fusions
          fedsim benchmark --method mmfede-zero --method mmfed3-hide --output runs/two --model.scorer distmult
        """
        if listing:
            _show_lists()
            return
        if output is None:
            raise click.UsageError("give --output, the folder of runs and tables (or --list to see what there is)")
        plan = _make_plan(groups, methods, output.absolute(), options)
        if not _carry_out(plan, run_on_ray, options):
            click.get_current_context().exit(1)

    benchmark.params = [option for option in benchmark.params if not _is_twin(option)]
    return benchmark


def _carry_out(plan: Plan, run_on_ray: RayRunner, options: dict[str, Any]) -> bool:
    """Run the benchmark or the tuning where the options say; returns whether all runs ended well."""
    keep = options["keep_models"]

    def execute(cells: Sequence[Cell]) -> Outcomes:
        if options["runtime"] == "ray":
            address = current_overrides().get("runtime.address")
            limits = {name: options[name] for name in ("gpus_per_run", "hours_per_run")}
            return run_on_ray(cells, keep_models=keep, address=address, **limits)
        from fedsim.benchmark.execution import run_in_process

        return run_in_process(cells, keep_models=keep)

    try:
        return (_tune if options["tune"] else _benchmark)(plan, execute, options["tuned"], make_console())
    except KeyboardInterrupt:
        click.echo(f"interrupted; the same command goes on in {shown_path(plan.output)}", err=True)
        click.get_current_context().exit(130)


def _is_twin(option: click.Parameter) -> bool:
    """Tell a config option that a benchmark has another for from that other."""
    return option.name in OWN_OPTIONS and not option.expose_value


def asked_for(option: str) -> bool:
    """Tell whether an option stands on the command line."""
    return click.get_current_context().get_parameter_source(option) == click.core.ParameterSource.COMMANDLINE


def _make_plan(groups: Sequence[str], methods: Sequence[str], output: Path, options: dict[str, Any]) -> Plan:
    """Make the plan of the options; all that is wrong with them is said here."""
    from fedsim.benchmark.methods import select_methods, without_variants
    from fedsim.benchmark.plan import Plan, check_changes, check_trials, parse_missing
    from fedsim.benchmark.recipes import select_recipes
    from fedsim.benchmark.tuned import BUNDLED, Tuned, check_tuned, check_writable, read_tuned

    if options["tune"] and options["rates"] is not None:
        raise click.UsageError("--tune takes the missing rate of the recipe's budget; leave --rates out")
    if options["tune"] and asked_for("seeds"):
        raise click.UsageError("--tune takes the seeds of the recipe's budget; leave --seeds out")
    if options["tune"] and options["tuned"] is not None:
        check_writable(options["tuned"])
    changes = current_overrides()
    if options["rounds"] is not None:
        changes = changes | {"federation.num_rounds": options["rounds"]}
    check_changes(changes)
    recipes = select_recipes(list(options["data"]))
    chosen = select_methods(groups, methods)
    if options["tune"]:
        chosen = without_variants(chosen)
        check_trials(recipes, chosen, changes)
    tuned = Tuned({}) if options["tune"] else read_tuned(options["tuned"] or BUNDLED)
    if options["tuned"] is not None and not options["tune"]:
        check_tuned(tuned, recipes, chosen, options["tuned"])
    asked = None if options["rates"] is None else options["rates"].split(",")
    rates = {}
    for recipe in recipes:
        found = [parse_missing(text) for text in asked or recipe.rates]
        rates[recipe.name] = list(dict.fromkeys(found))
    return Plan(
        output=output,
        recipes=recipes,
        methods=chosen,
        rates=rates,
        num_seeds=options["seeds"],
        tuned=tuned,
        changes={path: value for path, value in changes.items() if path != "runtime.address"},
        on_gpu=options["gpus_per_run"] > 0,
    )


def _benchmark(plan: Plan, execute: Executor, tuned: Path | None, console: Console) -> bool:
    """Run what is missing, then write and show the tables; returns whether all cells are there."""
    from fedsim.benchmark import records, tables
    from fedsim.benchmark.comparison import compare
    from fedsim.checkpoint import replace_text

    started = time.perf_counter()
    cells = plan.cells()
    outcomes, num_run = _run_all(plan, "benchmark", cells, execute, console)
    compared = compare(plan, lambda folder: outcomes[folder])
    grids = tables.make_grids(compared, plan.num_seeds)
    hours = sum(sum(done.result["seconds"].values()) for done in outcomes.values() if done.result) / 3600
    minutes = (time.perf_counter() - started) / 60
    footer = [
        f"{len(cells)} runs of {hours:.2f} h in all; this call did {num_run} in {minutes:.1f} min wall time.",
        f"Hardware: {records.hardware()}{' and a GPU' if plan.on_gpu else ''}; fedsim {_version(outcomes)}.",
    ]
    lines = tables.notes(compared, plan, footer)
    replace_text(plan.output / "table.md", tables.as_markdown(grids, lines, "runs.md"))
    replace_text(plan.output / "table.tex", tables.as_latex(grids, lines))
    replace_text(plan.output / "table.csv", records.as_csv(compared))
    replace_text(plan.output / "runs.md", records.as_run_list(compared, plan.output))
    for grid in grids:
        tables.show(grid, console)
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)
    console.print(
        f"Written: table.md, table.csv, table.tex and runs.md in {shown_path(plan.output)}",
        soft_wrap=True,
        markup=False,
    )
    if cells[0].config.report.html:
        finish_with_report(plan.output)
    return all(outcome.result is not None for outcome in outcomes.values())


def _tune(plan: Plan, execute: Executor, tuned: Path | None, console: Console) -> bool:
    """Run the trials of the budget and write what they chose; returns whether all of them ended well."""
    from fedsim.benchmark.tuned import choose, trial_number, write_tuned

    path = tuned or plan.output / "tuned.yaml"
    found: dict[TrialKey, list[float]] = {}

    def run(cells: list[Cell]) -> None:
        outcomes, _ = _run_all(plan, "tuning", cells, execute, console)
        for cell in cells:
            result = outcomes[cell.folder].result
            if result is not None:
                key = cell.recipe, cell.method, trial_number(cell.folder.name)
                found.setdefault(key, []).append(result["valid_mrr"])

    cells = plan.trials()
    run(cells)
    best = choose(plan.recipes, plan.methods, found)
    own = plan.trials(best)
    if own:
        run(own)
    chosen = choose(plan.recipes, plan.methods, found, best)
    write_tuned(chosen, path)
    rows = [[recipe, method, str(settings)] for recipe, found in chosen.items() for method, settings in found.items()]
    show_rows("Chosen on validation", ["data", "method", "settings"], rows, console)
    console.print(f"Written: {shown_path(path)}; use it with --tuned {shown_path(path)}", soft_wrap=True, markup=False)
    if cells[0].config.report.html:
        finish_with_report(plan.output)
    return all(method.name in chosen.get(recipe.name, {}) for recipe in plan.recipes for method in plan.methods)


def _run_all(
    plan: Plan,
    kind: str,
    cells: Sequence[Cell],
    execute: Executor,
    console: Console,
) -> tuple[dict[Path, Outcome], int]:
    """Run the cells that are not finished; returns the outcome of every cell, and how many were run."""
    from fedsim.benchmark.execution import read_finished
    from fedsim.benchmark.folder import LOCK, check_free, locked, open_folder

    folder = shown_path(plan.output)
    check_free(plan.output)
    with locked(plan.output / LOCK, f"another fedsim benchmark is at work in {folder}; wait for it, or end it"):
        open_folder(plan, kind)
        done = {cell.folder: outcome for cell in cells if (outcome := read_finished(cell)) is not None}
        waiting = [cell for cell in cells if cell.folder not in done]
        console.print(
            f"{len(cells)} runs, {len(done)} of them finished already; folder {folder}", soft_wrap=True, markup=False
        )
        if not waiting:
            return done, 0
        started = time.perf_counter()
        names = {cell.folder: cell.name for cell in cells}
        with closing(execute(waiting)) as outcomes:
            for outcome in outcomes:
                done[outcome.folder] = outcome
                minutes = (time.perf_counter() - started) / 60
                console.print(
                    f"{minutes:6.1f} min  {len(done):>{len(str(len(cells)))}}/{len(cells)}  {names[outcome.folder]}: "
                    f"{_in_short(outcome)}",
                    soft_wrap=True,
                    markup=False,
                )
    return done, len(waiting)


def _in_short(outcome: Outcome) -> str:
    if outcome.result is None:
        return f"failed: {outcome.error}"
    seconds = sum(outcome.result["seconds"].values())
    return f"valid {outcome.result['valid_mrr']:.4f}  test {outcome.result['test']['mrr']:.4f}  {seconds:.0f} s"


def _version(folders: Iterable[Path]) -> str:
    """Name fedsim and the commits that the runs were made at."""
    from importlib.metadata import version

    from fedsim.benchmark.records import commits

    found = commits(folders)
    if len(found) > 1:
        return f"{version('fedsim')} at SEVERAL commits, so methods may not compare: {', '.join(found)}"
    return f"{version('fedsim')}{f', commit {found[0]}' if found else ''}"


def _budget_told(budget: TuningBudget) -> str:
    from fedsim.benchmark.methods import OTHERS

    num_seeds = len(budget.seeds)
    seeds = f", {num_seeds} seeds" if num_seeds > 1 else ""
    num_trials = len(budget.trials) + (len(OTHERS) if budget.own_trials else 0)
    return f"{num_trials} x {budget.num_rounds} rounds{seeds}"


def _show_lists() -> None:
    from fedsim.benchmark.methods import GROUPS, METHODS
    from fedsim.benchmark.recipes import bundled_recipes

    console = make_console()
    show_rows("Groups (--group)", ["group", "what"], [[name, what] for name, what in GROUPS.items()], console)
    rows = [[m.name, " ".join(m.groups), m.title, m.source] for m in METHODS.values()]
    show_rows("Methods (--method)", ["method", "groups", "what", "source"], rows, console)
    rows, told = [], set()
    for r in bundled_recipes().values():
        title = "" if r.family in told else r.title  # said once for the splits of one data set
        told.add(r.family)
        split = (
            r.settings.get("data.split_file") or f"{r.settings['data.split']}, {r.settings['data.num_clients']} clients"
        )
        rows.append([r.name, str(split), title, _budget_told(r.tuning)])
    show_rows("Recipes (--data)", ["recipe", "split", "data", "tuning per method"], rows, console)
