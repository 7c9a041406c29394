"""libtarflow: built in build/cpp, its quick tests in `make test`, and everything (`-m cpp`) in `make test-cpp`."""

import functools
import hashlib
import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
from PIL import Image

import tarflow_runtimes as tfr
from tarflow_export import export_bundle
from tarflow_runtimes import _onnx_proto as proto
from tarflow_runtimes._rewrites import sequential_graph
from tarflow_runtimes._rewrites.split_gradient import split_gradient
from tarflow_runtimes._tuned import TunedPlan, write_plans
from tarflow_sdk.testing import random_model

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "runtimes" / "cpp"
BUNDLE = ROOT / "runtimes" / "tarflow_runtimes" / "models" / "mnist.tarflow"
SHIPPED = ROOT / "tests" / "goldens" / "shipped.safetensors"

pytestmark = pytest.mark.slow


def _module(path: Path) -> ModuleType:
    """A module by its path: scripts and the tests' own matrix of models are in no package."""
    spec = importlib.util.spec_from_file_location(f"_{path.stem}_for_cpp", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


golden = _module(SOURCE / "tests" / "golden.py")


def _run(*command: str | Path, **environment: str | Path) -> str:
    """The output of a command that must succeed."""
    variables = os.environ | {name: str(value) for name, value in environment.items()}
    done = subprocess.run(
        command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-20000:]
    return done.stdout


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


def test_python_computes_the_committed_golden_file() -> None:
    cases, arrays = golden.read(SHIPPED)
    with tfr.load(BUNDLE) as flow:
        assert cases == [
            {**case, "arrays": committed["arrays"]}
            for case, committed in zip(golden.cases(flow.config, small=True), cases, strict=True)
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
    for name in ("unit_sampling", "parity_shipped", "consumer_installed", "symbols"):
        assert name in listed


@pytest.mark.cpp
@pytest.mark.timeout(900)
def test_full(build: Callable[..., Path]) -> None:
    """The rest of ctest."""
    assert "consumer_subproject" in _ctest(build("cpp"), "full")


MATRIX = _module(ROOT / "tests" / "runtimes" / "conftest.py").CONFIGS


@pytest.fixture(scope="session")
def random_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """`random_bundle(name, dtype)`: the bundle of a model of the matrix, and its golden file from this machine."""
    made: dict[tuple[str, str], tuple[Path, Path]] = {}

    def make(name: str, dtype: str) -> tuple[Path, Path]:
        if (name, dtype) not in made:
            folder = tmp_path_factory.mktemp("bundles")
            bundle, expected = folder / f"{name}.tarflow", folder / "golden.safetensors"
            export_bundle(random_model(MATRIX[name], seed=1), bundle, dtype=dtype, verify=False)
            golden.write(bundle, expected, small=False)
            made[name, dtype] = bundle, expected
        return made[name, dtype]

    return make


def _check(folder: Path, bundle: Path, expected: Path, library: Path) -> None:
    """Memory and every number of a random model, in one build."""
    heap = _run(folder / "tests" / "tarflow_memory", bundle, "1000", TARFLOW_ORT_LIBRARY=library)
    assert "0 from step to step" in heap
    equal = _run(folder / "tests" / "tarflow_parity", bundle, expected, "--exact", TARFLOW_ORT_LIBRARY=library)
    assert "bit-identical" in equal


@pytest.mark.timeout(600)
def test_quick_random(
    build: Callable[..., Path], random_bundle: Callable[..., tuple[Path, Path]], cpp_library: Path
) -> None:
    _check(build("cpp"), *random_bundle("class", "float32"), cpp_library)


@pytest.mark.cpp
@pytest.mark.timeout(600)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", MATRIX)
def test_matrix(
    name: str,
    dtype: str,
    build: Callable[..., Path],
    random_bundle: Callable[..., tuple[Path, Path]],
    cpp_library: Path,
) -> None:
    """Random models: every guidance, batches of 1, 3 and 17, bit for bit what Python computes here."""
    bundle, expected = random_bundle(name, dtype)
    program = build("cpp") / "tests" / "tarflow_parity"
    assert "bit-identical" in _run(program, bundle, expected, "--exact", TARFLOW_ORT_LIBRARY=cpp_library)


@pytest.mark.cpp
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_sanitizers(
    sanitizers: str,
    build: Callable[..., Path],
    random_bundle: Callable[..., tuple[Path, Path]],
    cpp_library: Path,
) -> None:
    """Unit tests, parity and memory; reports end a test. Little optimised, which halves the time to compile."""
    name = f"cpp-{sanitizers.partition(',')[0]}"
    folder = build(name, f"-DTARFLOW_SANITIZE={sanitizers}", "-DCMAKE_BUILD_TYPE=None", "-DCMAKE_CXX_FLAGS=-O1")
    assert "parity_shipped" in _ctest(folder, "quick")
    options = f"suppressions={SOURCE / 'tests' / 'tsan.supp'}:halt_on_error=1"
    bundle, expected = random_bundle("class", "float32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TSAN_OPTIONS", options)
        _check(folder, bundle, expected, cpp_library)


WHEELS = ("1.28.0", "1.29.0", "1.30.0", "1.31.1", "1.32.0")
"""The oldest ONNX Runtime that bundles run on, to the newest."""


@pytest.mark.cpp
@pytest.mark.timeout(600)
@pytest.mark.parametrize("version", WHEELS)
def test_one_program_runs_on_every_onnx_runtime(version: str, build: Callable[..., Path], tmp_path: Path) -> None:
    """The committed golden file, computed by the library of another wheel than the one at hand."""
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
    assert f"ONNX Runtime {version}" in _run(program, BUNDLE, SHIPPED, TARFLOW_ORT_LIBRARY=library)


@pytest.mark.cpp
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", ["class", "unconditional", "no_nvp"])
@pytest.mark.timeout(600)
def test_rewrites(name: str, dtype: str, build: Callable[..., Path], tmp_path: Path) -> None:
    """The load-time rewrites make, node for node, the graphs that Python's make."""
    path, graphs = tmp_path / f"{name}.tarflow", tmp_path / "graphs"
    graphs.mkdir()
    export_bundle(random_model(MATRIX[name], seed=1), path, dtype=dtype, verify=False)
    _run(build("cpp") / "tests" / "tarflow_unit_rewrites", path, graphs)
    with tfr.load(path) as flow:
        bundle = flow.bundle
    expected = {}
    for branches, temperature, windows in itertools.product((1, 2), (False, True), (False, True)):
        model = proto.parse_model(bundle.blocks[1].step.read_bytes(), where="step")
        kind = {"branches": branches, "temperature": temperature, "windows": windows}
        graph = sequential_graph(model, bundle.config, **kind)
        expected[f"step_{branches}{'t' * temperature}{'w' * windows}"] = graph.model
    if bundle.config.nvp and dtype == "float32":
        halves = split_gradient(proto.parse_model(bundle.blocks[1].gradient.read_bytes(), where="gradient"))
        expected |= {"gradient_forward": halves.forward, "gradient_backward": halves.backward}
    assert sorted(expected) == sorted(file.stem for file in graphs.iterdir())
    for graph_name, theirs in expected.items():
        assert _plain((graphs / f"{graph_name}.onnx").read_bytes()) == _plain(theirs), graph_name


@pytest.mark.cpp
@pytest.mark.parametrize("decode", ["sequential", "parallel"])
@pytest.mark.parametrize("guidance", [{}, {"guidance": 1.3, "attention_temperature": 0.7}])
@pytest.mark.parametrize(("name", "dtype"), [("class", "float32"), ("class", "float16"), ("no_nvp", "float32")])
@pytest.mark.timeout(600)
def test_tool(  # noqa: PLR0917 - cases and fixtures
    name: str,
    dtype: str,
    guidance: dict[str, float],
    decode: str,
    build: Callable[..., Path],
    cpp_library: Path,
    tmp_path: Path,
) -> None:
    """`tarflow-sample` draws, bit for bit, and reports what the Python runtime does."""
    bundle, output = tmp_path / f"{name}.tarflow", tmp_path / "images.npy"
    export_bundle(random_model(MATRIX[name], seed=2), bundle, dtype=dtype, verify=False)
    flags = ["--labels", "0,1,null", "--seed", "3", "-n", "5", "--batch-size", "2", "--json", "-o", output]
    flags += [word for key, value in guidance.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    plan = None
    if decode == "parallel":
        flags += ["--decode", "parallel", "--window", "5", "--tolerance", "0.001"]
        plan = tfr.Parallel(window=5, tolerance=0.001)
    said = _run(build("cpp") / "tarflow-sample", bundle, *flags, TARFLOW_ORT_LIBRARY=cpp_library)
    report = json.loads(said[said.index("{") : said.rindex("}") + 1])  # what it says to people goes to stderr
    with tfr.load(bundle) as flow:
        labels = [0, 1, -1, 0, 1]
        sample = flow.sample(5, labels=labels, seed=3, batch_size=2, plan=plan, **guidance)
        assert report["digest"] == flow.bundle.digest
    np.testing.assert_array_equal(np.load(output), sample.images)
    assert report["decode"] == {"asked": decode} | json.loads(json.dumps(sample.report.to_json()))


@pytest.mark.cpp
@pytest.mark.timeout(600)
def test_tuned_plans_of_python_are_taken(build: Callable[..., Path], cpp_library: Path, tmp_path: Path) -> None:
    """A plan for this bundle, engine, machine and versions means the same to both, one for another machine nothing."""
    bundle, output = tmp_path / "x.tarflow", tmp_path / "images.npy"
    export_bundle(random_model(MATRIX["class_n16"], seed=2), bundle, verify=False)
    plan = tfr.Plan(blocks=(tfr.Parallel(window=3, tolerance=1e-3, init="zeros"), tfr.Sequential()))
    with tfr.load(bundle) as flow:
        for changed in ({}, {"device": "another"}):
            entry = TunedPlan(
                identity=dict(flow.identity()) | changed,
                batch=4,
                branches=1,
                plan=plan,
                seconds=1.0,
                sequential_seconds=2.0,
            )
            tmp_path.joinpath("x.plans.json").unlink(missing_ok=True)
            write_plans(tmp_path / "x.plans.json", (entry,))
            sample = flow.sample(3, seed=1, plan="auto")
            flags = ["-n", "3", "--seed", "1", "--decode", "auto", "--json", "--overwrite", "-o", output]
            said = _run(build("cpp") / "tarflow-sample", bundle, *flags, TARFLOW_ORT_LIBRARY=cpp_library)
            report = json.loads(said[said.index("{") : said.rindex("}") + 1])
            assert report["decode"] == {"asked": "auto"} | json.loads(json.dumps(sample.report.to_json()))
            assert (report["decode"]["blocks"][1]["strategy"]["decode"] == "parallel") == (not changed)
            assert ("tuned for another device" in said) == bool(changed)
            np.testing.assert_array_equal(np.load(output), sample.images)


@pytest.mark.cpp
@pytest.mark.timeout(600)
def test_pictures_of_the_tool(build: Callable[..., Path], cpp_library: Path, tmp_path: Path) -> None:
    """A grid of `tarflow-sample` holds the pixels and the text of one of `tarflow-infer`."""
    flags = ["-n", "7", "--labels", "4,2", "--seed", "5", "--guidance", "1.5", "--guide", "a", "--anneal-guidance"]
    ours, theirs = tmp_path / "ours.png", tmp_path / "theirs.png"
    _run(build("cpp") / "tarflow-sample", BUNDLE, *flags, "-o", ours, TARFLOW_ORT_LIBRARY=cpp_library)
    _run(sys.executable, "-c", "from tarflow_runtimes._cli.infer import main; main()", BUNDLE, *flags, "-o", theirs)
    with Image.open(ours) as one, Image.open(theirs) as other:
        assert one.text == other.text  # type: ignore[attr-defined]
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.cpp
def test_a_gradient_graph_that_cannot_be_cut_runs_whole(
    build: Callable[..., Path], cpp_library: Path, tmp_path: Path
) -> None:
    """x - b written as x + (-b): both runtimes compute the forward pass twice, and the same pictures."""
    bundle = Path(shutil.copytree(BUNDLE, tmp_path / "odd.tarflow"))
    manifest = json.loads((bundle / "manifest.json").read_text())
    for path in bundle.glob("block_*/gradient.onnx"):
        model = onnx.load(path, load_external_data=False)
        nodes = list(model.graph.node)
        for node in [node for node in nodes if node.op_type == "Sub"]:
            negative = onnx.helper.make_node("Neg", [node.input[1]], [f"{node.output[0]}/negative"])
            node.op_type, node.input[1] = "Add", negative.output[0]
            model.graph.node.insert(list(model.graph.node).index(node), negative)
        data = model.SerializeToString()
        path.write_bytes(data)
        entry = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        manifest["files"][path.relative_to(bundle).as_posix()] = entry
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    flags = ["-n", "3", "--labels", "4,2,7", "--seed", "5", "-o"]
    output = _run(
        build("cpp") / "tarflow-sample", bundle, *flags, tmp_path / "cpp.npy", TARFLOW_ORT_LIBRARY=cpp_library
    )
    assert "warning: block 0 runs its portable gradient graph: found 0 differences" in output
    with tfr.load(bundle) as flow:
        images = flow.sample(3, labels=[4, 2, 7], seed=5).images
        assert "block 0: found 0 differences and 1 scales, expected one of each" in flow.engine_report["declined"]
    np.testing.assert_array_equal(np.load(tmp_path / "cpp.npy"), images)
    with tfr.load(BUNDLE) as flow:
        np.testing.assert_allclose(images, flow.sample(3, labels=[4, 2, 7], seed=5).images, atol=1e-5)


def _plain(data: bytes) -> onnx.ModelProto:
    """A model whose standard domain is written in one way, as nothing."""
    model = onnx.load_from_string(data)
    for node in model.graph.node:
        if not node.domain:
            node.ClearField("domain")
    return model
