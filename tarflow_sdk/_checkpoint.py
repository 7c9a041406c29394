"""Checkpoints: `load_checkpoint` and `save_checkpoint`, flat state dicts in `.safetensors` or `.pth` files.

Tensor names are those of the original code. Checkpoints of its descendants for molecules are read as well (Tan et al.
2025, "Scalable Equilibrium Sampling with Sequential Boltzmann Generators"): a Lightning module with the model under
`net.`, without the prior's `var`, and with a dropout in the MLP that moves its second layer from `main.2` to `main.3`.

Our own `.safetensors` files contain the configuration; for other files `_claims.py` infers it from shapes, file name
and flags. Reading is strict: no tensor may be unknown, missing, misshapen or not finite. `.pth` files are read with
PyTorch's weights-only unpickler, which runs no code from the file.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tarflow_sdk._claims import Claims, claim_metadata, infer_config
from tarflow_sdk._config import SIZES, FlowConfig
from tarflow_sdk._errors import CheckpointError, ConfigError
from tarflow_sdk._model import TarFlow

METADATA_KEY = "tarflow_config"
"""Metadata entry of our `.safetensors` files: `FlowConfig.to_json` as JSON text."""

TORCH_SUFFIXES = (".pth", ".pt")
READ_SUFFIXES = (*TORCH_SUFFIXES, ".ckpt")
"""File suffixes of PyTorch; `.ckpt` is used by Lightning."""
WRAPPERS = ("state_dict", "model")
"""Keys under which other trainers keep the flat state dict."""
PREFIXES = ("module.", "_orig_mod.")
"""Prefixes that `DistributedDataParallel` and `torch.compile` add to every name."""
NET = "net."
"""The prefix of the model in Lightning modules, which also have entries of their own."""
FIRST_WEIGHT = "blocks.0.proj_in.weight"
"""The tensor name that identifies a state dict as a TarFlow."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def load_checkpoint(
    path: str | Path,
    *,
    tokens: bool = False,
    image_channels: int | None = None,
    patch_size: int | None = None,
    head_dim: int | None = None,
    noise_std: float | None = None,
    labels: Sequence[str] | None = None,
) -> TarFlow:
    """Read a model from a `.safetensors`, `.pth`, `.pt` or `.ckpt` file, as float32 on the CPU.

    The arguments supply what the file does not say: whether the data are tokens [N, D], or else the image channels or
    the patch size (a patch has D = C * p * p values), the head dimension (default 64), sigma of the training noise, and
    the names of the classes, which replace those in the file. The model's `assumptions` list what was assumed or
    ignored.

    Raises:
        CheckpointError: when the file is missing, damaged, of another format or contains code; when a tensor is
            missing, unknown, misshapen or not finite; when shapes, metadata, file name and arguments contradict each
            other or leave the configuration open.

    >>> import tempfile
    >>> from tarflow_sdk.testing import random_model, tiny_config
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_checkpoint(random_model(tiny_config()), f"{folder}/tiny.safetensors")
    ...     load_checkpoint(f"{folder}/tiny.safetensors").config == tiny_config()
    True
    """
    path = Path(path)
    claims = Claims(path)
    entries, metadata = _read(path)
    entries, left_out = _unprefixed(entries)
    if left_out:
        claims.assumptions.append(f"left out, beside the model under {NET}: {_listed(left_out)}")
    tensors = _checked_tensors(path, entries)
    if tokens:
        claims.add("--tokens", "data", "tokens")
    flags = {
        "image_channels": image_channels, "patch_size": patch_size, "head_dim": head_dim, "noise_std": noise_std,
    }  # fmt: skip
    for field, value in flags.items():
        if value is not None:
            flag = f"--{field.replace('_', '-')}"
            claims.add(flag, field, value)
            if field in SIZES["image"]:
                claims.add(flag, "data", "image")
    if metadata is not None:
        claim_metadata(claims, metadata)
    try:
        config = infer_config(claims, tensors, labels=labels)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}", hint=error.hint) from error
    if "var" not in tensors and metadata is None and config.nvp:  # our own files always contain it
        claims.assumptions.append("var 1 everywhere, the prior's variance of models with nvp")
        tensors["var"] = torch.ones(config.patches, config.patch_values)
    with torch.device("meta"):  # no memory and no random numbers for weights that are about to be replaced
        model = TarFlow(config)
    _require_same_tensors(path, tensors, model)
    model.load_state_dict(tensors, assign=True)
    model.assumptions = tuple(claims.assumptions)
    return model


