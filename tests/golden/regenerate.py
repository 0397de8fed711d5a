"""Write the golden numbers anew: `python tests/golden/regenerate.py`, after a change that is meant to move them.

The commit that changes them says why they moved.
"""

import json
import sys
from pathlib import Path

import torch


def main() -> None:
    """Play all scenarios and write one file each."""
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    from scenarios import FOLDER, SCENARIOS, play

    torch.set_num_threads(1)
    for name in SCENARIOS:
        (FOLDER / f"{name}.json").write_text(json.dumps(play(name), indent=1) + "\n")
        sys.stdout.write(f"{name}.json\n")


if __name__ == "__main__":
    main()
