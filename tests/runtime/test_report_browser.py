"""Reports in a browser: every plot is drawn, nothing is complained of, and narrow and wide pages can be read."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from builders import tiny_graph
from experiments import small_config
from fedsim import simulation
from fedsim.data.dataset import save_dataset
from fedsim.report import write_run_report

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: Debian's package chromium")

# Says in the page what can only be seen in a browser, once all plots are drawn; it is put behind the page's scripts.
LOOK = """
window.addEventListener("message", (event) => {
  const place = document.createElement("pre");
  place.id = "seen";
  place.textContent = event.data;
  document.body.append(place);
});
const report = () => {
  const plots = [...document.querySelectorAll(".plot")];
  const wide = [...document.querySelectorAll("body *")].filter((item) =>
    !item.closest(".scroll, .plot, .skip, .hidden") && item.getBoundingClientRect().right > innerWidth + 1);
  const seen = {
    drawn: plots.filter((plot) => plot.dataset.drawn === "yes").length,
    plots: plots.length,
    empty: plots.filter((plot) => !plot.querySelector("svg .mark-group :is(path, text)")).map((plot) => plot.id),
    cut: plots.filter((plot) => [plot.querySelector("svg"), ...plot.querySelectorAll("svg text")].some((item) =>
      item.getBoundingClientRect().right > plot.getBoundingClientRect().right + 1)).map((plot) => plot.id),
    unnamed: plots.filter((plot) => plot.getAttribute("role") !== "img" || !plot.getAttribute("aria-label")).length,
    scrolls: document.documentElement.scrollWidth > innerWidth + 1,
    wide: wide.map((item) => item.outerHTML.slice(0, 80)),
    width: innerWidth,
    ran: window.ran === true,
    unreachable: [...document.querySelectorAll("a, button, .scroll")].filter((item) => item.tabIndex < 0).length,
    first: document.querySelector("a, button, [tabindex]").getAttribute("href"),
  };
  parent.postMessage(JSON.stringify(seen), "*");
};
const wait = setInterval(() => {
  if (document.documentElement.dataset.drawn) { clearInterval(wait); report(); }
}, 20);
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a small run whose entities have labels that would run if they became markup."""
    place = tmp_path_factory.mktemp("browser")
    graph = tiny_graph()
    labels = [f'<img src=x onerror="window.ran=true"><script>window.ran=true</script>{i}' for i in range(40)]
    save_dataset(replace(graph, entity_labels=labels), place / "data")
    split = {"data.split": "dirichlet", "data.dirichlet_alpha": 2.0, "data.num_clients": 3}
    paths = {"data.path": str(place / "data"), "output": str(place / "run"), "federation.num_rounds": 2}
    simulation.run(small_config(paths | split))
    return write_run_report(place / "run")


def _open(page: Path, width: int, folder: Path) -> tuple[dict[str, object], list[str]]:
    """Open a page; returns what `LOOK` saw in it and what the browser's console says of it."""
    html = page.read_text(encoding="utf-8")
    # The page's policy forbids foreign scripts, which another test holds it to; here one must look around.
    html = re.sub(r"script-src [^;\"]*", "script-src 'unsafe-inline' 'unsafe-eval'", html)
    watched = folder / "watched.html"
    before, _, after = html.rpartition("</body>")  # the library's script has such a text too
    watched.write_text(f"{before}<script>{LOOK}</script></body>{after}", encoding="utf-8")
    return _dump(watched, width, folder)


def _dump(page: Path, width: int, folder: Path) -> tuple[dict[str, object], list[str]]:
    assert CHROMIUM is not None
    # A headless window is at least 500 px wide: a narrow page is one in a frame.
    if width < 500:
        frame = folder / "frame.html"
        style = f"border:0;height:900px;width:{width}px"
        listener = LOOK.partition("const report")[0]
        frame.write_text(
            f'<body style="margin:0"><script>{listener}</script><iframe src="{page.name}" style="{style}"></iframe>'
        )
        shown = frame
    else:
        shown = page
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += [f"--window-size={max(width, 500)},900", "--virtual-time-budget=20000", "--enable-logging=stderr"]
    command += ["--allow-file-access-from-files", "--dump-dom", shown.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    said = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    seen = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout)
    assert seen is not None, said
    return json.loads(seen[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")), said


@pytest.mark.parametrize("width", [1280, 400])
def test_every_plot_is_drawn_and_the_page_fits(width: int, page: Path, tmp_path: Path) -> None:
    seen, said = _open(page, width, tmp_path)
    assert said == [], "no error and no warning"
    assert seen["width"] == width
    assert seen["plots"] == seen["drawn"] == 12
    assert (seen["empty"], seen["cut"], seen["unnamed"]) == ([], [], 0)
    assert (seen["scrolls"], seen["wide"]) == (False, [])
    assert not seen["ran"], "a label became markup"
    assert (seen["unreachable"], seen["first"]) == (0, "#main")


def test_the_page_as_it_is_draws_its_plots_under_its_own_policy(page: Path, tmp_path: Path) -> None:
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--virtual-time-budget=20000", "--enable-logging=stderr", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert [line for line in done.stderr.splitlines() if ":CONSOLE" in line] == []
    assert done.stdout.count('data-drawn="yes"') == 13, "12 plots and the page"
