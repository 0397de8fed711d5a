"""Match pictures to WordNet senses: names and keywords give candidates, the similarity of glosses chooses."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from wn_noto.wordnet import WordNet

from fedsim.data.encoders import encode_texts

# A name is better evidence than a keyword, and the more frequent sense better than a rare one.
NAME_BONUS = {"name": 0.35, "short_name": 0.25, "keyword_in_name": 0.1, "keyword": 0.0}
SENSE_BONUS = (0.12, 0.06, 0.03)
TOPIC_BONUS = 0.25
THRESHOLD = 0.6

# Where WordNet's lexicographers filed what a group of pictures shows (numbers of lexnames(5WN)).
TOPICS = {
    "animal": {5},
    "plant": {20},
    "food": {13},
    "drink": {13},
    "dishware": {6},
    "place-map": {15, 6, 17},
    "place": {6, 17, 15},
    "transport": {6},
    "time": {6, 28},
    "sky": {17, 19, 28},
    "event": {4, 6, 11, 28},
    "award": {6, 10},
    "sport": {4, 6},
    "game": {6, 4},
    "arts": {6},
    "clothing": {6},
    "sound": {6},
    "music": {6, 10},
    "phone": {6},
    "computer": {6},
    "light": {6},
    "book": {6, 10},
    "money": {21, 6},
    "mail": {6, 10},
    "writing": {6},
    "office": {6},
    "lock": {6},
    "tool": {6},
    "science": {6, 8},
    "medical": {6},
    "household": {6},
    "other-object": {6},
    "religion": {10, 6},
    "zodiac": {15},
    "body": {8},
    "hand": {4, 10, 8},
    "person-activity": {4, 18},
    "person-sport": {4, 18},
    "person": {18},
    "family": {14, 18},
    "face": {10, 12, 4},
    "emotion": {12, 10, 4},
    "heart": {12, 10, 25},
    "country": {15},
    "flag": {6},
    "geometric": {25},
    "currency": {21},
}


@dataclass(frozen=True)
class Picture:
    """A picture file with its name and keywords in Unicode CLDR."""

    file: str
    name: str
    other_names: tuple[str, ...]
    keywords: tuple[str, ...]
    category: str


def read_pictures(emoji_folder: Path, cldr_folder: Path) -> list[Picture]:
    """Read the pictures' names (variants by skin tone are left out)."""
    emojis = json.loads((emoji_folder / "emoji.json").read_text(encoding="utf-8"))
    cldr_file = cldr_folder / "annotations" / "en" / "annotations.json"
    annotations = json.loads(cldr_file.read_text(encoding="utf-8"))["annotations"]["annotations"]
    pictures = []
    for emoji in sorted(emojis, key=lambda entry: int(entry["sort_order"])):
        if emoji["category"] == "Component" or not emoji["has_img_google"]:
            continue
        characters = "".join(chr(int(code, 16)) for code in emoji["unified"].split("-"))
        entry = annotations.get(characters) or annotations.get(characters.replace("\ufe0f", "")) or {}
        unicode_name = (emoji["name"] or "").lower()
        if emoji["subcategory"] == "country-flag":
            unicode_name = unicode_name.removesuffix(" flag").replace("&", "and")
        name = entry.get("tts", [unicode_name])[0]
        short_names = [short.replace("_", " ") for short in emoji["short_names"] if not short.startswith("flag-")]
        others = tuple(dict.fromkeys([unicode_name, *short_names]))
        keywords = tuple(entry.get("default", []))
        pictures.append(Picture(emoji["image"], name, others, keywords, emoji["subcategory"]))
    return pictures


def candidates(picture: Picture, wordnet: WordNet) -> dict[str, float]:
    """Collect noun senses whose lemma is a name or keyword of the picture, each with its bonus."""
    found: dict[str, float] = {}
    topics = TOPICS.get(picture.category) or TOPICS.get(picture.category.split("-")[0].split()[0], set())
    words = [(picture.name, "name"), *((other, "short_name") for other in picture.other_names)]
    words += [(word, "keyword_in_name" if word in picture.name.split() else "keyword") for word in picture.keywords]
    words += [(word, "keyword_in_name") for word in picture.name.replace(":", "").split() if len(word) > 2]
    for word, kind in words:
        for rank, identifier in enumerate(wordnet.noun_senses(word)):
            bonus = NAME_BONUS[kind] + (SENSE_BONUS[rank] if rank < len(SENSE_BONUS) else 0.0)
            bonus += TOPIC_BONUS if wordnet.synsets[identifier].topic in topics else 0.0
            found[identifier] = max(found.get(identifier, 0.0), bonus)
    return found


def match(pictures: list[Picture], wordnet: WordNet) -> dict[str, tuple[str, float]]:
    """Assign at most one sense to a picture and one picture to a sense, best score first.

    Returns:
        picture file -> (sense identifier, score).
    """
    queries = encode_texts([f"{picture.name}: {', '.join(picture.keywords)}" for picture in pictures])
    options = [candidates(picture, wordnet) for picture in pictures]
    senses = sorted({identifier for option in options for identifier in option})
    texts = [f"{wordnet.synsets[sense].label}: {wordnet.synsets[sense].gloss}" for sense in senses]
    rows = {sense: row for row, sense in enumerate(senses)}
    values = encode_texts(texts)
    scored = []
    for query, picture, option in zip(queries, pictures, options, strict=True):
        for sense, bonus in option.items():
            score = float(np.dot(query, values[rows[sense]])) + bonus
            scored.append((-round(score, 3), picture.file, sense))
    chosen: dict[str, tuple[str, float]] = {}
    used: set[str] = set()
    for negative, file, sense in sorted(scored):
        if file not in chosen and sense not in used and -negative >= THRESHOLD:
            chosen[file] = (sense, -negative)
            used.add(sense)
    return chosen


COLUMNS = ["picture", "name", "proposed", "score", "gloss", "decision"]


def write_matches(
    path: Path, pictures: list[Picture], proposals: dict[str, tuple[str, float]], wordnet: WordNet, old: dict[str, str]
) -> None:
    """Write the match table; decisions made by reading it are kept, a new row has none."""
    lines = ["\t".join(COLUMNS)]
    for picture in pictures:
        row = [picture.file, picture.name, "", "", ""]
        if picture.file in proposals:
            identifier, score = proposals[picture.file]
            synset = wordnet.synsets[identifier]
            row[2:] = [synset.key, f"{score:.3f}", synset.gloss]
        lines.append("\t".join([*row, old.get(picture.file, "")]))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_matches(path: Path) -> list[dict[str, str]]:
    """Read the match table."""
    lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    return [dict(zip(lines[0].split("\t"), line.split("\t"), strict=True)) for line in lines[1:]]


def accepted(rows: list[dict[str, str]], wordnet: WordNet) -> dict[str, str]:
    """Apply the decisions: ``yes`` takes the proposal, a key replaces it, ``no`` or nothing leaves the picture out.

    Returns:
        sense identifier -> picture file.
    """
    identifiers = {synset.key: identifier for identifier, synset in wordnet.synsets.items()}
    chosen: dict[str, str] = {}
    for row in rows:
        if row["decision"] in ("no", ""):
            continue
        key = row["proposed"] if row["decision"] == "yes" else row["decision"]
        if key not in identifiers:
            raise SystemExit(f"matches.tsv: picture {row['picture']}: no sense {key!r} in WordNet")
        if identifiers[key] in chosen:
            raise SystemExit(f"matches.tsv: sense {key!r} has two pictures, {row['picture']} is the second")
        chosen[identifiers[key]] = row["picture"]
    return chosen
