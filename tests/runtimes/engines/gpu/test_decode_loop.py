"""The decode-loop graphs, launched by hand on ONNX Runtime: against ort-cpu's sequential and parallel decoding."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import tarflow_runtimes as tfr
from rooms import Conditions, Turn, conditions_of, open_bundle

STALE = 7.0
"""What the caches hold at first: nothing of it may kv_length an image."""

PROVIDERS = ("ort-cuda", "trt")
WAYS: dict[str, list[tfr.Guidance]] = {
    "unguided": [tfr.Guidance()],
    "annealed": [tfr.Guidance(weight=1.3, anneal=True)],
    "mixed": [
        tfr.Guidance(weight=1.3, guide="a", attention_temperature=0.5),
        tfr.Guidance(),
        tfr.Guidance(weight=0.7, guide="b", anneal=True),
    ],
}
"""The guidance of images in turn: those of "mixed" share a batch and have all of it differently."""
NAMES = ["class", "class_n16", "unconditional", "three_blocks", "no_nvp", "no_nvp_unconditional", "one_head", "tokens"]


@dataclasses.dataclass(frozen=True)
class Given:
    """What a block of a bundle is inverted from."""

    flow: tfr.Flow
    block: int
    noise: np.ndarray
    conditions: Conditions

    def on_cpu(self, strategy: tfr.Sequential | tfr.Parallel) -> tuple[np.ndarray, tfr.BlockReport]:
        """What ort-cpu makes of it."""
        x, (report,) = self.flow.engine.invert([Turn(block=self.block, strategy=strategy)], self.noise, self.conditions)
        return x, report


def given(source: Any, flow: tfr.Flow, way: str, *, block: int, batch: int) -> Given:
    labels = np.arange(batch) % flow.config.classes if flow.config.classes else None
    guidance = [WAYS[way][i % len(WAYS[way])] for i in range(batch)]
    conditions = conditions_of(guidance, labels, flow.config)
    return Given(flow, block, source.latents(batch, seed=block), conditions)


@dataclasses.dataclass
class Decoded:
    """Patches [B, N, D] in the order of the data, and how they came about: `positions` [launches + 1, B]."""

    patches: np.ndarray
    positions: np.ndarray
    residual: np.ndarray
    calls: np.ndarray

    def accepted(self, image: int) -> tuple[int, ...]:
        steps = np.diff(self.positions[:, image])
        return tuple(int(step) for step in steps if step)


def open_session(
    flow: tfr.Flow, block: int, graph: tuple[str, str], sizes: Mapping[str, int], optimised: Path | None = None
) -> onnxruntime.InferenceSession:
    """A graph (provider, kind) with these axes frozen; `optimised` is where it goes after basic optimisation."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    for axis, size in sizes.items():
        options.add_free_dimension_override_by_name(axis, size)
    folder = flow.bundle.blocks[block].weights.parent
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    if optimised is not None:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(optimised)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights.bin")
    model = flow.bundle.read(flow.bundle.graph(*graph, block))
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