def save_checkpoint(model: TarFlow, path: str | Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Write a model to one file, atomically: an existing file is replaced only by a complete one.

    `.safetensors` holds weights and configuration. `.pth` and `.pt` hold the flat state dict of the original code,
    with its `attn_mask` buffers, which the original loads strictly; sigma, head dimension and label names are lost.
    `dtype` is the weights'; the prior's `var` stays float32.

    Raises:
        CheckpointError: when the file cannot be written, or when a weight is not finite in `dtype`.

    >>> import tempfile
    >>> from tarflow_sdk.testing import random_model, tiny_config
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_checkpoint(random_model(tiny_config()), f"{folder}/tiny_model_4_64_2_2_0.10.pth")
    ...     load_checkpoint(f"{folder}/tiny_model_4_64_2_2_0.10.pth", head_dim=32).config.noise_std
    0.1
    """
    path = Path(path)
    if path.suffix not in (".safetensors", *TORCH_SUFFIXES):
        raise CheckpointError(f"{path}: cannot tell the format", hint="name the file .safetensors, .pth or .pt")
    tensors = {}
    for name, tensor in model.state_dict().items():
        # A variance may be below the range of float16, and encode divides by its square root.
        converted = tensor.detach().to("cpu", torch.float32 if name == "var" else dtype).contiguous()
        if not _is_finite(converted):
            raise CheckpointError(f"{path}: {name} has values that are not finite in {_dtype_name(converted)}")
        tensors[name] = converted
    with replacing(path) as partial:
        if path.suffix == ".safetensors":
            safetensors.torch.save_file(tensors, partial, metadata={METADATA_KEY: json.dumps(model.config.to_json())})
            return
        patches = model.config.patches
        for k in range(model.config.blocks):
            tensors[f"blocks.{k}.attn_mask"] = torch.ones(patches, patches).tril()
        torch.save(tensors, partial)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path` that replaces it on success and is removed otherwise.

    Raises:
        CheckpointError: when the file system refuses.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        raise CheckpointError(
            f"{path}: cannot write: {error}", hint="check the folder, its permissions and space"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


# -- reading -----------------------------------------------------------------------------------------------------


def _read(path: Path) -> tuple[dict[str, Any], FlowConfig | None]:
    """All entries of the flat state dict, and the configuration where the file carries one."""
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder, expected a checkpoint file")
    if not path.exists():
        raise CheckpointError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in READ_SUFFIXES:
        return _flat(path, _read_torch(path)), None
    raise CheckpointError(f"{path}: unknown kind of file", hint="expected a name in .safetensors, .pth, .pt or .ckpt")


def _read_safetensors(path: Path) -> tuple[dict[str, Any], FlowConfig | None]:
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged, truncated or not a safetensors file: {_first_line(error)}") from error
    if text is None:
        return tensors, None
    try:
        data = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{path}: metadata {METADATA_KEY} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: metadata {METADATA_KEY} is {type(data).__name__}, expected an object")
    try:
        return tensors, FlowConfig.from_json(data)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}", hint=error.hint) from error


def _read_torch(path: Path) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on foreign archives PyTorch warns before it raises
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if code := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise CheckpointError(
                f"{path}: contains Python code ({code[1]}); refused",
                hint="save the state dict alone: torch.save(model.state_dict(), ...)",
            ) from error
        raise CheckpointError(f"{path}: damaged, truncated or not a PyTorch file") from error
    except Exception as error:  # a damaged archive may raise any exception
        raise CheckpointError(f"{path}: damaged, truncated or not a PyTorch file: {_first_line(error)}") from error


def _flat(path: Path, data: object) -> dict[str, Any]:
    """The flat state dict in what a `.pth` file holds: itself, or the one entry that wraps it."""
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: holds a {type(data).__name__}, expected a state dict")
    if "averaged" in data and "optimizer" in data:
        raise CheckpointError(f"{path}: is the state of a training run", hint="use the model.safetensors beside it")
    for wrapper in WRAPPERS:
        if isinstance(data.get(wrapper), dict):
            return dict(data[wrapper])
    return dict(data)


def _unprefixed(entries: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The entries without what wrappers put in front of their names; those under `net.` if they hold a TarFlow.

    Also the names that were left out because they are not under `net.`.
    """
    while entries:
        prefix = next((p for p in PREFIXES if all(str(name).startswith(p) for name in entries)), None)
        if prefix is None:
            break
        entries = {name.removeprefix(prefix): value for name, value in entries.items()}
    under_net = {
        name.removeprefix(NET): value
        for name, value in entries.items()
        if isinstance(name, str) and name.startswith(NET)
    }
    if FIRST_WEIGHT in entries or not under_net:
        return entries, []
    net, _ = _unprefixed(under_net)  # a compiled model inside of a Lightning module
    if FIRST_WEIGHT not in net:
        return entries, []
    return net, [str(name) for name in entries if not str(name).startswith(NET)]


def _checked_tensors(path: Path, entries: dict[str, Any]) -> dict[str, Tensor]:
    """The entries as float32 under the original's names, without its `attn_mask` buffers."""
    if FIRST_WEIGHT not in entries:
        raise CheckpointError(
            f"{path}: not a TarFlow checkpoint: no {FIRST_WEIGHT}, but {_listed(entries) or 'nothing'}",
            hint=f"expected the flat state dict of the original code or of tarflow-train, also under {NET}",
        )
    tensors = {}
    for name, tensor in _without_dropout(entries).items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{path}: {name} is a {type(tensor).__name__}, expected a tensor")
        if name.endswith(".attn_mask"):
            if tensor.ndim != 2 or not torch.equal(tensor.float(), torch.ones(tensor.shape).tril()):
                raise CheckpointError(f"{path}: {name} is not a causal mask (lower triangular ones)")
            continue
        if tensor.dtype not in DTYPES:
            raise CheckpointError(f"{path}: {name} is {_dtype_name(tensor)}, expected floating point numbers")
        tensors[name] = tensor.to(torch.float32).contiguous()
        if not _is_finite(tensors[name]):
            bad = int((~torch.isfinite(tensors[name])).sum())
            raise CheckpointError(f"{path}: {name} holds {bad} of {tensor.numel()} values that are NaN or infinite")
    return tensors


def _without_dropout(entries: dict[str, Any]) -> dict[str, Any]:
    """The second layer of each MLP at `main.2`, where it is at `main.3` behind a dropout."""
    renamed = {name: re.sub(r"(\.mlp\.main)\.3\.(weight|bias)$", r"\1.2.\2", str(name)) for name in entries}
    return {name if renamed[name] in entries else renamed[name]: value for name, value in entries.items()}


def _require_same_tensors(path: Path, tensors: dict[str, Tensor], model: TarFlow) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if missing := [name for name in expected if name not in tensors]:
        raise CheckpointError(f"{path}: lacks {_listed(missing)}")
    if extra := [name for name in tensors if name not in expected]:
        raise CheckpointError(f"{path}: holds unknown tensors: {_listed(extra)}")
    wrong = [name for name, shape in expected.items() if tuple(tensors[name].shape) != shape]
    if wrong:
        name = wrong[0]
        more = f" (and {len(wrong) - 1} more)" if wrong[1:] else ""
        raise CheckpointError(
            f"{path}: {name} has shape {list(tensors[name].shape)}, expected {list(expected[name])}{more}"
        )
    if not bool((tensors["var"] > 0).all()):
        raise CheckpointError(f"{path}: var, the prior's variance, has values that are not positive")


def _is_finite(tensor: Tensor) -> bool:
    # NaN passes through min and max; unlike a mask of all values this takes one pass and no memory.
    low, high = torch.aminmax(tensor) if tensor.numel() else (torch.zeros(()), torch.zeros(()))
    return bool(torch.isfinite(low) and torch.isfinite(high))


def _listed(names: Any, limit: int = 3) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
