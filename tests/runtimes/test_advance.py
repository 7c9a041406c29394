"""The advance graph, looped by hand on ONNX Runtime: against the sequential stepper and `settle` on the step graph."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest

import tarflow_runtimes as tfr
from tarflow_runtimes import _onnx_proto as proto
from tarflow_runtimes._engines._session import BoundRun, Session
from tarflow_runtimes._engines._steppers import PortableStepper, StepInputs
from tarflow_runtimes._engines._windows import PortableWindows
from tarflow_runtimes._parallel import Settled, settle
from tarflow_runtimes._rewrites._graph import PatternMismatch
from tarflow_runtimes._rewrites.advance import advance_graph

STALE = 7.0
"""What the caches hold at first: nothing of it may reach an image."""

OPTIONS = {
    "unguided": tfr._sampler.Guidance(),
    "guided": tfr._sampler.Guidance(weight=1.3, guide="a"),
    "annealed": tfr._sampler.Guidance(weight=1.3, anneal=True),
    "temperature": tfr._sampler.Guidance(weight=0.7, temperature=0.5),
}


@dataclasses.dataclass
class Decoded:
    """Patches [B, N, D] in image order, and how they came about: `positions` [launches + 1, B]."""

    patches: np.ndarray
    positions: np.ndarray
    residual: np.ndarray
    calls: np.ndarray

    def committed(self, image: int) -> tuple[int, ...]:
        steps = np.diff(self.positions[:, image])
        return tuple(int(step) for step in steps if step)


class Loop:
    """State of the advance graph on the CPU, launched by turns from one half of it to the other."""

    def __init__(self, flow: tfr.Flow, block: int, inputs: StepInputs, graph: bytes) -> None:
        config = flow.config
        self.session = Session(graph, folder=flow.bundle.blocks[block].step.parent, threads=1)
        self.inputs = inputs
        shape = (inputs.rows, config.heads, config.patches, config.head_dim)
        names = [name for name in self.session.inputs if name.startswith(("key_", "value_"))]
        self.caches = {name: np.full(shape, STALE, inputs.cache_dtype) for name in names}
        self.finished = np.zeros_like(inputs.noise[:, None])
        self.in_place = {"finished": self.finished, **self.caches}
        self.order = np.arange(config.patches)[:: -1 if inputs.is_reversed else 1]
        self.fixed: dict[str, Any] = {
            "noise": inputs.noise,
            "guidance": inputs.guidance,
            "inverse_temperature": inputs.inverse_temperature,
        }
        if inputs.labels is not None:
            self.fixed["labels"] = inputs.labels

    def decode(
        self,
        window: int,
        *,
        tolerance: float = 0.0,
        init: str = "noise",
        launches: int | None = None,
        reach: Callable[[int], int] | None = None,
        position: np.ndarray | None = None,
        start: np.ndarray | None = None,
    ) -> Decoded:
        """Launch until every image is finished, or `launches` times.

        `reach` maps the largest position to L. `position` and `start` go on from finished patches.
        """
        batch, patches = self.inputs.noise.shape[:2]
        iterates = self.inputs.noise if init == "noise" else np.zeros_like(self.inputs.noise)
        self.finished[:, 0] = iterates if start is None else start
        self.finished[:, 0, self.order[0]] = self.inputs.noise[:, self.order[0]]
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
        bound: dict[tuple[int, int], BoundRun] = {}
        positions = [at.copy()]
        while positions[-1].min() < patches - 1 and (launches is None or len(positions) <= launches):
            turn = (len(positions) - 1) % 2
            length = patches if reach is None else reach(int(positions[-1].max()))
            if (turn, length) not in bound:
                arrays = {
                    **self.fixed, **self.in_place, **halves[turn],
                    "tolerance": np.array([tolerance], np.float32), "reach": np.arange(length),
                }  # fmt: skip
                following = {**self.in_place, **halves[1 - turn]}
                outputs = {f"next_{name}": array for name, array in following.items()}
                bound[turn, length] = BoundRun(self.session, arrays, outputs)
            bound[turn, length]()
            positions.append(halves[1 - turn]["position"].copy())
        last = halves[(len(positions) - 1) % 2]
        return Decoded(self.finished[:, 0].copy(), np.array(positions), last["residual"], last["calls"])


def step_inputs(exported: Any, flow: tfr.Flow, guidance: Any, *, block: int, batch: int, dtype: str) -> StepInputs:
    config = flow.config
    labels = None
    if config.classes:
        given = np.arange(batch) % config.classes
        labels = np.stack([given, np.full_like(given, config.classes)][: guidance.branches])
    return StepInputs(
        noise=exported.latents(batch, seed=block),
        labels=labels,
        guidance=guidance.weights(config.patches),
        inverse_temperature=guidance.inverse_temperature(),
        is_reversed=flow.bundle.blocks[block].order == "reversed",
        cache_dtype=dtype,
    )


def rewritten(flow: tfr.Flow, block: int, **sizes: int | None) -> bytes:
    path = flow.bundle.blocks[block].step
    return advance_graph(proto.parse_model(path.read_bytes(), where=str(path)), flow.config, **sizes)


def portable(flow: tfr.Flow, block: int) -> Session:
    files = flow.bundle.blocks[block]
    return Session(files.step, folder=files.step.parent, threads=1)


def settled_alone(flow: tfr.Flow, session: Session, inputs: StepInputs, strategy: tfr.Parallel) -> list[Settled]:
    """`settle` on the step graph, image by image; patches in image order."""
    results = []
    for image in range(len(inputs.noise)):
        noise = inputs.noise[image, ::-1] if inputs.is_reversed else inputs.noise[image]
        labels = None if inputs.labels is None else inputs.labels[:, image : image + 1]
        one = dataclasses.replace(inputs, noise=noise[None], labels=labels)
        settled = settle(PortableWindows(session, flow.config, one), noise, strategy)
        patches = settled.patches[::-1] if inputs.is_reversed else settled.patches
        results.append(dataclasses.replace(settled, patches=patches))
    return results


NAMES = ["class", "class_n16", "unconditional", "three_blocks", "no_nvp", "no_nvp_unconditional", "one_head"]


def windows(patches: int) -> list[int]:
    return sorted({window for window in (1, 2, 5, patches - 1) if window < patches})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("guidance", OPTIONS.values(), ids=OPTIONS.keys())
def test_one_patch_at_a_time_is_the_sequential_stepper(exported, flows, name, guidance):
    source, flow = exported(name), flows(name)
    steps = flow.config.patches - 1
    for block, batch in itertools.product(range(flow.config.blocks), (1, 3)):
        inputs = step_inputs(source, flow, guidance, block=block, batch=batch, dtype="float32")
        stepper = PortableStepper(portable(flow, block), flow.config, inputs)
        for _ in range(steps):
            stepper.advance()
        expected = stepper.result()
        assert np.abs(expected - inputs.noise).max() > 0.1
        for sizes in ({}, {"window": 1}):
            decoded = Loop(flow, block, inputs, rewritten(flow, block, **sizes)).decode(1)
            np.testing.assert_allclose(decoded.patches, expected, rtol=0, atol=1e-6)
            np.testing.assert_array_equal(decoded.calls, steps)
            np.testing.assert_array_equal(decoded.residual, 0)
            np.testing.assert_array_equal(decoded.positions, np.arange(steps + 1)[:, None].repeat(batch, axis=1))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("guidance", OPTIONS.values(), ids=OPTIONS.keys())
def test_windows_settle_as_parallel_decoding_does(exported, flows, name, guidance):
    source, flow = exported(name), flows(name)
    for block, batch in itertools.product(range(min(2, flow.config.blocks)), (1, 3)):
        inputs = step_inputs(source, flow, guidance, block=block, batch=batch, dtype="float32")
        loop, session = Loop(flow, block, inputs, rewritten(flow, block)), portable(flow, block)
        for window, init in itertools.product(windows(flow.config.patches), ("noise", "zeros")):
            for tolerance in (0.0, 1e-5, 0.1, 1.0):
                strategy = tfr.Parallel(window=window, tolerance=tolerance, init=init)
                decoded = loop.decode(window, tolerance=tolerance, init=init)
                for image, expected in enumerate(settled_alone(flow, session, inputs, strategy)):
                    np.testing.assert_allclose(decoded.patches[image], expected.patches, rtol=0, atol=5e-6)
                    np.testing.assert_allclose(decoded.residual[image], expected.residual, rtol=0, atol=5e-6)
                    assert decoded.calls[image] == len(decoded.committed(image))
                    # At 0 a patch is still or not by the last bit, which may depend on how many rows a product has.
                    if tolerance:
                        assert decoded.committed(image) == expected.committed


def test_loose_windows_settle_several_patches_at_once(exported, flows):
    source, flow = exported("class_n16"), flows("class_n16")
    inputs = step_inputs(source, flow, OPTIONS["unguided"], block=1, batch=3, dtype="float32")
    decoded = Loop(flow, 1, inputs, rewritten(flow, 1)).decode(5, tolerance=0.1)
    assert len({decoded.committed(image) for image in range(3)}) > 1
    assert (decoded.calls < flow.config.patches - 1).all()
    assert ((decoded.residual > 0) & (decoded.residual <= 0.1)).all()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("window", [1, 5, 15])
def test_frozen_axes_change_nothing(exported, flows, dtype, window):
    name = "class_n16" if dtype == "float32" else "class"
    source, flow = exported(name, dtype), flows(name, dtype)
    patches, guidance = flow.config.patches, OPTIONS["temperature"]
    window = min(window, patches - 1)
    inputs = step_inputs(source, flow, guidance, block=1, batch=2, dtype=dtype)
    expected = Loop(flow, 1, inputs, rewritten(flow, 1)).decode(window, tolerance=0.1)
    graph = rewritten(flow, 1, images=2, branches=2, window=window, reach=patches)
    decoded = Loop(flow, 1, inputs, graph).decode(window, tolerance=0.1)
    np.testing.assert_array_equal(decoded.positions, expected.positions)
    # Without its transpositions the graph of one patch has ONNX Runtime round elsewhere between halves.
    rounding = 1e-3 if dtype == "float16" and window == 1 else 0.0
    np.testing.assert_allclose(decoded.patches, expected.patches, rtol=rounding, atol=rounding)
    np.testing.assert_array_equal(decoded.residual, expected.residual)

    model = onnx.load_from_string(graph).graph
    assert "Shape" not in {node.op_type for node in model.node}
    shapes = [value.type.tensor_type.shape.dim for value in (*model.input, *model.output)]
    assert all(dim.dim_value for shape in shapes for dim in shape)
    names = {value.name for value in model.input}
    assert ("tolerance" in names) == (window > 1)
    swapped = [node for node in model.node if node.op_type == "Transpose" and node.attribute[0].ints == [0, 2, 1, 3]]
    assert bool(swapped) == (window > 1)
    assert "reach" not in names


def test_state_is_read_where_it_was_written(flows):
    """What is updated in place goes from graph input to graph output, and nothing but the scatter reads the input."""
    flow = flows("class")
    model = onnx.load_from_string(rewritten(flow, 1)).graph
    caches = [f"{kind}_{layer}" for kind in ("key", "value") for layer in range(flow.config.layers)]
    for name in ("finished", *caches):
        (reader,) = [node for node in model.node if name in node.input]
        assert (reader.op_type, list(reader.output)) == ("TensorScatter", [f"next_{name}"])
    states = {"window", "position", "residual", "calls", "finished", *caches}
    assert {value.name for value in model.output} == {f"next_{name}" for name in states}
    others = {"noise", "guidance", "labels", "inverse_temperature", "tolerance", "reach"}
    assert {value.name for value in model.input} == states | others


@pytest.mark.parametrize("window", [1, 2, 5, 15])
@pytest.mark.parametrize("block", [0, 1])
def test_images_may_be_at_different_positions(exported, flows, window, block):
    source, flow = exported("class_n16"), flows("class_n16")
    patches = flow.config.patches
    inputs = step_inputs(source, flow, OPTIONS["annealed"], block=block, batch=4, dtype="float32")
    for sizes in ({}, {"window": 1}) if window == 1 else ({},):
        loop = Loop(flow, block, inputs, rewritten(flow, block, **sizes))
        expected = loop.decode(1).patches
        position = np.array([0, 6, patches - 2, patches - 1])
        known = np.arange(patches) <= position[:, None]  # in block order
        for cache in loop.caches.values():
            rows = cache.reshape(-1, 4, *cache.shape[1:])  # branch, image, head, patch
            rows[np.broadcast_to(~known[None, :, None, :], rows.shape[:-1])] = STALE
        start = np.where(known[:, loop.order, None], expected, inputs.noise)
        start[3] += 1.0  # a finished image is not looked at, whatever is in it
        start[3, loop.order[0]] = expected[3, loop.order[0]]
        decoded = loop.decode(window, position=position, start=start)
        np.testing.assert_allclose(decoded.patches[:3], expected[:3], rtol=0, atol=5e-6)
        np.testing.assert_array_equal(decoded.patches[3], start[3])
        assert decoded.calls[3] == 0
        assert decoded.calls[2] == 1
        assert (decoded.positions[:, 3] == patches - 1).all()
        np.testing.assert_array_equal(decoded.residual, 0)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("window", [1, 5])
def test_values_that_are_not_finite_are_marked(exported, flows, value, window):
    source, flow = exported("class_n16"), flows("class_n16")
    inputs = step_inputs(source, flow, OPTIONS["unguided"], block=1, batch=3, dtype="float32")
    sound = Loop(flow, 1, inputs, rewritten(flow, 1)).decode(window, tolerance=0.1)
    for sizes in ({}, {"window": window}):
        noise = inputs.noise.copy()
        noise[1, 4, 2] = value
        broken = dataclasses.replace(inputs, noise=noise)
        decoded = Loop(flow, 1, broken, rewritten(flow, 1, **sizes)).decode(window, tolerance=0.1)
        assert decoded.residual[1] == np.inf
        for image in (0, 2):
            np.testing.assert_array_equal(decoded.patches[image], sound.patches[image])
            np.testing.assert_array_equal(decoded.residual[image], sound.residual[image])
            assert decoded.committed(image) == sound.committed(image)


def test_a_move_beyond_the_largest_number_is_no_overflow(exported, flows):
    """As in `settle`: iterates far from the answer may be huge, as long as they are finite."""
    flow = flows("no_nvp")
    inputs = step_inputs(exported("no_nvp"), flow, OPTIONS["unguided"], block=0, batch=2, dtype="float32")
    inputs.noise[:, -1] = 3e38
    start = inputs.noise.copy()
    start[:, -1] = -3e38
    decoded = Loop(flow, 0, inputs, rewritten(flow, 0)).decode(1, tolerance=0.1, start=start)
    np.testing.assert_array_equal(decoded.residual, 0)
    np.testing.assert_allclose(decoded.patches[:, -1], 3e38, rtol=1e-6)


@pytest.mark.parametrize("window", [1, 5])
@pytest.mark.parametrize("guidance", [OPTIONS["unguided"], OPTIONS["temperature"]], ids=["one branch", "two branches"])
def test_any_sufficient_reach_gives_the_same(exported, flows, window, guidance):
    source, flow = exported("class_n16"), flows("class_n16")
    patches = flow.config.patches
    inputs = step_inputs(source, flow, guidance, block=1, batch=3, dtype="float32")
    whole = Loop(flow, 1, inputs, rewritten(flow, 1, reach=patches)).decode(window, tolerance=0.1)
    loop = Loop(flow, 1, inputs, rewritten(flow, 1))

    def least(position: int) -> int:
        return min(position, patches - 1 - window) + window

    for reach in (least, lambda position: patches, lambda position: -(-least(position) // 2) * 2):
        decoded = loop.decode(window, tolerance=0.1, reach=reach)
        np.testing.assert_array_equal(decoded.positions, whole.positions)
        np.testing.assert_allclose(decoded.patches, whole.patches, rtol=0, atol=5e-6)
    short = loop.decode(window, tolerance=0.1, reach=lambda position: max(1, least(position) - 1))
    assert np.abs(short.patches - whole.patches).max() > 1e-3


def test_a_frozen_reach_is_the_first_entries(exported, flows):
    source, flow = exported("class_n16"), flows("class_n16")
    inputs = step_inputs(source, flow, OPTIONS["guided"], block=0, batch=2, dtype="float32")
    expected = Loop(flow, 0, inputs, rewritten(flow, 0)).decode(1, launches=7)
    decoded = Loop(flow, 0, inputs, rewritten(flow, 0, reach=7)).decode(1, launches=7)
    np.testing.assert_allclose(decoded.patches, expected.patches, rtol=0, atol=5e-6)
    further = Loop(flow, 0, inputs, rewritten(flow, 0, reach=7)).decode(1, launches=9)
    expected = Loop(flow, 0, inputs, rewritten(flow, 0)).decode(1, launches=9)
    assert np.abs(further.patches - expected.patches).max() > 1e-3


def mend(model: Any, node_name: str, **changes: Any) -> None:
    (node,) = [node for node in model.graph.node if node.name == node_name]
    for name, value in changes.items():
        if name == "op_type":
            node.op_type = value
        else:
            node.input[int(name.removeprefix("input"))] = value


DAMAGE = {
    "no branches": lambda model: mend(model, "positions/Shape", input0="guidance"),
    "another axis": lambda model: mend(model, "positions/Shape_2", op_type="Size"),
    "no mask": lambda model: mend(model, "mask/LessOrEqual", op_type="Less"),
    "a mask of other columns": lambda model: mend(model, "mask/Range", input1="const_1_scalar"),
    "no scatter": lambda model: mend(model, "layer_0.attention/TensorScatter", op_type="Identity"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_another_graph_is_declined(flows, damage):
    flow = flows("class")
    path = flow.bundle.blocks[0].step
    model = proto.parse_model(path.read_bytes(), where=str(path))
    damage(model)
    with pytest.raises(PatternMismatch):
        advance_graph(model, flow.config)
