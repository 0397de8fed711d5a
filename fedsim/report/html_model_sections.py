"""The sections of a run's report for which its data and its saved models are needed."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from fedsim.config import Config
from fedsim.errors import FedSimError
from fedsim.report.html_examples import Example, Shown, examples, has_pictures
from fedsim.report.html_models import MapPoint, SavedData, SavedModels
from fedsim.report.html_models import availability as measure_availability
from fedsim.report.html_models import embedding_map as make_map
from fedsim.report.html_models import sampling_quality as measure_sampling
from fedsim.report.html_page import Cell, Section, Table
from fedsim.report.plots_run import availability, embedding_map, sampling_quality
from fedsim.run_folder import RunFolder

METRICS = {"cosine": "cosine with the true token", "hits_at_10": "retrieval Hits@10"}


def model_sections(folder: RunFolder, config: Config, result: Mapping[str, Any] | None) -> list[Section]:
    """Make the sections; where data or models are not there, they say why."""
    try:
        data = SavedData.of(config)
    except FedSimError as err:
        return [Section("modalities", "Modalities", f"The data of this run cannot be read: {err}.")]
    found = [_modalities(data)]
    try:
        models = SavedModels.of(data, folder)
        found += [_imputation(models, result), _map(models), _examples(models)]
    except FedSimError as err:
        found.append(Section("models", "Models", f"What needs the models of this run is left out: {err}."))
    return found


def _modalities(data: SavedData) -> Section:
    """Plot which share of its entities a client has each modality of, before and after hiding."""
    before, after = measure_availability(data)
    text = "Structure is always available. What is hidden reaches neither a model nor a loss."
    if not any(before.values()):
        return Section("modalities", "Modalities", "The run uses structure alone.")
    figures = (
        availability("available-before", "Modalities in the data", before, "Before anything was hidden."),
        availability("available-after", "Modalities that each client sees", after, "After hiding."),
    )
    return Section("modalities", "Modalities", text, figures)


def _imputation(models: SavedModels, result: Mapping[str, Any] | None) -> Section:
    """Plot the diffusion's quality over its sampling steps."""
    title = "Imputation by sampling steps"
    quality = measure_sampling(models)
    if quality is None:
        text = "The run's imputer has no sampling steps, or nothing was hidden."
        return Section("sampling", title, text)
    clients = f"{len(quality.clients)} of {len(models.data.clients)} clients"
    text = (
        f"The saved denoisers of {clients} fill what was hidden with more or fewer sampling steps than the run's "
        f"{models.data.config.diffusion.sampling_steps}; nothing is trained anew."
    )
    figures = []
    for metric, by_steps in (("cosine", quality.cosine), ("hits_at_10", quality.hits_at_10)):
        others: dict[str, dict[str, float]] = {}
        for row, values in (result["imputation"] if result is not None else {}).items():
            modality, _, imputer = row.rpartition("/")
            if imputer != "diffusion" and metric in values:
                others.setdefault(modality, {})[imputer] = values[metric]
        note = "Mean over clients. " + (
            "Imputers without steps are those of the run's result, over all clients." if others else ""
        )
        used = models.data.config.diffusion.sampling_steps
        figures.append(sampling_quality(metric, METRICS[metric], by_steps, others, used, note))
    return Section("sampling", title, text, tuple(figures))


def _map(models: SavedModels) -> Section:
    """Plot shared entities at each client before and after imputation."""
    title = "Semantic consistency, as a map"
    found = make_map(models)
    if found is None:
        return Section("map", title, "There is no map: no two clients share entities, or the model imputes nothing.")
    labels = models.data.graph.entity_labels
    num_entities = len({point.entity for point in found.after})
    text = (
        f"{num_entities} of {found.num_shared} entities that clients {_listed(found.clients)} share, by the tokens of "
        f"the {found.view} model side by side; shown are those whose missing tokens differ. Before: missing "
        f"tokens are zero. After: the imputer filled them. A line joins one entity at several clients: the shorter the "
        f"lines are for the size of the map, the more the clients mean the same by it. Each map shows the two "
        f"directions in which its entities differ most; the cosines are those of all dimensions."
    )
    figures = []
    for key, heading, points in (("before", "Before imputation", found.before), ("after", "After it", found.after)):
        summary = (
            f"Mean cosine between clients {found.consistency[key]:.3f}, over {found.num_shared} shared entities. On "
            f"this map an entity's points are {_spread(points):.2f} times as far apart as the entities are."
        )
        figures.append(embedding_map(f"map-{key}", heading, _rows(points, labels), summary))
    return Section("map", title, text, tuple(figures))


def _rows(points: Sequence[MapPoint], labels: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {
            "x": round(point.x, 4),
            "y": round(point.y, 4),
            "client": f"client {point.client}",
            "order": point.client,
            "id": point.entity,
            "entity": labels[point.entity],
            "tokens": f"real: {', '.join(point.real)}",
        }
        for point in points
    ]


def _spread(points: Sequence[MapPoint]) -> float:
    """Return how far an entity's points are from their mean, relative to how far the means are from theirs (RMS)."""
    places: dict[int, list[MapPoint]] = {}
    for point in points:
        places.setdefault(point.entity, []).append(point)
    means = {entity: (fmean(p.x for p in own), fmean(p.y for p in own)) for entity, own in places.items()}
    middle = fmean(x for x, _ in means.values()), fmean(y for _, y in means.values())
    within = fmean(math.dist((point.x, point.y), means[point.entity]) ** 2 for point in points)
    between = fmean(math.dist(mean, middle) ** 2 for mean in means.values())
    return math.sqrt(within / between) if between else math.nan


def _examples(models: SavedModels) -> Section:
    """Show test questions with the best answers."""
    found = examples(models)
    title = "Example predictions"
    if not found:
        return Section("examples", title, "The clients that were asked have no test triples.")
    text = (
        "Test questions of some clients, chosen to be looked at: right answers, near misses and failures, those with "
        'pictures first. They say nothing of how often the models are right. The answer held back is marked; "hidden" '
        "names what the data have of an entity and the client did not see."
    )
    if not has_pictures(models):
        text += " The data set has no pictures on disk: labels and texts are shown."
    width = max(len(example.answers) for example in found)
    header = ("question", "client", "held back", "rank", *(f"answer {place}" for place in range(1, width + 1)))
    rows = []
    for example in found:
        answers = [_answer(answer) for answer in example.answers]
        answers += [Cell("")] * (width - len(answers))
        rank, client = Cell(f"{example.rank:g}"), Cell(str(example.client))
        rows.append((_question(example), client, _entity(example.expected), rank, *answers))
    note = "Ranks and answers are filtered: other right answers of the client's triples are left out."
    return Section("examples", title, text, (Table("examples", "Questions and answers", header, tuple(rows), note),))


def _question(example: Example) -> Cell:
    asked = f"(?, {example.relation}, {example.given.label})"
    if not example.inverse:
        asked = f"({example.given.label}, {example.relation}, ?)"
    return Cell(asked, _detail(example.given), picture=example.given.picture)


def _entity(shown: Shown) -> Cell:
    return Cell(shown.label, _detail(shown), picture=shown.picture)


def _answer(shown: Shown) -> Cell:
    hidden = f"; {', '.join(shown.hidden)} hidden" if shown.hidden else ""
    return Cell(shown.label, f"score {shown.score:.3f}{hidden}", picture=shown.picture, right=shown.right)


def _detail(shown: Shown) -> str:
    hidden = f"[{', '.join(shown.hidden)} hidden]" if shown.hidden else ""
    return " ".join(text for text in (shown.description, hidden) if text)


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
