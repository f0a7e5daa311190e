"""What a program has otherwise than another, as data: `ir/diff.py`'s rows by the numbers of their lines."""

from typing import Any

from ..ir import Program
from ..ir.diff import compare


def difference_data(before: Program, after: Program) -> dict[str, Any]:
    """`rows` are `[marker, line of before, line of after, count, text]`: -1 where there is no line; `count` rows of that marker whose lines
    follow one another on both sides; `text` where it is not that of the line of `after` (or of `before`), else null. `changed` are
    `[line of before, line of after]` of what is the same but says another thing."""
    difference = compare(before, after)
    rows: list[list[Any]] = []
    for row in difference.rows:
        pairing = difference.pairing
        own = pairing.after.lines[row.after].text if row.after >= 0 else pairing.before.lines[row.before].text
        text = None if row.text == own else row.text
        if text is None and rows and _follows(rows[-1], row.marker, row.before, row.after):
            rows[-1][3] += 1
        else:
            rows.append([row.marker, row.before, row.after, 1, text])
    changed = [[difference.pairing.partner[line], line] for line in sorted(difference.pairing.changed)]
    return {"summary": difference.summary.as_dict(), "said": str(difference.summary), "rows": rows, "changed": changed}


def _follows(last: list[Any], marker: str, before: int, after: int) -> bool:
    if last[0] != marker or last[4] is not None:
        return False
    return all(now == (-1 if first < 0 else first + last[3]) for first, now in ((last[1], before), (last[2], after)))
