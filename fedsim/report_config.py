"""The config section of what a run of the command line writes for people."""

from pydantic import Field

from fedsim.config_types import Section


class ReportConfig(Section):
    """What the command line writes beside the result; it changes no number of the run."""

    html: bool = Field(True, description="write report.html at the end; `fedsim report RUN` writes it at any time")
