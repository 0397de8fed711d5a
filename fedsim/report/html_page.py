"""A page of plots and tables as one HTML file that asks no network for anything.

Plots are Vega-Lite specifications, drawn in the browser as SVG by Vega. Its scripts (Vega, Vega-Lite and vega-embed,
0.9 MB together) are what `vl_convert` bundles. Everything else is data: the template escapes it, the specifications
stand in a block that is never run, and the page's content security policy knows its two scripts by their hashes, so
that a label of an entity cannot become a third one.
"""

import base64
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from fedsim.checkpoint import replace_text
from fedsim.report.plots import THEME, Spec

PAGES = Path(__file__).parent / "pages"


@dataclass(frozen=True)
class Figure:
    """One plot.

    Attributes:
        name: unique within the page.
        title: what is plotted.
        spec: the Vega-Lite specification.
        summary: the main finding in numbers, for those who do not see the plot.
        note: what stands below it.
        wide: whether it takes the whole width.
    """

    name: str
    title: str
    spec: Spec
    summary: str
    note: str = ""
    wide: bool = False
    kind: Literal["figure"] = "figure"


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Attributes:
        text: what it says.
        detail: smaller, below.
        bold: whether it stands out.
        href: where it leads, relative to the page.
        picture: a data URI.
        right: whether it is marked as right.
    """

    text: str
    detail: str = ""
    bold: bool = False
    href: str = ""
    picture: str = ""
    right: bool = False


@dataclass(frozen=True)
class Table:
    """A table; the first column names its rows."""

    name: str
    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    kind: Literal["table"] = "table"

    @property
    def numeric(self) -> list[bool]:
        """Tell which columns hold numbers and are aligned to the right."""
        return [
            number > 0 and all(_is_number(row[number].text) for row in self.rows) for number in range(len(self.header))
        ]


Block = Figure | Table


@dataclass(frozen=True)
class Section:
    """A heading with text and blocks; two figures in a row of `blocks` stand side by side where there is room."""

    name: str
    title: str
    text: str
    blocks: tuple[Block, ...] = ()


@dataclass(frozen=True)
class Page:
    """A report.

    Attributes:
        title: of the page.
        notice: what must be known first, for example that a run is not finished.
        facts: name -> value, at the top.
        sections: in order; those without text and blocks are left out.
    """

    title: str
    notice: str
    facts: Mapping[str, str]
    sections: Sequence[Section]

    @property
    def figures(self) -> Iterator[Figure]:
        """Go through the plots of all sections."""
        return (block for section in self.sections for block in section.blocks if isinstance(block, Figure))


def write_page(page: Page, path: Path) -> Path:
    """Write a page whole or not at all; RunError if the place cannot be written."""
    replace_text(path, render(page))
    return path


def render(page: Page) -> str:
    """Return a page as HTML."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(PAGES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    library, drawing = plotting_library(), (PAGES / "report.js").read_text(encoding="utf-8")
    plots = {figure.name: figure.spec for figure in page.figures}
    return environment.get_template("report.html").render(
        page=page,
        style=(PAGES / "report.css").read_text(encoding="utf-8"),
        library=library,
        drawing=drawing,
        hashes=[_hash(library), _hash(drawing)],
        plots=as_script({"theme": THEME, "plots": plots}),
    )


@cache
def plotting_library() -> str:
    """Return the scripts that draw the plots; the bundle is made by the package, without a network."""
    import vl_convert

    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")).replace("</script", "<\\/script")


def as_script(value: Any) -> str:
    """Write a value as JSON that can stand in a script element; numbers that are not finite become null."""
    text = json.dumps(finite(value), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


def finite(value: Any) -> Any:
    """Replace numbers that are not finite, at any depth, by None: JSON has none."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def text_cells(texts: Sequence[str], *, bold: bool = False) -> tuple[Cell, ...]:
    """Make a row of plain cells."""
    return tuple(Cell(text, bold=bold) for text in texts)


def _hash(script: str) -> str:
    digest = hashlib.sha256(script.encode("utf-8")).digest()
    return f"sha256-{base64.b64encode(digest).decode('ascii')}"


def _is_number(text: str) -> bool:
    plain = text.replace(",", "").removeprefix("-").removesuffix(" %")
    return plain in ("", "–") or plain.replace(".", "", 1).isdigit()
