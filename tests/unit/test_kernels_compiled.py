"""Compiled distances (`training.compile`) against those by torch's operators, and what a user without compiler sees."""

import math
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from builders import tiny_graph
from experiments import small_config, small_options, small_runtime
from fedsim import cli
from fedsim.errors import ConfigError
from fedsim.federated.client import train_together
from fedsim.models import compiled
from fedsim.models.client_model import ClientModel
from fedsim.models.compiled import COMPILED, load_library
from fedsim.models.kernels import BLOCKED, L1, MODULI, Distances, Norm
from fedsim.models.scorers import COMPILED_SCORERS

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler 'cc'")
every_norm = pytest.mark.parametrize("norm", [L1, MODULI], ids=["L1", "MODULI"])
every_scorer = pytest.mark.parametrize("scorer", list(COMPILED_SCORERS))


@pytest.fixture
def fresh_library() -> Iterator[None]:
    """Compile anew in the test, and after it."""
    load_library.cache_clear()
    yield
    load_library.cache_clear()


def all_results(
    by: Distances, norm: Norm, query: Tensor, table: Tensor, ids: Tensor, slope: float = 1.0
) -> list[Tensor]:
    """Compute distances of all pairs and of own rows, each with the gradients of query and table."""
    query, table = query.detach().requires_grad_(), table.detach().requires_grad_()
    results = []
    for distances in (by.all_pairs(query, table, norm), by.rows(query, table, ids, norm)):
        # Slopes of every sign and size, the same for whoever computes.
        grad = torch.arange(distances.numel(), dtype=query.dtype).sub_(1.5).view_as(distances) * slope
        results += [distances.detach(), *torch.autograd.grad(distances, (query, table), grad)]
    return results


