"""Numbers in words: the one way that values, intervals and p-values are written, on every page and in papers.

A number that is not there is written as `MISSING`, never as zero. Minus signs are U+2212; `paper` turns them
into LaTeX's. Nothing here says what is better: that is a `Judgement` of the analysis.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import statistics
from collections.abc import Callable, Iterable, Sequence

from jaxablate.analysis.findings import ArmValue, Effect, Estimate, Judgement, Verdict
from jaxablate.study import Response

MISSING = "–"


def number(value: float | None, decimals: int | None = None) -> str:
    """`0.912`, `−0.004`, `12,000`; four significant digits unless `decimals` says how many after the point."""
    if value is None or not math.isfinite(value):
        return MISSING
    if decimals is None:
        if value != 0 and (abs(value) < 1e-4 or abs(value) >= 1e7):
            return f"{value:.3g}".replace("-", "−")
        decimals = places(abs(value) / 100 or 1)
        text = f"{value:,.{decimals}f}"
        text = text.rstrip("0").rstrip(".") if "." in text else text
    else:
        text = f"{value:,.{decimals}f}"
    if not text.strip("-0.,"):
        text = text.removeprefix("-")  # what rounds to zero has no sign
    return text.replace("-", "−")


def signed(value: float | None, decimals: int | None = None) -> str:
    """The same with a plus: `+0.004`."""
    text = number(value, decimals)
    return f"+{text}" if value is not None and value > 0 and text.strip("0.,") else text


def places(resolution: float) -> int:
    """Decimals that show a number of this size to two significant digits; 0 to 6."""
    if not math.isfinite(resolution) or resolution <= 0:
        return 3
    return min(max(1 - math.floor(math.log10(resolution)), 0), 6)


def common_places(estimates: Iterable[Estimate | None]) -> int | None:
    """Decimals for a column: a typical interval gets two significant digits. None: nothing to go by."""
    widths = [half for e in estimates if e is not None and (half := half_width(e)) is not None and half > 0]
    return places(statistics.median_low(widths)) if widths else None


def half_width(estimate: Estimate) -> float | None:
    """Half the length of an interval; None without one."""
    if estimate.low is None or estimate.high is None:
        return None
    return (estimate.high - estimate.low) / 2


def plus_minus(estimate: Estimate, decimals: int | None = None) -> str:
    """`0.912 ± 0.004`; an interval that is not symmetric is written out; without one the value alone."""
    half = half_width(estimate)
    if half is None or estimate.value is None or estimate.low is None or estimate.high is None:
        return number(estimate.value, decimals)
    middle = (estimate.low + estimate.high) / 2
    if abs(middle - estimate.value) > 0.02 * half:
        return interval(estimate, decimals)
    decimals = places(half) if decimals is None else decimals
    return f"{number(estimate.value, decimals)} ± {number(half, decimals)}"


def interval(estimate: Estimate, decimals: int | None = None, sign: str = "") -> str:
    """`0.912 (0.908 to 0.916)`; `sign="+"` puts a plus before the value."""
    if decimals is None and (half := half_width(estimate)):
        decimals = places(half)
    show = signed if sign == "+" else number
    text = show(estimate.value, decimals)
    if estimate.low is None or estimate.high is None:
        return text
    return f"{text} ({show(estimate.low, decimals)} to {show(estimate.high, decimals)})"


def ratio_in_percent(ratio: Estimate) -> Estimate:
    """A ratio as the percentage by which it differs from one."""
    return _mapped(ratio, lambda value: 100 * (value - 1))


def log_in_percent(log_difference: Estimate) -> Estimate:
    """A difference of logarithms as a change in percent: 100 (exp d - 1)."""
    return _mapped(log_difference, lambda value: 100 * math.expm1(value))


def _mapped(estimate: Estimate, to: Callable[[float], float]) -> Estimate:
    value, low, high = (None if x is None else to(x) for x in (estimate.value, estimate.low, estimate.high))
    return dataclasses.replace(estimate, value=value, low=low, high=high)


def level(estimate: Estimate) -> str:
    """`95 %`."""
    return confidence(estimate.level)


def confidence(level: float) -> str:
    """The level of an interval: `95 %`, `99.5 %`."""
    return f"{number(100 * level)} %"


def p_value(p: float | None) -> str:
    """`0.034`, `< 0.001`; never zero."""
    if p is None:
        return MISSING
    if p < 0.001:
        return "< 0.001"
    return f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def share(value: float | None) -> str:
    """`45 %`."""
    return MISSING if value is None else f"{number(100 * value, 0)} %"


def gigabytes(value: float | None) -> str:
    """Bytes in GB (10⁹), with the digits that a person can use; small ones in MB."""
    if value is None:
        return MISSING
    return f"{value / 1e9:.3g} GB" if value >= 1e8 else f"{value / 1e6:.3g} MB"


def duration(hours: float | None) -> str:
    """`1.5 h`, `12 min`, `40 s`."""
    if hours is None:
        return MISSING
    if hours >= 1:
        return f"{number(hours, 1)} h"
    return f"{number(hours * 60, 1)} min" if hours >= 1 / 60 else f"{number(hours * 3600, 0)} s"


def count(n: int, what: str, many: str = "") -> str:
    """`1 run`, `3 runs`."""
    return f"{number(n, 0)} {what if n == 1 else many or what + 's'}"


def listed(items: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join([", ".join(items[:-1]), items[-1]]) if len(items) > 1 else "".join(items)


def capital(text: str) -> str:
    """With a capital first letter, the rest as it is."""
    return text[:1].upper() + text[1:]


def seeds(value: ArmValue) -> str:
    """How many of an arm's seeds a number rests on: `3 of 3`, `2 of 3, 1 diverged`."""
    known = len(value.values)
    parts = [f"{known} of {value.planned}"]
    if value.diverged:
        parts.append(f"{value.diverged} diverged")
    if value.unfinished:
        parts.append(f"{value.unfinished} unfinished")
    if (blank := value.done - known) > 0:
        parts.append(f"{blank} without a value")
    return ", ".join(parts)


