"""Choose the entities of wn_noto: the pictured senses and the part of WordNet that connects them most densely."""

import heapq
from collections import defaultdict

from wn_noto.wordnet import Synset, WordNet

Triple = tuple[str, str, str]

NUM_ENTITIES = 3400  # aim; the 2-core then drops a few
MAX_UNPICTURED_INSTANCES = 120  # named cities, rivers and groups are dense in WordNet and would crowd out the rest
HUB_DISCOUNT = 0.35  # a link to a hub, such as a large country, says little
MAX_PATH = 4.5
# A path through a rarer relation is preferred, so that many relations carry triples.
RARE = ("similar", "antonym", "attribute", "also_see", "verb_group", "entailment", "cause", "pertainym")
COST = {"hypernym": 1.3, "instance_hypernym": 2.0, **dict.fromkeys(RARE, 0.6)}


def is_instance(synset: Synset) -> bool:
    """Tell whether a sense is a named individual."""
    return any(relation == "instance_hypernym" for relation, _ in synset.pointers)


def neighbours(triples: list[Triple]) -> dict[str, dict[str, float]]:
    """Map each sense to its neighbours, each with the cost of the cheapest relation between them."""
    graph: dict[str, dict[str, float]] = defaultdict(dict)
    for head, relation, tail in triples:
        cost = min(COST.get(relation, 1.0), graph[head].get(tail, 9.0))
        graph[head][tail] = graph[tail][head] = cost
    return graph


def two_core(members: set[str], graph: dict[str, dict[str, float]]) -> set[str]:
    """Drop members with fewer than two neighbours among the members until none is left."""
    core = set(members)
    degree = {member: sum(other in core for other in graph[member]) for member in core}
    queue = sorted(member for member in core if degree[member] < 2)
    while queue:
        member = queue.pop()
        if member in core:
            core.discard(member)
            for other in graph[member]:
                if other in core:
                    degree[other] -= 1
                    if degree[other] < 2:
                        queue.append(other)
    return core


def select(wordnet: WordNet, triples: list[Triple], pictured: set[str]) -> list[str]:
    """Choose the entities.

    First the pictured senses with their chains of hypernyms, then for each pictured sense that hangs by one link a
    cheap second path, then the senses with the most links to those chosen, up to `NUM_ENTITIES`; of these the 2-core.
    """
    graph = neighbours(triples)
    everything = two_core(set(wordnet.synsets), graph)
    pictured = pictured & everything
    members = set(pictured)
    parents = defaultdict(list)
    for head, relation, tail in triples:
        if relation in ("hypernym", "instance_hypernym"):
            parents[head].append(tail)
    for sense in sorted(pictured):
        for parent in parents[sense]:
            members.add(parent)
    for _ in range(2):  # the second round mends what the first one's cut-off left hanging
        for sense in sorted(pictured):
            linked = {other for other in graph[sense] if other in members}
            if len(linked) < 2 or sense not in two_core(members, graph):
                members |= _second_path(sense, linked, members, graph, everything)
    members = two_core(members, graph)
    _fill(members, pictured, graph, everything, wordnet)
    return sorted(two_core(members, graph))


def _second_path(
    start: str, linked: set[str], members: set[str], graph: dict[str, dict[str, float]], allowed: set[str]
) -> set[str]:
    """Find the cheapest path from a sense to a member it is not linked to; returns the senses on it."""
    queue: list[tuple[float, str, tuple[str, ...]]] = [(0.0, start, ())]
    done: set[str] = set()
    while queue:
        cost, sense, path = heapq.heappop(queue)
        if sense in done or cost > MAX_PATH:
            continue
        done.add(sense)
        if path and sense in members and sense != start and not (len(path) == 1 and sense in linked):
            return set(path)
        for other, step in graph[sense].items():
            if other in allowed and other not in done and not (sense == start and other in linked):
                heapq.heappush(queue, (cost + step, other, (*path, other)))
    return set()


def _fill(
    members: set[str],
    pictured: set[str],
    graph: dict[str, dict[str, float]],
    allowed: set[str],
    wordnet: WordNet,
) -> None:
    """Add the senses with the most links to the members until there are `NUM_ENTITIES`."""
    score: dict[str, float] = defaultdict(float)
    queue: list[tuple[float, str]] = []

    def count(added: str) -> None:
        worth = (1.5 if added in pictured else 1.0) / len(graph[added]) ** HUB_DISCOUNT
        for other, cost in graph[added].items():
            if other in allowed and other not in members:
                score[other] += worth / cost
                heapq.heappush(queue, (-score[other], other))

    for member in sorted(members):
        count(member)
    named = {sense for sense, synset in wordnet.synsets.items() if is_instance(synset)}
    num_named = len((members - pictured) & named)
    while queue and len(members) < NUM_ENTITIES:
        negative, sense = heapq.heappop(queue)
        if sense in members or -negative != score[sense]:
            continue
        if sense in named:
            if num_named >= MAX_UNPICTURED_INSTANCES:
                continue
            num_named += 1
        members.add(sense)
        count(sense)
