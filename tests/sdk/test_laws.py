"""The laws of the model: what must hold whatever the weights are."""

import dataclasses
import itertools
import math

import pytest
import torch
from torch import Tensor

from tarflow_sdk import (
    NULL_LABEL,
    FlowConfig,
    Guidance,
    TarFlow,
    TarFlowError,
    bits_per_dim,
    classify,
    decode,
    denoise,
    encode,
    inverse_block,
    log_prob,
)
from tarflow_sdk._inverse import empty_caches, step
from tarflow_sdk.testing import random_model, tiny_config, tiny_token_config

CONFIGS = {
    "classes": tiny_config(),
    "unconditional": tiny_config(classes=0),
    "volume preserving": tiny_config(nvp=False),
    "volume preserving, unconditional": tiny_config(nvp=False, classes=0),
    "three blocks, rgb": tiny_config(blocks=3, layers=1, image_channels=3, patch_size=2),
    "one block, five channels": tiny_config(blocks=1, image_channels=5),
    "tokens": tiny_token_config(),
    "tokens with classes": tiny_token_config(tokens=7, blocks=3, classes=2),
    "volume preserving tokens": tiny_token_config(token_values=2, nvp=False),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def some_images(config: FlowConfig, count: int = 3, seed: int = 0) -> Tensor:
    return torch.rand((count, *config.shape), generator=torch.Generator().manual_seed(seed)) * 2 - 1


def some_latents(config: FlowConfig, count: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(count, config.patches, config.patch_values, generator=torch.Generator().manual_seed(seed))


def some_labels(config: FlowConfig, count: int = 3) -> Tensor | None:
    """Every class in turn, with null labels between them."""
    return torch.arange(count) % (config.classes + 1) - 1 if config.classes else None


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


# -- the density -------------------------------------------------------------------------------------------------


@every_config
def test_decode_inverts_encode(config: FlowConfig) -> None:
    model, images, labels = random_model(config), some_images(config), some_labels(config)
    with torch.no_grad():
        u, _ = encode(model, images, labels)
    assert difference(decode(model, u, labels), images) < 1e-5
    z = some_latents(config)
    with torch.no_grad():
        u, _ = encode(model, decode(model, z, labels), labels)
    assert difference(u, z) < 1e-4


@every_config
def test_the_inverse_is_exact_in_float64(config: FlowConfig) -> None:
    model, images, labels = random_model(config).double(), some_images(config).double(), some_labels(config)
    with torch.no_grad():
        u, log_det = encode(model, images, labels)
    assert u.dtype == log_det.dtype == torch.float64
    assert difference(decode(model, u, labels), images) < 1e-13


def test_the_prior_variance_takes_part() -> None:
    """Leaving sqrt(var) out of both ways would invert as well: the scale itself is checked."""
    model = random_model(tiny_config(nvp=False))
    images = some_images(model.config)
    with torch.no_grad():
        z, log_det = model(images)
        u, full_log_det = encode(model, images)
    assert difference(model.var, torch.ones(1)) > 0.1
    torch.testing.assert_close(u * model.var.sqrt(), z)
    torch.testing.assert_close(full_log_det, log_det - 0.5 * model.var.log().sum())


@every_config
def test_log_det_is_the_jacobians(config: FlowConfig) -> None:
    config = dataclasses.replace(config, layers=1)
    model, labels = random_model(config).double(), some_labels(config, 2)
    images = some_images(config, 2).double()
    log_det = encode(model, images, labels)[1].detach()
    for i in range(2):
        one = None if labels is None else labels[i : i + 1]
        jacobian = torch.autograd.functional.jacobian(lambda x, one=one: encode(model, x, one)[0], images[i : i + 1])
        assert isinstance(jacobian, Tensor)
        _, expected = torch.linalg.slogdet(jacobian.reshape(config.dims, config.dims))
        assert abs(float(log_det[i] - expected)) < 1e-10 * max(1.0, abs(float(expected)))


@every_config
def test_log_prob_and_bits_per_dim_are_their_formulas(config: FlowConfig) -> None:
    model, images, labels = random_model(config), some_images(config), some_labels(config)
    with torch.no_grad():
        u, log_det = encode(model, images, labels)
        normal = torch.distributions.Normal(0.0, 1.0).log_prob(u).sum(dim=(1, 2))
        torch.testing.assert_close(log_prob(model, images, labels), normal + log_det)
        if config.data == "tokens":
            with pytest.raises(TarFlowError, match="bits/dim is defined for images") as caught:
                bits_per_dim(model, images, labels)
            assert "log_prob" in caught.value.hint
            return
        # A change of variables to pixels: [-1, 1) is 128 times narrower than [0, 256).
        log_prob_of_pixels = normal + log_det - config.dims * math.log(128)
        expected = -log_prob_of_pixels / (config.dims * math.log(2))
        torch.testing.assert_close(bits_per_dim(model, images, labels), expected)


def test_uniform_images_have_eight_bits_under_the_uniform_density() -> None:
    """-log2 of the density 1/2 per dim on [-1, 1] is 1 bit; + 7 is the 8 bits of a pixel."""
    config = tiny_config()
    log_uniform = -config.dims * math.log(2)
    assert -log_uniform / (config.dims * math.log(2)) + 7 == 8.0


@every_config
def test_denoise_follows_the_finite_difference_gradient(config: FlowConfig) -> None:
    model, labels = random_model(config).double(), some_labels(config, 2)
    images = some_images(config, 2).double()
    moved = denoise(model, images, labels, noise_std=0.2, strength=0.5) - images
    score = moved / (0.5 * 0.2**2)
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    h = 1e-5
    with torch.no_grad():
        ahead, behind = (log_prob(model, images + s * h * direction, labels) for s in (1, -1))
    expected = (ahead - behind) / (2 * h)
    torch.testing.assert_close((score * direction).flatten(1).sum(dim=1), expected, rtol=1e-7, atol=1e-7)


def test_denoise_uses_the_models_sigma_or_says_that_it_is_unknown() -> None:
    config = tiny_config(noise_std=0.3)
    images = some_images(config)
    model = random_model(config)
    torch.testing.assert_close(denoise(model, images), denoise(model, images, noise_std=0.3))
    for unknown in (tiny_config(noise_std=None), tiny_config(noise="uniform", noise_std=None)):
        with pytest.raises(TarFlowError, match="cannot denoise") as caught:
            denoise(random_model(unknown), images)
        assert "noise_std" in caught.value.hint


# -- classes -----------------------------------------------------------------------------------------------------


def test_classify_is_bayes_rule() -> None:
    model = random_model(tiny_config())
    images = some_images(model.config, 4)
    posteriors = classify(model, images)
    assert posteriors.shape == (4, 3)
    torch.testing.assert_close(posteriors.exp().sum(dim=1), torch.ones(4))
    with torch.no_grad():
        likelihoods = torch.stack([log_prob(model, images, torch.full((4,), c)) for c in range(3)], dim=1)
    assert difference(posteriors[:, 0] - posteriors[:, 1], likelihoods[:, 0] - likelihoods[:, 1]) < 1e-4
    with pytest.raises(TarFlowError, match="no classes"):
        classify(random_model(tiny_config(classes=0)), images)


def test_the_null_class_is_the_mean_row() -> None:
    model = random_model(tiny_config())
    images, z = some_images(model.config), some_latents(model.config)
    null = torch.full((3,), NULL_LABEL)
    mean = random_model(tiny_config())
    for block in mean.flow_blocks:
        assert block.class_embed is not None
        block.class_embed.data[:] = block.class_embed.data.mean(dim=0, keepdim=True)
    with torch.no_grad():
        torch.testing.assert_close(encode(model, images)[0], encode(mean, images, torch.tensor([0, 1, 2]))[0])
        torch.testing.assert_close(encode(model, images, null), encode(model, images))
        mixed = encode(model, images, torch.tensor([0, NULL_LABEL, 2]))[0]
    torch.testing.assert_close(mixed[1:2], encode(model, images[1:2])[0].detach())
    assert difference(mixed[0], encode(model, images)[0][0]) > 1e-3
    torch.testing.assert_close(decode(model, z, null), decode(model, z))


# -- structure ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, 1])
@pytest.mark.parametrize("nvp", [True, False])
@pytest.mark.parametrize("tiny", [tiny_config(patch_size=2), tiny_token_config()], ids=["image", "tokens"])
def test_blocks_are_causal_in_their_order(k: int, nvp: bool, tiny: FlowConfig) -> None:
    config = dataclasses.replace(tiny, nvp=nvp, layers=1)
    block = random_model(config).flow_blocks[k]
    x = some_latents(config, 1)
    order = list(range(config.patches))[:: -1 if k else 1]
    with torch.no_grad():
        z, _ = block(x)
        for place, patch in enumerate(order):
            changed = x.clone()
            changed[:, patch] += 1.0
            moved = (block(changed)[0] - z).abs().amax(dim=(0, 2))
            assert not moved[order[:place]].any(), f"patch {patch} reaches back"
            assert (moved[order[place + 1 :]] > 1e-6).all(), f"patch {patch} does not reach forward"
            # A patch moves its own noise by its scale alone: 1 for the first patch and volume preserving blocks.
            if place == 0 or not nvp:
                assert abs(float(moved[patch]) - 1.0) < 1e-5


@every_config
def test_stepping_with_caches_equals_the_whole_sequence(config: FlowConfig) -> None:
    """(a, b) of every step, read off the inverse one patch at a time, against one causal forward pass."""
    labels = some_labels(config)
    for block in random_model(config).flow_blocks:
        x = some_latents(config)
        with torch.no_grad():
            z, log_det = block(x, labels)
            rows = block.class_rows(labels)
            x, z = block.in_order(x), block.in_order(z)
            caches, total = empty_caches(block, 3, config.patches, x), torch.zeros(3)
            for i in range(config.patches - 1):
                a, b, caches = step(
                    block, x[:, i : i + 1], i, class_rows=rows, temperature=torch.ones(3), caches=caches
                )
                assert difference((x[:, i + 1] - b[:, 0]) * torch.exp(-a[:, 0]), z[:, i + 1]) < 1e-5
                total -= a.sum(dim=(1, 2))
        assert difference(total, log_det) < 1e-4


def test_the_cache_is_explicit_state() -> None:
    """A step changes nothing but what it returns, so that the same step may be taken twice."""
    config = tiny_config()
    block = random_model(config).flow_blocks[0]
    x = some_latents(config)
    caches = empty_caches(block, 3, config.patches, x)
    with torch.no_grad():
        first = step(block, x[:, :1], 0, class_rows=block.class_rows(None), temperature=torch.ones(3), caches=caches)
        again = step(block, x[:, :1], 0, class_rows=block.class_rows(None), temperature=torch.ones(3), caches=caches)
    assert not any(tensor.any() for cache in caches for tensor in cache)
    assert torch.equal(first[0], again[0])
    assert first[2][0].key[:, :, 0].any()
    assert not first[2][0].key[:, :, 1:].any()


@every_config
def test_batches_do_not_mix(config: FlowConfig) -> None:
    model = random_model(config)
    images, z, labels = some_images(config, 5), some_latents(config, 5), some_labels(config, 5)
    guidance = Guidance(weight=1.5, attention_temperature=0.8)
    with torch.no_grad():
        u, log_det = encode(model, images, labels)
        drawn, denoised = decode(model, z, labels, guidance), denoise(model, images, labels)
        for i in range(5):
            one = None if labels is None else labels[i : i + 1]
            alone = slice(i, i + 1)
            assert difference(encode(model, images[alone], one)[0], u[alone]) < 1e-5
            assert difference(encode(model, images[alone], one)[1], log_det[alone]) < 1e-4
            assert difference(decode(model, z[alone], one, guidance), drawn[alone]) < 1e-4
            assert difference(denoise(model, images[alone], one), denoised[alone]) < 1e-5


def test_patchify_is_row_major_and_channel_first() -> None:
    config = tiny_config(image_channels=2)
    images = torch.arange(2 * 64.0).reshape(1, 2, 8, 8)
    model = random_model(config)
    patches = model.patchify(images)
    assert torch.equal(patches[0, 1], images[0, :, :4, 4:].flatten())
    assert torch.equal(patches[0, 2], images[0, :, 4:, :4].flatten())
    assert torch.equal(model.unpatchify(patches), images)


def test_tokens_are_used_as_they_are() -> None:
    config = tiny_token_config()
    model, tokens = random_model(config), some_images(config)
    assert model.patchify(tokens) is tokens
    assert model.unpatchify(tokens) is tokens
    assert torch.equal(model(tokens)[0], encode(model, tokens)[0])


def test_half_precision_norms_run_in_float32_and_float64_stays() -> None:
    config = tiny_config()
    images = some_images(config)
    exact, _ = random_model(config).double()(images.double())
    assert exact.dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, log_det = random_model(config)(images)
    assert z.dtype == log_det.dtype == torch.float32
    assert difference(z.double(), exact) < 0.1


# -- guidance ----------------------------------------------------------------------------------------------------


def guided_by_hand(model: TarFlow, z: Tensor, labels: Tensor | None, guidance: Guidance) -> Tensor:
    """The inverse by its definition: whole sequences instead of caches, and one pass per branch."""

    def scale_and_shift(
        block_index: int, x: Tensor, labels: Tensor | None, temperature: float
    ) -> tuple[Tensor, Tensor]:
        block = model.flow_blocks[block_index]
        h = block.proj_in(x) + block.in_order(block.pos_embed, 0)[: x.shape[1]]
        rows = block.class_rows(labels)
        h = h if rows is None else h + rows
        for layer in block.attn_blocks:
            q, k, v = layer.attention.project(h)  # type: ignore[union-attr, operator]
            logits = (q @ k.mT) / math.sqrt(model.config.head_dim) / temperature
            logits = logits.masked_fill(torch.ones_like(logits).triu(1).bool(), -torch.inf)
            h = h + layer.attention.merge(logits.softmax(-1) @ v)  # type: ignore[union-attr, operator]
            h = h + layer.mlp(h)  # type: ignore[operator]
        a, b = block.scale_and_shift(h[:, -1:])
        return a, b

    last = model.config.patches - 1
    z = z * model.var.sqrt()
    for k in reversed(range(model.config.blocks)):
        z = model.flow_blocks[k].in_order(z)
        x = z[:, :1]
        for i in range(last):
            a, b = scale_and_shift(k, x, labels, 1.0)
            a_u, b_u = scale_and_shift(k, x, None, guidance.attention_temperature)
            g = guidance.weight * ((i + 1) / last if guidance.anneal else 1.0)
            a = a + g * (a - a_u) if "a" in guidance.guide else a
            b = b + g * (b - b_u) if "b" in guidance.guide else b
            x = torch.cat([x, z[:, i + 1 : i + 2] * torch.exp(a) + b], dim=1)
        z = model.flow_blocks[k].in_order(x)
    return model.unpatchify(z)


GUIDANCES = [
    Guidance(),
    Guidance(weight=2.0),
    Guidance(weight=2.0, guide="a"),
    Guidance(weight=2.0, guide="b"),
    Guidance(weight=2.0, anneal=True),
    Guidance(weight=1.0, attention_temperature=0.6),
    Guidance(weight=1.0, attention_temperature=1.7, anneal=True, guide="b"),
]


@pytest.mark.parametrize("guidance", GUIDANCES, ids=str)
@every_config
def test_guidance_is_its_definition(config: FlowConfig, guidance: Guidance) -> None:
    model, z, labels = random_model(config), some_latents(config), some_labels(config)
    with torch.no_grad():
        expected = guided_by_hand(model, z, labels, guidance)
    assert difference(decode(model, z, labels, guidance), expected) < 1e-4


def test_guidance_that_does_nothing() -> None:
    model = random_model(tiny_config())
    z, labels = some_latents(model.config), torch.tensor([0, 1, 2])
    plain = decode(model, z, labels)
    assert torch.equal(decode(model, z, labels, Guidance(weight=0.0, attention_temperature=0.5)), plain)
    assert torch.equal(decode(model, z, labels, Guidance(weight=3.0, guide="")), plain)
    # Without labels both branches are the null class, and without a temperature they agree.
    assert difference(decode(model, z, None, Guidance(weight=3.0)), decode(model, z)) < 1e-5


def test_guidance_that_does_something_is_different_each_time() -> None:
    model = random_model(tiny_config())
    z, labels = some_latents(model.config), torch.tensor([0, 1, 2])
    drawn = [decode(model, z, labels, guidance) for guidance in GUIDANCES]
    for one, other in itertools.combinations(drawn, 2):
        assert difference(one, other) > 1e-3
    unconditional = random_model(tiny_config(classes=0))
    tempered = decode(unconditional, z, None, Guidance(weight=1.0, attention_temperature=0.5))
    assert difference(tempered, decode(unconditional, z)) > 1e-3


def test_weights_of_the_steps() -> None:
    g = Guidance(weight=3.0, anneal=True).weights(4)
    assert g[:, :3].tolist() == [[1.0, 2.0, 3.0]] * 2  # w (i + 1) / (N - 1): the last step has the full weight
    assert Guidance(weight=3.0, guide="a").weights(3).tolist() == [[3.0] * 3, [0.0] * 3]
    assert Guidance(weight=3.0, guide="b").weights(3).tolist() == [[0.0] * 3, [3.0] * 3]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weight": -1.0}, "guidance must be a finite number >= 0"),
        ({"weight": math.nan}, "guidance must be"),
        ({"weight": math.inf}, "guidance must be"),
        ({"attention_temperature": 0.0}, "temperature must be positive"),
        ({"attention_temperature": math.nan}, "temperature must be positive"),
        ({"guide": "c"}, "guide must be"),
    ],
)
def test_guidance_out_of_range(fields: dict[str, float], message: str) -> None:
    with pytest.raises(TarFlowError, match=message):
        Guidance(**fields)  # type: ignore[arg-type]


