"""Which engines are ready: `Facts`, which probes gather, and conclusions, which are pure functions of the facts."""

from tarflow_runtimes.doctor.conclusions import Fault, choose, verdicts, warnings
from tarflow_runtimes.doctor.facts import Facts
from tarflow_runtimes.doctor.probes import gather

__all__ = ["Facts", "Fault", "choose", "gather", "verdicts", "warnings"]
