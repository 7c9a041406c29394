"""The forward pass against float64, ONNX Runtime and the inverse; its one set of bits; what it refuses."""

from __future__ import annotations

import copy
import hashlib
import threading
import time

import numpy as np
import pytest

from tarflow_runtimes.engines.native.library import NativeError, Shape, Watch, aligned_bytes, shape_of

CANCELLED, SMALL, NOT_PACKED, BAD_ARGUMENT, BAD_KERNEL = 1, 6, 7, 8, 9

NAMES = [
    "class", "n16", "n64", "unconditional", "three_blocks", "no_nvp", "no_nvp_unconditional", "one_head", "heads_of_16",
    "heads_of_8", "heads_of_5", "heads_of_80", "width_96", "tokens", "two_tokens", "odd_tokens",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_close_to_float64_and_to_onnx_runtime(models, name):
    model = models(name)
    patches, labels = model.patches(7)
    z, log_det = model.forward(patches, labels)
    exact_z, exact_log_det = model.exact_forward(patches, labels)
    np.testing.assert_allclose(z, exact_z, rtol=0, atol=5e-6)
    np.testing.assert_allclose(log_det, exact_log_det, rtol=5e-7, atol=1e-5)
    ort_z, ort_log_det = model.ort_forward(patches, labels)
    np.testing.assert_allclose(z, ort_z, rtol=0, atol=1e-5)
    np.testing.assert_allclose(log_det, ort_log_det, rtol=1e-6, atol=2e-5)


@pytest.mark.parametrize("name", ["class", "heads_of_8", "heads_of_5", "heads_of_80", "no_nvp", "odd_tokens"])
def test_bfloat16_weights_with_float32_activations(models, name):
    model = models(name, "bfloat16")
    for batch in (1, 9):
        patches, labels = model.patches(batch)
        for found, exact in zip(model.forward(patches, labels), model.exact_forward(patches, labels), strict=True):
            np.testing.assert_allclose(found, exact, rtol=5e-7, atol=1e-5)


@pytest.mark.parametrize("name", ["class", "heads_of_8", "heads_of_5", "heads_of_80", "no_nvp", "odd_tokens"])
def test_int8_weights_with_int8_activations(models, name):
    model = models(name, "int8")
    patches, labels = model.patches(9)
    z, log_det = model.forward(patches, labels)
    exact_z, exact_log_det = model.exact_forward(patches, labels)
    assert 0 < np.sqrt(np.mean((z - exact_z) ** 2)) < 0.02
    np.testing.assert_allclose(log_det, exact_log_det, rtol=0.02, atol=0.5)
    back = model.native(z, model.conditions(9, "plain"))
    assert np.median(np.abs(back - patches)) < 1e-5  # both ways round alike, but for values halfway


def test_digits_are_at_least_as_exact_as_with_onnx_runtime(models):
    model = models("digits")
    latents, labels = model.patches(16)
    digits = model.native(latents, model.conditions(16, "plain"))  # as likely as digits are: log|det| is large
    exact_z, exact_log_det = model.exact_forward(digits, labels)

    def errors(z, log_det):
        return np.sqrt(np.mean((z - exact_z) ** 2)), np.sqrt(np.mean((log_det - exact_log_det) ** 2))

    native, ort = errors(*model.forward(digits, labels)), errors(*model.ort_forward(digits, labels))
    assert np.abs(exact_log_det).mean() > 1000
    assert native[0] <= ort[0]
    assert native[1] <= ort[1]
    assert native[1] < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_the_inverse_brings_it_back(models, name):
    """Within the rounding of one affine map: both directions compute the same bits of a and b."""
    model = models(name)
    patches, labels = model.patches(5)
    for block in model.blocks:
        z, _ = model.library.forward(block, patches, labels=labels)
        back = model.library.invert(block, z, labels=None if labels is None else labels[None])
        np.testing.assert_allclose(back, patches, rtol=0, atol=1e-6)


def test_the_log_determinant_is_that_of_the_jacobian(models):
    """In float64, by autograd: what z is differentiates to what log|det| says, also from the kernel's rounded z."""
    torch = pytest.importorskip("torch")
    model = models("two_tokens")
    patches, labels = model.patches(4)
    block = model.precise.flow_blocks[0]
    numbers = None if labels is None else torch.from_numpy(np.where(labels == model.config.classes, -1, labels))
    _, log_det = model.library.forward(model.blocks[0], patches, labels=labels)
    for i in range(4):

        def z_of(x, i=i):
            return block(x[None], None if numbers is None else numbers[i : i + 1])[0][0].flatten()

        x = torch.from_numpy(patches[i]).double()
        jacobian = torch.autograd.functional.jacobian(z_of, x).reshape(x.numel(), x.numel())
        assert torch.linalg.slogdet(jacobian).logabsdet.item() == pytest.approx(log_det[i], abs=1e-6)


def test_a_patch_depends_on_those_before_it_alone(models):
    """Not even a NaN spreads to earlier ones, however the rows are cut."""
    model = models("n64")
    patches, labels = model.patches(2)
    for threads in (1, 4):
        z, log_det = model.library.forward(model.blocks[0], patches, labels=labels, threads=threads)
        for at in (1, 17, 30, 63):
            spoilt = patches.copy()
            spoilt[0, at] = np.nan
            found, found_log_det = model.library.forward(model.blocks[0], spoilt, labels=labels, threads=threads)
            assert np.array_equal(found[0, :at], z[0, :at])
            assert np.isnan(found[0, at:]).all()
            assert np.array_equal(found[1], z[1])
            assert np.isnan(found_log_det[0]) == (at < 63)  # the last patch has no influence on a
            assert found_log_det[1] == log_det[1]


CASES = [
    ("digits", "float32"), ("n64", "float32"), ("odd_tokens", "float32"), ("heads_of_5", "float32"),
    ("heads_of_80", "float32"), ("no_nvp", "float32"), ("class", "bfloat16"), ("odd_tokens", "bfloat16"),
    ("class", "int8"), ("heads_of_5", "int8"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "precision"), CASES)
def test_batch_threads_and_kernel_do_not_matter(models, name, precision):
    model = models(name, precision)
    patches, labels = model.patches(64)

    def forward(images, **options):
        return model.forward(patches[images], None if labels is None else labels[images], **options)

    def same(found, images):
        return np.array_equal(found[0], z[images]) and np.array_equal(found[1], log_det[images])

    z, log_det = forward(slice(None))
    assert np.isfinite(z).all()
    assert np.isfinite(log_det).all()
    for batch in (1, 5):
        for first in (0, 17, 59):
            images = slice(first, first + batch)
            for threads in (1, 2, 3, 7):  # more threads than images share them
                assert same(forward(images, threads=threads), images)
    for threads in (2, 3, 100):
        assert same(forward(slice(None), threads=threads), slice(None))
    for kernel in model.library.kernels:
        few = slice(0, 1 if (name, kernel) == ("digits", "portable") else 11)  # portable takes seconds
        for threads in (1, 3):
            assert same(forward(few, kernel=kernel, threads=threads), few), kernel


def test_threads_that_share_an_image_on_one_processor(models):
    """Many times, and more of them than there are processors: each waits for what another has not yet written."""
    model = models("n64")
    patches, labels = model.patches(2)
    expected = model.library.forward(model.blocks[0], patches, labels=labels)
    for _ in range(200):
        found = model.library.forward(model.blocks[0], patches, labels=labels, threads=8)
        assert np.array_equal(found[0], expected[0])
        assert np.array_equal(found[1], expected[1])


def test_the_bits_of_random_models_are_these(models):
    """Committed, so that another machine or compiler that differs is found; the models' weights come from seeds."""
    made = hashlib.sha256()
    for name in ("n16", "no_nvp", "odd_tokens"):
        for array in models(name).forward(*models(name).patches(16)):
            made.update(array.tobytes())
    assert made.hexdigest() == DIGEST


DIGEST = "a6217395bbb6d4b7df377fd5eefb98c1f24d42ff7534a37a527683b076268d82"


def refusal(call, *arguments, **options):
    with pytest.raises(NativeError) as caught:
        call(*arguments, **options)
    return caught.value.status


def test_arguments(library, models):
    model = models("class")
    block, (patches, labels) = model.blocks[0], model.patches(3)
    forward = library.forward
    forward(block, patches, labels=labels)
    for change in (
        {"batch": 0}, {"batch": -1}, {"batch": 2**40}, {"threads": 0}, {"x": None}, {"z": None}, {"log_det": None},
        {"z": patches.ctypes.data}, {"workspace": None}, {"packed": None}, {"struct_size": 8},
    ):  # fmt: skip
        assert refusal(forward, block, patches, labels=labels, planted=change) == BAD_ARGUMENT, change
    assert refusal(forward, block, patches) == BAD_ARGUMENT
    for label in (-1, 4):
        assert refusal(forward, block, patches, labels=np.array([0, 1, label])) == BAD_ARGUMENT
    for change in ({"workspace_bytes": 1000}, {"packed_bytes": 1000}, {"packed_bytes": 8}):
        assert refusal(forward, block, patches, labels=labels, planted=change) == SMALL, change
    assert refusal(forward, block, patches, labels=labels, kernel="x86-64-v9") == BAD_KERNEL
    unconditional = models("unconditional")
    assert refusal(forward, unconditional.blocks[0], unconditional.noise(2), labels=np.zeros(2)) == BAD_ARGUMENT


def test_every_byte_of_the_workspace_is_asked_for(library, models):
    """One byte less is refused; what lies behind it is not written to."""
    model = models("odd_tokens")
    block, (patches, labels) = model.blocks[0], model.patches(3)
    for batch, threads in ((1, 1), (1, 3), (3, 2)):
        needed = library.forward_bytes(block.shape, batch, threads)
        room = aligned_bytes(needed + 64)
        room[needed:] = 77
        planted = {"workspace": room.ctypes.data, "workspace_bytes": needed}
        given = {"labels": None if labels is None else labels[:batch], "threads": threads}
        library.forward(block, patches[:batch], **given, planted=planted)
        assert (room[needed:] == 77).all()
        for change in ({"workspace_bytes": needed - 1}, {"workspace": room.ctypes.data + 8}):
            assert refusal(library.forward, block, patches[:batch], **given, planted=planted | change) == SMALL


def test_sizes_out_of_range(library, models):
    shape = shape_of(models("class").config)
    fields = {name: getattr(shape, name) for name, _ in Shape._fields_}
    for change in ({"patches": 1}, {"patches": 2**40}, {"width": 65}, {"layers": 0}, {"nvp": 2}, {"classes": -1}):
        assert library.forward_bytes(Shape(**{**fields, **change}), 1, 1) == 0, change
    for batch, threads in ((0, 1), (2**40, 1), (1, 0), (1, -1)):
        assert library.forward_bytes(shape, batch, threads) == 0


def test_weights_that_were_not_packed_here(library, models):
    model = models("unconditional")
    for at in (0, 8, 20, 72):  # the mark, the version, a size, the format
        block = copy.copy(model.blocks[0])
        packed = aligned_bytes(block.packed.nbytes)
        packed[:] = block.packed
        packed[at] ^= 255
        object.__setattr__(block, "packed", packed)
        assert refusal(library.forward, block, model.noise(2)) in (NOT_PACKED, SMALL)


def test_progress_counts_images_and_patches(library, models):
    model = models("n64")
    for batch, threads in ((40, 1), (40, 3), (1, 4)):
        watch = Watch()
        patches, labels = model.patches(batch)
        library.forward(model.blocks[0], patches, labels=labels, threads=threads, watch=watch)
        assert watch.progress[0] == batch * 63


@pytest.mark.parametrize(("batch", "threads"), [(512, 1), (512, 2), (1, 2)])
def test_cancelled_within_a_layer(library, models, batch, threads):
    """Also where threads share an image and wait for each other."""
    model = models("digits")
    patches, labels = model.patches(batch)
    watch, found = Watch(), []
    if batch == 1:
        watch.cancel[0] = 1

    def work():
        try:
            library.forward(model.blocks[0], patches, labels=labels, threads=threads, watch=watch)
        except NativeError as error:
            found.append((error.status, time.perf_counter()))

    thread = threading.Thread(target=work)
    thread.start()
    deadline = time.monotonic() + 30
    while watch.progress[0] == 0 and watch.cancel[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.0005)
    watch.cancel[0] = 1
    asked = time.perf_counter()
    thread.join()
    assert [status for status, _ in found] == [CANCELLED]
    assert found[0][1] - asked < 0.05
    assert watch.progress[0] < batch * 48
    few = patches[:2], None if labels is None else labels[:2]
    assert np.isfinite(library.forward(model.blocks[0], few[0], labels=few[1])[0]).all()


def test_memory_is_bounded_in_the_batch(library, models):
    shape = shape_of(models("digits").config)
    some, many = (library.forward_bytes(shape, batch, 2) for batch in (64, 65536))
    assert many <= some
