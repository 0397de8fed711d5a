"""Parsers of text that anybody may have written: what is wrong with it is told by one kind of error.

The libraries' own raise whatever the text leads them to: a date that is none, an integer of 5,000 digits, or nesting
deeper than Python's stack.
"""

import json
from typing import Any

import yaml

MAX_YAML_NODES = 100_000  # once references are written out: a few lines can stand for billions
MAX_YAML_DEPTH = 50


def parse_json(text: str | bytes) -> Any:
    """Parse JSON.

    Raises:
        ValueError: if it is not JSON.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_yaml(text: str | bytes) -> Any:
    """Parse YAML of plain values.

    Raises:
        yaml.YAMLError: if it is not YAML, or asks for more than plain values of a sane size.
    """
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError:
        raise
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except (ValueError, TypeError, AttributeError, LookupError, OverflowError) as err:
        # PyYAML lets pass what Python's own types say of a date, a number or a key.
        raise yaml.YAMLError(f"a value is not what it looks like ({err})") from err
    _measure(tree, {}, 0)
    return tree


def _measure(tree: Any, known: dict[int, tuple[int, int]], depth: int) -> tuple[int, int]:
    """Count the nodes and levels of a tree with all references written out; one to what holds it is endless."""
    if not isinstance(tree, dict | list | set | tuple):
        return 1, 0
    if id(tree) in known:
        return known[id(tree)]
    num_nodes, num_levels = 1, 0
    if depth <= MAX_YAML_DEPTH:
        for part in [*tree, *tree.values()] if isinstance(tree, dict) else tree:
            nodes, levels = _measure(part, known, depth + 1)
            num_nodes, num_levels = num_nodes + nodes, max(num_levels, 1 + levels)
    if depth + num_levels > MAX_YAML_DEPTH:
        raise yaml.YAMLError(f"it is nested more than {MAX_YAML_DEPTH} deep, or refers to itself")
    if num_nodes > MAX_YAML_NODES:
        raise yaml.YAMLError(f"its references stand for more than {MAX_YAML_NODES} values")
    known[id(tree)] = num_nodes, num_levels
    return known[id(tree)]
