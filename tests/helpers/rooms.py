"""The few names by which tests of one room call another: a bundle, and what an engine is asked to invert."""

from tarflow_runtimes.bundle.reader import Bundle, open_bundle
from tarflow_runtimes.decode.turn import Conditions, Turn
from tarflow_runtimes.doctor.requirements import choose_cpu, native_library
from tarflow_runtimes.model.guidance import conditions_of

CPU_ENGINE = choose_cpu("float32")[0]
"""The default engine: native where it was built."""

__all__ = ["CPU_ENGINE", "Bundle", "Conditions", "Turn", "conditions_of", "native_library", "open_bundle"]
