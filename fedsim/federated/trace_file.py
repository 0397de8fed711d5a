"""Reads traces of availability and speed: csv files with the columns client, round, available and perhaps speed."""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedsim.errors import ConfigError, DataError

COLUMNS = ["client", "round", "available", "speed"]


@dataclass(frozen=True)
class TraceRow:
    """What holds for a client from a round on, until its next row.

    Attributes:
        round_num: the round, from 1.
        available: whether the client is up.
        speed: 1 is the normal speed, 2 is twice as fast; None if the file has no such column.
    """

    round_num: int
    available: bool
    speed: float | None


def read_trace(path: Path, clients: Sequence[int]) -> dict[int, list[TraceRow]]:
    """Read a trace; returns client -> its rows in order of rounds.

    Args:
        path: the csv file, with a header line.
        clients: ids of the run's clients, sorted.

    Raises:
        ConfigError: if the file cannot be read.
        DataError: naming file and line of what cannot be used.
    """
    try:
        lines = path.expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as err:
        reason = err.strerror if isinstance(err, OSError) else "it is not UTF-8 text"
        raise ConfigError(
            f"config field 'participation.trace_file' = '{path}' cannot be read: {reason}; give a csv file with the "
            f"columns client,round,available[,speed]"
        ) from err
    rows = list(csv.reader(lines))
    header = [name.strip() for name in rows[0]] if rows else []
    if header not in (COLUMNS[:3], COLUMNS):
        raise DataError(f"{path}, line 1: the header must be client,round,available or with ,speed behind it")
    trace: dict[int, list[TraceRow]] = {}
    line_of: dict[tuple[int, int], int] = {}
    for number, row in enumerate(rows[1:], start=2):
        where = f"{path}, line {number}"
        if not row:
            continue
        if len(row) != len(header):
            raise DataError(f"{where}: {len(row)} values instead of {len(header)} ({','.join(header)})")
        client, parsed = _parse(dict(zip(header, row, strict=True)), where)
        if client not in clients:
            raise DataError(f"{where}: client {client} is none of the run's clients {clients[0]} to {clients[-1]}")
        earlier = line_of.setdefault((client, parsed.round_num), number)
        if earlier != number:
            raise DataError(f"{where}: client {client}, round {parsed.round_num} stands in line {earlier} already")
        trace.setdefault(client, []).append(parsed)
    if not trace:
        raise DataError(f"{path}: no row below the header; give at least one, or leave participation.trace_file out")
    return {client: sorted(own, key=lambda row: row.round_num) for client, own in trace.items()}


def _parse(row: dict[str, str], where: str) -> tuple[int, TraceRow]:
    """Turn a line's texts into (client, row)."""
    numbers = {}
    for name in ("client", "round"):
        try:
            numbers[name] = int(row[name])
        except ValueError as err:
            raise DataError(f"{where}: {name} '{row[name].strip()}' is not a whole number") from err
    if numbers["round"] < 1:
        raise DataError(f"{where}: round {numbers['round']} is not one; rounds count from 1")
    available = row["available"].strip()
    if available not in ("0", "1"):
        raise DataError(f"{where}: available '{available}' must be 1 (up) or 0 (down)")
    speed = None
    if "speed" in row:
        try:
            speed = float(row["speed"])
        except ValueError:
            speed = math.nan
        if not 0 < speed < math.inf:
            raise DataError(f"{where}: speed '{row['speed'].strip()}' must be a number above 0 (1 is normal)")
    return numbers["client"], TraceRow(numbers["round"], available == "1", speed)