# -- input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("classes", "labels", "message"),
    [
        (3, [0, 1, 3], r"in 0\.\.2, or -1 for the null class; got 0\.\.3"),
        (3, [0, -2, 1], "in 0..2"),
        (3, [0, 1], "one for each image"),
        (3, [0.0, 1.0, 2.0], "int64"),
        (0, [0, 0, 0], "no classes"),
    ],
)
def test_labels_that_do_not_fit(classes: int, labels: list[int], message: str) -> None:
    model = random_model(tiny_config(classes=classes))
    for call in (
        lambda y: encode(model, some_images(model.config), y),
        lambda y: decode(model, some_latents(model.config), y),
    ):
        with pytest.raises(TarFlowError, match=message):
            call(torch.tensor(labels))


def test_shapes_that_do_not_fit() -> None:
    model = random_model(tiny_config())
    for images in (torch.zeros(1, 3, 8, 8), torch.zeros(1, 1, 16, 16), torch.zeros(1, 8, 8)):
        with pytest.raises(TarFlowError, match=r"images must be \[B, 1, 8, 8\]"):
            encode(model, images)
    for z in (torch.zeros(1, 4, 15), torch.zeros(1, 16, 4), torch.zeros(4, 16)):
        with pytest.raises(TarFlowError, match=r"latents must be \[B, 4, 16\]"):
            decode(model, z)
    tokens = random_model(tiny_token_config())
    for data in (torch.zeros(1, 3, 5), torch.zeros(5, 3), torch.zeros(1, 1, 5, 3)):
        with pytest.raises(TarFlowError, match=r"tokens must be \[B, 5, 3\]"):
            encode(tokens, data)
        with pytest.raises(TarFlowError, match=r"latents must be \[B, 5, 3\]"):
            decode(tokens, data)


def test_one_block_inverts_under_guidance_only_where_it_is_off() -> None:
    block = random_model(tiny_config()).flow_blocks[0]
    x, labels = some_latents(tiny_config()), torch.tensor([0, 1, 2])
    with torch.no_grad():
        z, _ = block(x, labels)
    assert difference(inverse_block(block, z, labels), x) < 1e-5
    assert difference(inverse_block(block, z, labels, Guidance(weight=1.0)), x) > 1e-3