class Loop:
    """State of the graph, launched by turns from one half of it to the other, with the rest updated in place."""

    def __init__(self, given: Given, provider: str, kind: str, sizes: Mapping[str, int] | None = None) -> None:
        config, self.given = given.flow.config, given
        self.session = open_session(given.flow, given.block, (provider, kind), sizes or {})
        self.inputs = [value.name for value in self.session.get_inputs()]
        rows = given.conditions.branches * len(given.noise)
        shape = (rows, config.heads, config.patches, config.head_dim)
        names = [name for name in self.inputs if name.startswith(("key_", "value_"))]
        self.caches = {name: np.full(shape, STALE, given.flow.bundle.cache_dtype) for name in names}
        self.finished = np.zeros_like(given.noise[:, None])
        self.in_place = {"finished": self.finished, **self.caches}
        self.order = given.flow.bundle.tensor(given.block, "order")
        self.fixed: dict[str, Any] = {
            "noise": given.noise,
            "guidance": given.conditions.guidance,
            "inverse_temperature": given.conditions.inverse_temperature,
            "labels": given.conditions.labels,
        }

    def decode(
        self,
        window: int,
        *,
        tolerance: float = 0.0,
        init: str = "noise",
        kv_length: Callable[[int], int] | None = None,
        position: np.ndarray | None = None,
        start: np.ndarray | None = None,
    ) -> Decoded:
        """Launch until every image is finished.

        `kv_length` maps the largest position to L. `position` and `start` go on from finished patches.
        """
        noise = self.given.noise
        batch, patches = noise.shape[:2]
        self.finished[:, 0] = start if start is not None else noise if init == "noise" else np.zeros_like(noise)
        self.finished[:, 0, self.order[0]] = noise[:, self.order[0]]
        at = np.zeros(batch, np.int64) if position is None else position
        places = self.order[np.minimum(at, patches - 1 - window)[:, None] + np.arange(window + 1)]
        halves = [
            {
                "window": np.take_along_axis(self.finished[:, 0], places[:, :, None], axis=1),
                "position": at.copy(),
                "residual": np.zeros(batch, np.float32),
                "calls": np.zeros(batch, np.int64),
            }
            for _ in range(2)
        ]
        positions = [at.copy()]
        while positions[-1].min() < patches - 1 and len(positions) <= patches:
            turn = (len(positions) - 1) % 2
            length = patches if kv_length is None else kv_length(int(positions[-1].max()))
            arrays = {
                **self.fixed, **self.in_place, **halves[turn],
                "tolerance": np.array([tolerance], np.float32), "kv_positions": np.arange(length),
            }  # fmt: skip
            self._launch(arrays, {**self.in_place, **halves[1 - turn]})
            positions.append(halves[1 - turn]["position"].copy())
        last = halves[(len(positions) - 1) % 2]
        return Decoded(self.finished[:, 0].copy(), np.array(positions), last["residual"], last["calls"])

    def _launch(self, arrays: Mapping[str, np.ndarray], following: Mapping[str, np.ndarray]) -> None:
        binding = self.session.io_binding()
        for name in self.inputs:
            array = arrays[name]
            binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        for name, array in following.items():
            binding.bind_output(f"next_{name}", "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        self.session.run_with_iobinding(binding)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", WAYS)
def test_steps_are_sequential_decoding(exported, flows, name, way):
    source, flow = exported(name), flows(name)
    steps = flow.config.patches - 1
    for block, batch in itertools.product(range(flow.config.blocks), (1, 3)):
        start = given(source, flow, way, block=block, batch=batch)
        expected, _ = start.on_cpu(tfr.Sequential())
        assert np.abs(expected - start.noise).max() > 0.1
        for provider in PROVIDERS:
            decoded = Loop(start, provider, "step").decode(1)
            np.testing.assert_allclose(decoded.patches, expected, rtol=0, atol=5e-6)
            np.testing.assert_array_equal(decoded.calls, steps)
            np.testing.assert_array_equal(decoded.residual, 0)
            np.testing.assert_array_equal(decoded.positions, np.arange(steps + 1)[:, None].repeat(batch, axis=1))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", WAYS)
def test_windows_settle_as_parallel_decoding_does(exported, flows, name, way):
    source, flow = exported(name), flows(name)
    last = flow.config.patches - 1
    for block, batch in itertools.product(range(min(2, flow.config.blocks)), (1, 3)):
        start = given(source, flow, way, block=block, batch=batch)
        loop = Loop(start, PROVIDERS[block % 2], "window")
        for window, init in itertools.product(sorted({1, 2, min(5, last), last}), ("noise", "zeros")):
            for tolerance in (0.0, 1e-3, 0.1, 1.0):
                expected, report = start.on_cpu(tfr.Parallel(window=window, tolerance=tolerance, init=init))
                decoded = loop.decode(window, tolerance=tolerance, init=init)
                np.testing.assert_allclose(decoded.patches, expected, rtol=0, atol=1e-5)
                np.testing.assert_allclose(decoded.residual.max(), report.residual, rtol=0, atol=1e-5)
                for image in range(batch):
                    assert decoded.calls[image] == len(decoded.accepted(image))
                    # At 0 a patch is still or not by the last bit.
                    if tolerance:
                        assert decoded.accepted(image) == report.accepted[image]


