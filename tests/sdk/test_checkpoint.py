"""Checkpoints: what is written is read again, and every kind of bad file is one clear error."""

import dataclasses
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tarflow_sdk import CheckpointError, FlowConfig, TarFlow, load_checkpoint, save_checkpoint
from tarflow_sdk.testing import random_model, tiny_config, tiny_token_config

NAME = "tiny_model_4_64_2_2_0.10.pth"
State = dict[str, Tensor]


def same_weights(ours: TarFlow, theirs: TarFlow) -> bool:
    a, b = ours.state_dict(), theirs.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def original_state(config: FlowConfig) -> State:
    """The flat state dict as the original code saves it."""
    masks = {f"blocks.{k}.attn_mask": torch.ones(config.patches, config.patches).tril() for k in range(config.blocks)}
    return {**random_model(config).state_dict(), **masks}


CONFIGS = {
    "classes": tiny_config(labels=("cat", "dog", "bird")),
    "unconditional": tiny_config(classes=0, noise_std=None),
    "uniform": tiny_config(noise="uniform", noise_std=None),
    "volume preserving": tiny_config(nvp=False, blocks=3),
    "rgb": tiny_config(image_channels=3, patch_size=2, head_dim=64, layers=1),
    "five channels": tiny_config(image_channels=5),
    "tokens": tiny_token_config(classes=2),
    "volume preserving tokens": tiny_token_config(tokens=4, nvp=False),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_safetensors_keeps_everything(config: FlowConfig, tmp_path: Path) -> None:
    model = random_model(config)
    save_checkpoint(model, tmp_path / "model.safetensors")
    loaded = load_checkpoint(tmp_path / "model.safetensors")
    assert loaded.config == config
    assert same_weights(model, loaded)
    assert not [a for a in loaded.assumptions if "noise_std" not in a]
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("suffix", [".pth", ".pt"])
def test_torch_files_keep_the_weights(config: FlowConfig, suffix: str, tmp_path: Path) -> None:
    model = random_model(config)
    save_checkpoint(model, tmp_path / f"model{suffix}")
    state = torch.load(tmp_path / f"model{suffix}", weights_only=True)
    assert torch.equal(state["blocks.1.attn_mask"], torch.ones(config.patches, config.patches).tril())
    loaded = load_checkpoint(
        tmp_path / f"model{suffix}",
        tokens=config.data == "tokens",
        image_channels=config.image_channels,
        head_dim=config.head_dim,
    )
    assert loaded.config == dataclasses.replace(config, noise="gaussian", noise_std=None, labels=None)
    assert same_weights(model, loaded)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_as_float32(suffix: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = random_model(tiny_config(nvp=False))
    save_checkpoint(model, tmp_path / f"model{suffix}", dtype=dtype)
    loaded = load_checkpoint(tmp_path / f"model{suffix}", head_dim=32)
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.float32}
    assert torch.equal(loaded.var, model.var)
    weight = model.flow_blocks[0].proj_in.weight
    assert torch.equal(loaded.flow_blocks[0].proj_in.weight, weight.to(dtype).float())


def test_half_precision_that_overflows_is_refused(tmp_path: Path) -> None:
    model = random_model(tiny_config())
    model.flow_blocks[0].pos_embed.data[1, 2] = 1e6
    with pytest.raises(CheckpointError, match=r"blocks\.0\.pos_embed .* not finite in float16"):
        save_checkpoint(model, tmp_path / "model.safetensors", dtype=torch.float16)
    assert not list(tmp_path.iterdir())


def test_the_file_name_says_what_shapes_do_not(tmp_path: Path) -> None:
    config = tiny_config(image_channels=4, patch_size=2, head_dim=64)  # D = 16, which is also 1 x 4 x 4
    torch.save(original_state(config), tmp_path / "my_data_model_2_64_2_2_0.10.pth")
    loaded = load_checkpoint(tmp_path / "my_data_model_2_64_2_2_0.10.pth")
    assert loaded.config == config
    assert loaded.assumptions == ("head_dim 64, the original code's",)
    torch.save(original_state(config), tmp_path / "my_data_model_2_64_2_2_uniform.pth")
    assert load_checkpoint(tmp_path / "my_data_model_2_64_2_2_uniform.pth").config.noise == "uniform"
    torch.save(original_state(config), tmp_path / "my_data_model_2_64_2_2_0.00.pth")
    rounded = load_checkpoint(tmp_path / "my_data_model_2_64_2_2_0.00.pth", noise_std=0.004)
    assert rounded.config.noise_std == 0.004


def test_what_was_assumed_is_said(tmp_path: Path) -> None:
    torch.save(original_state(tiny_config(head_dim=64)), tmp_path / "model.pth")
    loaded = load_checkpoint(tmp_path / "model.pth")
    assert (loaded.config.image_channels, loaded.config.patch_size, loaded.config.head_dim) == (1, 4, 64)
    assert [words.split()[0] for words in loaded.assumptions] == ["noise", "noise_std", "image_channels", "head_dim"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"image_channels": 4}, (4, 2)),
        ({"patch_size": 2}, (4, 2)),
        ({"image_channels": 16, "patch_size": 1}, (16, 1)),
        ({}, (1, 4)),
    ],
)
def test_patch_values_are_split_by_flags(flags: dict[str, int], expected: tuple[int, int], tmp_path: Path) -> None:
    torch.save(original_state(tiny_config()), tmp_path / "model.pth")
    config = load_checkpoint(tmp_path / "model.pth", head_dim=32, **flags).config
    assert (config.image_channels, config.patch_size) == expected


