"""What the C ABI refuses, how it is cancelled, and what it leaves behind."""

from __future__ import annotations

import copy
import threading
import time

import numpy as np
import pytest

from tarflow_runtimes.engines.native.library import NativeError, Shape, Watch, aligned_bytes, shape_of

CANCELLED, BAD_SHAPE, BAD_PRECISION, BAD_TENSOR, BAD_ORDER, SMALL, NOT_PACKED, BAD_ARGUMENT, BAD_KERNEL = range(1, 10)


@pytest.fixture
def table(models):
    """Shape, precision, table of tensors and weights of a block, to plant errors in."""
    bundle = models("class").bundle
    entries = {name: (tensor.dtype, tensor.shape, tensor.offset) for name, tensor in bundle.tensors.items()}
    return shape_of(bundle.config), entries, np.fromfile(bundle.blocks[1].weights, np.uint8)


def refusal(call, *arguments, **options):
    with pytest.raises(NativeError) as caught:
        call(*arguments, **options)
    return caught.value


def test_the_version_and_the_kernels(library):
    assert library.abi == 3
    assert library.kernels[-1] == "portable"


@pytest.mark.parametrize("name", ["proj_in.weight", "attn_blocks.1.attention.qkv.bias", "class_embed", "order"])
def test_a_tensor_that_is_missing_or_another(library, table, name):
    shape, entries, weights = table
    dtype, axes, offset = entries[name]
    end = len(weights)
    wrong = {
        "missing": None,
        "dtype": ("float16", axes, offset),
        "shape": (dtype, (*axes[:-1], axes[-1] + 1), offset),
        "rank": (dtype, (*axes, 1), offset),
        "past the end": (dtype, axes, end),
        "over the end": (dtype, axes, end - 1),
        "before the start": (dtype, axes, -1),
        "far away": (dtype, axes, 2**62),
    }
    for entry in wrong.values():
        planted = {key: value for key, value in entries.items() if key != name}
        if entry is not None:
            planted[name] = entry
        error = refusal(library.pack_tensors, shape, "float32", planted, weights)
        assert error.status == BAD_TENSOR
        assert error.culprit
        assert error.culprit in name


def test_names_are_compared_whole(library, table):
    shape, entries, weights = table
    for fake in ("attn_blocks.01.mlp.norm.bias", "attn_blocks.10.mlp.norm.bias", "attn_blocks.1.mlp.norm.bias2"):
        planted = {fake if name == "attn_blocks.1.mlp.norm.bias" else name: entry for name, entry in entries.items()}
        assert refusal(library.pack_tensors, shape, "float32", planted, weights).status == BAD_TENSOR


def test_an_order_that_is_neither(library, table):
    shape, entries, weights = table
    weights[entries["order"][2] :][:8].view(np.int64)[0] = 2
    assert refusal(library.pack_tensors, shape, "float32", entries, weights).status == BAD_ORDER


@pytest.mark.parametrize(
    "change",
    [{"patches": 1}, {"patches": 2**40}, {"values": 0}, {"width": 65}, {"width": -64}, {"layers": 0}, {"head_dim": 0},
     {"classes": -1}, {"classes": 2**40}, {"nvp": 2}, {"width": 2**24, "head_dim": 2**24, "layers": 2**20}],
)  # fmt: skip
def test_shapes_out_of_range(library, table, change):
    given, entries, weights = table
    fields = {name: getattr(given, name) for name, _ in Shape._fields_}
    shape = Shape(**{**fields, **change})
    assert library.packed_bytes(shape, "float32") == 0
    assert library.workspace_bytes(shape, 1, 1, 1) == 0
    room = aligned_bytes(1 << 20)
    assert refusal(library.pack_tensors, shape, "float32", entries, weights, room).status == BAD_SHAPE


