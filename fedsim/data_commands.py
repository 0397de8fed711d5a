"""`fedsim data ...`: import, look at, split and encode data sets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fedsim.errors import DataError
from fedsim.report.console import make_console, show_rows

if TYPE_CHECKING:
    from fedsim.data.splits import FederatedSplit

FILE = click.Path(path_type=Path)
SPLIT_KIND = click.Choice(["relation", "cluster", "dirichlet"])
POSITIVE = click.FloatRange(min=0, min_open=True)


@click.group()
def data() -> None:
    """Import, look at, split and encode data sets."""


@data.command(name="import")
@click.argument("source", type=FILE)
@click.argument("output", type=FILE)
@click.option("--name", help="Name of the data set.  [default: that of OUTPUT]")
@click.option(
    "--format",
    "triples_format",
    default="auto",
    show_default=True,
    help="names or ids (head, relation, tail), openke (ids in OpenKE's order), fede (a FedE pickle), or auto.",
)
@click.option("--feature", "features", metavar="MODALITY=FILE", multiple=True, help="A feature file; repeatable.")
@click.option("--pictures", type=FILE, help="Folder or zip file with the pictures that entities.tsv names.")
@click.option("--mend-valid", is_flag=True, help="Drop valid triples that train or test hold too; see the report.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of --mend-valid.")
@click.option("--description", default="", help="One line about the data.")
@click.option("--licence", default="", help="Licence of the data.")
def import_(source: Path, output: Path, features: tuple[str, ...], **options: Any) -> None:
    """Import a folder or a FedE pickle as a data set.

    SOURCE holds train, valid and test triples (tsv or txt), and may hold entities and relations, features and
    federated splits. Feature files are npz, npy, safetensors or pth. OUTPUT is a new folder.

    \b
    Examples:
      fedsim data import downloads/FB15k-237 data/fb15k237
      fedsim data import downloads/WN9 data/wn9 --format openke --feature image=downloads/WN9/visual.npy
    """
    from fedsim.data.importers import import_dataset

    files: dict[str, Path] = {}
    for text in features:
        modality, separator, path = text.partition("=")
        if not (modality and separator and path):
            raise click.UsageError(f"--feature {text}: write MODALITY=FILE, for example image=visual.npy")
        files[modality] = Path(path)
    report = import_dataset(source, output, features=files, **options)
    rows = [["format", report.triples_format], ["entities", f"{report.num_entities:,}"]]
    rows += [["relations", f"{report.num_relations:,}"]]
    rows += [[f"{name} triples", f"{count:,}"] for name, count in report.num_triples.items()]
    rows += [[f"{name} features", f"{count:,}"] for name, count in report.features.items()]
    rows += [[f"split {name}", f"{count} clients"] for name, count in report.splits.items()]
    show_rows(f"Imported {source} into {report.path}", ["", "count"], rows, make_console())
    for note in report.notes:
        click.echo(f"note: {note}")


@data.command()
@click.argument("dataset", default="wn_noto")
@click.option("--split", "given", metavar="NAME|FILE", help="Show the clients of this split too.")
@click.option("--kind", type=SPLIT_KIND, help="Show the clients that this split would make.")
@click.option("--num-clients", type=click.IntRange(min=1), default=3, show_default=True, help="Clients of --kind.")
@click.option("--alpha", type=POSITIVE, default=0.5, show_default=True, help="Concentration of --kind dirichlet.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of --kind.")
def info(dataset: str, given: str | None, kind: str | None, num_clients: int, alpha: float, seed: int) -> None:
    """Show what a data set holds.

    Counts, coverage per modality, repeated triples and leaks between train, valid and test; with a split also the
    clients and the entities they share. DATASET is a bundled name or a folder  [default: wn_noto].
    """
    from fedsim.data.dataset import load_dataset, resolve_dataset
    from fedsim.data.inspection import inspect_dataset, render_report
    from fedsim.data.splits import load_split, make_split, resolve_split

    if given is not None and kind is not None:
        raise click.UsageError("give --split (a saved split) or --kind (a new one), not both")
    graph = load_dataset(resolve_dataset(dataset))
    division: FederatedSplit | None = None
    if given is not None:
        division = load_split(resolve_split(graph, given), graph)
    elif kind is not None:
        division = make_split(graph, kind, num_clients, seed=seed, alpha=alpha)
    make_console().print(render_report(inspect_dataset(graph, division)))


@data.command()
@click.argument("dataset")
@click.argument("output", type=FILE, metavar="OUTPUT.safetensors")
@click.option(
    "--kind",
    type=SPLIT_KIND,
    help="Relations in random groups, relations in clusters, or a Dirichlet draw over relations.  [default: relation]",
)
@click.option("--num-clients", type=click.IntRange(min=1), help="Number of clients.  [default: 3]")
@click.option("--alpha", type=POSITIVE, help="Dirichlet concentration.  [default: 0.5]")
@click.option("--seed", type=click.IntRange(min=0), help="Seed of the split.  [default: 0]")
@click.option("--from", "given", metavar="FILE", help="Check and convert this split (safetensors, npz or tsv) instead.")
@click.option(
    "--move-unseen", is_flag=True, help="With --from: move valid and test triples that a client cannot learn."
)
def split(
    dataset: str,
    output: Path,
    kind: str | None,
    num_clients: int | None,
    alpha: float | None,
    seed: int | None,
    given: str | None,
    move_unseen: bool,
) -> None:
    """Divide a data set among clients.

    The split is written to OUTPUT, for `fedsim run --data.split given --data.split_file OUTPUT`.

    \b
    Examples:
      fedsim data split wn_noto five.safetensors --kind cluster --num-clients 5
      fedsim data split my_graph mine.safetensors --from mine.tsv --move-unseen
    """
    from fedsim.data.dataset import load_dataset, resolve_dataset
    from fedsim.data.splits import load_split, make_split, resolve_split, save_split

    if given is not None and any(value is not None for value in (kind, num_clients, alpha, seed)):
        raise click.UsageError(
            "--from takes the clients from the file; leave --kind, --num-clients, --alpha, --seed out"
        )
    if given is None and move_unseen:
        raise click.UsageError("--move-unseen goes with --from: splits made here contain no unseen triples")
    if output.suffix != ".safetensors":
        raise click.UsageError(f"{output}: a split is written as .safetensors; name it so")
    if output.exists():
        raise DataError(f"{output}: already exists; choose another file or remove this one")
    graph = load_dataset(resolve_dataset(dataset))
    if given is not None:
        result = load_split(resolve_split(graph, given), graph, move_unseen=move_unseen)
    else:
        result = make_split(graph, kind or "relation", num_clients or 3, seed=seed or 0, alpha=alpha or 0.5)
    save_split(result, output)
    _show_split(result, output)


@data.command()
@click.argument("dataset")
@click.option(
    "--modality",
    "modalities",
    type=click.Choice(["text", "image"]),
    multiple=True,
    help="What to encode; repeat for several.  [default: text and image]",
)
@click.option("--text-encoder", default="minilm", show_default=True, help="Encoder of labels and descriptions.")
@click.option("--picture-encoder", default="efficientnet_lite0", show_default=True, help="Encoder of pictures.")
@click.option(
    "--image-dim", type=click.IntRange(min=1), default=256, show_default=True, help="Principal components kept."
)
def encode(dataset: str, modalities: tuple[str, ...], text_encoder: str, picture_encoder: str, image_dim: int) -> None:
    """Turn texts and pictures of a data set into features.

    They are written to the data set's features/ folder. Needs the extra: pip install 'fedsim[encode]'.
    """
    from fedsim.data.dataset import resolve_dataset
    from fedsim.data.encoders import encode_dataset

    folder = resolve_dataset(dataset)
    encode_dataset(folder, modalities or ("text", "image"), text_encoder, picture_encoder, image_dim)
    click.echo(f"encoded {' and '.join(modalities or ('text', 'image'))} into {folder / 'features'}")


def _show_split(split: FederatedSplit, path: Path) -> None:
    counts = {
        name: [int((part[:, 0] == client).sum()) for client in range(split.num_clients)]
        for name, part in (("train", split.train), ("valid", split.valid), ("test", split.test))
    }
    rows = [[str(client), *(f"{counts[name][client]:,}" for name in counts)] for client in range(split.num_clients)]
    show_rows(str(path), ["client", *counts], rows, make_console())
    if split.num_moved:
        click.echo(f"{split.num_moved:,} valid and test triples that their client cannot learn moved to its train")
