"""libtarflow: built in build/cpp, its quick tests in `make test`, and everything (`-m cpp`) in `make test-cpp`."""

import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

import tarflow_runtimes as tfr
from tarflow_export import convert_bundle, export_bundle
from tarflow_sdk import FlowConfig
from tarflow_sdk.testing import random_model, tiny_config

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "runtimes" / "cpp"
BUNDLE = ROOT / "runtimes" / "tarflow_runtimes" / "models" / "mnist.tarflow"
SHIPPED = ROOT / "tests" / "goldens" / "shipped.safetensors"

MATRIX: dict[str, FlowConfig] = {
    "class": tiny_config(labels=("cat", "dog", "wild")),
    "unconditional": tiny_config(classes=0, patch_size=2),
    "many_patches": tiny_config(patch_size=1),
    "no_nvp": tiny_config(nvp=False, image_channels=2),
    "no_nvp_unconditional": tiny_config(nvp=False, classes=0, noise="uniform", noise_std=None),
    "tokens": FlowConfig(
        tokens=9, token_values=3, width=64, blocks=3, layers=1, head_dim=32, classes=2, noise_std=0.05
    ),
}
"""Models with random weights."""

ENGINES: dict[str, tuple[str, ...]] = {
    "native": ("float32", "bfloat16", "int8"),
    "ort-cpu": ("float32", "float16", "int8"),
}
"""The precisions that each engine computes in."""

pytestmark = pytest.mark.slow