@pytest.mark.parametrize("wrapper", ["state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_wrapped_state_dicts(wrapper: str, prefix: str, tmp_path: Path) -> None:
    state = {prefix + name: tensor for name, tensor in original_state(tiny_config()).items()}
    torch.save({wrapper: state, "epoch": 3}, tmp_path / NAME)
    assert same_weights(load_checkpoint(tmp_path / NAME, head_dim=32), random_model(tiny_config()))


def test_names_and_sigma_are_given(tmp_path: Path) -> None:
    save_checkpoint(random_model(tiny_config(noise_std=None)), tmp_path / "m.safetensors")
    loaded = load_checkpoint(tmp_path / "m.safetensors", noise_std=0.07, labels=["a", "b", "c"])
    assert loaded.config.noise_std == 0.07
    assert loaded.config.labels == ("a", "b", "c")


# -- tokens ------------------------------------------------------------------------------------------------------


MOLECULE = FlowConfig(tokens=33, token_values=3, width=256, blocks=6, layers=6)


def molecular_state(config: FlowConfig, *, masks: bool = True) -> State:
    """As Lightning modules of molecules save it: under `net.`, a dropout in the MLP, no `var`."""
    state = original_state(config)
    del state["var"]
    if not masks:
        state = {name: tensor for name, tensor in state.items() if not name.endswith("attn_mask")}
    return {"net." + name.replace("mlp.main.2", "mlp.main.3"): tensor for name, tensor in state.items()}


@pytest.mark.parametrize("masks", [True, False])
def test_a_molecular_checkpoint(masks: bool, tmp_path: Path) -> None:
    torch.save(molecular_state(MOLECULE, masks=masks), tmp_path / "alanine_0.pth")
    loaded = load_checkpoint(tmp_path / "alanine_0.pth", tokens=True)
    assert loaded.config == MOLECULE
    assert loaded.config.name == "33x3-256-6-6-0.00"
    assert same_weights(loaded, random_model(MOLECULE))
    assert loaded.assumptions == (
        "noise gaussian, the original code's default",
        "noise_std unknown: denoising needs it",
        "head_dim 64, the original code's",
        "var 1 everywhere, the prior's variance of models with nvp",
    )


@pytest.mark.parametrize("prefix", ["", "net.", "module.net.", "net._orig_mod.", "_orig_mod.net.module."])
@pytest.mark.parametrize("suffix", [".ckpt", ".pth", ".safetensors"])
def test_prefixed_tokens(prefix: str, suffix: str, tmp_path: Path) -> None:
    config, path = tiny_token_config(head_dim=64, noise_std=None), tmp_path / f"model{suffix}"
    state = {prefix + name: tensor for name, tensor in original_state(config).items()}
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state, "epoch": 3}, path)
    loaded = load_checkpoint(path, tokens=True)
    assert loaded.config == config
    assert same_weights(loaded, random_model(config))
    assert not [words for words in loaded.assumptions if "left out" in words or "var" in words]


