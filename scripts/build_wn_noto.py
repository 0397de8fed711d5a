"""Build the bundled data set wn_noto from registry packages.

    python scripts/build_wn_noto.py --cache ~/.cache/wn_noto --output fedsim/datasets/wn_noto

Needs apt-get and dpkg-deb (WordNet 3.0 as Debian packages it), npm (pictures and their names), and the extra
``encode``. With ``--propose`` it matches pictures to senses anew and rewrites ``scripts/wn_noto/matches.tsv``, keeping
the decisions in its last column, which were made by reading the table.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))

from wn_noto import matching, selecting, sources, splitting
from wn_noto.wordnet import RELATIONS, WordNet, all_triples, read_wordnet

from fedsim.data.dataset import KnowledgeGraph, save_dataset
from fedsim.data.encoders import encode_dataset
from fedsim.randomness import numpy_generator

NAME = "wn_noto"
SEED = 1
MIN_TRIPLES = 5  # a relation with fewer says nothing
PICTURE_COLOURS = 128
MATCHES = Path(__file__).resolve().parent / NAME / "matches.tsv"
NOTICES = Path(__file__).resolve().parent / NAME / "notices"
DESCRIPTION = (
    "Senses of WordNet 3.0 with glosses as texts and Noto Emoji as pictures. Assembled for fedsim, "
    "not a published benchmark."
)


def build_graph(wordnet: WordNet, pictures: dict[str, str]) -> KnowledgeGraph:
    """Choose entities and triples; the graph has no features yet.

    Args:
        wordnet: all of WordNet.
        pictures: sense identifier -> picture file.
    """
    triples = all_triples(wordnet)
    members = set(selecting.select(wordnet, triples, set(pictures)))
    triples = [triple for triple in triples if triple[0] in members and triple[2] in members]
    counts = {relation: sum(triple[1] == relation for triple in triples) for relation in RELATIONS.values()}
    triples = [triple for triple in triples if counts[triple[1]] >= MIN_TRIPLES]
    members = selecting.two_core(members, selecting.neighbours(triples))
    triples = [triple for triple in triples if triple[0] in members and triple[2] in members]
    splits = splitting.split_triples(triples, numpy_generator(SEED, "wn_noto/split"))

    senses = sorted(members, key=lambda member: wordnet.synsets[member].key)
    relations = [relation for relation in RELATIONS.values() if counts[relation] >= MIN_TRIPLES]
    row = {sense: entity for entity, sense in enumerate(senses)}
    ids = {
        name: np.array([(row[h], relations.index(r), row[t]) for h, r, t in part], dtype=np.int64)
        for name, part in splits.items()
    }
    return KnowledgeGraph(
        name=NAME,
        entity_keys=[wordnet.synsets[sense].key for sense in senses],
        entity_labels=[wordnet.synsets[sense].label for sense in senses],
        entity_descriptions=[wordnet.synsets[sense].gloss for sense in senses],
        entity_pictures=[pictures.get(sense, "") for sense in senses],
        relation_keys=relations,
        relation_labels=[relation.replace("_", " ") for relation in relations],
        **ids,
        features={},
        path=None,
        meta=describe(),
    )


def describe() -> dict[str, object]:
    """Name the sources and their licences for meta.json."""
    return {
        "description": DESCRIPTION,
        "licence": "WordNet licence (graph, texts); Apache-2.0 (pictures); see the notices beside this file",
        "source": [
            {
                "name": "WordNet",
                "version": "3.0 (Debian wordnet-base 1:3.0-37)",
                "licence": "WordNet",
                "notice": "LICENSE-WordNet.txt",
            },
            {
                "name": "Noto Emoji",
                "version": "npm emoji-datasource-google 16.0.0",
                "licence": "Apache-2.0",
                "notice": "NOTICE-Noto-Emoji.txt",
            },
            {
                "name": "Unicode CLDR annotations (used to match pictures to senses)",
                "version": "npm cldr-annotations-full 48.2.0",
                "licence": "Unicode-3.0",
                "notice": "LICENSE-Unicode.txt",
            },
        ],
    }


def write_pictures(names: list[str], source: Path, target: Path) -> None:
    """Copy pictures with a palette of `PICTURE_COLOURS` colours, which halves their size."""
    target.mkdir(parents=True)
    for name in names:
        picture = Image.open(source / name).convert("RGBA")
        picture.quantize(PICTURE_COLOURS, method=Image.Quantize.FASTOCTREE).save(target / name, optimize=True)


def write_notices(fetched: sources.Sources, folder: Path) -> None:
    """Write the sources' notices and the README beside the data."""
    (folder / "LICENSE-WordNet.txt").write_text(sources.wordnet_notice(fetched), encoding="utf-8")
    (folder / "LICENSE-Unicode.txt").write_text(sources.cldr_notice(fetched), encoding="utf-8")
    (folder / "LICENSE-emoji-data.txt").write_text(sources.emoji_notice(fetched), encoding="utf-8")
    for notice in sorted(NOTICES.iterdir()):
        shutil.copyfile(notice, folder / notice.name)


def main() -> None:
    """Build the data set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder for downloads")
    parser.add_argument("--output", type=Path, required=True, help="folder of the data set; must not exist")
    parser.add_argument("--propose", action="store_true", help="match pictures to senses anew")
    arguments = parser.parse_args()
    fetched = sources.fetch(arguments.cache.expanduser())
    wordnet = read_wordnet(fetched.wordnet / "usr" / "share" / "wordnet")
    if arguments.propose:
        pictures = matching.read_pictures(fetched.emoji, fetched.cldr)
        old = {row["picture"]: row["decision"] for row in matching.read_matches(MATCHES)} if MATCHES.exists() else {}
        matching.write_matches(MATCHES, pictures, matching.match(pictures, wordnet), wordnet, old)
    graph = build_graph(wordnet, matching.accepted(matching.read_matches(MATCHES), wordnet))
    with tempfile.TemporaryDirectory() as folder:
        pictures_dir = Path(folder) / "pictures"
        used = sorted({name for name in graph.entity_pictures if name})
        write_pictures(used, fetched.emoji / "img" / "google" / "64", pictures_dir)
        save_dataset(graph, arguments.output, pictures_dir)
    write_notices(fetched, arguments.output)
    encode_dataset(arguments.output)


if __name__ == "__main__":
    main()
