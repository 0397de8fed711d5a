"""Build the Grafana dashboard that `fedsim dashboard export` writes, with Grafana's own builder library.

    python scripts/build_grafana_dashboard.py

It overwrites fedsim/report/grafana_dashboard.json; a test holds that file to what this script makes.
"""

from dataclasses import dataclass
from pathlib import Path

from grafana_foundation_sdk.builders import common, dashboard, prometheus, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    LegendDisplayMode,
    LegendPlacement,
    SortOrder,
    StackingMode,
    TooltipDisplayMode,
)
from grafana_foundation_sdk.models.dashboard import DataSourceRef, VariableOption, VariableRefresh

TARGET = Path(__file__).parents[1] / "fedsim" / "report" / "grafana_dashboard.json"
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
RUN = '{run=~"$run"}'
WIDTH, HEIGHT = 8, 8  # three panels in a row of 24


@dataclass(frozen=True)
class Panel:
    """A panel: its queries with the legend of each, and the unit."""

    title: str
    meaning: str
    queries: tuple[tuple[str, str], ...]
    unit: str = "short"
    stacked: bool = False


def last(metric: str, *labels: str) -> str:
    """Write the query of a gauge; several processes or jobs with the same labels count once."""
    return f"max by ({', '.join(('run', *labels))}) (ray_{metric}{RUN})"


def rate(metric: str) -> str:
    """Write the query of a counter: its growth per second."""
    return f"sum by (run) (rate(ray_{metric}_total{RUN}[$__rate_interval]))"


def quantile(share: float) -> str:
    """Write the query of a quantile of the calls' seconds."""
    buckets = f"rate(ray_fedsim_call_seconds_bucket{RUN}[$__rate_interval])"
    return f"histogram_quantile({share}, sum by (le, run, phase) ({buckets}))"


ROWS = {
    "Learning": (
        Panel(
            "Rounds",
            "Finished rounds, and how many the run is to have.",
            ((last("fedsim_round"), "{{run}} done"), (last("fedsim_rounds"), "{{run}} of")),
        ),
        Panel("Training loss", "Mean over the round's clients.", ((last("fedsim_loss"), "{{run}}"),)),
        Panel(
            "Validation MRR",
            "Filtered, realistic ranks, weighted by triples.",
            ((last("fedsim_valid_mrr"), "{{run}}"),),
        ),
        Panel(
            "Imputation quality",
            "Cosine of imputed and true features that were kept aside; needs evaluation.measure_every.",
            ((last("fedsim_imputation_cosine", "part"), "{{run}} {{part}}"),),
        ),
        Panel(
            "Semantic consistency",
            "Cosine of shared entities between clients; needs evaluation.measure_every.",
            ((last("fedsim_consistency_cosine", "part"), "{{run}} {{part}}"),),
        ),
    ),
    "Time and bytes": (
        Panel(
            "Seconds per phase",
            "Wall time of the phases of the last round.",
            ((last("fedsim_phase_seconds", "phase"), "{{run}} {{phase}}"),),
            unit="s",
            stacked=True,
        ),
        Panel(
            "Seconds of an actor's call",
            "Median and 90 % quantile of one call for a batch of clients.",
            ((quantile(0.5), "{{run}} {{phase}} median"), (quantile(0.9), "{{run}} {{phase}} 90 %")),
            unit="s",
        ),
        Panel(
            "Bytes",
            "What clients sent and were sent, per second.",
            ((rate("fedsim_bytes_up"), "{{run}} up"), (rate("fedsim_bytes_down"), "{{run}} down")),
            unit="Bps",
        ),
    ),
    "Actors": (
        Panel(
            "Clients",
            "Clients whose actor lives, that trained in the last round, came late, or failed; actors restarted.",
            (
                (f"sum by (run) (ray_fedsim_clients_alive{RUN})", "{{run}} alive"),
                (last("fedsim_clients_trained"), "{{run}} trained"),
                (last("fedsim_clients_late"), "{{run}} late"),
                (last("fedsim_clients_failed"), "{{run}} failed"),
                (f"sum by (run) (ray_fedsim_actor_restarted{RUN})", "{{run}} actors restarted"),
            ),
        ),
        Panel(
            "Queue length",
            "Batches of clients that wait for the actor or are with it.",
            ((last("fedsim_queue_length", "actor"), "{{run}} {{actor}}"),),
        ),
        Panel(
            "Host memory",
            "Memory of the process that it shares with no other.",
            ((last("fedsim_host_memory_bytes", "actor"), "{{run}} {{actor}}"),),
            unit="bytes",
            stacked=True,
        ),
        Panel(
            "GPU memory",
            "GPU memory that the process has reserved.",
            ((last("fedsim_gpu_memory_bytes", "actor"), "{{run}} {{actor}}"),),
            unit="bytes",
            stacked=True,
        ),
    ),
    "Clients (with fewer than watching.per_client_below)": (
        Panel("Loss of each client", "Last round.", ((last("fedsim_client_loss", "client"), "{{run}} {{client}}"),)),
        Panel(
            "Validation MRR of each client",
            "Filtered, realistic ranks.",
            ((last("fedsim_client_valid_mrr", "client"), "{{run}} {{client}}"),),
        ),
        Panel(
            "Training seconds of each client",
            "Last round; of a batch, the client's share.",
            ((last("fedsim_client_seconds", "client"), "{{run}} {{client}}"),),
            unit="s",
        ),
    ),
}


def build() -> str:
    """Return the dashboard as JSON."""
    made = (
        dashboard.Dashboard("fedsim")
        .uid("fedsim")
        .description("Federations of fedsim: learning, time and bytes, actors, clients.")
        .tags(["fedsim", "ray"])
        .editable()
        .refresh("10s")
        .time("now-30m", "now")
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(
            dashboard.QueryVariable("run")
            .label("Run")
            .query("label_values(ray_fedsim_rounds, run)")
            .datasource(SOURCE)
            .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
            .multi(True)
            .include_all(True)
            .all_value(".*")
            .current(VariableOption(text="All", value="$__all"))
        )
    )
    for title, panels in ROWS.items():
        made = made.with_row(dashboard.Row(title))
        for panel in panels:
            made = made.with_panel(_drawn(panel))
    return JSONEncoder(sort_keys=True, indent=1).encode(made.build()) + "\n"


def _drawn(panel: Panel) -> timeseries.Panel:
    drawn = (
        timeseries.Panel()
        .title(panel.title)
        .description(panel.meaning)
        .datasource(SOURCE)
        .unit(panel.unit)
        .span(WIDTH)
        .height(HEIGHT)
        .legend(
            common.VizLegendOptions()
            .show_legend(True)
            .display_mode(LegendDisplayMode.LIST)
            .placement(LegendPlacement.BOTTOM)
        )
        .tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI).sort(SortOrder.DESCENDING))
    )
    if panel.stacked:
        drawn = drawn.fill_opacity(30).stacking(common.StackingConfig().mode(StackingMode.NORMAL))
    for number, (query, legend) in enumerate(panel.queries):
        target = prometheus.Dataquery().expr(query).legend_format(legend).ref_id("ABCDE"[number]).range()
        drawn = drawn.with_target(target)
    return drawn


if __name__ == "__main__":
    TARGET.write_text(build(), encoding="utf-8")
