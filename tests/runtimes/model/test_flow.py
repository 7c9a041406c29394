"""`Flow` against the PyTorch model, its laws, and its arguments."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import tarflow_runtimes as tfr
import tarflow_sdk
from hard_cases import closed_while_sampling
from rooms import CPU_ENGINE
from tarflow_runtimes.model.noise import standard_normal

CLASSES = {
    "class": 3,
    "class_n16": 3,
    "unconditional": 0,
    "three_blocks": 3,
    "no_nvp": 3,
    "no_nvp_unconditional": 0,
    "one_head": 3,
    "tokens": 0,
}
"""Models of conftest's matrix and their number of classes."""

GUIDANCE = {
    "off": tfr.Guidance(),
    "ab": tfr.Guidance(weight=1.5, attention_temperature=0.5),
    "a": tfr.Guidance(weight=2.0, guide="a", attention_temperature=0.7),
    "b": tfr.Guidance(weight=2.0, guide="b", attention_temperature=1.4),
    "annealed": tfr.Guidance(weight=1.5, anneal=True, attention_temperature=0.5),
    "labels alone": tfr.Guidance(weight=1.0),
}


# A model without classes has nothing to compare without a temperature.
CASES = [(name, kind) for name, classes in CLASSES.items() for kind in GUIDANCE if kind != "labels alone" or classes]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_sampling_equals_pytorch(exported, flows, name, kind):
    source, flow, guidance = exported(name), flows(name), GUIDANCE[kind]
    theirs = tarflow_sdk.Guidance(**dataclasses.asdict(guidance))
    for n in (1, 3, 17):
        sample = flow.sample(n, labels=source.labels(n), seed=5, denoise=False, guidance=guidance)
        noise = standard_normal(5, 0, n, source.config.patches, source.config.patch_values)
        with torch.no_grad():
            expected = tarflow_sdk.decode(source.model, torch.from_numpy(noise), source.torch_labels(n), theirs)
        assert sample.images.dtype == np.float32
        np.testing.assert_allclose(sample.images, expected.numpy(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", CLASSES)
def test_density_equals_pytorch(exported, flows, name):
    source, flow = exported(name), flows(name)
    for n in (1, 3, 17):
        images, labels, theirs = source.images(n), source.labels(n), source.torch_labels(n)
        x = torch.from_numpy(images)
        with torch.no_grad():
            z, log_det = tarflow_sdk.encode(source.model, x, theirs)
            log_prob = tarflow_sdk.log_prob(source.model, x, theirs)
        ours = flow.encode(images, labels)
        assert [array.dtype for array in ours] == [np.float32, np.float64]
        np.testing.assert_allclose(ours[0], z.numpy(), rtol=0, atol=1e-4)
        np.testing.assert_allclose(ours[1], log_det.numpy(), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(flow.log_prob(images, labels), log_prob.numpy(), rtol=1e-5, atol=1e-5)
        expected = tarflow_sdk.denoise(source.model, x, theirs, noise_std=0.2, strength=0.5).numpy() - images
        actual = flow.denoise(images, labels, sigma=0.2, strength=0.5) - images
        assert np.linalg.norm(actual - expected) <= 1e-5 * np.linalg.norm(expected) + 1e-6
        if source.config.classes:
            posteriors = tarflow_sdk.classify(source.model, x).numpy()
            np.testing.assert_allclose(flow.classify(images), posteriors, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CLASSES)
def test_decode_inverts_encode(exported, flows, name):
    source, flow = exported(name), flows(name)
    images, labels = source.images(5), source.labels(5)
    z, _ = flow.encode(images, labels)
    np.testing.assert_allclose(flow.decode(z, labels), images, rtol=0, atol=1e-4)


def test_float16_is_close_to_float32(exported, flows):
    narrow, wide = tfr.load(exported("class", "float16").path), exported("class", "float16")
    with torch.no_grad():
        noise = standard_normal(1, 0, 4, 4, 16)
        expected = tarflow_sdk.decode(wide.model, torch.from_numpy(noise), wide.torch_labels(4)).numpy()
    with narrow:
        sample = narrow.sample(4, labels=wide.labels(4), seed=1, denoise=False).images
    np.testing.assert_allclose(sample, expected, rtol=0, atol=2e-2)
    assert np.abs(sample - expected).max() > 0


def test_bits_per_dim_is_of_images(exported, flows):
    images, labels = exported("class").images(3), exported("class").labels(3)
    with torch.no_grad():
        expected = tarflow_sdk.bits_per_dim(
            exported("class").model, torch.from_numpy(images), exported("class").torch_labels(3)
        )
    np.testing.assert_allclose(flows("class").bits_per_dim(images, labels), expected.numpy(), rtol=1e-5, atol=1e-5)
    with pytest.raises(tfr.InputError, match="tokens") as caught:
        flows("tokens").bits_per_dim(exported("tokens").images(1))
    assert "log_prob" in caught.value.hint


def test_tokens_are_no_picture(flows, tmp_path):
    sample = flows("tokens").sample(2, seed=0, denoise=False)
    assert sample.images.shape == (2, *flows("tokens").config.shape)
    for name in ("grid.png", "folder"):
        with pytest.raises(tfr.InputError, match="cannot be written as pictures") as caught:
            sample.save(tmp_path / name)
        assert ".npy" in caught.value.hint
    with pytest.raises(tfr.InputError, match="tokens, not images"):
        sample.uint8()
    (path,) = sample.save(tmp_path / "tokens.npy")
    np.testing.assert_array_equal(np.load(path), sample.images)


def test_classify_is_a_distribution(exported, flows):
    posteriors = flows("class").classify(exported("class").images(4))
    assert posteriors.shape == (4, 3)
    np.testing.assert_allclose(np.exp(posteriors).sum(axis=1), 1.0, rtol=1e-12)


def test_a_seed_repeats_and_another_does_not(flows):
    flow = flows("class")
    first = flow.sample(3, labels=[0, 1, 2], seed=9, guidance=1.0)
    again = flow.sample(3, labels=[0, 1, 2], seed=9, guidance=1.0)
    other = flow.sample(3, labels=[0, 1, 2], seed=10, guidance=1.0)
    np.testing.assert_array_equal(first.images, again.images)
    assert np.abs(first.images - other.images).max() > 0.1
    assert first.seed == 9


def test_without_a_seed_one_is_drawn_and_reported(flows):
    flow = flows("class")
    samples = [flow.sample(1) for _ in range(2)]
    assert samples[0].seed != samples[1].seed
    np.testing.assert_array_equal(flow.sample(1, seed=samples[0].seed).images, samples[0].images)


def test_an_image_does_not_depend_on_its_batch(flows):
    flow = flows("class_n16")
    labels = [i % 3 for i in range(40)]
    whole = flow.sample(40, labels=labels, seed=2, guidance=1.0).images
    few = flow.sample(5, labels=labels[:5], seed=2, guidance=1.0).images
    np.testing.assert_allclose(few, whole[:5], rtol=0, atol=1e-5)
    later = flow.sample(6, labels=labels[7:13], seed=2, first_index=7, guidance=1.0).images
    np.testing.assert_allclose(later, whole[7:13], rtol=0, atol=1e-5)
    chunked = flow.sample(40, labels=labels, seed=2, guidance=1.0, batch_size=7).images
    np.testing.assert_allclose(chunked, whole, rtol=0, atol=1e-5)


MIXED = [GUIDANCE[kind] for kind in ("off", "ab", "a", "labels alone", "annealed", "b")] * 2


@pytest.mark.parametrize("name", ["class_n16", "unconditional", "no_nvp"])
@pytest.mark.parametrize("plan", [None, tfr.Parallel(window=5, tolerance=0.0)])
def test_mixed_images_in_one_batch_equal_single_ones(flows, name, plan):
    """Twelve images, each with its own seed, label and guidance."""
    flow = flows(name)
    classes = flow.config.classes
    labels = [[0, 2, None, 1, 2, 0, None, 1, 0, 2, 1, 0][i] for i in range(12)] if classes else None
    guidance = MIXED if classes else [one if one != GUIDANCE["labels alone"] else GUIDANCE["off"] for one in MIXED]
    seeds = [7 * i for i in range(12)]
    batch = flow.sample(12, labels=labels, seed=seeds, guidance=guidance, plan=plan, denoise=False)
    assert batch.seed == tuple(seeds)
    for i in range(12):
        label = None if labels is None else [labels[i]]
        weight = guidance[i] if label != [None] or guidance[i].attention_temperature != 1 else 0.0
        alone = flow.sample(1, labels=label, seed=seeds[i], guidance=weight, plan=plan, denoise=False)
        np.testing.assert_allclose(batch.images[i], alone.images[0], rtol=0, atol=1e-6)
    z, one_each = flow.encode(batch.images, labels)[0], [float(one.weight) for one in guidance]
    if classes:
        together = flow.decode(z, labels, guidance=one_each)
        np.testing.assert_allclose(together[3], flow.decode(z[3:4], labels[3:4], guidance=1.0)[0], rtol=0, atol=1e-6)


def test_noise_replaces_the_seed(exported, flows):
    flow, source = flows("class"), exported("class")
    noise = source.latents(3)
    sample = flow.sample(3, labels=[0, 1, 2], noise=noise, denoise=False)
    assert sample.seed is None
    np.testing.assert_array_equal(sample.images, flow.decode(noise, [0, 1, 2]))
    assert np.array_equal(noise, source.latents(3)), "the caller's noise was written to"


def test_sampling_denoises_with_the_labels(flows):
    flow = flows("class")
    noisy = flow.sample(4, labels=[0, 1, 2, None], seed=0, denoise=False).images
    expected = flow.denoise(noisy, [0, 1, 2, None])
    np.testing.assert_allclose(flow.sample(4, labels=[0, 1, 2, None], seed=0).images, expected, rtol=0, atol=1e-6)
    assert np.abs(expected - noisy).max() > 1e-3


def test_every_way_to_write_a_label(flows):
    flow = flows("class")
    expected = flow.sample(4, labels=[2, 0, -1, None], seed=0).images
    for labels in (["wild", "cat", None, -1], np.array([2, 0, -1, -1]), (np.int32(2), "cat", -1, None)):
        np.testing.assert_array_equal(flow.sample(4, labels=labels, seed=0).images, expected)
    null = flow.sample(2, seed=0).images
    np.testing.assert_array_equal(flow.sample(2, labels=[None, None], seed=0).images, null)
    assert flow.class_names == ("cat", "dog", "wild")
    assert flow.engine_name == CPU_ENGINE


SAMPLE_ERRORS = {
    "n zero": ({"n": 0}, "n must be an integer of at least 1"),
    "n a float": ({"n": 1.5}, "n must be an integer"),
    "n a bool": ({"n": True}, "n must be an integer"),
    "seed negative": ({"seed": -1}, "seed must be an integer of at least 0 and below 2^64"),
    "seed too large": ({"seed": 2**64}, "seed"),
    "first_index negative": ({"first_index": -1}, "first_index"),
    "indices past the end": ({"first_index": 2**64 - 1, "n": 2}, "2^64"),
    "seed and noise": ({"seed": 1, "noise": np.zeros((2, 4, 16), np.float32)}, "both seed and noise"),
    "noise of another shape": ({"noise": np.zeros((3, 4, 16), np.float32)}, "shape [2, 4, 16], got [3, 4, 16]"),
    "noise of another rank": ({"noise": np.zeros((2, 64), np.float32)}, "shape [2, 4, 16], got [2, 64]"),
    "noise of another dtype": ({"noise": np.zeros((2, 4, 16))}, "float32, got float64"),
    "noise not an array": ({"noise": [[0.0]]}, "NumPy array, got list"),
    "noise not finite": ({"noise": np.full((2, 4, 16), np.nan, np.float32)}, "not finite"),
    "guidance negative": ({"guidance": -0.5, "labels": [0, 1]}, "guidance must be a finite number >= 0"),
    "guidance not finite": ({"guidance": float("inf"), "labels": [0, 1]}, "guidance must be a finite"),
    "guidance a word": ({"guidance": "much", "labels": [0, 1]}, "guidance must be a number"),
    "one guidance too few": ({"guidance": [1.0], "labels": [0, 1]}, "1 guidance values for 2 images"),
    "guidance of one image negative": ({"guidance": [1.0, -1.0], "labels": [0, 1]}, "finite number >= 0"),
    "seeds too few": ({"seed": [1]}, "1 seeds for 2 images"),
    "a seed too large": ({"seed": [1, 2**64]}, "below 2^64"),
    "seeds and first_index": ({"seed": [1, 2], "first_index": 3}, "one was given per image"),
    "guidance of nothing": ({"guidance": 1.0}, "every label is the null class"),
    "guidance of null labels": ({"guidance": 1.0, "labels": [None, -1]}, "every label is the null class"),
    "too few labels": ({"labels": [0]}, "1 labels for 2 images"),
    "one label": ({"labels": 0}, "one label per image"),
    "labels as a word": ({"labels": "cat"}, "one label per image"),
    "label too large": ({"labels": [0, 3]}, "label 3"),
    "label too small": ({"labels": [0, -2]}, "label -2"),
    "label a float": ({"labels": [0, 1.0]}, "label 1.0"),
    "label a bool": ({"labels": [0, True]}, "label True"),
    "label of another name": ({"labels": ["cat", "cow"]}, "unknown label 'cow'"),
    "batch_size zero": ({"batch_size": 0}, "batch_size"),
}


@pytest.mark.parametrize(("options", "message"), SAMPLE_ERRORS.values(), ids=SAMPLE_ERRORS.keys())
def test_sample_refuses(flows, options, message):
    with pytest.raises(tfr.InputError) as caught:
        flows("class").sample(**{"n": 2} | options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_a_model_cannot_do_names_the_remedy(exported, flows):
    flow, source = flows("no_nvp_unconditional"), exported("no_nvp_unconditional")
    with pytest.raises(tfr.InputError, match="uniform noise") as caught:
        flow.sample(1)
    assert "denoise=False" in caught.value.hint
    assert "--no-denoise" in caught.value.hint
    with pytest.raises(tfr.InputError, match="uniform noise") as caught:
        flow.denoise(source.images(1))
    assert "sigma" in caught.value.hint
    assert "--sigma" in caught.value.hint
    with pytest.raises(tfr.InputError, match="no classes"):
        flow.sample(1, labels=[0], denoise=False)
    with pytest.raises(tfr.InputError, match="no classes"):
        flow.classify(source.images(1))
    with pytest.raises(tfr.InputError, match="no classes") as caught:
        flow.sample(1, guidance=1.0, denoise=False)
    assert "attention_temperature" in caught.value.hint
    with pytest.raises(tfr.InputError, match="no label names"):
        flows("class_n16").sample(1, labels=["cat"])


GUIDANCE_ERRORS = {
    "guide": ({"guide": "c"}, "guide must be 'a', 'b' or 'ab'"),
    "temperature": ({"attention_temperature": 0.0}, "attention_temperature must be a finite number > 0"),
    "weight": ({"weight": float("nan")}, "guidance must be a finite number >= 0"),
    "anneal": ({"anneal": "yes"}, "anneal must be true or false"),
}


@pytest.mark.parametrize(("fields", "message"), GUIDANCE_ERRORS.values(), ids=GUIDANCE_ERRORS.keys())
def test_guidance_refuses(fields, message):
    with pytest.raises(tfr.InputError) as caught:
        tfr.Guidance(**fields)
    assert message in str(caught.value)


@pytest.mark.parametrize("method", ["encode", "log_prob", "bits_per_dim", "denoise", "classify"])
@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 3, 8, 8), np.float32), "shape [B, 1, 8, 8]"),
        (np.zeros((1, 8, 8), np.float32), "shape [B, 1, 8, 8]"),
        (np.zeros((0, 1, 8, 8), np.float32), "shape [B, 1, 8, 8]"),
        (np.zeros((2, 1, 8, 8)), "float32, got float64"),
        (np.full((2, 1, 8, 8), np.inf, np.float32), "not finite"),
        ("image.png", "NumPy array"),
    ],
)
def test_images_that_do_not_fit(flows, method, images, message):
    with pytest.raises(tfr.InputError) as caught:
        getattr(flows("class"), method)(images)
    assert message in str(caught.value)


