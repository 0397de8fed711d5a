"""How an update lies in the numbers that are masked, and how their sum becomes the server's sums again.

A row of the table holds, of one entity (or relation), its embedding, its token of each modality or zeros, one flag per
modality for whether there is a token, and, if ownership is hidden, a 1 for whether the client has the row at all. What
all clients have are the shared modules, by name, and their weight. Everything is int64 as in
`fedsim.federated.aggregation`, so that the sum is the plain one to the bit.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.federated.aggregation import ModuleMean, PartialSums, SumShape, encode, range_limit
from fedsim.federated.compression import decode_message
from fedsim.federated.message_checks import Rejection, find_fault
from fedsim.federated.messages import ClientUpdate
from fedsim.privacy.secure_aggregation.messages import PlainInput
from fedsim.privacy.secure_aggregation.sums import MaskedSums


@dataclass(frozen=True)
class Layout:
    """Where everything lies.

    Attributes:
        shape: of the round's sums.
        hide_ownership: whether clients send all rows there are.
    """

    shape: SumShape
    hide_ownership: bool

    @property
    def width(self) -> int:
        """Return the numbers per row."""
        form = self.shape.form
        return form.dim + form.num_modalities * (form.token_dim + 1) + int(self.hide_ownership)

    @property
    def modules(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each shared module, in the order in which they lie."""
        return dict(sorted(self.shape.form.modules.items()))

    @property
    def num_common(self) -> int:
        """Return the numbers that all clients send: the modules and their weight."""
        return sum(self._sizes) + 1

    @property
    def _sizes(self) -> list[int]:
        return [math.prod(size) for size in self.modules.values()]

    def sums(self, round_num: int, ownership: Mapping[int, Tensor]) -> MaskedSums:
        """Open the sums of a round."""
        known = None if self.hide_ownership else ownership
        return MaskedSums(round_num, self.shape.num_entities, self.width, self.num_common, known)

    def fault(self, update: ClientUpdate) -> Rejection | None:
        """Say what is wrong with an update, which once it is masked nobody can check any more."""
        form = self.shape.form
        own = {update.client: update.entity_ids}
        return find_fault(update, form, update.round_num, own, (), range_limit(len(form.num_triples)))

    def encode(self, update: ClientUpdate) -> PlainInput:
        """Lay out one client's update that has no fault."""
        update = decode_message(update)
        form = self.shape.form
        num_rows, num_modalities = len(update.entity_ids), form.num_modalities
        tokens = torch.zeros(num_modalities, num_rows, form.token_dim, dtype=torch.int64)
        flags = torch.zeros(num_modalities, num_rows, dtype=torch.int64)
        if update.token_present is not None and update.tokens is not None:
            tokens[update.token_present] = encode(update.tokens)
            flags = update.token_present.to(torch.int64)
        columns = [encode(update.entity), *tokens, flags.T]
        weighted = ModuleMean()
        weighted.add(update.modules, update.num_triples / sum(form.num_triples.values()))
        common = torch.cat([*(weighted.totals[name].flatten() for name in self.modules), weighted.weight.view(1)])
        if not self.hide_ownership:
            return PlainInput(update.entity_ids, torch.cat(columns, 1), common)
        owned = torch.ones(num_rows, 1, dtype=torch.int64)
        table = torch.zeros(self.shape.num_entities, self.width, dtype=torch.int64)
        table[update.entity_ids] = torch.cat([*columns, owned], 1)
        return PlainInput(None, table, common)

    def decode(self, sums: MaskedSums) -> PartialSums:
        """Read the server's sums off the unmasked ones."""
        form = self.shape.form
        table = sums.table
        entity, tokens, flags = table.tensor_split([form.dim, form.dim + form.num_modalities * form.token_dim], dim=1)
        if sums.ownership is None:
            counts = table[:, -1].clone()
        else:
            counts = torch.zeros(len(table), dtype=torch.int64)
            for client in sums.received:
                counts[sums.ownership[client]] += 1
        *modules, weight = sums.common.split([*self._sizes, 1])
        return PartialSums(
            round_num=sums.round_num,
            clients=tuple(sorted(sums.received)),
            entity=entity,
            entity_counts=counts,
            modules={name: part.view(size) for (name, size), part in zip(self.modules.items(), modules, strict=True)},
            module_weight=weight.view(()),
            tokens=tokens.unflatten(1, (form.num_modalities, form.token_dim)).transpose(0, 1),
            token_counts=flags[:, : form.num_modalities].T,
            soft_queries={},
            rows={},
            rejected=tuple(sums.rejected),
            seconds=sums.seconds,
        )
