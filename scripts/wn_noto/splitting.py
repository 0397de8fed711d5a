"""Split the triples of wn_noto so that no test or validation answer stands in train in another form."""

from collections import Counter, defaultdict

import numpy as np

Triple = tuple[str, str, str]

SHARE = 0.1  # of the triples, for validation and for test each


def split_triples(triples: list[Triple], generator: np.random.Generator) -> dict[str, list[Triple]]:
    """Draw validation and test triples.

    A pair of entities linked by several relations stays in train whole, and a triple is held out only if its head, its
    tail and its relation keep a triple in train.
    """
    num_links = Counter(frozenset((head, tail)) for head, _, tail in triples)
    degree = Counter(entity for head, _, tail in triples for entity in (head, tail))
    of_relation = Counter(relation for _, relation, _ in triples)
    held_out: dict[str, list[Triple]] = defaultdict(list)
    quota = {relation: round(2 * SHARE * count) for relation, count in of_relation.items()}
    for index in generator.permutation(len(triples)):
        head, relation, tail = triple = triples[index]
        taken = held_out[relation]
        only_link = num_links[frozenset((head, tail))] == 1
        if len(taken) < quota[relation] and only_link and degree[head] > 1 and degree[tail] > 1:
            taken.append(triple)
            degree[head] -= 1
            degree[tail] -= 1
    valid = [triple for taken in held_out.values() for triple in taken[0::2]]
    test = [triple for taken in held_out.values() for triple in taken[1::2]]
    train = set(triples) - set(valid) - set(test)
    return {"train": sorted(train), "valid": sorted(valid), "test": sorted(test)}
