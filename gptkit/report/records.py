"""What a run has written, as report.py shows it: columns of numbers, restarts, how it stands.

Taken as it comes, from old or broken files too: what is no number is left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gptkit.base.files import as_dict

Record = dict[str, Any]
LARGEST = 1e18  # what is larger is no number of a run, and would break a chart


@dataclass(frozen=True)
class RunRecord:
    """The records of a run, each with its step, by rising step. `about` is its config.json."""

    name: str
    about: Record = field(default_factory=dict)
    metrics: Sequence[Record] = ()
    samples: Sequence[Record] = ()
    sessions: Sequence[Record] = ()
    is_running: bool = False

    def settings(self) -> Record:
        """Settings and dimensions, by name."""
        return as_dict(self.about.get("settings")) | as_dict(self.about.get("model"))

    def environment(self) -> Record:
        """Of the newest session."""
        return as_dict(self.sessions[-1].get("environment")) if self.sessions else {}

    def curve(self, x_name: str, y_name: str) -> list[tuple[float, float]]:
        """The points that two columns of the reports make."""
        points = [(as_number(record.get(x_name)), as_number(record.get(y_name))) for record in self.metrics]
        return sorted((x, y) for x, y in points if x is not None and y is not None)

    def restarts(self, x_name: str) -> list[float]:
        """Where sessions after the first one began: at the last report before them."""
        found = []
        for session in self.sessions[1:]:
            before = [as_number(record.get(x_name)) for record in self.metrics if record["step"] <= session["step"]]
            found += [x for x in before[-1:] if x is not None]
        return found


def as_number(value: Any) -> float | None:
    """A number that can be drawn."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) < LARGEST else None  # a NaN is less than nothing


def pick_evenly(items: Sequence[Record], n: int) -> list[Record]:
    """At most n of the items, the first and the last among them."""
    if len(items) <= n:
        return list(items)
    return [items[round(i * (len(items) - 1) / (n - 1))] for i in range(n)]
