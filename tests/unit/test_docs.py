"""The documentation is true: its commands, options, links, equations and examples exist and run."""

import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch

import fedsim
from builders import tiny_graph
from fedsim import cli
from fedsim.config import config_fields, load_config
from fedsim.data.dataset import resolve_dataset, save_dataset
from fedsim.federated import STRATEGIES
from fedsim.models.fusion import FUSIONS
from fedsim.models.imputers import IMPUTERS, TokenTable
from fedsim.models.losses import LOSSES
from fedsim.models.scorers import SCORERS
from runs import SMALL

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
METHOD = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
SECTIONS = {path.split(".")[0] for path, _ in config_fields() if "." in path}


def _blocks(text: str, language: str) -> list[str]:
    """Return the fenced blocks of one language, without the indentation of a list item."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", text, flags=re.MULTILINE | re.DOTALL)
    return ["\n".join(line.removeprefix(indent) for line in block.splitlines()) for indent, block in found]


def _commands() -> list[list[str]]:
    """Return every command line that the README shows, in blocks and in backticks, without comments."""
    lines = [line for block in _blocks(README, "sh") for line in block.splitlines()]
    lines += re.findall(r"`((?:fedsim|make) [^`]*)`", README)
    words = [shlex.split(line, comments=True) for line in lines]
    return [[word for word in line if not word.startswith("RAY_AUTH_MODE=")] for line in words if line]


def _slug(heading: str) -> str:
    """Make the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("words", _commands(), ids=" ".join)
def test_readme_commands_and_options_exist(words: list[str]) -> None:
    program, *rest = words
    if program == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    elif program == "python":
        source = (ROOT / rest[0]).read_text(encoding="utf-8")
        assert all(f'"{word}"' in source for word in rest if word.startswith("--"))
    elif program == "fedsim":
        command: click.Command = cli.commands
        while isinstance(command, click.Group):
            command = command.commands[rest.pop(0).rstrip(",")]
        options = {name for parameter in command.params for name in parameter.opts} | {"--section.field"}
        used = {word.strip("[]") for word in rest if word.lstrip("[").startswith("--")}
        assert used <= options
    else:
        assert program in ("ray",), f"{program} is a program that this test does not know"


def test_method_options_of_the_readme_are_a_config() -> None:
    for line in re.findall(r"\| `(--federation[^`]*)` \|", README):
        load_config(overrides=dict(re.findall(r"--(\S+) (\S+)", line)))


@pytest.mark.parametrize("registry", [STRATEGIES, IMPUTERS, FUSIONS, SCORERS, LOSSES])
def test_readme_names_every_registered_part(registry: dict[str, Any]) -> None:
    assert [name for name in registry if f"`{name}`" not in README] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name) if name else page
        assert linked.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in map(_slug, headings), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_config_fields_that_are_named_exist(page: Path) -> None:
    fields = {path for path, _ in config_fields()}
    named = re.findall(rf"`(?:--)?((?:{'|'.join(sorted(SECTIONS))})\.[a-z][a-z_0-9]*)[:` ]", page.read_text("utf-8"))
    assert set(named) <= fields


def test_method_has_the_equations_and_sections_that_docstrings_cite() -> None:
    equations = set(re.findall(r"\\tag\{(\d+)\}", METHOD))
    sections = set(re.findall(r"^## (\d+)\.", METHOD, flags=re.MULTILINE))
    assert equations == {str(number) for number in range(1, 16)}
    for source in (path for folder in ("fedsim", "actors", "tests") for path in (ROOT / folder).rglob("*.py")):
        text = source.read_text(encoding="utf-8")
        for cited in re.findall(r"\beq\. (\d+(?:(?:, | and | to )\d+)*)", text):
            assert set(re.findall(r"\d+", cited)) <= equations, f"{source} cites eq. {cited}"
        for cited in re.findall(r"method\.md sections? (\d+(?:(?:, | and | to )\d+)*)", text):
            assert set(re.findall(r"\d+", cited)) <= sections, f"{source} cites section {cited}"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_configs_load(path: Path) -> None:
    config = load_config(path)
    assert config.federation.strategy in STRATEGIES
    assert resolve_dataset(config.data.path).is_dir()


def test_readme_python_runs_in_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _run_python(0, tmp_path, monkeypatch).clients


@pytest.mark.usefixtures("ray_cluster")
def test_readme_python_runs_on_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _run_python(1, tmp_path, monkeypatch).clients


def _run_python(number: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a Python example of the README as it stands, in a folder of its own; returns its result."""
    code = [block for block in _blocks(README, "python") if block.startswith("import fedsim")][number]
    assert len([line for line in code.splitlines() if line]) <= 5
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(code, names)  # the README is ours
    return names["result"]


@pytest.fixture
def _median() -> Iterator[None]:
    """Take the three steps of the README: its file, its line in the registry."""
    (code,) = [block for block in _blocks(README, "python") if "MedianImputer" in block]
    names: dict[str, Any] = {}
    exec(code, names)
    IMPUTERS["median"] = names["MedianImputer"]
    yield
    del IMPUTERS["median"]


@pytest.mark.usefixtures("_median")
def test_the_imputer_of_the_readme_is_one(tmp_path: Path) -> None:
    save_dataset(tiny_graph(), tmp_path / "data")
    paths = {"data.path": str(tmp_path / "data"), "output": str(tmp_path / "run"), "federation.num_rounds": 1}
    result = fedsim.run(load_config(overrides=SMALL | paths | {"model.imputer": "median"}))
    assert {"text/median", "image/median"} <= set(result.imputation)


@pytest.mark.usefixtures("_median")
def test_the_median_is_that_of_the_available_tokens() -> None:
    """Tokens 1, 2 and 9 are available and 7 is not: the median is 2."""
    values = torch.tensor([[1.0, 2.0, 9.0, 7.0]]).unsqueeze(-1)
    table = TokenTable(values, torch.tensor([[True, True, True, False]]))
    made = IMPUTERS["median"](load_config(), 1).impute({}, table, {})
    assert made.values[0, 3, 0] == 2.0


def test_the_example_script_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    save_dataset(tiny_graph(), tmp_path / "data")
    load = load_config
    quick = SMALL | {"data.path": str(tmp_path / "data")}
    monkeypatch.setattr(fedsim, "load_config", lambda overrides: load(overrides=overrides | quick))
    names = runpy.run_path(str(ROOT / "examples" / "compare_imputers.py"))
    names["compare"](tmp_path / "runs", num_rounds=1)
    names["ask"](tmp_path / "runs" / "diffusion")
    shown = capsys.readouterr().out
    assert "diffusion" in shown
    assert "client 2: unknown entity 'guitar'" in shown
