"""Stacks of clients: the values and inputs of several clients as tensors with a leading clients dimension.

Entity tables are padded to one more row than the largest has. The last row belongs to no entity: what is padded in a
list of rows is written there. Padded entities are not available and score -1e6, so that no loss or gradient sees them.

The functions of a model are written for one client. `over_clients` applies them to a stack.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from fedsim.models.client_model import EntityInput, ModalityInput, Prototypes
from fedsim.models.imputers import Draws
from fedsim.models.losses import PADDING_LOGIT
from fedsim.models.parameters import Params

T = TypeVar("T")


def pad_stack(tensors: Sequence[Tensor], shape: Sequence[int] | None = None, value: float = 0) -> Tensor:
    """Stack tensors of different sizes, padded at the end of each dimension.

    Args:
        tensors: of the same number of dimensions.
        shape: to pad to; by default the largest size of each dimension.
        value: of the padding.

    Returns:
        [clients, *shape].
    """
    wanted = tuple(shape) if shape is not None else tuple(map(max, zip(*(item.shape for item in tensors), strict=True)))
    if all(item.shape == wanted for item in tensors):
        return torch.stack(list(tensors))
    result = tensors[0].new_full((len(tensors), *wanted), value)
    for slot, item in zip(result, tensors, strict=True):
        slot[tuple(slice(size) for size in item.shape)] = item
    return result


@dataclass(frozen=True)
class StackShape:
    """The sizes of the clients of a stack, to go from one client's tables to the stack's and back.

    Attributes:
        num_entities: of each client.
        num_relations: of each client.
        reciprocal: whether a relation table has a second half for head queries, which is padded on its own.
    """

    num_entities: tuple[int, ...]
    num_relations: tuple[int, ...]
    reciprocal: bool

    @property
    def num_rows(self) -> int:
        """Return the rows of a stacked entity table: one belongs to no entity."""
        return max(self.num_entities) + 1

    def real(self) -> Tensor:
        """Say which rows of the stacked entity tables are entities, bool [clients, num_rows]."""
        return torch.arange(self.num_rows) < torch.tensor(self.num_entities).unsqueeze(1)

    def stack(self, states: Sequence[Mapping[str, Tensor]]) -> Params:
        """Stack clients' parameters, or optimiser state named ``<slot>/<parameter>``; what a client lacks is zero.

        Returns:
            name -> [clients, ...].
        """
        stacked: Params = {}
        for name in dict.fromkeys(name for state in states for name in state):
            known = next(state[name] for state in states if name in state)
            if known.dim() > 0 and name.endswith("/entity"):
                tables = [state.get(name) for state in states]
                empty = [known.new_zeros(size, known.shape[1]) for size in self.num_entities]
                found = [own if table is None else table for own, table in zip(empty, tables, strict=True)]
                stacked[name] = pad_stack(found, (self.num_rows, known.shape[1]))
            elif known.dim() > 0 and name.endswith("relation"):
                num_parts, _, width = known.shape
                halves = [
                    state[name].unflatten(1, (self._halves, size))
                    if name in state
                    else known.new_zeros(num_parts, self._halves, size, width)
                    for state, size in zip(states, self.num_relations, strict=True)
                ]
                stacked[name] = pad_stack(halves).flatten(2, 3)
            else:
                stacked[name] = torch.stack([state.get(name, torch.zeros_like(known)) for state in states])
        return stacked

    def unstack(self, stacked: Mapping[str, Tensor], index: int) -> Params:
        """Show the tensors of the client at a place of the stack, in its own sizes; they may be views of the stack."""
        own: Params = {}
        for name, values in stacked.items():
            value = values[index]
            if value.dim() > 0 and name.endswith("/entity"):
                value = value[: self.num_entities[index]]
            elif value.dim() > 0 and name.endswith("relation"):
                value = value.unflatten(1, (self._halves, -1))[:, :, : self.num_relations[index]].flatten(1, 2)
            own[name] = value
        return own

    @property
    def _halves(self) -> int:
        return 2 if self.reciprocal else 1


def stack_entities(inputs: Sequence[EntityInput], num_rows: int) -> EntityInput:
    """Stack what clients know of their entities; prototypes are absent where a client has none.

    Args:
        inputs: of each client.
        num_rows: of the stacked tables; the last is of no entity.
    """
    num_tokens = len(inputs[0].available)
    features = {
        name: ModalityInput(
            pad_stack([item.features[name].rows for item in inputs], value=num_rows - 1),
            pad_stack([item.features[name].values for item in inputs]),
        )
        for name in inputs[0].features
    }
    prototypes = None
    known = next((item.prototypes for item in inputs if item.prototypes is not None), None)
    if known is not None:
        empty = Prototypes(known.values[:, :0], known.present[:, :0])
        found = [item.prototypes or empty for item in inputs]
        prototypes = Prototypes(
            pad_stack([item.values for item in found], (num_tokens, num_rows, known.values.shape[-1])),
            pad_stack([item.present for item in found], (num_tokens, num_rows)),
        )
    return EntityInput(pad_stack([item.available for item in inputs], (num_tokens, num_rows)), features, prototypes)


def stack_draws(draws: Sequence[Draws], num_rows: int) -> Draws:
    """Stack draws of the same names; see `Draws` for what the names mean. A padded row is the last, of no entity."""
    return {name: _stack_draw(name, [item[name] for item in draws], num_rows) for name in draws[0]}


def _stack_draw(name: str, found: Sequence[Tensor], num_rows: int) -> Tensor:
    if name.endswith("rows"):
        return pad_stack(found, value=num_rows - 1)
    if name.startswith("entity_"):
        return pad_stack(found, (found[0].shape[0], num_rows, *found[0].shape[2:]))
    return pad_stack(found)


def over_clients(function: Callable[..., T], *arguments: Any) -> T:
    """Apply a function that is written for one client to stacked arguments: trees of tensors and None.

    A tree is a tensor, None, or a dataclass, dict or tuple of trees; so is the result.
    """
    structure: list[T] = []

    def on_leaves(*leaves: Tensor) -> tuple[Tensor, ...]:
        rest = iter(leaves)
        result = function(*(_rebuild(argument, rest) for argument in arguments))
        structure.append(result)
        return tuple(_leaves(result))

    leaves = [leaf for argument in arguments for leaf in _leaves(argument)]
    results = torch.func.vmap(on_leaves)(*leaves)
    rebuilt: T = _rebuild(structure[0], iter(results))
    return rebuilt


def mask_padding(logits: Tensor, num_entities: Sequence[int]) -> Tensor:
    """Set the logits of padded entities to -1e6, in place; [clients, num_queries, num_rows]."""
    masked: Tensor = _MaskPadding.apply(logits, tuple(num_entities))  # type: ignore[no-untyped-call]
    return masked


class _MaskPadding(torch.autograd.Function):
    """Padded entities have no weight in any softmax, so what comes back for them is zero already."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, num_entities: tuple[int, ...]) -> Tensor:
        """Overwrite the last columns."""
        for scores, size in zip(logits, num_entities, strict=True):
            scores[:, size:] = PADDING_LOGIT
        ctx.mark_dirty(logits)
        return logits

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Pass on."""
        return grad, None


def first_of(tree: T, num_clients: int) -> T:
    """Take the first clients of a stacked tree, without a copy."""
    part: T = _rebuild(tree, iter([leaf[:num_clients] for leaf in _leaves(tree)]))
    return part


def _leaves(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif tree is not None:
        for _, item in _items(tree):
            yield from _leaves(item)


def _rebuild(tree: Any, leaves: Iterator[Tensor]) -> Any:
    """Make the same tree of other tensors."""
    if tree is None:
        return None
    if isinstance(tree, Tensor):
        return next(leaves)
    items = {name: _rebuild(item, leaves) for name, item in _items(tree)}
    if isinstance(tree, dict):
        return items
    return tuple(items.values()) if isinstance(tree, tuple) else replace(tree, **items)


def _items(tree: Any) -> list[tuple[Any, Any]]:
    if isinstance(tree, dict):
        return list(tree.items())
    if isinstance(tree, tuple):
        return list(enumerate(tree))
    if not is_dataclass(tree):
        raise TypeError(f"{type(tree).__name__} is not a tree of tensors")
    return [(item.name, getattr(tree, item.name)) for item in fields(tree)]
