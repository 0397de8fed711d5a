"""Reads feature files as people have them: npy, npz, safetensors, and pth without executing pickle."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedsim.data import storage
from fedsim.data.dataset import Features, check_features
from fedsim.errors import DataError

Arrays = dict[str, npt.NDArray[Any]]

SUFFIXES = (".npy", ".npz", ".safetensors", ".pth", ".pt")


def read_features(path: Path, modality: str, num_entities: int) -> tuple[Features, int]:
    """Read the features of one modality.

    Args:
        path: a file with one array, or with arrays named `<modality>` or `values` and, where not every entity has
            a row, `<modality>_entity` or `entity` (the entity id of each row).
        modality: its name.
        num_entities: number of entities; without ids the file must have a row for each, in their order.

    Returns:
        The features, and the number of rows left out because they are all zero: in published files that is how
        a missing picture or text is written.
    """
    arrays = read_arrays(path)
    values = _pick(arrays, modality, path)
    if values.ndim != 2 or values.shape[1] == 0 or not np.issubdtype(values.dtype, np.number):
        raise DataError(f"{path}: {modality} is {values.dtype} {list(values.shape)}, need numbers [rows, dim]")
    entity = _entities(arrays, modality, path)
    if entity is None:
        if len(values) != num_entities:
            raise DataError(
                f"{path}: {modality} has {len(values)} rows but there are {num_entities} entities; give a row per "
                f"entity in the order of their ids, or the ids of the rows as an array {modality + '_entity'!r}"
            )
        entity = np.arange(num_entities)
    if entity.shape != (len(values),):
        raise DataError(f"{path}: {len(values)} rows of {modality} but {entity.size} entity ids; give one per row")
    bad = np.flatnonzero((entity < 0) | (entity >= num_entities))
    if len(bad):
        raise DataError(
            f"{path}: {modality} row {bad[0]}: entity id {entity[bad[0]]} is out of range 0..{num_entities - 1}"
        )
    order = np.argsort(entity, kind="stable")
    entity = entity[order]
    twice = np.flatnonzero(np.diff(entity) == 0)
    if len(twice):
        raise DataError(f"{path}: {modality} row {order[twice[0] + 1]}: a second row for entity {entity[twice[0]]}")
    if values.dtype != np.float16:
        values = values.astype(np.float32)
    _check_finite(values, modality, path)
    values = values[order]
    filled = np.asarray(values.any(axis=1))
    features = Features(values=values[filled], entity=entity[filled].astype(np.int64))
    check_features(features, num_entities, path)
    return features, int(len(filled) - filled.sum())


def read_arrays(path: Path) -> Arrays:
    """Read all arrays of a feature file; a nameless one gets the name `values`."""
    if not path.is_file():
        raise DataError(f"{path}: file not found; give a feature file ({', '.join(SUFFIXES)})")
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: unknown kind of feature file; give {', '.join(SUFFIXES)}")
    if path.suffix == ".safetensors":
        return storage.map_safetensors(path)
    if path.suffix in (".pth", ".pt"):
        return _read_torch(path)
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {"values": loaded}
        with loaded:
            storage.check_unpacked(path)
            arrays = {name: loaded[name] for name in loaded.files}
        if not all(isinstance(array, np.ndarray) for array in arrays.values()):
            raise ValueError("it holds files that are no arrays")
        return arrays
    except Exception as err:  # a damaged file can raise anything
        raise DataError(f"{path}: not a readable numpy file without pickle ({err})") from err


def modalities_in(arrays: Arrays) -> list[str]:
    """List the modalities that a file of several arrays holds: its two-dimensional arrays of numbers."""
    return [name for name, array in arrays.items() if array.ndim == 2 and np.issubdtype(array.dtype, np.floating)]


def _read_torch(path: Path) -> Arrays:
    import torch

    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as err:  # a damaged file can raise anything
        message = str(err).splitlines()[0] if str(err) else type(err).__name__
        raise DataError(f"{path}: refused, not a file of tensors alone ({message})") from err
    tensors = loaded if isinstance(loaded, dict) else {"values": loaded}
    arrays = {str(name): value for name, value in tensors.items() if isinstance(value, torch.Tensor)}
    # numpy has no bfloat16.
    return {
        name: (value.float() if value.dtype == torch.bfloat16 else value).detach().numpy()
        for name, value in arrays.items()
    }


def _pick(arrays: Arrays, modality: str, path: Path) -> npt.NDArray[Any]:
    for name in (modality, "values"):
        if name in arrays:
            return arrays[name]
    if len(arrays) == 1:
        return next(iter(arrays.values()))
    raise DataError(f"{path}: no array {modality!r} or 'values' among {', '.join(arrays) or 'none'}; name one so")


def _entities(arrays: Arrays, modality: str, path: Path) -> npt.NDArray[np.int64] | None:
    for name in (f"{modality}_entity", "entity"):
        if name in arrays:
            if not np.issubdtype(arrays[name].dtype, np.integer):
                raise DataError(f"{path}: {name} is {arrays[name].dtype}, need whole numbers (entity ids)")
            return arrays[name].astype(np.int64)
    return None


def _check_finite(values: npt.NDArray[Any], modality: str, path: Path) -> None:
    """Refuse NaN and infinity, naming the row of the file."""
    finite = np.isfinite(values).all(axis=1)
    if not finite.all():
        raise DataError(
            f"{path}: {modality} row {int(np.argmin(finite))} holds NaN or infinity (in all {int((~finite).sum())} "
            f"rows do); encode those entities again or leave their rows out"
        )
