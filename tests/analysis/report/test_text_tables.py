"""Tables as plain text: as wide as the page at most, and no name is broken but behind one of its parts."""

from __future__ import annotations

import re

import pytest

from jaxablate.analysis.report import plain
from jaxablate.analysis.report.document import Cell, Column, Document, Section, Table

RESPONSES = (
    "nrmse",
    "nrmse_operator",
    "rollout_nrmse",
    "crmse",
    "brmse",
    "frmse_low",
    "frmse_middle",
    "frmse_high",
)
ARMS = ("16tokens_pure", "16tokens_channel_sep", "32tokens_unet_channel_sep")


NOTE = "val/nrmse_persistence"


def whole_parts(names: set[str]) -> set[str]:
    """What a line may end with, or begin with, of a name: `frmse_middle`, `frmse_`, `middle`."""
    found = set[str]()
    for name in names:
        parts = re.findall(r"[^_/]+[_/]?", name)
        found |= {"".join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1)}
    return found


def table_of(responses: tuple[str, ...], note: str = "5 of 5") -> Table:
    rows = tuple((Cell(arm), *(Cell("0.1234 ± 0.0056", note) for _ in responses)) for arm in ARMS)
    return Table("Scores", (Column("arm", "words"), *map(Column, responses)), rows, "Means.")


def lines_of(table: Table, width: int) -> list[str]:
    document = Document("Title", "A study", (Section("arms", "Arms", (table,)),))
    return plain.text(document, width).splitlines()


@pytest.mark.parametrize(
    ("width", "note", "parts"), [(80, NOTE, 3), (80, "5 of 5", 2), (120, NOTE, 2), (120, "5 of 5", 1)]
)
def test_no_name_is_broken_within_a_part_however_many_responses(width: int, note: str, parts: int) -> None:
    lines = lines_of(table_of(RESPONSES, note), width)
    assert max(map(len, lines)) <= width
    heads = [line for line in lines[lines.index("Scores") + 1 :] if "0.1234" not in line and "_" in line]
    assert {word for line in heads for word in line.split()} <= whole_parts({"arm", *RESPONSES, *ARMS, NOTE})
    for arm in ARMS:
        assert sum(line.startswith(arm) for line in lines) == parts
    assert sum(line.count("0.1234") for line in lines) == len(ARMS) * len(RESPONSES)


def test_what_has_room_stays_on_one_line_and_names_are_broken_last() -> None:
    few = lines_of(table_of(("rollout_nrmse", "frmse_low")), 80)
    assert any("rollout_nrmse" in line and "frmse_low" in line for line in few)
    assert sum("0.1234 ± 0.0056" in line for line in few) == len(ARMS)
    some = lines_of(table_of(RESPONSES[:4]), 80)  # the scores are broken at their blanks, the names are not
    assert any("nrmse_operator" in line and "rollout_nrmse" in line for line in some)
    assert not any("0.1234 ± 0.0056" in line for line in some)


def test_a_name_without_parts_that_is_wider_than_the_page_is_folded() -> None:
    lines = lines_of(table_of(("x" * 100,)), 80)
    assert "x" * 100 in "".join(line.strip() for line in lines if "x" in line).replace(" ", "").replace(
        "arm", ""
    )