def test_loose_windows_settle_several_patches_at_once(exported, flows):
    start = given(exported("class_n16"), flows("class_n16"), "unguided", block=1, batch=3)
    decoded = Loop(start, "ort-cuda", "window").decode(5, tolerance=0.1)
    assert len({decoded.accepted(image) for image in range(3)}) > 1
    assert (decoded.calls < start.flow.config.patches - 1).all()
    assert ((decoded.residual > 0) & (decoded.residual <= 0.1)).all()


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize(("provider", "window"), list(itertools.product(PROVIDERS, (1, 5, 15))))
def test_frozen_axes_change_nothing_and_leave_no_shape(exported, flows, tmp_path, precision, provider, window):  # noqa: PLR0917 - fixtures
    """What measures a shape runs on the host, where on a GPU nothing may."""
    flow, kind = flows("class_n16", precision), "step" if window == 1 else "window"
    start = given(exported("class_n16", precision), flow, "mixed", block=1, batch=2)
    sizes = {"B": 2, "G": 2, "R": 4, "S": window, "S + 1": window + 1, "L": flow.config.patches}
    expected = Loop(start, provider, kind).decode(window, tolerance=0.1)
    decoded = Loop(start, provider, kind, sizes).decode(window, tolerance=0.1)
    np.testing.assert_array_equal(decoded.positions, expected.positions)
    np.testing.assert_allclose(decoded.patches, expected.patches, rtol=0, atol=1e-3 if precision == "float16" else 1e-6)

    session = open_session(flow, 1, (provider, kind), sizes, tmp_path / "optimised.onnx")
    for value in (*session.get_inputs(), *session.get_outputs()):
        assert all(isinstance(size, int) for size in value.shape), value.name
    model = onnx.load(tmp_path / "optimised.onnx", load_external_data=False)
    found = {node.op_type for node in model.graph.node}
    assert not found & {"Shape", "Size", "Range", "ConstantOfShape"}


def test_a_bfloat16_bundle_has_these_graphs_and_no_others_to_run(exported):
    bundle = open_bundle(exported("class", "bfloat16").path)
    assert {provider: set(kinds) for provider, kinds in bundle.graphs.items()} == {
        provider: {"step", "window"} for provider in PROVIDERS
    }
    with pytest.raises(tfr.EngineError, match="is of int8 and has no graphs for trt"):
        open_bundle(exported("class", "int8").path).graph("trt", "step", 0)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("kind", ["step", "window"])
def test_state_is_read_where_it_was_written(flows, provider, kind):
    """What is updated in place goes from graph input to graph output, and nothing but the scatter reads the input."""
    flow = flows("class")
    model = onnx.load_from_string(flow.bundle.graph(provider, kind, 1).read_bytes()).graph
    caches = [f"{kind}_{layer}" for kind in ("key", "value") for layer in range(flow.config.layers)]
    for name in ("finished", *caches):
        (reader,) = [node for node in model.node if name in node.input]
        assert (reader.op_type, list(reader.output)) == ("TensorScatter", [f"next_{name}"])
    assert sum(node.op_type == "TensorScatter" for node in model.node) == len(caches) + 1
    states = {"window", "position", "residual", "calls", "finished", *caches}
    assert {value.name for value in model.output} == {f"next_{name}" for name in states}
    others = {"noise", "guidance", "labels", "inverse_temperature"}
    others |= ({"tolerance"} if kind == "window" else set()) | ({"kv_positions"} if provider == "trt" else set())
    assert {value.name for value in model.input} == states | others
    swapped = [node for node in model.node if node.op_type == "Transpose" and node.attribute[0].ints == [0, 2, 1, 3]]
    assert bool(swapped) == (kind == "window"), "with S = 1 the numbers lie in the right order"