def _module(path: Path) -> ModuleType:
    """A module by its path: scripts are in no package."""
    spec = importlib.util.spec_from_file_location(f"_{path.stem}_for_cpp", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


golden = _module(SOURCE / "tests" / "golden.py")


def _load(bundle: Path, engine: str) -> tfr.Flow:
    try:
        return tfr.load(bundle, engine)
    except tfr.EngineError as error:
        if "which was not built" not in str(error):
            raise
        pytest.skip(f"Python's native kernel was not built: {error.hint}")


def _done(*command: str | Path, **environment: str | Path) -> tuple[int, str]:
    """The exit status and the output of a command."""
    variables = os.environ | {name: str(value) for name, value in environment.items()}
    done = subprocess.run(
        command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return done.returncode, done.stdout


def _run(*command: str | Path, **environment: str | Path) -> str:
    """The output of a command that must succeed."""
    code, printed = _done(*command, **environment)
    assert code == 0, printed[-20000:]
    return printed


@pytest.fixture(scope="session")
def build(cpp_headers: Path, cpp_library: Path) -> Callable[..., Path]:
    """`build(name, *settings)`: the folder of that name under build/, configured and up to date. Once per session."""

    @functools.cache
    def make(name: str, *settings: str) -> Path:
        folder = ROOT / "build" / name
        found = [f"-DONNXRUNTIME_INCLUDE_DIR={cpp_headers}", f"-DONNXRUNTIME_LIBRARY={cpp_library}"]
        _run("cmake", "-S", SOURCE, "-B", folder, *found, *settings)
        _run("cmake", "--build", folder, "--parallel", "2")
        return folder

    return make


def _ctest(folder: Path, label: str) -> str:
    return _run("ctest", "--test-dir", folder, "-L", label, "--output-on-failure", "--no-tests=error")


@pytest.mark.parametrize("engine", ENGINES)
def test_python_computes_the_committed_golden_file(engine: str) -> None:
    cases, arrays = golden.read(SHIPPED)
    with _load(BUNDLE, engine) as flow:
        assert cases == [
            {**case, "arrays": accepted["arrays"]}
            for case, accepted in zip(golden.cases(flow.config, small=True), cases, strict=True)
        ]
        for case in cases:
            images = arrays.get(case["arguments"].get("images", ""))
            for name, array in golden.compute(flow, case, images).items():
                limit = case["arrays"][name]["limit"]
                assert golden.difference(name, array, arrays[name]) <= limit, name
                if case["call"] == "noise":
                    np.testing.assert_array_equal(array, arrays[name])


@pytest.mark.timeout(600)
def test_quick(build: Callable[..., Path]) -> None:
    listed = _ctest(build("cpp"), "quick")
    for name in ("unit_native", "unit_sampling_native", "parity_shipped_ort-cpu", "consumer_installed", "symbols"):
        assert name in listed


@pytest.mark.timeout(600)
def test_the_first_program_of_the_docs(build: Callable[..., Path], tmp_path: Path) -> None:
    """It is compiled and run as it stands, without ONNX Runtime."""
    code = re.search(r"^```cpp\n(.*?)^```", (ROOT / "docs" / "CPP.md").read_text(), re.MULTILINE | re.DOTALL)
    assert code is not None
    (tmp_path / "app.cpp").write_text(code.group(1))
    (tmp_path / "mnist.tarflow").symlink_to(BUNDLE)
    program, folder = tmp_path / "app", build("cpp")
    compiled = "c++", "-std=c++17", "-Wall", "-Werror", f"-I{SOURCE / 'include'}", tmp_path / "app.cpp"
    _run(*compiled, folder / "libtarflow.so", f"-Wl,-rpath,{folder}", "-o", program)
    assert "drawn by native on " in _run("env", "-C", tmp_path, program, TARFLOW_ORT_LIBRARY="/nowhere")


@pytest.mark.cpp
@pytest.mark.timeout(900)
def test_full(build: Callable[..., Path]) -> None:
    """The rest of ctest."""
    assert "consumer_subproject" in _ctest(build("cpp"), "full")


@pytest.fixture(scope="session")
def random_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`random_bundle(name, precision)`: the bundle of a model of the matrix."""

    @functools.cache
    def make(name: str, precision: Any = "float32") -> Path:
        bundle = tmp_path_factory.mktemp("bundles") / f"{name}.tarflow"
        if precision == "float32":
            export_bundle(random_model(MATRIX[name], seed=1), bundle, verify=False)
        else:
            convert_bundle(make(name), bundle, precision=precision, verify=False)
        return bundle

    return make


@pytest.fixture(scope="session")
def goldens(random_bundle: Callable[..., Path]) -> Callable[..., tuple[Path, Path]]:
    """`goldens(name, engine, precision)`: a random bundle, and its golden file of an engine on this machine."""

    @functools.cache
    def make(name: str, engine: str, precision: str = "float32") -> tuple[Path, Path]:
        bundle = random_bundle(name, precision)
        expected = bundle.parent / f"{engine}.safetensors"
        with _load(bundle, engine) as flow:
            golden.write(flow, expected, small=False)
        return bundle, expected

    return make


def _check(folder: Path, model: tuple[Path, Path], engine: str, library: Path, samples: int) -> None:
    """Memory and every number of a random model, in one build."""
    bundle, expected = model
    heap = _run(folder / "tests" / "tarflow_memory", bundle, engine, str(samples), TARFLOW_ORT_LIBRARY=library)
    assert "0 from step to step" in heap
    equal = _run(folder / "tests" / "tarflow_parity", bundle, expected, engine, "--exact", TARFLOW_ORT_LIBRARY=library)
    assert "bit-identical" in equal


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("name", "engine"), [("many_patches", "native"), ("class", "ort-cpu")])
def test_quick_random(
    name: str, engine: str, build: Callable[..., Path], goldens: Callable[..., tuple[Path, Path]], cpp_library: Path
) -> None:
    _check(build("cpp"), goldens(name, engine), engine, cpp_library, 1000)


@pytest.mark.cpp
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("engine", "precision"), [(name, dtype) for name, dtypes in ENGINES.items() for dtype in dtypes]
)
@pytest.mark.parametrize("name", MATRIX)
def test_matrix(  # noqa: PLR0917 - cases and fixtures
    name: str,
    engine: str,
    precision: str,
    build: Callable[..., Path],
    goldens: Callable[..., tuple[Path, Path]],
    cpp_library: Path,
) -> None:
    """Random models: every guidance, batches of 1, 3 and 17, bit for bit what Python's engine computes here."""
    command = build("cpp") / "tests" / "tarflow_parity", *goldens(name, engine, precision), engine, "--exact"
    assert f"{engine}, ONNX Runtime" in _run(*command, TARFLOW_ORT_LIBRARY=cpp_library)


@pytest.mark.cpp
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("engine", "precision", "said"),
    [
        ("native", "float16", "engine native reads float32, bfloat16, int8, bundle class.tarflow is of float16"),
        ("ort-cpu", "bfloat16", "bundle class.tarflow is of bfloat16 and has no graphs for ort-cpu"),
        ("auto", "bfloat16", "bundle class.tarflow is of bfloat16 and has no graphs for ort-cpu"),
    ],
)
def test_an_engine_and_a_precision_that_do_not_fit(  # noqa: PLR0917 - cases and fixtures
    engine: str,
    precision: str,
    said: str,
    build: Callable[..., Path],
    random_bundle: Callable[..., Path],
    cpp_library: Path,
    tmp_path: Path,
) -> None:
    """Neither here nor for the denoiser does another engine take its place; without it, native draws in bfloat16."""
    command = build("cpp") / "tarflow-sample", random_bundle("class", precision), "--engine", engine, "-o"
    code, printed = _done(*command, tmp_path / "x.png", TARFLOW_ORT_LIBRARY=cpp_library)
    assert (code, said in printed, "hint: " in printed) == (2, True, True), printed
    code, printed = _done(*command, tmp_path / "x.png", "--no-denoise", TARFLOW_ORT_LIBRARY=cpp_library)
    assert (code, ", native," in printed) == ((0, True) if engine == "auto" else (2, False)), printed


@pytest.mark.cpp
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_sanitizers(
    sanitizers: str,
    build: Callable[..., Path],
    goldens: Callable[..., tuple[Path, Path]],
    cpp_library: Path,
) -> None:
    """Unit tests, parity and memory; reports end a test. Little optimised, which halves the time to compile."""
    name = f"cpp-{sanitizers.partition(',')[0]}"
    settings = ("-DCMAKE_BUILD_TYPE=None", "-DCMAKE_CXX_FLAGS=-O1", "-DTARFLOW_BUILD_TOOL=OFF")
    folder = build(name, f"-DTARFLOW_SANITIZE={sanitizers}", *settings)
    assert "parity_shipped" in _ctest(folder, "quick")
    options = f"suppressions={SOURCE / 'tests' / 'tsan.supp'}:halt_on_error=1"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TSAN_OPTIONS", options)
        for name, engine in (("many_patches", "native"), ("class", "ort-cpu")):
            _check(folder, goldens(name, engine), engine, cpp_library, 100)


WHEELS = ("1.28.0", "1.29.0", "1.30.0", "1.31.1", "1.32.0")
"""The oldest ONNX Runtime that bundles run on, to the newest."""


@pytest.mark.cpp
@pytest.mark.timeout(600)
@pytest.mark.parametrize("version", WHEELS)
def test_one_program_runs_on_every_onnx_runtime(version: str, build: Callable[..., Path], tmp_path: Path) -> None:
    """The accepted golden file, computed by the library of another wheel than the one at hand."""
    program = build("cpp") / "tests" / "tarflow_parity"
    wheel = f"onnxruntime=={version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run([*command, "--dest", tmp_path, wheel], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{wheel} cannot be downloaded: {done.stderr[-500:]}")
    (archive,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(archive) as files:
        (member,) = [name for name in files.namelist() if "/libonnxruntime.so" in name]
        library = files.extract(member, tmp_path)
    assert f"ONNX Runtime {version}" in _run(program, BUNDLE, SHIPPED, "ort-cpu", TARFLOW_ORT_LIBRARY=library)


@pytest.mark.cpp
@pytest.mark.parametrize("guidance", [tfr.Guidance(), tfr.Guidance(weight=1.3, attention_temperature=0.7)])
@pytest.mark.parametrize(
    ("name", "precision", "engine"),
    [("class", "float16", "ort-cpu"), ("no_nvp", "float32", "native"), ("tokens", "int8", "native")],
)
@pytest.mark.timeout(600)
def test_tool(  # noqa: PLR0917 - cases and fixtures
    name: str,
    precision: str,
    engine: str,
    guidance: tfr.Guidance,
    build: Callable[..., Path],
    random_bundle: Callable[..., Path],
    cpp_library: Path,
    tmp_path: Path,
) -> None:
    """`tarflow-sample` draws, bit for bit, what the Python runtime does, and says on which engine it chose to."""
    bundle, output = random_bundle(name, precision), tmp_path / "images.npy"
    flags = ["--labels", "0,1,null", "--seed", "3", "-n", "5", "--batch-size", "2", "--json", "-o", str(output)]
    if guidance.weight:
        flags += ["--guidance", "1.3", "--attention-temperature", "0.7"]
    said = _run(build("cpp") / "tarflow-sample", bundle, *flags, TARFLOW_ORT_LIBRARY=cpp_library)
    report = json.loads(said[said.index("{") : said.rindex("}") + 1])  # what it says to people goes to stderr
    with _load(bundle, engine) as flow:
        sample = flow.sample(5, labels=[0, 1, -1, 0, 1], seed=3, batch_size=2, guidance=guidance)
        assert report["digest"] == flow.bundle.digest
    np.testing.assert_array_equal(np.load(output), sample.images)
    assert (report["engine"], report["precision"], report["non_finite"]) == (engine, precision, [])


@pytest.mark.cpp
@pytest.mark.timeout(600)
def test_tool_writes_no_pictures_of_tokens(
    build: Callable[..., Path], random_bundle: Callable[..., Path], cpp_library: Path, tmp_path: Path
) -> None:
    command = build("cpp") / "tarflow-sample", random_bundle("tokens"), "-o", tmp_path / "x.png"
    code, printed = _done(*command, TARFLOW_ORT_LIBRARY=cpp_library)
    assert code == 2
    assert "the model draws tokens, which are no pictures" in printed
    assert "hint: write them as an array: -o tokens.npy" in printed


@pytest.mark.cpp
@pytest.mark.timeout(600)
@pytest.mark.parametrize("engine", ENGINES)
def test_pictures_of_the_tool(engine: str, build: Callable[..., Path], cpp_library: Path, tmp_path: Path) -> None:
    """A grid of `tarflow-sample` holds the pixels and the text of one of `tarflow-infer`."""
    _load(BUNDLE, engine).close()
    flags = ["-n", "7", "--labels", "4,2", "--seed", "5", "--guidance", "1.5", "--guide", "a", "--anneal-guidance"]
    flags += ["--engine", engine]
    ours, theirs = tmp_path / "ours.png", tmp_path / "theirs.png"
    _run(build("cpp") / "tarflow-sample", BUNDLE, *flags, "-o", ours, TARFLOW_ORT_LIBRARY=cpp_library)
    _run(Path(sys.executable).with_name("tarflow-infer"), BUNDLE, *flags, "-o", theirs)
    with Image.open(ours) as one, Image.open(theirs) as other:
        assert one.text == other.text  # type: ignore[attr-defined]
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def _output_of(model: onnx.ModelProto, name: str, op: str, inputs: int, **attributes: Any) -> onnx.TypeProto.Tensor:
    """Make the output `name` what `op` makes of it; returns its declared type."""
    for node in model.graph.node:
        for values in (node.input, node.output):
            values[:] = [f"{name}/before" if value == name else value for value in values]
    model.graph.node.append(onnx.helper.make_node(op, [f"{name}/before"] * inputs, [name], **attributes))
    tensor: onnx.TypeProto.Tensor = next(v for v in model.graph.output if v.name == name).type.tensor_type
    return tensor


def _twice(model: onnx.ModelProto, name: str) -> None:
    """The output is there twice along its first axis."""
    _output_of(model, name, "Concat", 2, axis=0).shape.dim[0].dim_param = "twice"


def _half(model: onnx.ModelProto, name: str) -> None:
    """The output is float16."""
    _output_of(model, name, "Cast", 1, to=onnx.TensorProto.FLOAT16).elem_type = onnx.TensorProto.FLOAT16


def _renamed(model: onnx.ModelProto, name: str) -> None:
    """The input has a name that the manifest does not list."""
    for node in model.graph.node:
        node.input[:] = ["other" if value == name else value for value in node.input]
    next(value for value in model.graph.input if value.name == name).name = "other"


def _elsewhere(model: onnx.ModelProto, name: str) -> None:
    """The weight lies in the folder of another block."""
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    next(entry for entry in tensor.external_data if entry.key == "location").value = "../block_01/weights.bin"


@pytest.mark.cpp
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("graph", "edit", "name", "said"),
    [
        ("portable/forward", _twice, "z", "output z: expected float32 [B, 4, 16], got float32 ["),
        ("portable/forward", _twice, "log_det", "output log_det: expected float32 [B], got float32 ["),
        ("ort-cpu/vjp_forward", _twice, "z", "output z: expected float32 [B, 4, 16], got float32 ["),
        ("ort-cpu/vjp_backward", _twice, "gradient", "output gradient: expected float32 [B, 4, 16], got float32 ["),
        ("ort-cpu/step", _twice, "next", "ONNX Runtime failed in a step: "),
        ("ort-cpu/step", _half, "next", "output next: expected float32 [B, 16], got float16 ["),
        ("ort-cpu/step_guided", _renamed, "g", "10 inputs, among them other, and the manifest lists others"),
        ("ort-cpu/step", _elsewhere, "proj_in.weight", "ONNX Runtime cannot open it: "),
    ],
)
def test_a_graph_that_is_not_what_its_manifest_says(  # noqa: PLR0917 - cases and fixtures
    graph: str,
    edit: Callable[[onnx.ModelProto, str], None],
    name: str,
    said: str,
    build: Callable[..., Path],
    goldens: Callable[..., tuple[Path, Path]],
    cpp_library: Path,
    tmp_path: Path,
) -> None:
    """Its digest is right, and it is refused before anything of it is read: when it is opened, else when it has run."""
    bundle, expected = goldens("class", "ort-cpu")
    copy = Path(shutil.copytree(bundle, tmp_path / "odd.tarflow"))
    manifest = json.loads((copy / "manifest.json").read_text())
    for path in copy.glob(f"graphs/{graph}.onnx".replace("graphs/portable", "block_*")):
        model = onnx.load(path, load_external_data=False)
        edit(model, name)
        data = model.SerializeToString()
        path.write_bytes(data)
        entry = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        manifest["files"][path.relative_to(copy).as_posix()] = entry
    (copy / "manifest.json").write_text(json.dumps(manifest))
    command = build("cpp") / "tests" / "tarflow_parity", copy, expected, "ort-cpu"
    code, printed = _done(*command, TARFLOW_ORT_LIBRARY=cpp_library)
    assert code == 1
    assert f"graph {graph}" in printed
    assert said in printed
