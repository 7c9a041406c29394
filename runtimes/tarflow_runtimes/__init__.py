"""TarFlow runtime: sample, denoise, encode, score and classify with a bundle, without PyTorch."""

from tarflow_runtimes._bundle import ModelConfig
from tarflow_runtimes._errors import BundleError, Cancelled, EngineError, InputError, TarFlowError, VerificationError
from tarflow_runtimes._flow import Flow, load
from tarflow_runtimes._sample import Sample
from tarflow_runtimes._sampler import Step

__all__ = [
    "BundleError",
    "Cancelled",
    "EngineError",
    "Flow",
    "InputError",
    "ModelConfig",
    "Sample",
    "Step",
    "TarFlowError",
    "VerificationError",
    "load",
]
