"""Filtered ranking with realistic ranks: the link-prediction metrics, without a Python loop over triples.

*Filtered*: candidates that are known answers of the same query, other than the one asked for, do not count.
*Realistic*: among candidates with the same score the rank is the mean of the best (optimistic) and the worst
(pessimistic) place, so a constant scorer gets the middle rank and not the first.

The rank is found by comparing, never by sorting or masking: add up the signs of all candidates' leads over the target,
then take off the known answers among them, whose scores are gathered. The score matrix is read once, in blocks that
stay in the cache, and never copied.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedsim.errors import RunError

ScoreFunction = Callable[[Tensor, Tensor, bool], Iterable[Tensor]]
"""(entity ids [batch], relation ids [batch], inverse) -> scores of all entities [batch, num_entities], of one model
after the other; a tensor holds until the next one is asked for."""

# Scores per block: on a CPU the comparison then stays in the cache, an accelerator wants few large kernels.
_BLOCK_SIZE_CPU = 1 << 18
_BLOCK_SIZE_ACCELERATOR = 1 << 27


@dataclass(frozen=True)
class RankingMetrics:
    """Filtered metrics over realistic ranks.

    Attributes:
        mrr: mean of 1 / rank; 0 if there are no queries.
        hits: for each k the share of ranks <= k; a realistic rank of 1.5 (a tie for the first place) is no hit at 1.
        num_queries: number of ranks behind the means.
    """

    mrr: float
    hits: dict[int, float]
    num_queries: int

    @property
    def hits_at_1(self) -> float:
        """Return the share of filtered realistic ranks <= 1."""
        return self.hits[1]

    @property
    def hits_at_3(self) -> float:
        """Return the share of filtered realistic ranks <= 3."""
        return self.hits[3]

    @property
    def hits_at_5(self) -> float:
        """Return the share of filtered realistic ranks <= 5."""
        return self.hits[5]

    @property
    def hits_at_10(self) -> float:
        """Return the share of filtered realistic ranks <= 10."""
        return self.hits[10]


@dataclass(frozen=True)
class FilterIndex:
    """The known answers of every query (entity, relation, direction), in compressed rows.

    Attributes:
        num_entities: number of entity ids.
        num_relations: number of relation ids.
        queries: sorted codes of the queries that have an answer. [num_queries]
        offsets: the answers of query i are answers[offsets[i]:offsets[i + 1]]. [num_queries + 1]
        answers: entity ids, each once per query. [num_answers]
    """

    num_entities: int
    num_relations: int
    queries: Tensor
    offsets: Tensor
    answers: Tensor

    @classmethod
    def build(cls, triples: np.ndarray, num_entities: int, num_relations: int) -> "FilterIndex":
        """Index triples for tail and head queries.

        Args:
            triples: all known triples (train, valid and test), ids of head, relation, tail; repeats are allowed. [n, 3]
            num_entities: number of entity ids.
            num_relations: number of relation ids.
        """
        assert 2 * num_relations * num_entities**2 < 2**63, "the codes of the triples do not fit into int64"
        head, relation, tail = _columns(triples)
        for ids, num in ((head, num_entities), (relation, num_relations), (tail, num_entities)):
            assert not ids.numel() or (ids.min() >= 0 and ids.max() < num), "a triple has an id out of range"
        tail_queries = (relation * num_entities + head) * num_entities + tail
        head_queries = ((num_relations + relation) * num_entities + tail) * num_entities + head
        codes = torch.unique(torch.cat([tail_queries, head_queries]))  # sorted: by query, then by answer
        queries, counts = torch.unique_consecutive(codes // max(num_entities, 1), return_counts=True)
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return cls(num_entities, num_relations, queries, offsets, codes % max(num_entities, 1))

    def known(self, entity: Tensor, relation: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        """Look up the known answers of a batch of queries.

        Args:
            entity: ids of the known entity. [batch]
            relation: relation ids. [batch]
            inverse: False for (entity, relation, ?), True for (?, relation, entity).

        Returns:
            Row of the batch and known answer, sorted and without repeats. [num_known], [num_known]
        """
        if not self.queries.numel():
            return entity.new_empty(0), entity.new_empty(0)
        code = (relation + self.num_relations * int(inverse)) * self.num_entities + entity
        position = torch.searchsorted(self.queries, code).clamp_(max=self.queries.numel() - 1)
        found = self.queries[position] == code
        start = self.offsets[position]
        count = torch.where(found, self.offsets[position + 1] - start, 0)
        row = torch.arange(entity.numel()).repeat_interleave(count)
        # Number the answers of each row from 0, then shift them to where the row's answers start.
        within = torch.arange(row.numel()) - (count.cumsum(0) - count)[row]
        return row, self.answers[start[row] + within]


def filtered_ranks(scores: Tensor, target: Tensor, known_row: Tensor, known_answer: Tensor) -> Tensor:
    """Rank targets among candidates: filtered, realistic (mean of optimistic and pessimistic rank).

    rank = 1 + (candidates above the target) + (other candidates level with it) / 2, without the known answers.

    Args:
        scores: higher is better. [batch, num_candidates]
        target: column of the right answer. [batch]
        known_row: rows of the known answers, as `FilterIndex.known` gives them. [num_known]
        known_answer: their columns, no (row, column) twice; the target itself may be among them. [num_known]

    Returns:
        Ranks, float64, multiples of 1/2. [batch]

    Raises:
        RunError: if a score is NaN or infinite: a comparison with it would pass as a good rank.
    """
    num_rows, num_candidates = scores.shape
    assert num_candidates < 2**24, "float32 counts are exact below 2^24 candidates only"
    target_score = scores.gather(1, target.unsqueeze(1))  # [batch, 1]
    block_size = _BLOCK_SIZE_CPU if scores.device.type == "cpu" else _BLOCK_SIZE_ACCELERATOR
    height = max(block_size // max(num_candidates, 1), 1)
    buffer = scores.new_empty(min(height, num_rows), num_candidates)
    sums, lead = scores.new_empty(2, num_rows)
    for start in range(0, num_rows, height):
        rows = slice(start, start + height)
        difference = torch.sub(scores[rows], target_score[rows], out=buffer[: len(scores[rows])])
        torch.sum(difference, 1, out=sums[rows])  # not finite if a score is not
        torch.sum(difference.sign_(), 1, out=lead[rows])  # candidates above the target less candidates below it
    _refuse_non_finite(scores, sums)
    # above - below + (above + level + below) = 2 above + level, and the target is level with itself.
    ranks: Tensor = (lead.double() + (num_candidates + 1)) / 2

    known_lead = (scores[known_row, known_answer] - target_score[known_row, 0]).sign_().double()
    is_other = known_answer != target[known_row]
    ranks.index_add_(0, known_row, (known_lead + 1) / 2 * is_other, alpha=-1)
    return ranks


@torch.no_grad()
def rank_triples(
    score_fn: ScoreFunction,
    triples: np.ndarray,
    filter_index: FilterIndex,
    *,
    batch_size: int = 512,
    both_sides: bool = True,
    candidates: Tensor | None = None,
    num_models: int = 1,
) -> list[Tensor]:
    """Rank the tail and the head of each triple by models that share work, such as mixtures: filtered, realistic ranks.

    Args:
        score_fn: scores all entities for a batch of queries, by each model in turn; gets ids on the CPU, may score on
            any device.
        triples: ids of head, relation, tail. [n, 3]
        filter_index: the known answers that do not count.
        batch_size: queries per call of ``score_fn``.
        both_sides: tail and head queries; False for tail queries alone, the FedE convention.
        candidates: sorted ids of the only entities that compete, for example those of one client when a centrally
            trained model is ranked on it; the answers must be among them. All entities if None. [num_candidates]
        num_models: how many there are.

    Returns:
        Each model's ranks, float64, on the CPU: all tail queries in the order of the triples, then all head queries.
        [n] or [2n]

    Raises:
        RunError: if a score is NaN or infinite.
        ValueError: if a right answer is not among the candidates.
    """
    head, relation, tail = _columns(triples)
    column = _candidate_columns(candidates, filter_index.num_entities)
    ranks: list[list[Tensor]] = [[] for _ in range(num_models)]
    for inverse in (False, True) if both_sides else (False,):
        entity, answer = (tail, head) if inverse else (head, tail)
        target = column[answer]
        if (target < 0).any():
            raise ValueError(f"{int((target < 0).sum())} right answers are not among the candidates")
        for start in range(0, len(entity), batch_size):
            rows = slice(start, start + batch_size)
            known_row, known_answer = filter_index.known(entity[rows], relation[rows], inverse)
            known_column = column[known_answer]
            competes = known_column >= 0
            places = (target[rows], known_row[competes], known_column[competes])
            for scores, found in zip(score_fn(entity[rows], relation[rows], inverse), ranks, strict=True):
                assert scores.shape == (len(entity[rows]), filter_index.num_entities), "one score per query and entity"
                competing = scores if candidates is None else scores[:, candidates.to(scores.device)]
                found.append(filtered_ranks(competing, *(ids.to(scores.device) for ids in places)).cpu())
    return [torch.cat(found) if found else torch.empty(0, dtype=torch.float64) for found in ranks]


def summarise(ranks: Tensor, ks: Sequence[int] = (1, 3, 10)) -> RankingMetrics:
    """Turn filtered realistic ranks, [num_queries], into MRR and Hits@k; all zeros without queries."""
    ranks = ranks.double()
    num_queries = ranks.numel()
    if not num_queries:
        return RankingMetrics(0.0, dict.fromkeys(ks, 0.0), 0)
    assert bool((ranks >= 1).all()), "a rank is below 1 or NaN"
    hits = {k: (ranks <= k).sum().item() / num_queries for k in ks}
    return RankingMetrics(ranks.reciprocal().mean().item(), hits, num_queries)


def weighted_mean(metrics: Sequence[RankingMetrics]) -> RankingMetrics:
    """Average the metrics of several clients, each weighted by its number of queries, in the given order."""
    num_queries = sum(item.num_queries for item in metrics)
    ks = list(metrics[0].hits) if metrics else []
    assert all(list(item.hits) == ks for item in metrics), "the metrics have Hits@k for different k"
    weights = [item.num_queries / max(num_queries, 1) for item in metrics]
    mrr = sum(weight * item.mrr for weight, item in zip(weights, metrics, strict=True))
    hits = {k: sum(weight * item.hits[k] for weight, item in zip(weights, metrics, strict=True)) for k in ks}
    return RankingMetrics(float(mrr), hits, num_queries)


def _columns(triples: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """Split triples, [n, 3], into head, relation and tail ids, [n] each; copies, since an array may be read-only."""
    head, relation, tail = torch.tensor(np.ascontiguousarray(triples.T), dtype=torch.int64)
    return head, relation, tail


def _candidate_columns(candidates: Tensor | None, num_entities: int) -> Tensor:
    """Map entity ids to columns of the score matrix, -1 for entities that do not compete; [num_entities]."""
    if candidates is None:
        return torch.arange(num_entities)
    ids = candidates.cpu()
    assert bool((ids[1:] > ids[:-1]).all()), "candidates are sorted ids without repeats"
    column = torch.full((num_entities,), -1)
    column[ids] = torch.arange(len(ids))
    return column


def _refuse_non_finite(scores: Tensor, sums: Tensor) -> None:
    """Raise RunError if a score, [batch, num_candidates], is NaN or infinite, as then a sum, [batch], is."""
    if bool(torch.isfinite(sums).all()):
        return
    num_bad = int((~torch.isfinite(scores)).sum())
    raise RunError(
        f"{num_bad} of {scores.numel()} scores are NaN or infinite, so no rank can be computed: training has"
        " diverged; lower the learning rate or turn on regularisation"
    )
