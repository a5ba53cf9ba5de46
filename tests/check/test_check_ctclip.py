"""The shipped CT-CLIP study does what it says, as far as two cores can see."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jaxablate import study
from jaxablate.check import check_study

# Each factor by itself; the arms that combine them with JAXABLATE_CASES=300, and in `make demo`.
ARMS = ["baseline", "flash_only", "rms_only", "swiglu_only"]
if int(os.environ.get("JAXABLATE_CASES", "0")) >= 300:
    ARMS += ["flash_rms", "flash_swiglu", "rms_swiglu", "optimized_full"]


@pytest.mark.slow
def test_every_arm_of_ctclip_ablates_what_it_says(repo: Path) -> None:
    spec = f"{repo}/configs/ctclip.py"
    fewer = [("data.phantoms_train", "64"), ("data.phantoms_val", "48")]  # made in a tenth of the time
    report = check_study(study.load(spec, fewer), spec=spec, arms=ARMS)
    assert not report.failed, report.table(120, verbose=True)
    assert {finding.verdict for finding in report.findings} <= {"ok", "note"}
    changed = [row.arm for row in report.rows if row.function == "changed"]
    assert changed == [arm for arm in ARMS if arm not in ("baseline", "flash_only")]
    for row in report.rows:
        assert row.kernel == (
            "blockwise" if "flash" in row.arm or row.arm == "optimized_full" else "reference"
        )


@pytest.mark.slow
def test_upstreams_flash_switch_is_no_implementation(repo: Path) -> None:
    """What upstream's switch really did: no QK-norm, half precision, and no position bias."""
    declared = study.load(f"{repo}/configs/ctclip.py")
    flash = study.switch("flash", "implementation", {"model.image.attention.variant": "faithful_flash"})
    broken = study.Study(
        name="ctclip",
        base=declared.base,
        factors=(flash,),
        arms=study.factorial((flash,)),
        seeds=(0,),
        responses=declared.responses[:1],
    )
    report = check_study(broken, arms=["flash"], execute="no")  # shapes tell
    (finding,) = [f for f in report.of("flash", "fail") if f.check == "function"]
    assert "removes" in finding.reason
    assert "must leave the parameters as they are" in finding.reason
