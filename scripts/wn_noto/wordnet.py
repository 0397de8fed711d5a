"""Read the database files of WordNet 3.0 (format: the manual page wndb(5WN))."""

import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

POS_FILES = {"n": "noun", "v": "verb", "a": "adj", "r": "adv"}
NOUN_ENDINGS = (
    ("ses", "s"),
    ("xes", "x"),
    ("zes", "z"),
    ("ches", "ch"),
    ("shes", "sh"),
    ("men", "man"),
    ("ies", "y"),
    ("s", ""),
)

# One direction of each pair of inverse pointers; the others (hyponyms, holonyms, domain members) repeat the same fact.
RELATIONS = {
    "@": "hypernym",
    "@i": "instance_hypernym",
    "%m": "member_meronym",
    "%p": "part_meronym",
    "%s": "substance_meronym",
    "+": "derivation",
    "=": "attribute",
    "!": "antonym",
    "&": "similar",
    "^": "also_see",
    ";c": "domain_topic",
    ";r": "domain_region",
    ";u": "domain_usage",
    "*": "entailment",
    ">": "cause",
    "$": "verb_group",
    "\\": "pertainym",
}


@dataclass
class Synset:
    """One sense: its identifier (part of speech and file offset), words, gloss and pointers (relation, target)."""

    identifier: str
    lemmas: list[str]
    gloss: str
    pointers: list[tuple[str, str]]
    topic: int  # number of the lexicographer file, see lexnames(5WN)
    key: str = ""

    @property
    def label(self) -> str:
        """The first word, with spaces."""
        return self.lemmas[0].replace("_", " ")


@dataclass
class WordNet:
    """All synsets by identifier, and per part of speech the senses of each lemma in order of frequency."""

    synsets: dict[str, Synset] = field(default_factory=dict)
    senses: dict[str, dict[str, list[str]]] = field(default_factory=lambda: defaultdict(dict))
    noun_exceptions: dict[str, str] = field(default_factory=dict)

    def noun_senses(self, words: str) -> list[str]:
        """Look a noun up, then its singular; returns identifiers, most frequent sense first."""
        lemma = re.sub(r"[\s]+", "_", words.strip().lower().replace("’", "'"))
        forms = [
            lemma,
            lemma.replace("-", "_"),
            lemma.replace("-", ""),
            lemma.replace("_", "-"),
            lemma.replace("_", ""),
        ]
        forms += [self.noun_exceptions[lemma]] if lemma in self.noun_exceptions else []
        forms += [lemma[: -len(end)] + new for end, new in NOUN_ENDINGS if lemma.endswith(end) and len(lemma) > 3]
        for form in forms:
            if form in self.senses["n"]:
                return self.senses["n"][form]
        return []


def read_wordnet(folder: Path) -> WordNet:
    """Read data, index and exception files of all four parts of speech."""
    wordnet = WordNet()
    for pos, name in POS_FILES.items():
        for line in (folder / f"data.{name}").read_text(encoding="latin-1").splitlines():
            if not line.startswith(" "):
                synset = _read_synset(line, pos)
                wordnet.synsets[synset.identifier] = synset
        for line in (folder / f"index.{name}").read_text(encoding="latin-1").splitlines():
            if not line.startswith(" "):
                fields = line.split()
                num_senses = int(fields[2])
                wordnet.senses[pos][fields[0]] = [pos + offset for offset in fields[-num_senses:]]
    for synset in wordnet.synsets.values():
        pos = synset.identifier[0]
        lemma = synset.lemmas[0].lower()
        number = wordnet.senses[pos][lemma].index(synset.identifier) + 1
        synset.key = f"{lemma}.{pos}.{number:02d}"
    for line in (folder / "noun.exc").read_text(encoding="latin-1").splitlines():
        form, base = line.split()[:2]
        wordnet.noun_exceptions[form] = base
    return wordnet


def _read_synset(line: str, pos: str) -> Synset:
    """Parse one line of a data file; only the definition of the gloss is kept, not its examples."""
    data, _, gloss = line.partition(" | ")
    fields = data.split()
    num_words = int(fields[3], 16)
    lemmas = [re.sub(r"\((a|p|ip)\)$", "", word) for word in fields[4 : 4 + 2 * num_words : 2]]
    start = 5 + 2 * num_words
    pointers = []
    for position in range(start, start + 4 * int(fields[start - 1]), 4):
        symbol, offset, target_pos = fields[position : position + 3]
        if symbol in RELATIONS:
            pointers.append((RELATIONS[symbol], target_pos.replace("s", "a") + offset))
    definition = re.split(r';\s*"', gloss.strip())[0].strip().strip(";").strip()
    return Synset(pos + fields[0], lemmas, definition, list(dict.fromkeys(pointers)), int(fields[1]))


def all_triples(wordnet: WordNet) -> list[tuple[str, str, str]]:
    """List every fact once as (head, relation, tail) identifiers, in order.

    Symmetric pointers, such as derivation, are written at both ends; only the first of the two is kept.
    """
    triples = []
    seen = set()
    for head, synset in sorted(wordnet.synsets.items()):
        for relation, tail in synset.pointers:
            pair = (relation, *sorted((head, tail)))
            if pair not in seen and head != tail:
                seen.add(pair)
                triples.append((head, relation, tail))
    return triples
