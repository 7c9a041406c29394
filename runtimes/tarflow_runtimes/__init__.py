"""TarFlow runtime: sample, denoise, encode, score and classify with a bundle, without PyTorch."""

from tarflow_runtimes._bundle import ModelConfig
from tarflow_runtimes._errors import (
    BundleError,
    Cancelled,
    DecodeWarning,
    EngineError,
    InputError,
    TarFlowError,
    VerificationError,
)
from tarflow_runtimes._flow import Flow, load
from tarflow_runtimes._guidance import Guidance
from tarflow_runtimes._plan import BlockReport, DecodeReport, Parallel, Plan, Sequential
from tarflow_runtimes._sample import Sample
from tarflow_runtimes._sampler import Step
from tarflow_runtimes._tune import tune
from tarflow_runtimes._tuned import TunedPlan, TunedPlans

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
