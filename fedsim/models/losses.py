"""Link-prediction losses (method.md section 3).

A loss takes the logits of each query over its candidates. With `one_vs_all` the candidates are all entities of the
client; with `self_adversarial` they are the true answer (column 0) and sampled negatives.

To add one: write a class with the members of `Loss`, and add a line to `LOSSES`.
"""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from fedsim.config import TrainingConfig


class Loss(Protocol):
    """A link-prediction loss."""

    samples_negatives: bool

    def __call__(self, logits: Tensor, target: Tensor, config: TrainingConfig) -> Tensor:
        """Return the mean loss of logits [batch, num_candidates] with the true candidate at target [batch]."""
        ...


class OneVsAll:
    """Cross-entropy over all entities of the client (Lacroix et al., ICML 2018)."""

    samples_negatives = False

    def __call__(self, logits: Tensor, target: Tensor, config: TrainingConfig) -> Tensor:
        """Return the mean cross-entropy."""
        return functional.cross_entropy(logits, target, label_smoothing=config.label_smoothing)


class SelfAdversarial:
    """Negative sampling weighted by the model's own belief (RotatE, Sun et al., ICLR 2019; used by FedE).

    The negatives are uniform draws from all entities of the client; the authors' code draws true answers again.
    """

    samples_negatives = True

    def __call__(self, logits: Tensor, target: Tensor, config: TrainingConfig) -> Tensor:
        """Return -(log sigmoid(gamma + s+) + sum_i p_i log sigmoid(-gamma - s-_i)) / 2, averaged."""
        positive, negative = logits[:, 0], logits[:, 1:]
        weight = torch.softmax(negative.detach() * config.adversarial_temperature, 1)  # [batch, num_negatives]
        positive_loss = functional.logsigmoid(config.margin + positive)
        negative_loss = (weight * functional.logsigmoid(-config.margin - negative)).sum(1)
        return -(positive_loss + negative_loss).mean() / 2


LOSSES: dict[str, Loss] = {"one_vs_all": OneVsAll(), "self_adversarial": SelfAdversarial()}


def n3_penalty(head: Tensor, relation: Tensor, tail: Tensor, *, complex_pairs: bool) -> Tensor:
    """Return the nuclear 3-norm regulariser (Lacroix et al., ICML 2018), mean over the batch.

    Args:
        head: [batch, dim] (relation and tail likewise).
        relation: [batch, dim].
        tail: [batch, dim].
        complex_pairs: whether the halves of dim are real and imaginary parts (ComplEx).
    """
    total = head.new_zeros(())
    for part in (head, relation, tail):
        if complex_pairs:
            real, imaginary = part.chunk(2, -1)
            size = (real.square() + imaginary.square() + 1e-12).sqrt()
        else:
            size = part.abs()
        total = total + size.pow(3).sum(-1).mean()
    return total