@pytest.mark.parametrize("options", [{"sigma": 0.0}, {"sigma": -1.0}, {"sigma": float("nan")}, {"strength": -1.0}])
def test_denoise_refuses(exported, flows, options):
    with pytest.raises(tfr.InputError, match=next(iter(options))):
        flows("class").denoise(exported("class").images(1), **options)


def test_progress_counts_to_the_end(flows):
    flow = flows("class_n16")
    heard: list[tfr.Step] = []
    flow.sample(20, seed=0, batch_size=10, on_step=heard.append, denoise=False)
    steps = [step.step for step in heard]
    total = 2 * 2 * 15
    assert steps == sorted(set(steps))
    assert steps[-1] == total
    assert {step.total for step in heard} == {total}
    assert [step.block for step in heard if step.step in (15, 30, 45, 60)] == [1, 0, 1, 0]
    assert all(step.block == 1 - (step.step - 1) // 15 % 2 for step in heard)


def test_one_image_reports_every_step(flows):
    heard: list[tfr.Step] = []
    flows("class", engine="ort-cpu").sample(1, seed=0, on_step=heard.append)
    assert [(step.block, step.step, step.total) for step in heard] == [
        (1, 1, 6), (1, 2, 6), (1, 3, 6), (0, 4, 6), (0, 5, 6), (0, 6, 6)
    ]  # fmt: skip


@pytest.mark.parametrize("n", [1, 20])
def test_a_cancelled_run_leaves_the_flow_usable(flows, n):
    flow = flows("class_n16")
    expected = flow.sample(n, seed=0).images
    heard = []

    def stop(step: tfr.Step) -> bool:
        heard.append(step)
        return len(heard) < 2  # of two blocks at least two reports come, however the parts are shared out

    threads = threading.active_count()
    with pytest.raises(tfr.Cancelled):
        flow.sample(n, seed=0, on_step=stop)
    assert len(heard) == 2
    assert threading.active_count() == threads
    np.testing.assert_array_equal(flow.sample(n, seed=0).images, expected)


def test_returning_nothing_or_zero_does_not_cancel(flows):
    flows("class").sample(1, seed=0, on_step=lambda _: None)
    flows("class").sample(1, seed=0, on_step=lambda _: 0)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_error_in_the_callback_passes_through(flows, error):
    flow = flows("class_n16")
    expected = flow.sample(20, seed=0).images

    def fail(_: tfr.Step) -> None:
        raise error

    threads = threading.active_count()
    with pytest.raises(error):
        flow.sample(20, seed=0, on_step=fail)
    assert threading.active_count() == threads
    np.testing.assert_array_equal(flow.sample(20, seed=0).images, expected)


INTERRUPTED = """
import _thread, sys, threading
import tarflow_runtimes as tfr
with tfr.load(sys.argv[1]) as flow:
    expected = flow.sample(20, seed=0).images
    heard = []
    def interrupt(step):
        heard.append(step)
        if len(heard) == 2:
            _thread.interrupt_main()
    try:
        flow.sample(20, seed=0, on_step=interrupt)
    except KeyboardInterrupt:
        print("interrupted", threading.active_count(), (flow.sample(20, seed=0).images == expected).all())
"""


def test_ctrl_c_ends_the_run_and_its_threads(exported):
    command = [sys.executable, "-c", INTERRUPTED, str(exported("class_n16").path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout == "interrupted 1 True\n", done.stderr


def test_threads_may_share_a_flow(exported):
    source = exported("class_n16")
    images, labels = source.images(3), source.labels(3)
    with tfr.load(source.path) as flow:
        calls = [
            lambda: flow.sample(9, labels=[i % 3 for i in range(9)], seed=1, guidance=1.0).images,
            lambda: flow.sample(2, seed=2).images,
            lambda: flow.encode(images, labels)[0],
            lambda: flow.denoise(images, labels),
            lambda: flow.classify(images),
        ]
        with ThreadPoolExecutor(4) as pool:
            results = [pool.submit(call) for _ in range(6) for call in calls]
            found = [result.result() for result in results]
        expected = [call() for call in calls]
    for i, array in enumerate(found):
        np.testing.assert_array_equal(array, expected[i % len(calls)])


def test_closing_while_another_thread_runs(exported):
    source = exported("class_n16")
    flow = tfr.load(source.path)
    outcome = closed_while_sampling(flow)
    assert len(outcome) == 1


def test_the_shipped_bundle_is_named_when_it_is_missing(monkeypatch):
    monkeypatch.setattr("tarflow_runtimes.model.flow.SHIPPED", "none.tarflow")
    with pytest.raises(tfr.BundleError, match="ships with the package"):
        tfr.load()
