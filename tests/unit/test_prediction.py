"""Questions to a trained client."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from builders import tiny_graph
from experiments import small_config
from fedsim import cli, simulation
from fedsim.config import Config
from fedsim.data.clients import ClientData
from fedsim.data.dataset import KnowledgeGraph, save_dataset
from fedsim.errors import DataError, RunError
from fedsim.federated.runtime import prepare
from fedsim.prediction import predict


def _graph() -> KnowledgeGraph:
    """A tiny graph in which two entities are called the same, and one label differs from another by case alone."""
    graph = tiny_graph()
    graph.entity_labels[3] = graph.entity_labels[5] = "Twin"
    graph.relation_labels[0] = "Part Of"
    return graph


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config]:
    folder = tmp_path_factory.mktemp("prediction")
    save_dataset(_graph(), folder / "tiny")
    config = small_config(
        {"data.path": str(folder / "tiny"), "output": str(folder / "run"), "training.local_epochs": 4}
    )
    simulation.run(config)
    return folder / "run", config


def _client(config: Config, number: int) -> ClientData:
    return prepare(config).clients[number]


def _known_question(data: ClientData) -> tuple[str, str, str]:
    """A training triple's keys."""
    head, relation, tail = data.train[0]
    return f"e{data.entity_ids[head]}", f"r{data.relation_ids[relation]}", f"e{data.entity_ids[tail]}"


@pytest.mark.parametrize("number", [0, 1])
def test_candidates_are_the_clients_own_entities_best_first(trained: tuple[Path, Config], number: int) -> None:
    run, config = trained
    data = _client(config, number)
    head, relation, tail = _known_question(data)
    answers = predict(run, number, head, relation, "tail", 1000)
    assert {item.key for item in answers} == {f"e{i}" for i in data.entity_ids}
    scores = [item.score for item in answers]
    assert scores == sorted(scores, reverse=True)
    assert len(predict(run, number, head, relation, "tail", 3)) == 3
    assert answers[:3] == predict(run, number, head, relation, "tail", 3)
    found = {item.key: item.known for item in answers}
    assert found[tail]
    graph = _graph()
    triples = np.concatenate([part for group in data.groups for part in group.triples.values()])
    expected = {
        f"e{data.entity_ids[t]}" for h, r, t in triples if (f"e{data.entity_ids[h]}", r) == (head, data.train[0, 1])
    }
    assert {key for key, known in found.items() if known} == expected
    assert all(item.label == graph.entity_labels[int(item.key[1:])] for item in answers)


def test_heads_are_asked_for_by_the_tail(trained: tuple[Path, Config]) -> None:
    run, config = trained
    head, relation, tail = _known_question(_client(config, 0))
    answers = predict(run, 0, tail, relation, "head", 1000)
    assert {item.key: item.known for item in answers}[head]


def test_scores_are_those_that_the_evaluation_ranked(trained: tuple[Path, Config]) -> None:
    """The rank of a known answer among unknown ones is what the run's test metrics counted, for each test triple."""
    run, config = trained
    data = _client(config, 0)
    reciprocal_ranks = []
    for h, r, t in data.groups[0].triples["test"]:
        keys = f"e{data.entity_ids[h]}", f"r{data.relation_ids[r]}", f"e{data.entity_ids[t]}"
        for given, answer, direction in ((keys[0], keys[2], "tail"), (keys[2], keys[0], "head")):
            found = predict(run, 0, given, keys[1], direction, 1000)  # type: ignore[arg-type]
            rivals = [item.key for item in found if not item.known or item.key == answer]
            reciprocal_ranks.append(1 / (rivals.index(answer) + 1))
    result = simulation.evaluate(run)
    assert np.mean(reciprocal_ranks) == pytest.approx(result.clients[0].test.mrr, abs=1e-6)


