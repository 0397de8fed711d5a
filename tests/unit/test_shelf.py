"""The state of clients on a shelf: same numbers, no memory, no file left, and errors that name the field."""

from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import read_files, small_client, small_runtime
from fedsim.errors import RunError
from fedsim.federated import STRATEGIES
from fedsim.federated.runtime import InProcessRuntime
from fedsim.federated.shelf import Shelf

VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"federation.strategy": name} for name, strategy in STRATEGIES.items() if not strategy.together},
    "top rows": {"federation.strategy": "mmfed3", "communication.top_k": 0.5, "communication.full_every": 2},
}


def _outcome(runtime: InProcessRuntime, folder: Path) -> tuple[list[Any], dict[str, bytes]]:
    """Run rounds of which the second leaves a client out, and return all numbers and the bytes of a checkpoint."""
    numbers: list[Any] = []
    for round_num, cohort in ((1, [0, 1]), (2, [1]), (3, [0, 1])):
        numbers.append([report.losses for report in runtime.train(round_num, cohort).reports])
        numbers.append(runtime.evaluate("valid", round_num, choose=True))
    folder.mkdir()
    runtime.save(folder)
    runtime.train(4, [0, 1])
    runtime.load(folder)
    numbers.append(runtime.evaluate("test", 3, choose=False))
    numbers.append(runtime.measure(3))
    return numbers, read_files(folder)


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)
def test_a_shelf_changes_no_number(overrides: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    shelved = small_runtime(overrides | {"runtime.scratch": str(tmp_path / "scratch")})
    assert _outcome(shelved, tmp_path / "shelved") == _outcome(small_runtime(overrides), tmp_path / "kept")
    assert not any(client.values.params for client in shelved.clients.values())  # nothing stays in memory
    assert not any(client.prototypes for client in shelved.clients.values())


def test_the_file_has_no_name(tmp_path: Path) -> None:
    """So a killed process leaves nothing behind."""
    runtime = small_runtime({"runtime.scratch": str(tmp_path)})
    runtime.train(1, [0, 1])
    assert list(tmp_path.iterdir()) == []


def test_a_state_that_grows_moves_and_one_that_shrinks_stays(tmp_path: Path) -> None:
    """Of two clients that change size in turns each gets back what it put away."""
    clients = [small_client({"data.num_clients": 2}) for _ in range(2)]
    object.__setattr__(clients[1].data, "client", 1)
    shelf = Shelf(str(tmp_path))
    for size in (3, 2, 500, 1, 501):
        with shelf.at_work(clients):
            for number, client in enumerate(clients):
                client.values.params = {"relation": torch.full((size + number,), float(size + number))}
        with shelf.at_work(clients, changes=False):
            found = [client.values.params["relation"].tolist() for client in clients]
        assert found == [[float(size + number)] * (size + number) for number in range(2)]


def test_what_does_not_change_is_not_written_again(tmp_path: Path) -> None:
    client = small_client()
    shelf = Shelf(str(tmp_path))
    with shelf.at_work([client]):
        client.values.params = {"relation": torch.ones(2)}
    with shelf.at_work([client], changes=False):
        client.values.params["relation"] += 1
    with shelf.at_work([client]):
        assert client.values.params["relation"].tolist() == [1.0, 1.0]


def test_a_state_that_is_cut_short_is_one_message(tmp_path: Path) -> None:
    client = small_client()
    shelf = Shelf(str(tmp_path))
    with shelf.at_work([client]):
        client.values.params = {"relation": torch.ones(2000)}
    assert shelf._file is not None
    shelf._file.truncate(100)
    with (
        pytest.raises(RunError, match=r"client 0: its state in 'runtime.scratch' = .* is cut short"),
        shelf.at_work([client]),
    ):
        pass


def test_without_a_folder_all_stays_in_memory() -> None:
    client = small_client()
    with Shelf(None).at_work([client]):
        before = client.values
    assert client.values is before


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(RunError, match=rf"'runtime.scratch' = '{missing}': No such file or directory; give a folder"):
        small_runtime({"runtime.scratch": str(missing)})
