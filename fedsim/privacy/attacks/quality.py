"""How well an attack tells members from others."""

from dataclasses import dataclass

import numpy as np
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor

LOW_RATE = 0.01  # of false positives: an attack that is right only rarely, but then surely, still harms


@dataclass(frozen=True)
class AttackQuality:
    """Of a score that should be higher for members.

    Attributes:
        auc: area under the ROC curve; 0.5 is a guess.
        tpr: true positive rate at a false positive rate of at most `LOW_RATE`; as much as that is a guess.
        num_members: members scored.
        num_others: others scored.
    """

    auc: float
    tpr: float
    num_members: int
    num_others: int


def attack_quality(members: Tensor, others: Tensor) -> AttackQuality:
    """Measure scores of members [num_members] and of others [num_others].

    The low rate is that of Carlini et al., "Membership Inference Attacks From First Principles", S&P 2022.
    """
    scores = np.concatenate([members.double().numpy(), others.double().numpy()])
    truth = np.concatenate([np.ones(len(members)), np.zeros(len(others))])
    false_rate, true_rate, _ = roc_curve(truth, scores, drop_intermediate=False)
    at_low_rate = float(true_rate[false_rate <= LOW_RATE].max())
    return AttackQuality(float(roc_auc_score(truth, scores)), at_low_rate, len(members), len(others))