def judged(better: Judgement) -> str:
    """What a judgement says of a difference, in the words of the tables."""
    return {"better": "better", "worse": "worse", "unclear": "unclear", "same": "no difference"}[better]


def goal(response: Response) -> str:
    """`higher` or `lower`: where the better values of a response lie. A time is better the lower it is."""
    return "higher" if response.better > 0 else "lower"


def rule(response: Response) -> str:
    """How a run is reduced to one number, in words."""
    if response.reduce == "time_to":
        what = (
            f"{number(response.target)}"
            if response.target is not None
            else f"{share(response.fraction)} of the baseline's way from chance ({number(response.chance)})"
        )
        return f"first step at which {response.metric} reaches {what}"
    if response.metric.startswith("perf/"):
        return f"median over the run of {response.metric}"
    words = {
        "final": "last value of",
        "best": f"{'highest' if response.direction == 'max' else 'lowest'} value of",
        "at": f"value at step {response.step:,} of",
    }
    return f"{words[response.reduce]} {response.metric}"


def effect_name(effect: Effect) -> str:
    """`rms`, `flash × rms`."""
    return " × ".join(effect.factors)


def claim(verdict: Verdict) -> str:
    """A claim with its margin: `equivalence within ±0.02`, `superiority by more than 5 %`."""
    size = f"{number(100 * verdict.margin)} %" if verdict.scale == "ratio" else number(verdict.margin)
    if verdict.claim == "equivalence":
        return f"equivalence within ±{size}"
    if verdict.claim == "non_inferiority":
        return f"non-inferiority with margin {size}"
    return f"superiority by more than {size}" if verdict.margin else "superiority"


def compared(verdict: Verdict) -> str:
    """What a verdict compares: `optimized_full vs baseline`."""
    return f"{verdict.treatment} vs {verdict.control}" if verdict.control else verdict.treatment


def day(time: str) -> str:
    """`2026-01-01 00:00 UTC` of an ISO time; as it is if it is none."""
    try:
        moment = datetime.datetime.fromisoformat(time)
    except ValueError:
        return time
    zone = " UTC" if moment.utcoffset() == datetime.timedelta(0) else ""
    return moment.strftime("%Y-%m-%d %H:%M") + zone
