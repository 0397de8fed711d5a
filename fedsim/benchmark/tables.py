"""The table for people: on the terminal, as Markdown and as LaTeX, from one grid of cells."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedsim.benchmark.comparison import METRICS, Column, Entry, RecipeTable
from fedsim.benchmark.plan import Missing, Plan

COLUMN_GAP = 3  # the box's line and a space on both sides
NOT_TUNED, NOT_RANKED, LEVEL = "†", "‡", "°"
LEVEL_P = 0.05
LEVEL_NOTE = f"{LEVEL} not told apart from the best of its column (p ≥ {LEVEL_P}); tested are methods with all seeds."
LATEX = {
    "\\": r"\textbackslash{}",
    "†": r"$\dagger$",
    "‡": r"$\ddagger$",
    "°": r"$^\circ$",
    "≥": r"$\ge$",
    "<": "$<$",
    "±": r"$\pm$",
    "–": "--",
} | {char: f"\\{char}" for char in "&%$#_{}"}


@dataclass(frozen=True)
class Text:
    """One cell of the printed table."""

    text: str
    bold: bool = False


@dataclass(frozen=True)
class Block:
    """The columns of one missing rate: a title over headers, and a row of cells per method."""

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[Text, ...], ...]


@dataclass(frozen=True)
class Grid:
    """The table of one recipe before it is given a form."""

    title: str
    names: tuple[str, ...]
    blocks: tuple[Block, ...]
    seconds: tuple[str, ...]


def make_grids(tables: Sequence[RecipeTable], num_seeds: int) -> list[Grid]:
    """Write the numbers as texts: of each recipe all metrics, below MRR at a glance if there are several rates."""
    grids = []
    for table in tables:
        name, seeds = table.recipe.name, f"{num_seeds} seed{'s' if num_seeds > 1 else ''}"
        if len(table.columns) > 1:
            glances = tuple(_glances(column) for column in table.columns)
            grids.append(_grid(f"{name}: filtered test MRR, {seeds}", table, glances))
        blocks = tuple(_block(column) for column in table.columns)
        grids.append(_grid(f"{name}: filtered test metrics, {seeds}", table, blocks))
    return grids


def notes(tables: Sequence[RecipeTable], plan: Plan, footer: Sequence[str]) -> list[str]:
    """Write what stands below the tables."""
    entries = [entry for table in tables for entry in table.entries]
    lines = []
    if plan.num_seeds > 1:
        lines.append(
            f"Mean ± standard deviation over {plan.num_seeds} seeds; best mean in bold. p: two-sided paired t-test of "
            "MRR over the seeds against the best method of the column; at the best one against the second. Not "
            "corrected for the number of methods."
        )
        if any(len(table.columns) > 1 for table in tables):
            lines.append(LEVEL_NOTE)
    else:
        lines.append("One seed: no spread and no test; best value in bold.")
    protocols = [table.recipe.name for table in tables if table.recipe.settings.get("evaluation.protocol") == "fede"]
    if protocols:
        lines.append(f"Tails alone are ranked, as FedE does, on {', '.join(protocols)}.")
    if any(not entry.tuned for entry in entries):
        lines.append(f"{NOT_TUNED} not tuned on this data: the recipe's defaults, or what the options say.")
    if any(not entry.method.ranked for entry in entries):
        lines.append(f"{NOT_RANKED} sees what is hidden from the others; neither ranked nor bold.")
    if any(entry.method.fixed_rate for entry in entries):
        once = dict.fromkeys(entry.method.name for entry in entries if entry.method.fixed_rate)
        lines.append(f"The same at all missing rates, run once: {', '.join(once)}.")
    if plan.changes:
        lines.append(f"Changed for all: {', '.join(f'{path} = {value}' for path, value in plan.changes.items())}.")
    failed = {outcome.folder: outcome.error for entry in entries for outcome in entry.outcomes if not outcome.result}
    for folder, error in failed.items():
        lines.append(f"Missing: {folder.relative_to(plan.output)}: {error}")
    return [*lines, *footer]


def show(grid: Grid, console: Console) -> None:
    """Print a grid; missing rates that do not fit side by side follow each other."""
    width = max(len(name) for name in grid.names) + max(len(text) for text in grid.seconds) + 2 * COLUMN_GAP + 4
    taken = width
    parts: list[list[Block]] = [[]]
    for block in grid.blocks:
        wide = _width(block)
        if parts[-1] and taken + wide > console.width:
            parts.append([])
            taken = width
        parts[-1].append(block)
        taken += wide
    for blocks in parts:
        printed = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=escape(grid.title), title_justify="left")
        printed.add_column("method", no_wrap=True)
        for block in blocks:
            for number, header in enumerate(block.headers):
                printed.add_column(f"{block.title if number == 0 else ''}\n{header}", justify="right", no_wrap=True)
        printed.add_column("\ns/run", justify="right", no_wrap=True)
        for row, name in enumerate(grid.names):
            cells = [cell for block in blocks for cell in block.rows[row]]
            shown = [f"[bold]{escape(cell.text)}[/bold]" if cell.bold else escape(cell.text) for cell in cells]
            printed.add_row(escape(name), *shown, grid.seconds[row])
        console.print(printed)


def as_markdown(grids: Sequence[Grid], lines: Sequence[str], runs: str) -> str:
    """Write the tables as a Markdown page.

    Args:
        grids: the tables.
        lines: what stands below them.
        runs: the page that lists the runs, which is linked.
    """
    parts = []
    for grid in grids:
        header = ["method", *(f"{b.title}: {h}" for b in grid.blocks for h in b.headers), "s/run"]
        parts.append(f"## {grid.title}\n\n| {' | '.join(header)} |\n|---|{'---:|' * (len(header) - 1)}")
        for row, name in enumerate(grid.names):
            cells = [f"**{c.text}**" if c.bold else c.text for block in grid.blocks for c in block.rows[row]]
            parts.append(f"| {' | '.join([f'`{name}`', *cells, grid.seconds[row]])} |")
        parts.append("")
    below = "\n".join(f"- {line}" for line in lines)
    return "\n".join(parts) + f"\n{below}\n- Run folder and command of every cell: [{runs}]({runs}), and table.csv.\n"


def as_latex(grids: Sequence[Grid], lines: Sequence[str]) -> str:
    """Write the tables as LaTeX with booktabs, the notes below each."""
    below = ["\\par\\smallskip", "\\begin{minipage}{\\linewidth}\\footnotesize"]
    below += [*(f"{escape_latex(line)}\\par" for line in lines), "\\end{minipage}"]
    parts = ["% needs \\usepackage{booktabs}"]
    for grid in grids:
        width = sum(len(block.headers) for block in grid.blocks)
        groups = [f"\\multicolumn{{{len(b.headers)}}}{{c}}{{{escape_latex(b.title)}}}" for b in grid.blocks]
        headers = [escape_latex(header) for block in grid.blocks for header in block.headers]
        parts += [
            "\\begin{table}",
            "\\centering",
            f"\\caption{{{escape_latex(grid.title)}}}",
            f"\\begin{{tabular}}{{l{'r' * (width + 1)}}}",
            "\\toprule",
            f" & {' & '.join(groups)} & \\\\",
            f"method & {' & '.join(headers)} & s/run \\\\",
            "\\midrule",
        ]
        for row, name in enumerate(grid.names):
            cells = [cell for block in grid.blocks for cell in block.rows[row]]
            texts = [f"\\textbf{{{escape_latex(c.text)}}}" if c.bold else escape_latex(c.text) for c in cells]
            parts.append(f"{escape_latex(name)} & {' & '.join(texts)} & {escape_latex(grid.seconds[row])} \\\\")
        parts += ["\\bottomrule", "\\end{tabular}", *below, "\\end{table}"]
    return "\n".join(parts) + "\n"


def escape_latex(text: str) -> str:
    """Write a text so that LaTeX prints it as it is."""
    return "".join(LATEX.get(char, char) for char in text)


def _row_name(entry: Entry) -> str:
    marks = ("" if entry.tuned else NOT_TUNED) + ("" if entry.method.ranked else NOT_RANKED)
    return f"{entry.method.name}{' ' if marks else ''}{marks}"


def _grid(title: str, table: RecipeTable, blocks: tuple[Block, ...]) -> Grid:
    entries = [column.entries for column in table.columns]
    seconds = []
    for row in zip(*entries, strict=True):
        spent = [value for entry in row for value in entry.seconds]
        seconds.append(f"{fmean(spent):.0f}" if spent else "–")
    return Grid(title, tuple(_row_name(entry) for entry in entries[0]), blocks, tuple(seconds))


def _glances(column: Column) -> Block:
    rows = tuple((glance(column, entry),) for entry in column.entries)
    return Block(hidden_title(column.missing), ("MRR",), rows)


def glance(column: Column, entry: Entry) -> Text:
    """Write a mean MRR, and whether it is level with the best of the column."""
    p = column.p_values.get(entry.method.name)
    level = p is not None and p >= LEVEL_P and entry.method.name != column.best
    return Text(f"{_value(entry, 'mrr')}{LEVEL if level else ''}", column.is_best(entry, "mrr"))


def hidden_title(missing: Missing) -> str:
    """Say what a missing rate hides."""
    return f"{missing.rate:g} of the clients blind" if missing.pattern == "client" else f"{missing.rate:g} hidden"


def _block(column: Column) -> Block:
    tested = any(len(entry.outcomes) > 1 for entry in column.entries)
    rows = []
    for entry in column.entries:
        cells = [Text(_value(entry, metric), column.is_best(entry, metric)) for metric in METRICS]
        rows.append((*cells, Text(_p(column.p_values.get(entry.method.name)))) if tested else tuple(cells))
    return Block(
        hidden_title(column.missing), (*METRICS.values(), "p") if tested else tuple(METRICS.values()), tuple(rows)
    )


def _value(entry: Entry, metric: str) -> str:
    mean, spread = entry.mean(metric), entry.spread(metric)
    if mean is None:
        return "failed"
    text = f"{mean:.4f}" if spread is None else f"{mean:.4f} ± {spread:.4f}"
    done = len(entry.values(metric))
    return text if entry.complete else f"{text} ({done} of {len(entry.outcomes)})"


def _p(value: float | None) -> str:
    if value is None:
        return "–"
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _width(block: Block) -> int:
    """Count the characters that a block's columns take on the terminal; its title stands over the first."""
    columns = zip(block.headers, *([cell.text for cell in row] for row in block.rows), strict=True)
    widths = [max(map(len, column)) for column in columns]
    return max(widths[0], len(block.title)) + sum(widths[1:]) + COLUMN_GAP * len(widths)
