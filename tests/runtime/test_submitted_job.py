"""A run submitted as a job to a cluster, from its wheel and another folder, ends with the bits of a local one."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from builders import write_tiny_dataset
from fedsim import cli
from runs import outcome, small_options
from two_nodes import BIN, TwoNodes, install_wheel, listening_addresses, new_token, port_of, two_nodes

NUM_ROUNDS = 2
TOKEN = new_token()
DASHBOARD_PAGES = ("/api/jobs/", "/api/version", "/logical/actors")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoNodes]:
    with two_nodes(install_wheel(tmp_path_factory.mktemp("wheel")), TOKEN) as started:
        yield started


def test_a_submitted_run_ends_with_the_bits_of_a_local_one(cluster: TwoNodes, tmp_path: Path) -> None:
    dataset = write_tiny_dataset(tmp_path / "data" / "tiny")
    (tmp_path / "elsewhere").mkdir()
    options = small_options(dataset, tmp_path / "submitted", NUM_ROUNDS)
    entrypoint = ["fedsim", "run", *options, "--runtime.address=auto", f"--storage={(tmp_path / 'shared').as_uri()}"]
    done = subprocess.run(
        [str(BIN / "ray"), "job", "submit", f"--address={cluster.dashboard}", "--log-style=record", "--", *entrypoint],
        cwd=tmp_path / "elsewhere",
        env=cluster.environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout + done.stderr
    here = [*small_options(dataset, tmp_path / "local", NUM_ROUNDS), "--runtime.kind=in_process"]
    assert cli.main(["run", *here]) == 0
    assert outcome(tmp_path / "submitted") == outcome(tmp_path / "local") == outcome(tmp_path / "shared")

    log = (tmp_path / "submitted" / "run.log").read_text()
    assert "on 2 node(s)" in log
    versions = json.loads((tmp_path / "submitted" / "versions.json").read_text())
    assert versions["git_commit"] is None, "it ran from the wheel, not from this checkout"
    assert TOKEN not in log + done.stdout + done.stderr


def test_strangers_stay_outside(cluster: TwoNodes) -> None:
    assert listening_addresses(port_of(cluster.dashboard)) == {"0100007F"}  # 127.0.0.1
    assert [cluster.status_of(page, None) for page in DASHBOARD_PAGES] == [401] * 3
    assert [cluster.status_of(page, new_token()) for page in DASHBOARD_PAGES] == [403] * 3
    assert [cluster.status_of(page, TOKEN) for page in DASHBOARD_PAGES] == [200] * 3
