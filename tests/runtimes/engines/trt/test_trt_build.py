"""Engines built for real by TensorRT for RTX, which needs no GPU for that; what cannot be built is an error."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence

import onnx
import pytest

import tarflow_runtimes as tfr
from rooms import Bundle, open_bundle
from tarflow_export import convert_bundle, export_bundle
from tarflow_runtimes.engines.trt.build import build
from tarflow_runtimes.engines.trt.compile import Built, Job, compile_engine
from tarflow_runtimes.engines.trt.graphs import KINDS, LOOPS, open_graph
from tarflow_runtimes.engines.trt.network import Graph, parse
from tarflow_runtimes.engines.trt.package import PORTABLE_TARGETS, import_package
from tarflow_runtimes.engines.trt.profiles import Profile, profiles_for, shape_of, uncovered
from tarflow_runtimes.engines.trt.supply import wanted_engines
from tarflow_sdk.testing import random_model, tiny_config

PRECISIONS = ("float32", "float16", "bfloat16")
OTHER_MODELS = ["class", "unconditional", "three_blocks", "no_nvp", "no_nvp_unconditional", "one_head", "tokens"]


@pytest.fixture(scope="module")
def rtx():
    return import_package("trt-rtx")


@pytest.fixture
def built(rtx) -> Callable[..., Built]:
    """`built(bundle, block, kind, profiles=..., targets=...)`."""

    def run(
        bundle: Bundle,
        block: int,
        kind: str,
        *,
        profiles: Sequence[Profile],
        targets: Sequence[str] = PORTABLE_TARGETS,
    ) -> Built:
        graph = open_graph(bundle, block, kind, bundle.precision)
        return compile_engine(rtx, Job(graph=graph, profiles=tuple(profiles), targets=tuple(targets)))

    return run


def job_of(graph: Graph, *profiles: Profile, targets: Sequence[str] = ("sm_89",)) -> Job:
    return Job(graph=graph, profiles=profiles or profiles_for([2]), targets=tuple(targets))


@pytest.fixture
def graph(exported) -> Graph:
    """The forward graph of a tiny bundle, which builds in no time."""
    return open_graph(open_bundle(exported("class").path), 0, "forward", "float32")


def profiles_of(kind: str, images: int, window: int, *, branches: Sequence[int] = (1, 2)) -> tuple[Profile, ...]:
    """All shapes that a graph of this kind is built for."""
    if kind not in LOOPS:
        return profiles_for([images])
    return profiles_for([images], branches=branches, windows=[1 if kind == "step" else window])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("target", PORTABLE_TARGETS)
def test_the_decode_loop_of_a_guided_batch_builds_for_every_target(exported, built, precision, target):
    bundle = open_bundle(exported("class", precision).path)
    for kind in LOOPS:
        engine = built(bundle, 1, kind, profiles=profiles_of(kind, 3, 3, branches=[2]), targets=[target])
        assert len(engine.engine) > 10_000
        assert engine.layers > 100
        assert not [line for line in engine.warnings if "Unused" in line]
        assert engine.seconds.keys() == {"parse", "build"}


@pytest.mark.parametrize("name", ["class_n16", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHER_MODELS)])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_graph_of_every_kind_of_model_builds(exported, built, name, precision):
    bundle = open_bundle(exported(name, precision).path)
    for kind in KINDS:
        profiles = profiles_of(kind, 3, bundle.config.patches - 1)
        made = built(bundle, len(bundle.blocks) - 1, kind, profiles=profiles)
        weights = 12 * bundle.config.layers * bundle.config.width**2
        assert len(made.engine) > weights * (4 if precision == "float32" else 2)


@pytest.mark.slow
def test_every_graph_of_the_shipped_bundle_builds(built):
    bundle = tfr.load().bundle
    for kind in KINDS:
        for block in (0, 1):  # the others differ from these in their weights alone
            assert built(bundle, block, kind, profiles=profiles_of(kind, 8, 16)).engine


@pytest.fixture(scope="module")
def photo_bundles(tmp_path_factory) -> Callable[[str], Bundle]:
    """One block of the shape of the AFHQ model: 256x256x3 in patches of 8, 8 layers of width 768, 12 heads."""
    config = tiny_config(
        image_size=256, image_channels=3, patch_size=8, width=768, blocks=1, layers=8, head_dim=64, classes=3
    )
    folder = tmp_path_factory.mktemp("photo")

    @functools.cache
    def get(precision: str) -> Bundle:
        path = folder / f"{precision}.tarflow"
        if precision == "float32":
            export_bundle(random_model(config), path, verify=False)
        else:
            convert_bundle(get("float32").path, path, precision=precision, verify=False)
        return open_bundle(path, verify_digests=False)

    return get


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_one_block_of_a_photo_model_builds(built, photo_bundles, precision):
    bundle = photo_bundles(precision)
    weights = bundle.block_bytes
    for kind in KINDS:
        made = built(bundle, 0, kind, profiles=profiles_of(kind, 8, 16, branches=[1]))
        copies = 2 if kind == "gradient" else 1
        assert weights < len(made.engine) < 1.2 * copies * weights + 100e6


@pytest.mark.slow
def test_a_large_build_is_cancelled_within_two_seconds(rtx, photo_bundles):
    asked: list[float] = []

    def on_build(_: float) -> bool:
        now = time.monotonic()
        asked.extend([now] if asked or now > began + 1.0 else [])
        return not asked

    graph = open_graph(photo_bundles("float16"), 0, "gradient", "float16")
    began = time.monotonic()
    with pytest.raises(tfr.Cancelled):
        build(rtx, job_of(graph, *profiles_for([8]), targets=PORTABLE_TARGETS), on_build)
    assert time.monotonic() - asked[0] < 2.0


@pytest.mark.parametrize("kind", LOOPS)
def test_caches_are_updated_from_input_to_output(rtx, exported, kind):
    bundle = open_bundle(exported("class", "float16").path)
    graph = open_graph(bundle, 0, kind, "float16")
    assert graph.cache_updates == 2 * bundle.config.layers + 1
    parse(rtx, graph)
    with pytest.raises(tfr.EngineError, match=r"reads 5 updates in place .* 5 of them .* expected 6"):
        parse(rtx, dataclasses.replace(graph, cache_updates=6))


def test_a_manifest_that_does_not_describe_a_graph_is_an_error(copied, edit_manifest):
    edit_manifest(lambda manifest: manifest["graphs"]["trt"]["step"].pop("inputs"))
    with pytest.raises(tfr.BundleError, match="does not describe trt/step"):
        open_graph(open_bundle(copied), 0, "step", "float32")


def changed(graph: Graph, change: Callable[[onnx.ModelProto], object], inputs: Sequence[str] = ()) -> Graph:
    model = onnx.load_from_string(graph.model)
    change(model)
    return dataclasses.replace(
        graph, model=model.SerializeToString(), inputs={**graph.inputs, **{name: ["B"] for name in inputs}}
    )


def test_an_input_that_is_dropped_is_an_error(rtx, graph):
    planted = onnx.helper.make_tensor_value_info("planted", onnx.TensorProto.FLOAT, ["B"])
    with pytest.raises(tfr.EngineError, match=r"forward graph of block 0 in float32.* planted"):
        parse(rtx, changed(graph, lambda model: model.graph.input.append(planted), ["planted"]))


def test_an_operand_that_the_parser_leaves_out_is_an_error(rtx, graph):
    """TensorRT for RTX reads Attention without the lengths, and only warns."""
    shape, value = [4, 4, 8, 32], onnx.helper.make_tensor_value_info

    def attend(model: onnx.ModelProto) -> None:
        node = onnx.helper.make_node("Attention", ["q", "k", "v", "", "", "", "lengths"], ["y"])
        inputs = [value(name, onnx.TensorProto.FLOAT16, shape) for name in "qkv"]
        inputs.append(value("lengths", onnx.TensorProto.INT64, [4]))
        outputs = [value("y", onnx.TensorProto.FLOAT16, shape)]
        model.graph.CopyFrom(onnx.helper.make_graph([node], "attention", inputs, outputs))

    known = dict.fromkeys("qkv", shape)
    with pytest.raises(tfr.EngineError, match="without lengths"):
        parse(rtx, dataclasses.replace(changed(graph, attend), inputs={**known, "lengths": [4]}))
    broken = dataclasses.replace(changed(graph, attend), inputs=known)
    with pytest.raises(tfr.EngineError, match="Unused Input: lengths"):
        compile_engine(rtx, Job(graph=broken, profiles=(), targets=("sm_89",)))


def test_an_input_that_the_host_must_know_is_an_error(rtx, graph):
    def slice_by_labels(model: onnx.ModelProto) -> None:
        model.graph.node.append(onnx.helper.make_node("Slice", ["patches", "one", "labels", "one"], ["sliced"]))
        model.graph.initializer.append(onnx.helper.make_tensor("one", onnx.TensorProto.INT64, [1], [1]))
        model.graph.output.append(onnx.helper.make_tensor_value_info("sliced", onnx.TensorProto.FLOAT, None))
        del model.graph.input[1].type.tensor_type.shape.dim[:]
        model.graph.input[1].type.tensor_type.shape.dim.add(dim_value=1)

    with pytest.raises(tfr.EngineError, match="labels"):
        parse(rtx, changed(graph, slice_by_labels))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda model: setattr(model.graph.node[3], "op_type", "NoSuch"), "NoSuch"),
        (lambda model: model.graph.ClearField("node"), "cannot take"),
    ],
)
def test_a_graph_that_does_not_parse_is_an_error_with_a_reason(rtx, graph, change, why):
    with pytest.raises(tfr.EngineError, match=why) as caught:
        parse(rtx, changed(graph, change))
    assert "\n" not in str(caught.value)
    assert "no reason given" not in str(caught.value)


def test_missing_weights_are_an_error_with_a_reason(rtx, graph, tmp_path):
    with pytest.raises(tfr.EngineError, match=r"weights\.bin"):
        parse(rtx, dataclasses.replace(graph, folder=tmp_path))


def test_a_profile_that_the_graph_cannot_have_is_an_error(rtx, graph):
    with pytest.raises(tfr.EngineError, match=r"refuses B 5 to 2, G 1, S 1 of the forward graph .* MIN<=OPT<=MAX"):
        compile_engine(rtx, job_of(graph, Profile(least=5, most=2)))


def test_progress_rises_and_is_heard_in_the_callers_thread(rtx, graph):
    import threading

    heard: list[tuple[float, int]] = []
    build(rtx, job_of(graph), lambda share: heard.append((share, threading.get_ident())))
    shares = [share for share, _ in heard]
    assert shares == sorted(shares)
    assert 0.0 < shares[-1] <= 1.0
    assert {thread for _, thread in heard} == {threading.get_ident()}


def test_a_callback_cancels(rtx, graph):
    began = time.monotonic()
    with pytest.raises(tfr.Cancelled, match="forward graph of block 0"):
        build(rtx, job_of(graph, targets=PORTABLE_TARGETS), lambda _: False)
    assert time.monotonic() - began < 2.0
    build(rtx, job_of(graph))


def test_an_interrupt_ends_the_build_and_is_raised(rtx, graph):
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(rtx, job_of(graph), interrupt)


def test_what_another_process_builds_is_what_this_one_would(rtx, exported):
    graph = open_graph(open_bundle(exported("class", "float16").path), 0, "step", "float16")
    job = dataclasses.replace(job_of(graph), workspace=1 << 28)
    there, here = (run(rtx, job) for run in (build, compile_engine))
    for run in (build, compile_engine):
        with pytest.raises(tfr.EngineError, match="refuses B 5 to 2, G 1, S 1 of the step graph"):
            run(rtx, job_of(graph, Profile(least=5, most=2)))
    assert len(there.engine) == len(here.engine)  # two builds of one graph differ in some bytes
    assert (there.layers, there.warnings) == (here.layers, here.warnings)
    assert there.seconds.keys() == here.seconds.keys()


ENDS = {
    "import os; os.abort()": "exit code -6",
    "pass": "exit code 0",
    "raise MemoryError": "MemoryError",
    "print('so long')": "so long",
    "import os, sys; os.write(int(sys.argv[1]), b'half')": "exit code 0",
}
"""What a process might do instead of answering, and how the error says so."""


@pytest.mark.parametrize("code", ENDS)
def test_a_process_that_ends_without_an_answer_is_an_error(rtx, graph, monkeypatch, tmp_path, code):
    (tmp_path / "worker_that_ends.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("tarflow_runtimes.engines.trt.build.WORKER", "worker_that_ends")
    with pytest.raises(tfr.EngineError, match=f"ended while it built the forward graph.*: {ENDS[code]}") as caught:
        build(rtx, job_of(graph))
    assert "memory" in caught.value.hint


def test_the_digest_is_that_of_the_graph_and_its_weights(copied, edit_manifest, exported):
    """As the manifest has them: nothing is hashed again."""

    def digest(kind: str = "step", block: int = 0) -> str:
        return open_graph(open_bundle(copied, verify_digests=False), block, kind, "float32").digest

    first = digest()
    assert first == open_graph(open_bundle(exported("class").path), 0, "step", "float32").digest
    others = [digest(kind) for kind in KINDS if kind != "step"] + [digest(block=1)]
    for name in ("block_00/weights.bin", "graphs/trt/step.onnx"):
        edit_manifest(lambda manifest, name=name: manifest["files"][name].update(sha256="0" * 64))
        others.append(digest())
    assert len({first, *others}) == len(others) + 1


def test_every_graph_is_wanted_for_its_own_shapes(exported, monkeypatch):
    """Forward and gradient need no more images than they run at once."""
    bundle = open_bundle(exported("class").path)
    profiles = profiles_for([1, 8, 64], branches=[1, 2], windows=[1, 3])
    wanted = list(wanted_engines(bundle, profiles))
    assert [(block, kind) for block, kind, _ in wanted] == [(block, kind) for block in (0, 1) for kind in KINDS]
    for _, kind, some in wanted[:2]:
        assert some == tuple(one for one in profiles if one.patches == (1 if kind == "step" else 3))
    assert [(one.least, one.most) for one in wanted[2][2]] == [(1, 1), (2, 8), (9, 64)]
    single = wanted_engines(bundle, profiles_for([1]))
    assert [kind for block, kind, _ in single if block == 0] == ["step", "forward", "gradient"]
    monkeypatch.setattr("tarflow_runtimes.engines.trt.supply.density_images", lambda _: 5)
    *_, (_, kind, whole) = wanted_engines(bundle, profiles)
    assert (kind, [(one.least, one.most) for one in whole]) == ("gradient", [(1, 1), (2, 5)])


def test_profiles():
    profiles = profiles_for([8, 1, 32], branches=[2, 1], windows=[16, 1])
    assert len(profiles) == 12
    assert [str(one) for one in profiles[:4]] == [
        "B 1, G 1, S 1",
        "B 2 to 8, G 1, S 1",
        "B 9 to 32, G 1, S 1",
        "B 1, G 1, S 16",
    ]
    assert uncovered([Profile(least=3, most=20, branches=2, patches=16)], profiles) == []
    too_much = Profile(least=1, most=33)
    assert uncovered([too_much], profiles) == [too_much]
    assert uncovered([Profile(least=1, most=1, patches=2)], profiles) == [Profile(least=1, most=1, patches=2)]
    gap = [Profile(least=1, most=4), Profile(least=6, most=8)]
    assert uncovered([Profile(least=3, most=7)], gap) == [Profile(least=3, most=7)]
    guided = Profile(least=2, most=8, branches=2, patches=16)
    assert guided.ranges(["R", 3, "S + 1", "L"], 49) == ((4, 3, 17, 1), (16, 3, 17, 49), (16, 3, 17, 49))
    assert shape_of(["G", "B", 5], guided.sizes(7, 10)) == (2, 7, 5)
    assert guided.takes(2, 2, 16)
    assert not guided.takes(9, 2, 16)
