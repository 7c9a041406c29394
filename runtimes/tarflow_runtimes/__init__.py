"""TarFlow runtime: sample, denoise, encode, score and classify with a bundle, without PyTorch."""

from tarflow_runtimes.bundle.config import ModelConfig
from tarflow_runtimes.decode.plan import BlockReport, DecodeReport, Parallel, Plan, Sequential
from tarflow_runtimes.decode.tuned import TunedPlan, TunedPlans
from tarflow_runtimes.errors import (
    BundleError,
    Cancelled,
    DecodeWarning,
    EngineError,
    InputError,
    TarFlowError,
    VerificationError,
)
from tarflow_runtimes.measure.tune import tune
from tarflow_runtimes.model.flow import Flow, load
from tarflow_runtimes.model.guidance import Guidance
from tarflow_runtimes.model.progress import Step
from tarflow_runtimes.model.sample import Sample

__all__ = [
    "BlockReport",
    "BundleError",
    "Cancelled",
    "DecodeReport",
    "DecodeWarning",
    "EngineError",
    "Flow",
    "Guidance",
    "InputError",
    "ModelConfig",
    "Parallel",
    "Plan",
    "Sample",
    "Sequential",
    "Step",
    "TarFlowError",
    "TunedPlan",
    "TunedPlans",
    "VerificationError",
    "load",
    "tune",
]
