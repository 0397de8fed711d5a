"""Example predictions of a run: test questions, the right answer and its rank, and the best answers, with pictures.

They are chosen to be looked at, half of them right, and say nothing about how often the model is right: for that there
are the test metrics.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from fedsim.evaluation.ranking import filtered_ranks
from fedsim.federated.client import Client
from fedsim.report.html_models import SavedModels, evenly

NUM_CLIENTS, NUM_ASKED, NUM_ANSWERS = 3, 96, 3
# Examples per client: rank from, rank to, how many.
WANTED = ((1.0, 1.0, 2), (1.5, 10.0, 1), (10.5, float("inf"), 1))
MAX_PICTURE_BYTES = 32_000  # larger ones are not embedded: a report stays small
MAX_DESCRIPTION = 90
# What the file really is decides, not its name: nothing that could run a script gets into the page.
IMAGE_TYPES = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"RIFF": "webp"}


@dataclass(frozen=True)
class Shown:
    """An entity as it is shown.

    Attributes:
        label: its label.
        description: its text, cut off.
        picture: a data URI, or "".
        hidden: modalities that the data has of it and this client does not see.
        score: of the answer; None where nothing was scored.
        right: whether it is the answer that was held back.
    """

    label: str
    description: str
    picture: str
    hidden: tuple[str, ...]
    score: float | None = None
    right: bool = False


@dataclass(frozen=True)
class Example:
    """A question to a client: (`given`, relation, ?), or (?, relation, `given`) with `inverse`."""

    client: int
    given: Shown
    relation: str
    inverse: bool
    expected: Shown
    rank: float
    answers: tuple[Shown, ...]


@dataclass(frozen=True)
class _Question:
    """A question with its rank, not shown yet; local ids."""

    given: int
    relation: int
    inverse: bool
    expected: int
    rank: float
    answers: tuple[int, ...]
    scores: tuple[float, ...]
    num_pictures: int


def examples(models: SavedModels) -> list[Example]:
    """Ask some clients some of their test questions and choose a few of each kind."""
    found = []
    for number in evenly(models.data.clients, NUM_CLIENTS):
        client = models.client(number)
        album = _Album(models, client)
        questions = _ask(models, client, album)
        for low, high, count in WANTED:
            fitting = [question for question in questions if low <= question.rank <= high]
            fitting.sort(key=lambda question: -question.num_pictures)  # stable: else in the order of the triples
            found += [album.show(question) for question in fitting[:count]]
    return found


def has_pictures(models: SavedModels) -> bool:
    """Tell whether the data set has pictures of its entities on disk."""
    graph = models.data.graph
    return graph.path is not None and (graph.path / "pictures").is_dir() and any(graph.entity_pictures)


def _ask(models: SavedModels, client: Client, album: "_Album") -> list[_Question]:
    """Rank the answers of some test triples, in both directions unless the run ranked tails alone."""
    group = client.data.groups[0]
    triples = group.triples["test"]
    triples = triples[evenly(range(len(triples)), NUM_ASKED)]
    if not len(triples):
        return []
    outside = torch.ones(len(client.data.entity_ids), dtype=torch.bool)
    outside[torch.from_numpy(group.candidates)] = False
    filters = client.filter_index(group)
    questions = []
    for inverse in (False, True) if client.config.evaluation.protocol == "both" else (False,):
        given, relation, expected = (torch.from_numpy(triples[:, i]) for i in ((2, 1, 0) if inverse else (0, 1, 2)))
        scores = client.scores(given, relation, inverse, models.round_num)  # [batch, num_entities]
        scores = scores.cpu().masked_fill(outside, -torch.inf)
        rows, answers = filters.known(given, relation, inverse)
        ranks = filtered_ranks(scores, expected, rows, answers)
        others = answers != expected[rows]
        scores[rows[others], answers[others]] = -torch.inf
        best = scores.topk(min(NUM_ANSWERS, len(group.candidates)))
        for row in range(len(triples)):
            top = best.indices[row].tolist()
            shown = [int(given[row]), int(expected[row]), *top]
            questions.append(
                _Question(
                    given=int(given[row]),
                    relation=int(relation[row]),
                    inverse=inverse,
                    expected=int(expected[row]),
                    rank=float(ranks[row]),
                    answers=tuple(top),
                    scores=tuple(best.values[row].tolist()),
                    num_pictures=sum(album.has_picture(entity) for entity in shown),
                )
            )
    return questions


class _Album:
    """Labels, texts and pictures of a client's entities, by local id."""

    def __init__(self, models: SavedModels, client: Client) -> None:
        self.graph, self.data = models.data.graph, client.data
        self.hidden: dict[str, set[int]] = {
            name: set(item.rows[~item.visible].tolist()) for name, item in client.data.features.items()
        }
        self.folder = self.graph.path / "pictures" if self.graph.path is not None else None

    def has_picture(self, entity: int) -> bool:
        """Tell whether there is a picture."""
        return self.folder is not None and bool(self.graph.entity_pictures[self.data.entity_ids[entity]])

    def entity(self, entity: int) -> Shown:
        """Show an entity."""
        place = int(self.data.entity_ids[entity])
        text = self.graph.entity_descriptions[place]
        picture = ""
        if self.folder is not None and self.graph.entity_pictures[place]:
            picture = data_uri(self.folder / self.graph.entity_pictures[place])
        return Shown(
            self.graph.entity_labels[place],
            text if len(text) <= MAX_DESCRIPTION else f"{text[: MAX_DESCRIPTION - 1]}…",
            picture,
            tuple(name for name, rows in self.hidden.items() if entity in rows),
        )

    def show(self, question: _Question) -> Example:
        """Show a question with its answers."""
        answers: Sequence[Shown] = [
            replace(
                self.entity(entity),
                score=score,
                right=entity == question.expected,
            )
            for entity, score in zip(question.answers, question.scores, strict=True)
            if np.isfinite(score)
        ]
        return Example(
            client=self.data.client,
            given=self.entity(question.given),
            relation=self.graph.relation_labels[int(self.data.relation_ids[question.relation])],
            inverse=question.inverse,
            expected=self.entity(question.expected),
            rank=question.rank,
            answers=tuple(answers),
        )


def data_uri(path: Path) -> str:
    """Return a picture as a data URI; "" if it is not there, too large, or no picture."""
    try:
        if path.stat().st_size > MAX_PICTURE_BYTES:
            return ""
        content = path.read_bytes()
    except OSError:
        return ""
    for start, kind in IMAGE_TYPES.items():
        if content.startswith(start) and (kind != "webp" or content[8:12] == b"WEBP"):
            return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
    return ""
