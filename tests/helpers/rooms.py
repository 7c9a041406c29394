"""The few names by which tests of one room call another: a bundle, and what an engine is asked to invert."""

from tarflow_runtimes.bundle.reader import Bundle, open_bundle
from tarflow_runtimes.decode.turn import Conditions, Turn
from tarflow_runtimes.model.guidance import conditions_of

__all__ = ["Bundle", "Conditions", "Turn", "conditions_of", "open_bundle"]
