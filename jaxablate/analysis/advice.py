"""What a person can do about runs that ended without a result, where one phrase says it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

# A run out of memory has been tried again by itself, with fewer members and then with micro-batches halved.
ADVICE: Mapping[str, str] = MappingProxyType(
    {
        "diverged": "try a lower learning rate",
        "oom": "try a smaller micro-batch, --config.training.accumulation=…, or a smaller batch, "
        "--config.training.batch_size=16 or 8",
    }
)