def test_entries_beside_the_model_are_left_out_and_named(tmp_path: Path) -> None:
    config = tiny_token_config(head_dim=64, noise_std=None)
    beside = {"mean": torch.zeros(3), "std": 2.5, **{f"teacher.blocks.{k}.pos_embed": torch.ones(1) for k in range(5)}}
    torch.save({"state_dict": {**molecular_state(config), **beside}}, tmp_path / "model.ckpt")
    loaded = load_checkpoint(tmp_path / "model.ckpt", tokens=True)
    assert same_weights(loaded, random_model(config))
    assert (
        loaded.assumptions[0]
        == "left out, beside the model under net.: mean, std, teacher.blocks.0.pos_embed and 4 more"
    )


def test_images_may_lie_under_net_too(tmp_path: Path) -> None:
    config = tiny_config(head_dim=64)
    torch.save(molecular_state(config), tmp_path / "tiny_model_4_64_2_2_0.10.pth")
    assert load_checkpoint(tmp_path / "tiny_model_4_64_2_2_0.10.pth").config == config


BAD_MOLECULES: dict[str, tuple[Callable[[State], Any], str]] = {
    "no flow under net": (
        lambda _: {"net.conv.weight": torch.ones(1), "mean": torch.ones(1)},
        "but net.conv.weight, m",
    ),
    "an average's wrapper": (
        lambda state: {**{name.replace("net.", "net.model."): t for name, t in state.items()}, "net.num_updates": 3},
        "not a TarFlow checkpoint",
    ),
    "two flows": (lambda state: {**original_state(MOLECULE), **state}, r"unknown tensors: net\.blocks"),
    "both layers": (
        lambda state: {**state, "net.blocks.0.attn_blocks.0.mlp.main.2.bias": torch.ones(64)},
        r"unknown tensors: blocks\.0\.attn_blocks\.0\.mlp\.main\.3\.bias",
    ),
    "conditioning": (
        lambda state: {**state, "net.blocks.0.cond_embed.weight": torch.ones(64, 3)},
        r"unknown tensors: blocks\.0\.cond_embed\.weight",
    ),
    "no variance without nvp": (lambda _: molecular_state(tiny_token_config(head_dim=64, nvp=False)), "lacks var$"),
    "one token": (
        lambda _: (
            molecular_state(tiny_token_config(head_dim=64))
            | {f"net.blocks.{k}.pos_embed": torch.ones(1, 64) for k in range(2)}
        ),
        "tokens must be an integer >= 2, got 1",
    ),
}