def draw(*leading: int, batch: int, num: int, dim: int, own: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Draw queries, a table and ids of its rows, some of them the same."""
    generator = torch.Generator().manual_seed(seed)
    query, table = (torch.randn(*leading, rows, dim, generator=generator) for rows in (batch, num))
    return query, table, torch.randint(num, (*leading, batch, own), generator=generator)


@needs_compiler
@pytest.mark.parametrize(
    ("norm", "expected", "slope"),
    [(L1, 4.0, [-2.0, 2.0]), (MODULI, math.sqrt(10.0), [-2 / math.sqrt(10.0), 6 / math.sqrt(10.0)])],
)
def test_distances_and_gradients_by_hand(norm: Norm, expected: float, slope: list[float]) -> None:
    """The query (1, 2) against (2, -1), differences (-1, 3), and against itself.

    Sizes: 1 + 3 = 4, slope (-1, 1). As one complex number, -1 + 3i: sqrt(10), slope (-1, 3) / sqrt(10). The gradient
    of the distances is (2, 7), and a distance of 0 has slope 0.
    """
    query = torch.tensor([[1.0, 2.0]], requires_grad=True)
    table = torch.tensor([[2.0, -1.0], [1.0, 2.0]], requires_grad=True)
    for distances in (
        COMPILED.all_pairs(query, table, norm),
        COMPILED.rows(query, table, torch.tensor([[0, 1]]), norm),
    ):
        torch.testing.assert_close(distances, torch.tensor([[expected, 0.0]]))
        of_query, of_table = torch.autograd.grad(distances, (query, table), torch.tensor([[2.0, 7.0]]))
        torch.testing.assert_close(of_query, torch.tensor([slope]))
        torch.testing.assert_close(of_table, torch.tensor([[-slope[0], -slope[1]], [0.0, 0.0]]))


@needs_compiler
@every_norm
@given(
    leading=st.sampled_from([(), (1,), (3,), (2, 3)]),
    batch=st.integers(1, 6),
    num=st.one_of(st.integers(1, 7), st.integers(126, 131)),  # 128 is a tile
    half=st.integers(1, 40),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=60, deadline=None)  # the first of them compiles
def test_they_equal_the_operators(
    norm: Norm, leading: tuple[int, ...], batch: int, num: int, half: int, seed: int
) -> None:
    inputs = draw(*leading, batch=batch, num=num, dim=2 * half, seed=seed)
    expected = all_results(BLOCKED, norm, *inputs)
    for value, other in zip(all_results(COMPILED, norm, *inputs), expected, strict=True):
        scale = float(other.abs().max())
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-5 * scale)


@needs_compiler
@every_norm
def test_any_strides_are_read(norm: Norm) -> None:
    query, table, ids = draw(2, batch=6, num=4, dim=6)
    turned = query.mT.contiguous().mT, table[:, :1].expand(-1, 4, -1), ids.mT.contiguous().mT
    plain = [value.contiguous() for value in turned]
    for value, other in zip(all_results(COMPILED, norm, *turned), all_results(COMPILED, norm, *plain), strict=True):
        assert torch.equal(value, other)


@needs_compiler
@every_norm
@pytest.mark.parametrize("offset", [0.0, 1e-30, 1e-22, 1e-19, 1e-10])
@pytest.mark.parametrize("slope", [1.0, 1e4])
def test_gradients_are_finite_at_and_near_distance_zero(norm: Norm, offset: float, slope: float) -> None:
    query, table = torch.zeros(2, 4), torch.full((3, 4), offset)
    results = all_results(COMPILED, norm, query, table, torch.arange(3).expand(2, -1), slope)
    for gradient in (results[1], results[2], results[4], results[5]):
        assert gradient.isfinite().all()
        assert gradient.abs().max() <= 7.51 * slope  # three pairs of a query, with gradients of 1.5, 2.5 and 3.5


@needs_compiler
@every_norm
def test_a_table_in_a_stack_has_the_bits_that_it_has_alone(norm: Norm) -> None:
    query, table, ids = draw(3, batch=20, num=150, dim=54)
    stacked = COMPILED.all_pairs(query, table, norm), COMPILED.rows(query, table, ids, norm)
    for i in range(3):
        assert torch.equal(stacked[0][i], COMPILED.all_pairs(query[i], table[i], norm))
        assert torch.equal(stacked[1][i], COMPILED.rows(query[i], table[i], ids[i], norm))


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the options are those of x86")
@pytest.mark.usefixtures("fresh_library")
@every_norm
def test_every_machine_computes_the_same_bits(norm: Norm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors of four, as any x86 processor has them, and without fused multiplication."""
    inputs = draw(2, batch=20, num=150, dim=54)
    expected = all_results(COMPILED, norm, *inputs)
    load_library.cache_clear()
    monkeypatch.setenv("CC", "cc -mno-avx -mno-fma")
    for value, other in zip(all_results(COMPILED, norm, *inputs), expected, strict=True):
        assert torch.equal(value, other)


@needs_compiler
@pytest.mark.parametrize("row", [-1, 3])
def test_rows_beyond_the_table_are_refused(row: int) -> None:
    query, table, _ = draw(batch=1, num=3, dim=4)
    with pytest.raises(IndexError, match="of a table that has 3"):
        COMPILED.rows(query, table, torch.tensor([[0, row]]), L1)


def trained(overrides: dict[str, Any], size: int) -> list[dict[str, Tensor]]:
    """Train three clients of different sizes for a round, so many at once; return their state."""
    fixed = {"data.num_clients": 3, "training.loss": "self_adversarial", "model.imputer": "zero"}
    graph = tiny_graph(num_entities=50, num_triples=400, num_relations=9)
    clients = list(small_runtime(fixed | overrides, graph).clients.values())
    for start in range(0, len(clients), size):
        part = clients[start : start + size]
        train_together(part, 1, [None] * len(part))
    return [client.state() for client in clients]


@needs_compiler
@every_scorer
@pytest.mark.parametrize("negatives", ["shared", "per_triple"])
def test_clients_train_as_without(scorer: str, negatives: str) -> None:
    """One by one and as one stack, within 1e-4 of the operators after a round."""
    settings = {"model.scorer": scorer, "training.negatives": negatives, "federation.strategy": "local"}
    plain = trained(settings, size=1)
    for size in (1, 3):
        for expected, found in zip(plain, trained(settings | {"training.compile": True}, size), strict=True):
            for name, value in expected.items():
                if not name.startswith("optimizer/"):
                    assert float((value - found[name]).norm() / value.norm().clamp(min=1e-6)) < 1e-4, name


def test_a_scorer_without_distances_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'training.compile' = true, but scorer 'distmult'.* from transe, rotate"):
        ClientModel(small_config({"model.scorer": "distmult", "training.compile": True}), {})


def test_clients_on_gpus_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"training.compile is for clients on CPUs.* runtime\.gpus_per_client to 0"):
        small_config({"model.scorer": "transe", "training.compile": True, "runtime.gpus_per_client": 0.5})


@pytest.mark.usefixtures("fresh_library")
@pytest.mark.parametrize(
    ("compiler", "cause"),
    [
        ("no-such-compiler", "'no-such-compiler' cannot be run (No such file or directory)"),
        ("false", "'false' failed: it says nothing"),
        ("true", "cannot load what 'true' compiled"),
        ("sh -c 'echo warning; echo x.c: error: no stdio.h >&2; exit 1'", "'sh' failed: x.c: error: no stdio.h"),
    ],
)
def test_without_compiler_a_command_ends_at_once(
    compiler: str, cause: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Exit code 2 and one message; no run folder is made."""
    monkeypatch.setenv("CC", compiler)
    options = {"model.scorer": "transe", "training.compile": True, "output": str(tmp_path / "run")}
    assert cli.main(["run", *small_options(options)]) == 2
    said = capsys.readouterr().err
    assert cause in said
    assert "set the field to false" in said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_what_is_compiled_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And what an earlier process left is not looked for: each compiles in a folder of its own."""
    monkeypatch.setattr(compiled.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("CC", "true")
    load_library.cache_clear()
    with pytest.raises(ConfigError, match="TMPDIR"):
        load_library()
    assert list(tmp_path.iterdir()) == []
