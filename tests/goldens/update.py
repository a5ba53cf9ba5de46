"""Writes the golden resolved configs anew; look at the diff before you commit it.

python -m tests.goldens.update        (from the repository's root)
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from jaxablate import config, study

HERE = Path(__file__).parent
CONFIGS = HERE.parents[1] / "configs"
SCALES = {
    "ctclip": ("tiny", "small", "paper"),
    "tinystories": ("tiny", "low_resource", "paper"),
    "burgers": ("tiny", "small", "paper"),
    "lora_space": ("tiny", "1k"),
    "vqa": ("tiny", "2b", "8b"),
}
EVERY_ARM = {"tinystories": ",arms=all"}  # where an argument chooses them
FURTHER = {  # folder -> argument: studies that a file declares besides
    "burgers": {"faithful": "scale=paper,arms=faithful", "random": "scale=tiny,encoder=faithful_random"},
    "vqa": {"jobs": "scale=8b,arms=jobs", "splits": "scale=8b,arms=splits"},
}


def goldens() -> Iterator[tuple[str, Path]]:
    """The config of each arm of each study at each scale, as main takes it, and its golden file."""
    for name, scales in SCALES.items():
        file = CONFIGS / f"{name}.py"
        folders = {scale: f"scale={scale}" for scale in scales} | FURTHER.get(name, {})
        for folder, arg in folders.items():
            for arm in study.load(f"{file}:{arg}{EVERY_ARM.get(name, '')}").arms:
                yield f"{file}:arm={arm.name},{arg}", HERE / name / folder / f"{arm.name}.json"


if __name__ == "__main__":
    for spec, path in goldens():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(config.load(spec).base.to_dict(), indent=2) + "\n")
