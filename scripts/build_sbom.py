"""Write sbom.json: the software bill of materials (CycloneDX) of all that constraints.txt pins.

    pip install -c constraints.txt -e '.[dev,encode,privacy,audit]'
    python scripts/build_sbom.py

Made by the CycloneDX project's own tool from the environment that it runs in, which must have what constraints.txt
says. Names, versions, package URLs, licences and the graph of dependencies are kept; a test holds the file to
constraints.txt, so that it is built anew when a pin changes.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "sbom.json"
KEPT = ("type", "bom-ref", "name", "version", "purl", "licenses")


def main() -> None:
    """Build the file."""
    with tempfile.TemporaryDirectory() as place:
        made = Path(place) / "made.json"
        command = [sys.executable, "-m", "cyclonedx_py", "environment", "--pyproject", str(ROOT / "pyproject.toml")]
        subprocess.run([*command, "--output-reproducible", "-o", str(made), sys.executable], check=True)
        found = json.loads(made.read_text(encoding="utf-8"))
    TARGET.write_text(json.dumps(shorten(found, pinned()), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def pinned() -> dict[str, str]:
    """Return what constraints.txt pins, name -> version."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(item.name): str(item.specifier).removeprefix("==") for item in requirements}


def shorten(found: dict[str, Any], pins: dict[str, str]) -> dict[str, Any]:
    """Keep the components that are pinned, each with what says what it is."""
    for item in found["components"]:  # a local version ("+cpu") says where a build came from, not which release it is
        item["version"] = item["version"].partition("+")[0]
        item["purl"] = item.get("purl", "").partition("%2B")[0].partition("+")[0].partition("?")[0]
    versions = {canonicalize_name(item["name"]): item["version"] for item in found["components"]}
    wrong = [f"{name}=={pin} (here {versions.get(name)})" for name, pin in pins.items() if versions.get(name) != pin]
    if wrong:
        sys.exit(f"constraints.txt pins what is not installed: {', '.join(wrong)}")
    components = [item for item in found["components"] if canonicalize_name(item["name"]) in pins]
    kept = {item["bom-ref"] for item in components} | {found["metadata"]["component"]["bom-ref"]}
    graph = [
        {"ref": item["ref"], "dependsOn": [ref for ref in item.get("dependsOn", ()) if ref in kept]}
        for item in found["dependencies"]
        if item["ref"] in kept
    ]
    return {
        **{name: found[name] for name in ("$schema", "bomFormat", "specVersion", "version")},
        "metadata": {"component": found["metadata"]["component"]},
        "components": [{name: item[name] for name in KEPT if name in item} for item in components],
        "dependencies": graph,
    }


if __name__ == "__main__":
    main()
