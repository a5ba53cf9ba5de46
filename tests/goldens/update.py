"""Writes the golden resolved configs anew; look at the diff before you commit it.

python tests/goldens/update.py        (from the repository's root)
"""

from __future__ import annotations

import json
from pathlib import Path

from jaxablate import config

HERE = Path(__file__).parent
ARMS = [
    "baseline",
    "flash_only",
    "rms_only",
    "swiglu_only",
    "flash_rms",
    "flash_swiglu",
    "rms_swiglu",
    "optimized_full",
]

if __name__ == "__main__":
    for scale in ("tiny", "small", "paper"):
        for arm in ARMS:
            path = HERE / "ctclip" / scale / f"{arm}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            values = config.load(f"configs/ctclip.py:{arm},scale={scale}").base.to_dict()
            path.write_text(json.dumps(values, indent=2) + "\n")