def test_labels_work_in_any_case_and_keys_win(trained: tuple[Path, Config]) -> None:
    run, config = trained
    holders = [number for number in (0, 1) if 0 in _client(config, number).relation_ids]
    number = holders[0]
    entity = int(_client(config, number).entity_ids[0])
    by_key = predict(run, number, f"e{entity}", "r0", "tail", 5)
    assert predict(run, number, f"ENTITY {entity}", "part of", "tail", 5) == by_key
    held = set(_client(config, number).entity_ids.tolist())
    assert {3, 5} <= held, "both twins are at this client"
    with pytest.raises(DataError, match=r"entity 'twin' can be e3, e5 at client \d; give one of the keys"):
        predict(run, number, "twin", "r0", "tail", 5)
    assert predict(run, number, "e3", "r0", "tail", 5)


def test_what_a_client_does_not_know_is_named(trained: tuple[Path, Config]) -> None:
    run, config = trained
    data = _client(config, 0)
    mine = f"r{data.relation_ids[0]}"
    others = next(i for i in range(6) if i not in data.relation_ids)
    entity = f"e{data.entity_ids[0]}"
    with pytest.raises(DataError, match="unknown entity 'entity 1x'; the nearest at client 0: entity 1"):
        predict(run, 0, "entity 1x", mine, "tail", 5)
    with pytest.raises(DataError, match=f"client 0 does not hold the relation 'r{others}'.*ask another --client"):
        predict(run, 0, entity, f"r{others}", "tail", 5)
    with pytest.raises(RunError, match="no client 2; it has clients 0 to 1"):
        predict(run, 2, entity, mine, "tail", 5)


def test_a_run_without_models_answers_from_its_best_checkpoint(trained: tuple[Path, Config], tmp_path: Path) -> None:
    run, config = trained
    head, relation, _ = _known_question(_client(config, 0))
    expected = predict(run, 0, head, relation, "tail", 5)
    stopped = tmp_path / "stopped"
    shutil.copytree(run, stopped)
    shutil.rmtree(stopped / "models")
    assert predict(stopped, 0, head, relation, "tail", 5) == expected
    shutil.rmtree(stopped / "checkpoints")
    with pytest.raises(RunError, match="has no models yet; finish it with `fedsim resume"):
        predict(stopped, 0, head, relation, "tail", 5)


def test_altered_models_are_refused(trained: tuple[Path, Config], tmp_path: Path) -> None:
    run, config = trained
    head, relation, _ = _known_question(_client(config, 0))
    shutil.copytree(run, tmp_path / "run")
    file = tmp_path / "run" / "models" / "clients-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(RunError, match=r"clients-00000\.safetensors was cut short or altered"):
        predict(tmp_path / "run", 0, head, relation, "tail", 5)


def test_a_central_model_is_one_client_with_all_data(tmp_path: Path) -> None:
    save_dataset(tiny_graph(), tmp_path / "tiny")
    settings = {"data.path": str(tmp_path / "tiny"), "output": str(tmp_path / "run"), "federation.num_rounds": 1}
    simulation.run(small_config({**settings, "federation.strategy": "central"}))
    assert len(predict(tmp_path / "run", 0, "e0", "r0", "tail", 1000)) == 40
    with pytest.raises(RunError, match="no client 1; it has one client, 0"):
        predict(tmp_path / "run", 1, "e0", "r0", "tail", 5)


def test_the_command_prints_the_table(trained: tuple[Path, Config], capsys: pytest.CaptureFixture[str]) -> None:
    run, config = trained
    head, relation, tail = _known_question(_client(config, 1))
    options = ["--client", "1", "--head", head, "--relation", relation, "--top", "40"]
    assert cli.main(["predict", str(run), *options]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["client", "1", "answers", f"({head},", f"{relation},", "?)"] in lines
    assert any(line[-1] == "yes" and tail in line for line in lines if line)
    assert cli.main(["predict", str(run), "--client", "1", "--head", "nobody", "--relation", relation]) == 2
    shown = capsys.readouterr().err
    assert "unknown entity 'nobody'" in shown
    assert "Traceback" not in shown
