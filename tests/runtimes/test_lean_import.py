"""The runtime needs neither PyTorch nor ONNX nor the training code, and starts quickly."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import tarflow_runtimes as tfr

ROOT = Path(tfr.__file__).parent
MODULES = sorted(
    ".".join(("tarflow_runtimes", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
    for path in ROOT.rglob("*.py")
)

BLOCKED = [
    *("torch", "google", "onnx", "onnx_ir", "onnxscript", "ml_dtypes"),
    *("tarflow_sdk", "tarflow_export", "safetensors", "scipy"),
]


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_module_imports_without_the_training_stack():
    assert len(MODULES) > 80
    run(f"""
import importlib, sys
for name in {BLOCKED!r}:
    sys.modules[name] = None
for name in {MODULES!r}:
    importlib.import_module(name)
""")


@pytest.mark.parametrize("denoise", [False, True])
def test_samples_without_the_training_stack(exported, denoise):
    out = run(f"""
import sys
for name in {BLOCKED!r}:
    sys.modules[name] = None
import tarflow_runtimes as tfr
with tfr.load({str(exported("class").path)!r}) as flow:
    print(flow.sample(2, labels=["cat", None], seed=0, guidance=1.0, denoise={denoise}).images.shape)
""")
    assert out == "(2, 1, 8, 8)\n"


def test_import_is_quick_and_loads_no_engine():
    out = run("""
import numpy, sys, time
before = time.process_time()
import tarflow_runtimes
print(time.process_time() - before)
loaded = {"onnxruntime", "PIL", "importlib.metadata", "typer", "rich"} & set(sys.modules)
print(sorted(loaded))
""")
    seconds, loaded = out.splitlines()
    assert float(seconds) < 0.2
    assert loaded == "[]"


def test_public_names():
    assert tfr.__all__ == sorted(tfr.__all__)
    for name in tfr.__all__:
        value = getattr(tfr, name)
        assert value.__doc__
        assert value.__module__.startswith("tarflow_runtimes.")
    rooms = {name.split(".")[1] for name in MODULES if "." in name}
    public = {name for name in vars(tfr) if not name.startswith("_")}
    assert public - rooms == set(tfr.__all__)


def test_errors_share_a_base():
    for name in tfr.__all__:
        value = getattr(tfr, name)
        if isinstance(value, type) and issubclass(value, Exception) and not issubclass(value, Warning):
            assert issubclass(value, tfr.TarFlowError)
    assert tfr.InputError("what", hint="how").hint == "how"