def test_precisions_and_buffers(library, table):
    shape, entries, weights = table
    assert library.packed_bytes(shape, "float16") == 0
    room = aligned_bytes(library.packed_bytes(shape, "float32") + 64)
    pack = library.pack_tensors
    assert refusal(pack, shape, "float16", entries, weights, room).status == BAD_PRECISION
    assert refusal(pack, shape, "int8", entries, weights, room).status == BAD_TENSOR
    assert refusal(pack, shape, "float32", entries, weights, room[:-65]).status == SMALL
    assert refusal(pack, shape, "float32", entries, weights, room[8:]).status == SMALL
    assert refusal(pack, shape, "float32", entries, weights[:1000], room).status == BAD_TENSOR


def test_arguments_of_a_run(library, models):
    model = models("class")
    block, noise = model.blocks[0], model.noise(3)
    conditions = model.conditions(3, "guided")
    given = {
        "labels": conditions.labels,
        "guidance": conditions.guidance,
        "inverse_temperature": conditions.inverse_temperature,
        "branches": 2,
    }
    library.invert(block, noise, **given)
    for change in (
        {"batch": 0}, {"batch": -1}, {"batch": 2**40}, {"steps": -1}, {"steps": 4}, {"threads": 0}, {"noise": None},
        {"x": None}, {"workspace": None}, {"packed": None}, {"struct_size": 8},
    ):  # fmt: skip
        assert refusal(library.invert, block, noise, **given, planted=change).status == BAD_ARGUMENT, change
    assert refusal(library.invert, block, noise, **{**given, "guidance": None}).status == BAD_ARGUMENT
    assert refusal(library.invert, block, noise, **{**given, "labels": None}).status == BAD_ARGUMENT
    for label in (-1, 4):
        labels = conditions.labels.copy()
        labels[1, 2] = label
        assert refusal(library.invert, block, noise, **{**given, "labels": labels}).status == BAD_ARGUMENT
    for change in ({"workspace_bytes": 1000}, {"packed_bytes": 1000}, {"packed_bytes": 8}):
        assert refusal(library.invert, block, noise, **given, planted=change).status == SMALL, change
    assert refusal(library.invert, block, noise, **given, kernel="x86-64-v9").status == BAD_KERNEL


def test_labels_of_a_model_without_classes(library, models):
    model = models("unconditional")
    labels = np.zeros((1, 2), np.int64)
    assert refusal(library.invert, model.blocks[0], model.noise(2), labels=labels).status == BAD_ARGUMENT


def test_weights_that_were_not_packed_here(library, models):
    model = models("unconditional")
    for at in (0, 8, 20, 72):  # the mark, the version, a size, the format
        block = copy.copy(model.blocks[0])
        packed = aligned_bytes(block.packed.nbytes)
        packed[:] = block.packed
        packed[at] ^= 255
        object.__setattr__(block, "packed", packed)
        assert refusal(library.invert, block, model.noise(2)).status in (NOT_PACKED, SMALL)


def test_progress_counts_images_and_steps(library, models):
    model = models("n16")
    for threads in (1, 3):
        watch = Watch()
        labels = model.conditions(40, "plain").labels
        library.invert(model.blocks[0], model.noise(40), labels=labels, threads=threads, watch=watch)
        assert watch.progress[0] == 40 * 15


@pytest.mark.parametrize("threads", [1, 2])
def test_cancelled_within_a_step(library, models, threads):
    model = models("digits")
    noise, labels = model.noise(256), model.conditions(256, "plain").labels
    watch, found = Watch(), []

    def work():
        try:
            library.invert(model.blocks[0], noise, labels=labels, threads=threads, watch=watch)
        except NativeError as error:
            found.append((error.status, time.perf_counter()))

    thread = threading.Thread(target=work)
    thread.start()
    deadline = time.monotonic() + 30
    while watch.progress[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.0005)
    watch.cancel[0] = 1
    asked = time.perf_counter()
    thread.join()
    assert [status for status, _ in found] == [CANCELLED]
    assert found[0][1] - asked < 0.05
    assert 0 < watch.progress[0] < 256 * 48
    alone = library.invert(model.blocks[0], noise[:2], labels=labels[:, :2])
    assert np.isfinite(alone).all()


def test_memory_is_bounded_in_the_batch(library, models):
    shape = shape_of(models("digits").config)
    some, many = (library.workspace_bytes(shape, batch, 2, 2) for batch in (64, 65536))
    assert many <= 2 * some