@pytest.mark.parametrize("window", [1, 2, 5, 15])
@pytest.mark.parametrize("block", [0, 1])
def test_images_may_be_at_different_positions(exported, flows, window, block):
    start = given(exported("class_n16"), flows("class_n16"), "annealed", block=block, batch=4)
    patches = start.flow.config.patches
    for kind in ("step", "window") if window == 1 else ("window",):
        loop = Loop(start, "ort-cuda", kind)
        expected = loop.decode(1).patches
        position = np.array([0, 6, patches - 2, patches - 1])
        known = np.arange(patches) <= position[:, None]  # in block order
        for cache in loop.caches.values():
            rows = cache.reshape(-1, 4, *cache.shape[1:])  # branch, image, head, patch
            rows[np.broadcast_to(~known[None, :, None, :], rows.shape[:-1])] = STALE
        given_patches = np.where(known[:, loop.order, None], expected, start.noise)
        given_patches[3] += 1.0  # a finished image is not looked at, whatever is in it
        given_patches[3, loop.order[0]] = expected[3, loop.order[0]]
        decoded = loop.decode(window, position=position, start=given_patches)
        np.testing.assert_allclose(decoded.patches[:3], expected[:3], rtol=0, atol=5e-6)
        np.testing.assert_array_equal(decoded.patches[3], given_patches[3])
        assert decoded.calls[3] == 0
        assert decoded.calls[2] == 1
        assert (decoded.positions[:, 3] == patches - 1).all()
        np.testing.assert_array_equal(decoded.residual, 0)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("window", [1, 5])
def test_values_that_are_not_finite_are_marked(exported, flows, value, window):
    start = given(exported("class_n16"), flows("class_n16"), "unguided", block=1, batch=3)
    noise = start.noise.copy()
    noise[1, 4, 2] = value
    for kind in ("step", "window") if window == 1 else ("window",):
        sound = Loop(start, "ort-cuda", kind).decode(window, tolerance=0.1)
        broken = dataclasses.replace(start, noise=noise)
        decoded = Loop(broken, "ort-cuda", kind).decode(window, tolerance=0.1)
        assert decoded.residual[1] == np.inf
        for image in (0, 2):
            np.testing.assert_array_equal(decoded.patches[image], sound.patches[image])
            np.testing.assert_array_equal(decoded.residual[image], sound.residual[image])
            assert decoded.accepted(image) == sound.accepted(image)


def test_a_move_beyond_the_largest_number_is_no_overflow(exported, flows):
    """Iterates far from the answer may be huge, as long as they are finite."""
    start = given(exported("no_nvp"), flows("no_nvp"), "unguided", block=0, batch=2)
    start.noise[:, -1] = 3e38
    iterates = start.noise.copy()
    iterates[:, -1] = -3e38
    decoded = Loop(start, "trt", "window").decode(1, tolerance=0.1, start=iterates)
    np.testing.assert_array_equal(decoded.residual, 0)
    np.testing.assert_allclose(decoded.patches[:, -1], 3e38, rtol=1e-6)


@pytest.mark.parametrize("window", [1, 5])
@pytest.mark.parametrize("way", ["unguided", "mixed"])
def test_any_sufficient_reach_gives_the_same(exported, flows, window, way):
    start = given(exported("class_n16"), flows("class_n16"), way, block=1, batch=3)
    patches, kind = start.flow.config.patches, "step" if window == 1 else "window"
    whole = Loop(start, "ort-cuda", kind).decode(window, tolerance=0.1)
    loop = Loop(start, "trt", kind)

    def least(position: int) -> int:
        return min(position, patches - 1 - window) + window

    for kv_length in (least, lambda position: patches, lambda position: -(-least(position) // 2) * 2):
        decoded = loop.decode(window, tolerance=0.1, kv_length=kv_length)
        np.testing.assert_array_equal(decoded.positions, whole.positions)
        np.testing.assert_allclose(decoded.patches, whole.patches, rtol=0, atol=5e-6)
    short = loop.decode(window, tolerance=0.1, kv_length=lambda position: max(1, least(position) - 1))
    assert np.abs(short.patches - whole.patches).max() > 1e-3