@pytest.mark.parametrize(("damage", "message"), BAD_MOLECULES.values(), ids=BAD_MOLECULES)
def test_bad_molecular_checkpoints(damage: Callable[[State], Any], message: str, tmp_path: Path) -> None:
    torch.save(damage(molecular_state(tiny_token_config(head_dim=64))), tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(tmp_path / "bad.pth", tokens=True)
    assert "\n" not in str(caught.value)


KINDS: dict[str, tuple[str, dict[str, Any], str, str]] = {
    # file name, flags, message, hint
    "not square": ("m.pth", {}, "5 rows, no square number", "if the data are 5 tokens of 3 values, give --tokens"),
    "patch size": (
        "m.pth",
        {"tokens": True, "patch_size": 1},
        "--tokens says data is tokens, --patch-size says image",
        "give --tokens or --patch-size",
    ),
    "channels": (
        "m.safetensors",
        {"tokens": True, "image_channels": 3},
        "--tokens says data is tokens, --image-channels says image",
        "give --tokens or --image-channels",
    ),
    "file name": (
        "m_model_1_64_2_2_0.10.pth",
        {"tokens": True},
        "--tokens says data is tokens, the file name says image",
        "correct --tokens or rename the file",
    ),
    "file name beside metadata": (
        "m_model_1_64_2_2_0.10.safetensors",
        {},
        "its metadata says data is tokens, the file name says image",
        "correct the file name",
    ),
    "metadata": (
        "m.safetensors",
        {"patch_size": 1},
        "--patch-size says data is image, its metadata says tokens",
        "correct --patch-size",
    ),
}


@pytest.mark.parametrize("case", KINDS.values(), ids=KINDS)
def test_images_or_tokens(case: tuple[str, dict[str, Any], str, str], tmp_path: Path) -> None:
    name, flags, message, hint = case
    save_checkpoint(random_model(tiny_token_config()), tmp_path / name)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(tmp_path / name, head_dim=32, **flags)
    assert caught.value.hint == hint


def test_images_are_no_tokens(tmp_path: Path) -> None:
    save_checkpoint(random_model(tiny_config()), tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="--tokens says data is tokens, its metadata says image") as caught:
        load_checkpoint(tmp_path / "m.safetensors", tokens=True)
    assert caught.value.hint == "correct --tokens"


def test_values_that_no_image_has_may_be_tokens(tmp_path: Path) -> None:
    save_checkpoint(random_model(tiny_token_config(tokens=4, token_values=5)), tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match="cannot tell the image channels") as caught:
        load_checkpoint(tmp_path / "m.pth", head_dim=32)
    assert caught.value.hint.endswith("(5, 1); or --tokens for data that are not images")


def test_our_own_files_say_that_they_hold_tokens(tmp_path: Path) -> None:
    save_checkpoint(random_model(tiny_token_config()), tmp_path / "m.safetensors")
    for flags in ({}, {"tokens": True}):
        loaded = load_checkpoint(tmp_path / "m.safetensors", **flags)
        assert loaded.config == tiny_token_config()
        assert loaded.assumptions == ()


def test_metadata_from_before_tokens_is_read(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_checkpoint(random_model(tiny_config()), path)
    fields = {name: value for name, value in tiny_config().to_json().items() if not name.startswith("token")}
    save_file(load_file(path), path, metadata={"tarflow_config": json.dumps(fields)})
    assert load_checkpoint(path).config == tiny_config()


# -- bad files ---------------------------------------------------------------------------------------------------


def with_nan(state: State) -> State:
    state["blocks.1.proj_out.bias"][3] = float("nan")
    return state


def with_inf(state: State) -> State:
    state["var"][0, 0] = float("inf")
    return state


def without(*names: str) -> Callable[[State], State]:
    return lambda state: {name: tensor for name, tensor in state.items() if name not in names}


def replaced(name: str, tensor: Any) -> Callable[[State], State]:
    return lambda state: {**state, name: tensor}


BAD_STATES: dict[str, tuple[Callable[[State], Any], str]] = {
    "nan": (with_nan, r"blocks\.1\.proj_out\.bias holds 1 of 32 values that are NaN or infinite"),
    "inf": (with_inf, "var holds 1 of 64 values"),
    "missing": (without("blocks.1.attn_blocks.0.mlp.norm.bias"), r"lacks blocks\.1\.attn_blocks\.0\.mlp\.norm\.bias$"),
    "missing var": (lambda _: without("var")(original_state(tiny_config(nvp=False))), "lacks var$"),
    "missing projection": (without("blocks.0.proj_out.weight"), r"lacks blocks\.0\.proj_out\.weight"),
    "missing embedding of one block": (without("blocks.1.class_embed"), r"lacks blocks\.1\.class_embed"),
    "gap": (
        lambda state: {re.sub(r"^blocks\.1\.", "blocks.7.", name): tensor for name, tensor in state.items()},
        r"lacks blocks\.1\.pos_embed",
    ),
    "extra": (replaced("ema.decay", torch.ones(1)), r"unknown tensors: ema\.decay$"),
    "shape": (
        replaced("blocks.1.proj_in.bias", torch.ones(65)),
        r"blocks\.1\.proj_in\.bias has shape \[65\], expected \[64\]",
    ),
    "rank": (replaced("blocks.0.pos_embed", torch.ones(4)), r"pos_embed has shape \[4\], expected 2 axes"),
    "empty": (replaced("blocks.0.proj_in.weight", torch.ones(0, 16)), "expected 2 axes"),
    "rows of proj_out": (replaced("blocks.0.proj_out.weight", torch.ones(33, 64)), "has 33 rows, expected 32"),
    "integers": (replaced("blocks.0.proj_in.bias", torch.ones(64, dtype=torch.int64)), "is int64, expected floating"),
    "no tensor": (replaced("blocks.0.proj_in.bias", 3), "is a int, expected a tensor"),
    "mask": (replaced("blocks.0.attn_mask", torch.ones(4, 4)), "is not a causal mask"),
    "variance": (replaced("var", torch.zeros(4, 16)), "not positive"),
    "patches not square": (replaced("blocks.0.pos_embed", torch.ones(5, 64)), "5 rows, no square number"),
    "foreign": (lambda _: {"conv1.weight": torch.ones(3), "fc.bias": torch.ones(2)}, "not a TarFlow checkpoint.*conv1"),
    "optimiser": (lambda _: {"optimizer": {"state": {}}, "lr_schedule": {}}, "not a TarFlow checkpoint"),
    "list": (lambda state: list(state.values()), "holds a list"),
    "tensor": (lambda state: state["var"], "holds a Tensor"),
    "nothing": (lambda _: {}, "nothing"),
    "training state": (lambda s: {"model": s, "averaged": s, "optimizer": {}}, "state of a training run"),
}


@pytest.mark.parametrize(("damage", "message"), BAD_STATES.values(), ids=BAD_STATES)
def test_bad_state_dicts(damage: Callable[[State], Any], message: str, tmp_path: Path) -> None:
    torch.save(damage(original_state(tiny_config())), tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(tmp_path / "bad.pth", head_dim=32)
    assert str(tmp_path / "bad.pth") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["absent.pth", "absent.safetensors"])
def test_missing_file(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        load_checkpoint(tmp_path / name)


def test_folder_and_unknown_suffix(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a folder"):
        load_checkpoint(tmp_path)
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="unknown kind of file"):
        load_checkpoint(tmp_path / "model.bin")
    with pytest.raises(CheckpointError, match="cannot tell the format"):
        save_checkpoint(random_model(tiny_config()), tmp_path / "model.onnx")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.9, 0.999])
def test_truncated_files(suffix: str, part: float, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    save_checkpoint(random_model(tiny_config()), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(CheckpointError, match="damaged, truncated or not"):
        load_checkpoint(path, head_dim=32)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "data", [b"hello", b"\x80\x02" + bytes(100), b"PK\x03\x04" + bytes(50), b"\x89PNG\r\n\x1a\n" * 9]
)
def test_garbage(suffix: str, data: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged, truncated or not"):
        load_checkpoint(path)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, ("touch evil",)


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_pickled_code_is_refused(
    save: Callable[[Any, Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save({"blocks.0.proj_in.weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match=r"contains Python code .*refused|damaged"):
        load_checkpoint(tmp_path / "evil.pth")
    assert not (tmp_path / "evil").exists()


def test_pickled_code_is_named(tmp_path: Path) -> None:
    torch.save({"model": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match=r"contains Python code \((posix|nt)\.system\); refused"):
        load_checkpoint(tmp_path / "evil.pth")


def test_whole_modules_are_refused(tmp_path: Path) -> None:
    torch.save(random_model(tiny_config()), tmp_path / "module.pth")
    with pytest.raises(CheckpointError, match=r"contains Python code \(.*TarFlow\); refused") as caught:
        load_checkpoint(tmp_path / "module.pth")
    assert "state_dict()" in caught.value.hint


CONTRADICTIONS: dict[str, tuple[dict[str, Any], str, dict[str, Any], str]] = {
    # fields of the model, file name, flags, message
    "patch size": ({}, NAME, {"patch_size": 2}, "--patch-size says patch_size is 2, the file name says 4"),
    "impossible patch size": ({}, "m.pth", {"patch_size": 3}, "--patch-size says patch_size is 3, but the shapes"),
    "impossible channels": ({}, "m.pth", {"image_channels": 3}, "--image-channels says image_channels is 3, but"),
    "channels and patch size": (
        {},
        "m.pth",
        {"image_channels": 4, "patch_size": 4},
        "--image-channels says .* 4 and --patch-size says .* 4, but the shapes",
    ),
    "sigma": ({}, NAME, {"noise_std": 0.2}, "--noise-std says noise_std is 0.2, the file name says 0.1"),
    "sigma of uniform": (
        {},
        "t_model_4_64_2_2_uniform.pth",
        {"noise_std": 0.2},
        "the file name says .* uniform, --noise-std",
    ),
    "width": ({}, "t_model_4_128_2_2_0.10.pth", {}, "the shapes says width is 64, the file name says 128"),
    "blocks": ({}, "t_model_4_64_8_2_0.10.pth", {}, "blocks is 2, the file name says 8"),
    "layers": ({}, "t_model_4_64_2_8_0.10.pth", {}, "layers is 2, the file name says 8"),
    "patch of the name": ({}, "t_model_3_64_2_2_0.10.pth", {}, "the file name says patch_size is 3, but the shapes"),
    "head dimension": ({}, NAME, {"head_dim": 48}, "width 64 is not a multiple of head_dim 48"),
    "head dimension unknown": ({"width": 96}, "m.pth", {"head_dim": None}, "width 96 is not a multiple of 64"),
    "ambiguous": ({"image_channels": 2}, "m.pth", {}, "cannot tell the image channels from the patch size"),
    "number of names": ({}, NAME, {"labels": ["a"]}, "1 label names for 3 classes"),
    "names without classes": ({"classes": 0}, NAME, {"labels": ["a"]}, "1 label names for 0 classes"),
    "same names": ({}, NAME, {"labels": ["a", "a", "b"]}, "not unique"),
}


@pytest.mark.parametrize(("fields", "name", "flags", "message"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_contradictions(fields: dict[str, Any], name: str, flags: dict[str, Any], message: str, tmp_path: Path) -> None:
    torch.save(original_state(tiny_config(**fields)), tmp_path / name)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(tmp_path / name, **{"head_dim": 32, **flags})
    assert "\n" not in str(caught.value)


def test_the_hint_names_the_flag(tmp_path: Path) -> None:
    torch.save(original_state(tiny_config(image_channels=2)), tmp_path / "m.pth")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path / "m.pth", head_dim=32)
    assert "--image-channels or --patch-size" in caught.value.hint
    assert "(2, 4)" in caught.value.hint
    torch.save(original_state(tiny_config(width=96)), tmp_path / "w.pth")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path / "w.pth")
    assert "--head-dim" in caught.value.hint


METADATA: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no json": ("{", {}, "is not JSON"),
    "no object": ("[1]", {}, "is list, expected an object"),
    "future": (json.dumps({"schema_version": 2}), {}, "schema_version 2, this version reads 1"),
    "unknown field": ({"colour": "red"}, {}, "unknown fields: colour"),
    "wrong type": ({"noise_std": "large"}, {}, "noise_std must be a number"),
    "wrong labels": ({"labels": "abc"}, {}, "label names must be a tuple"),
    "other width": ({"width": 128}, {}, "its metadata says width is 128, the shapes says 64"),
    "other size": ({"image_size": 16}, {}, "its metadata says patches is 16, the shapes says 4"),
    "flag": ({}, {"head_dim": 64}, "--head-dim says head_dim is 64, its metadata says 32"),
    "sigma": ({}, {"noise_std": 0.3}, "--noise-std says noise_std is 0.3, its metadata says 0.1"),
}


@pytest.mark.parametrize(("change", "flags", "message"), METADATA.values(), ids=METADATA)
def test_metadata_that_does_not_fit(change: Any, flags: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_checkpoint(random_model(tiny_config()), path)
    text = change if isinstance(change, str) else json.dumps({**tiny_config().to_json(), **change})
    save_file(load_file(path), path, metadata={"tarflow_config": text})
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path, **flags)


def test_foreign_safetensors_are_read_like_originals(tmp_path: Path) -> None:
    path = tmp_path / "tiny_model_4_64_2_2_0.10.safetensors"
    save_file(original_state(tiny_config()), path)
    assert load_checkpoint(path, head_dim=32).config == tiny_config()


# -- writing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["absent/model.pth", "absent/model.safetensors"])
def test_a_folder_that_is_missing(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot write"):
        save_checkpoint(random_model(tiny_config()), tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("suffix", "writer"), [(".pth", "torch.save"), (".safetensors", "safetensors.torch.save_file")]
)
def test_an_interrupted_save_leaves_the_old_file(
    suffix: str, writer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"old")

    def interrupted(_: Any, target: Path, **__: Any) -> None:
        target.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(writer, interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(random_model(tiny_config()), path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
