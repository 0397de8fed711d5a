"""A cluster of two `ray start` nodes on this machine, with fedsim from its wheel, for tests that submit jobs."""

import os
import re
import secrets
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from processes import descendants, end, wait_until

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
HOST = "127.0.0.1"


@dataclass(frozen=True)
class TwoNodes:
    """What a user of the cluster knows: its addresses, and the environment with its token."""

    gcs: str
    dashboard: str
    environment: Mapping[str, str]

    def status_of(self, path: str, token: str | None) -> int:
        """Ask the dashboard for a page, with a token or without; returns the HTTP status."""
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        try:
            with urllib.request.urlopen(urllib.request.Request(self.dashboard + path, headers=headers)) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as err:
            err.close()
            return err.code
        except OSError:
            return 0


def install_wheel(folder: Path) -> Path:
    """Build the wheel and install it, its dependencies being those of this Python; returns where it is."""
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    site = folder / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--target", str(site)]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True)
    return site


@contextmanager
def two_nodes(site: Path, token: str) -> Iterator[TwoNodes]:
    """Start two nodes of two CPUs, tokens on, the dashboard on the loopback address; nothing is left of them."""
    gcs, dashboard = _free_port(), _free_port()
    with ExitStack() as stack:
        # Sockets have short names: a test's own folder is too deep.
        place = stack.enter_context(tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True))
        token_file = Path(place) / "token"
        token_file.write_text(token)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment = kept | {
            "PYTHONPATH": str(site),
            "PATH": os.pathsep.join([str(site / "bin"), str(BIN), os.environ["PATH"]]),  # as an activated environment
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token_file),
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        }
        head = ["--head", f"--port={gcs}", f"--dashboard-host={HOST}", f"--dashboard-port={dashboard}"]
        head += [f"--temp-dir={place}/r"]
        cluster = TwoNodes(f"{HOST}:{gcs}", f"http://{HOST}:{dashboard}", environment)
        stack.enter_context(_node(head, Path(place), environment))
        stack.enter_context(_node([f"--address={cluster.gcs}"], Path(place), environment))
        assert wait_until(lambda: cluster.status_of("/api/version", token) == 200, 120), "the dashboard does not start"
        yield cluster


@contextmanager
def _node(options: Sequence[str], folder: Path, environment: Mapping[str, str]) -> Iterator[None]:
    """Run `ray start`. Never `ray stop`: it would end whatever Ray runs on this machine."""
    agent = _free_port()
    command = [str(BIN / "ray"), "start", "--block", "--num-cpus=2", f"--node-ip-address={HOST}"]
    command += ["--disable-usage-stats", f"--dashboard-agent-listen-port={agent}", *options]
    with (folder / "log").open("a") as log:
        node = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
    with node:
        try:
            # The agent starts last; jobs are refused until there is one.
            assert wait_until(lambda: _listens(agent) or node.poll() is not None, 120), "a node does not start"
            assert node.poll() is None, (folder / "log").read_text()
            yield
        finally:
            left = descendants(node.pid)
            node.kill()
            end(left)


def listening_addresses(port: int) -> set[str]:
    """Return the addresses of this machine that a port listens on, as the kernel writes them."""
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    return {row[1].partition(":")[0] for row in rows if row[3] == "0A" and row[1].endswith(f":{port:04X}")}


def new_token() -> str:
    """Make a token."""
    return secrets.token_hex(32)


def port_of(url: str) -> int:
    """Return the port of an address."""
    found = re.search(r":(\d+)$", url)
    assert found is not None
    return int(found[1])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0
