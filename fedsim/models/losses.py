"""Link-prediction losses (method.md section 3).

A loss takes the logits of each query over its candidates. With `one_vs_all` the candidates are all entities of the
client; with the others they are the true answer (column 0) and sampled negatives.

To add one: write a class with the members of `Loss`, and add a line to `LOSSES`.
"""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from fedsim.config import TrainingConfig

PADDING_LOGIT = -1e6  # of candidates that are none


class Loss(Protocol):
    """A link-prediction loss."""

    samples_negatives: bool
    drops_answers: bool  # negatives that are the query's own answer are left out

    def __call__(
        self, logits: Tensor, target: Tensor, weight: Tensor, config: TrainingConfig, real: Tensor | None = None
    ) -> Tensor:
        """Return the weighted sum of the queries' losses.

        Args:
            logits: [..., num_queries, num_candidates]; of padded candidates -1e6 or less.
            target: column of the true candidate. int64 [..., num_queries]
            weight: of each query; a client's weights sum to 1, those of padded queries are 0. [..., num_queries]
            config: the loss's settings.
            real: which candidates are no padding; None if all are real. bool [..., num_candidates]

        Returns:
            [...].
        """
        ...


class OneVsAll:
    """Cross-entropy over all entities of the client (Lacroix et al., ICML 2018)."""

    samples_negatives = False
    drops_answers = False

    def __call__(
        self, logits: Tensor, target: Tensor, weight: Tensor, config: TrainingConfig, real: Tensor | None = None
    ) -> Tensor:
        """Return the weighted sum of cross-entropies; label smoothing spreads over the real candidates."""
        share = None
        if config.label_smoothing > 0:
            each = self._counted(logits, real).to(logits.dtype)
            share = config.label_smoothing * each / each.sum(-1, keepdim=True)
        loss: Tensor = _CrossEntropy.apply(logits, target, 1 - config.label_smoothing, share)  # type: ignore[no-untyped-call]
        return (weight * loss).sum(-1)

    def _counted(self, logits: Tensor, real: Tensor | None) -> Tensor:
        """Return which candidates share the smoothing, [..., 1 or num_queries, num_candidates]."""
        return torch.ones_like(logits[..., :1, :]) if real is None else real.unsqueeze(-2)


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy with the labels `sharpness` at the target plus `share` [..., 1 or num_queries, num_candidates].

    One tensor of the logits' size is made: the model's distribution, which the backward pass turns into the gradient.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, sharpness: float, share: Tensor | None) -> Tensor:
        """Compute each query's loss, [..., num_queries]."""
        distribution = torch.softmax(logits, -1)
        # The largest probability is 1 / sum_i exp(logit_i - largest), at least 1 / num_candidates: its log is exact.
        log_total = logits.amax(-1) - distribution.amax(-1).log_()
        ctx.save_for_backward(target, share)
        ctx.distribution, ctx.sharpness = distribution, sharpness
        loss = log_total - sharpness * logits.gather(-1, target.unsqueeze(-1)).squeeze(-1)
        return loss if share is None else loss - torch.einsum("...qc,...qc->...q", logits, share)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        """Compute the gradient of the logits: the distribution less the labels, times the loss's gradient."""
        target, share = ctx.saved_tensors
        result: Tensor = ctx.distribution
        assert result is not None, "the gradient was computed in place of the distribution, so only once"
        ctx.distribution = None
        slope = grad.unsqueeze(-1)
        result.mul_(slope).scatter_add_(-1, target.unsqueeze(-1), -ctx.sharpness * slope)
        if share is not None:
            result.addcmul_(slope, share, value=-1)
        return result, None, None, None


class SampledSoftmax(OneVsAll):
    """Cross-entropy over the true answer and sampled negatives: `one_vs_all` for graphs of many entities.

    A draw of the answer itself is left out, or its share of the softmax could not pass 1/2 (Jean et al., ACL 2015).
    """

    samples_negatives = True
    drops_answers = True

    def _counted(self, logits: Tensor, real: Tensor | None) -> Tensor:
        """Return which candidates share the smoothing: what is left out and what is padding is scored -1e6 or less."""
        return logits > PADDING_LOGIT / 2


class SelfAdversarial:
    """Negative sampling weighted by the model's own belief (RotatE, Sun et al., ICLR 2019; used by FedE).

    The negatives are uniform draws from all entities of the client; the authors' code draws true answers again.

    With `training.negative_weighting: entropy` a negative weighs by how unsure the model is of it. From the abstract of
    MoCME (Li, arXiv:2507.20620) comes the idea, "entropy-guided negative sampling"; that it is a weight, and of which
    entropy, is our inference. An entropy is at most ln 2, so a temperature of 1 weighs no negative twice as much.
    """

    samples_negatives = True
    drops_answers = False

    def __call__(
        self, logits: Tensor, target: Tensor, weight: Tensor, config: TrainingConfig, real: Tensor | None = None
    ) -> Tensor:
        """Return the weighted sum of -(log sigmoid(gamma + s+) + sum_i p_i log sigmoid(-gamma - s-_i)) / 2."""
        positive, negative = logits[..., 0], logits[..., 1:]
        worth = negative.detach()
        if config.negative_weighting == "entropy":
            worth = decision_entropy(config.margin + worth)
        scaled = worth * config.adversarial_temperature
        if real is not None:
            scaled = scaled.masked_fill(~real[..., None, 1:], -torch.inf)
        share = torch.softmax(scaled, -1)  # [..., num_queries, num_negatives]
        positive_loss = functional.logsigmoid(config.margin + positive)
        negative_loss = (share * functional.logsigmoid(-config.margin - negative)).sum(-1)
        return -(weight * (positive_loss + negative_loss)).sum(-1) / 2


def decision_entropy(logits: Tensor) -> Tensor:
    """Return the entropy of a yes with probability sigmoid(logit), in nats: ln 2 at 0, none far from it; [...]."""
    # H(x) = H(-|x|), where softplus(x) - x sigmoid(x) has no large terms that cancel.
    unlikely = -logits.abs()
    return functional.softplus(unlikely) - unlikely * torch.sigmoid(unlikely)


LOSSES: dict[str, Loss] = {
    "one_vs_all": OneVsAll(),
    "sampled_softmax": SampledSoftmax(),
    "self_adversarial": SelfAdversarial(),
}


def n3_penalty(head: Tensor, relation: Tensor, tail: Tensor, *, complex_pairs: bool) -> Tensor:
    """Return the nuclear 3-norm regulariser of each triple (Lacroix et al., ICML 2018), [..., batch].

    Args:
        head: [..., batch, dim] (relation and tail likewise).
        relation: [..., batch, dim].
        tail: [..., batch, dim].
        complex_pairs: whether the halves of dim are real and imaginary parts (ComplEx).
    """
    total = head.new_zeros(head.shape[:-1])
    for part in (head, relation, tail):
        if complex_pairs:
            real, imaginary = part.chunk(2, -1)
            size = (real.square() + imaginary.square() + 1e-12).sqrt()
        else:
            size = part.abs()
        total = total + size.pow(3).sum(-1)
    return total
