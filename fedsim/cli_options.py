"""The config tree as command-line options: one `--section.field VALUE` per leaf."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import click
import yaml
from pydantic_core import PydanticUndefined

from fedsim.config import Config, config_fields
from fedsim.parsing import parse_yaml

_OVERRIDES = "fedsim.overrides"
Function = TypeVar("Function", bound=Callable[..., Any])


class _ConfigOption(click.Option):
    """An option that stands for one field of the config."""

    section: str = ""


class ConfigCommand(click.Command):
    """A command whose help groups the config options by section."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the command's own options, then those of each section under the section's meaning."""
        sections: dict[str, list[tuple[str, str]]] = {"": []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and not isinstance(parameter, click.Argument):
                sections.setdefault(parameter.section if isinstance(parameter, _ConfigOption) else "", []).append(
                    record
                )
        for section, records in sections.items():
            with formatter.section(_section_title(section)):
                formatter.write_dl(records, col_max=34)


def config_options(function: Function) -> Function:
    """Give a command one option per config field; `current_overrides` returns those that were used."""
    for path, field in reversed(list(config_fields())):
        section, _, _ = path.rpartition(".")
        option = click.option(
            f"--{path}",
            path.replace(".", "__"),
            cls=_ConfigOption,
            metavar=_metavar(field.annotation),
            help=f"{field.description}  [default: {_as_text(field.default)}]",
            callback=_keeper(path, field.annotation),
            expose_value=False,
        )
        function = option(function)
        function.__click_params__[-1].section = section  # type: ignore[attr-defined]
    return function


def current_overrides() -> dict[str, Any]:
    """Return dotted path -> value of the config options given to the current command."""
    overrides: dict[str, Any] = click.get_current_context().meta.get(_OVERRIDES, {})
    return overrides


def _keeper(path: str, annotation: Any) -> Callable[[click.Context, click.Parameter, str | None], None]:
    def keep(context: click.Context, parameter: click.Parameter, text: str | None) -> None:
        if text is not None:
            context.meta.setdefault(_OVERRIDES, {})[path] = _parse(text, annotation, parameter)

    return keep


def _parse(text: str, annotation: Any, parameter: click.Parameter) -> Any:
    """Read a value as YAML; texts are taken as they are, so that a name like `on` or `5` stays a text."""
    kinds = _alternatives(annotation)
    if str in kinds and kinds <= {str, type(None)}:
        return None if type(None) in kinds and text in ("null", "~") else text
    try:
        return parse_yaml(text)
    except yaml.YAMLError as err:
        raise click.BadParameter(f"{text!r} is not a YAML value", param=parameter) from err


def _alternatives(annotation: Any) -> set[Any]:
    """Split `A | B` into {A, B}, without their constraints."""
    origin = get_origin(annotation)
    if origin is Union or type(annotation).__name__ == "UnionType":
        return set().union(*(_alternatives(part) for part in get_args(annotation)))
    if hasattr(annotation, "__metadata__"):
        return _alternatives(get_args(annotation)[0])
    return {annotation}


def _metavar(annotation: Any) -> str:
    kinds = _alternatives(annotation) - {type(None)}
    if len(kinds) == 1:
        (kind,) = kinds
        if get_origin(kind) is Literal:
            return "|".join(get_args(kind))
        names = {int: "INTEGER", float: "NUMBER", bool: "true|false", str: "TEXT"}
        if kind in names:
            return names[kind]
    return "YAML"


def _as_text(default: Any) -> str:
    if default is None or default is PydanticUndefined:
        return "null"
    return str(default).lower() if isinstance(default, bool) else str(default)


def _section_title(section: str) -> str:
    if not section:
        return "Options"
    meaning = (Config.model_fields[section].annotation.__doc__ or "").split("\n")[0].split("(method.md")[0]
    return f"{section}: {meaning.strip().rstrip('.')}"
