"""Read the records of a run as report.py shows them: columns of numbers, restarts, state.

They may come from old or broken files; values that are not numbers are left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gptkit.base.files import as_dict
from gptkit.training.run_log import as_number

Record = dict[str, Any]


@dataclass(frozen=True)
class RunRecord:
    """The records of a run, each with its step, sorted by step. `config` is the run's config.json."""

    name: str
    config: Record = field(default_factory=dict)
    metrics: Sequence[Record] = ()
    samples: Sequence[Record] = ()
    sessions: Sequence[Record] = ()
    is_running: bool = False

    def settings(self) -> Record:
        """Return the settings and the model's dimensions by name."""
        return as_dict(self.config.get("settings")) | as_dict(self.config.get("model"))

    def environment(self) -> Record:
        """Return the environment of the newest session."""
        return as_dict(self.sessions[-1].get("environment")) if self.sessions else {}

    def curve(self, x_name: str, y_name: str) -> list[tuple[float, float]]:
        """Return the points of two columns of metrics.jsonl, sorted by x."""
        points = [(as_number(record.get(x_name)), as_number(record.get(y_name))) for record in self.metrics]
        return sorted((x, y) for x, y in points if x is not None and y is not None)

    def restarts(self, x_name: str) -> list[float]:
        """Return where sessions after the first one began, as the x value of the last report before each of them."""
        found = []
        for session in self.sessions[1:]:
            before = [as_number(record.get(x_name)) for record in self.metrics if record["step"] <= session["step"]]
            found += [x for x in before[-1:] if x is not None]
        return found


def pick_evenly(items: Sequence[Record], n: int) -> list[Record]:
    """Return at most n of the items, evenly spaced, with the first and the last among them."""
    if len(items) <= n:
        return list(items)
    return [items[round(i * (len(items) - 1) / (n - 1))] for i in range(n)]
