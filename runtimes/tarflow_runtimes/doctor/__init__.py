"""What engines need and what is there: `Facts`, gathered by probes, and conclusions, pure functions of the facts."""

from tarflow_runtimes.doctor.conclusions import Fault, choose, verdicts, warnings
from tarflow_runtimes.doctor.facts import Facts
from tarflow_runtimes.doctor.probes import gather

__all__ = ["Facts", "Fault", "choose", "gather", "verdicts", "warnings"]
