"""`StaticSampler`: the sequential decoder as fast as plain PyTorch makes it: preallocated caches, one compiled step.

Every tensor of a step keeps its shape and address, the position is a tensor, and the weights of a block are arguments:
`torch.compile` compiles one step for each number of rows and runs it for every patch of every block.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tarflow_sdk import NULL_LABEL, FlowBlock, Guidance, TarFlow
from tarflow_sdk._model import AttentionBlock


class _Weights(NamedTuple):
    """The weights of one block, those of its L layers stacked: few arguments are cheap to guard."""

    proj_in: tuple[Tensor, Tensor]
    proj_out: tuple[Tensor, Tensor]
    pos_embed: Tensor  # [N, W], block order
    layers: tuple[Tensor, ...]  # [L, ...]: weight and bias of norm, qkv, proj, norm, main.0, main.2


class _State(NamedTuple):
    """What a step reads and writes in place: R = G * B rows, head dimension E."""

    x: Tensor  # [B, N, D], block order: noise where not yet decoded
    caches: tuple[tuple[Tensor, Tensor], ...]  # L keys and values, [R, H, N, E]; one tensor each is written in place
    class_rows: Tensor  # [R, 1, W]
    inverse_temperature: Tensor  # [R, 1, 1, 1]
    guidance: Tensor  # [2, N]


def _stacked(block: FlowBlock) -> _Weights:
    layers = []
    for layer in block.attn_blocks:
        assert isinstance(layer, AttentionBlock)
        attention, mlp = layer.attention, layer.mlp
        owners = (attention.norm, attention.qkv, attention.proj, mlp.norm, mlp.main[0], mlp.main[2])
        layers.append([value.detach() for owner in owners for value in owner.parameters()])  # weight, bias
    return _Weights(
        proj_in=(block.proj_in.weight.detach(), block.proj_in.bias.detach()),
        proj_out=(block.proj_out.weight.detach(), block.proj_out.bias.detach()),
        pos_embed=block.in_order(block.pos_embed, 0).detach().contiguous(),
        layers=tuple(torch.stack(tensors) for tensors in zip(*layers, strict=True)),
    )


def _step(weights: _Weights, state: _State, position: Tensor, nvp: bool, guided: bool) -> None:
    """Patch `position` [1] of x through a block; writes patch position + 1 and the caches."""
    x = state.x
    batch, patches, _ = x.shape
    rows, heads, _, head_dim = state.caches[0][0].shape
    h = F.linear(x.index_select(1, position), *weights.proj_in).repeat(rows // batch, 1, 1)
    h = h + weights.pos_embed.index_select(0, position) + state.class_rows
    seen = (torch.arange(patches, device=x.device) <= position).view(1, 1, 1, patches)
    width = h.shape[-1]
    for layer, (keys, values) in enumerate(state.caches):
        norm, norm_b, qkv, qkv_b, proj, proj_b, norm2, norm2_b, up, up_b, down, down_b = (
            tensor[layer] for tensor in weights.layers
        )
        projected = F.linear(F.layer_norm(h, (width,), norm, norm_b), qkv, qkv_b)
        q, k, v = projected.view(rows, 1, 3, heads, head_dim).permute(2, 0, 3, 1, 4)
        keys[:, :, position] = k
        values[:, :, position] = v
        q = q * state.inverse_temperature
        attended = F.scaled_dot_product_attention(q, keys, values, attn_mask=seen)
        h = h + F.linear(attended.transpose(1, 2).reshape(rows, 1, width), proj, proj_b)
        h = h + F.linear(F.gelu(F.linear(F.layer_norm(h, (width,), norm2, norm2_b), up, up_b)), down, down_b)
    out = F.linear(h, *weights.proj_out)
    if guided:
        g = state.guidance.index_select(1, position).view(2, 1, 1, 1)
        g = g if nvp else g[1:]
        pair = out.view(rows, 1, len(g), -1).permute(2, 0, 1, 3)  # (2, R, 1, D), or (1, ...) without a
        pair = pair[:, :batch] + g * (pair[:, :batch] - pair[:, batch:])
        out = pair.permute(1, 2, 0, 3).flatten(2)
    following = position + 1
    z = x.index_select(1, following)
    if nvp:
        a, b = out.chunk(2, dim=-1)
        z = z * torch.exp(a) + b
    else:
        z = z + out
    x.index_copy_(1, following, z)


Step = Callable[[_Weights, _State, Tensor, bool, bool], object]


def just_in_time() -> Step:
    """The step, compiled by `torch.compile` when it is first called."""
    return torch.compile(_step, dynamic=False, fullgraph=True)  # type: ignore[no-any-return]


def ahead_of_time(folder: Path) -> Step:
    """The step, compiled by AOTInductor to a library in `folder` for each number of rows and guidance."""
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    libraries: dict[tuple[int, bool, bool], Any] = {}

    class Module(nn.Module):
        def __init__(self, nvp: bool, guided: bool) -> None:
            super().__init__()
            self.nvp, self.guided = nvp, guided

        def forward(self, weights: tuple[Any, ...], state: tuple[Any, ...], position: Tensor) -> Tensor:
            _step(_Weights(*weights), _State(*state), position, self.nvp, self.guided)
            return position.clone()

    def step(weights: _Weights, state: _State, position: Tensor, nvp: bool, guided: bool) -> object:
        key, given = (len(state.x), nvp, guided), (tuple(weights), tuple(state), position)
        if key not in libraries:
            exported = torch.export.export(Module(nvp, guided), given, strict=False)
            path = str(folder / f"step-{len(libraries)}.pt2")
            libraries[key] = aoti_load_package(aoti_compile_and_package(exported, package_path=path))
        return libraries[key](*given)

    return step


class StaticSampler:
    """`decode` of a model with this step."""

    def __init__(self, model: TarFlow, *, step: Step = _step) -> None:
        self.model = model.eval()
        self.weights = [_stacked(block) for block in model.flow_blocks]
        self.step = step

    @torch.no_grad()
    def __call__(self, z: Tensor, labels: Tensor | None = None, guidance: Guidance | None = None) -> Tensor:
        """Latents z [B, N, D] -> images [B, C, height, width], as `tarflow_sdk.decode`."""
        guidance, config = guidance or Guidance(), self.model.config
        batch, patches, _ = z.shape
        rows = batch * (2 if guidance.active else 1)
        null = torch.full((batch,), NULL_LABEL)
        both = torch.cat([null if labels is None else labels, null])[:rows]
        temperature = z.new_ones(rows, 1, 1, 1)
        temperature[batch:] = guidance.attention_temperature
        shape = (rows, config.heads, patches, config.head_dim)
        caches = tuple((z.new_zeros(shape), z.new_zeros(shape)) for _ in range(config.layers))
        x = z * self.model.var.sqrt()
        for block, weights in zip(reversed(self.model.flow_blocks), reversed(self.weights), strict=True):
            class_rows = block.class_rows(both)
            state = _State(
                x=block.in_order(x).clone(),
                caches=caches,
                class_rows=z.new_zeros(rows, 1, config.width) if class_rows is None else class_rows.contiguous(),
                inverse_temperature=1 / temperature,
                guidance=guidance.weights(patches).to(z),
            )
            position = torch.zeros(1, dtype=torch.int64)
            for i in range(patches - 1):
                position.fill_(i)
                self.step(weights, state, position, config.nvp, guidance.active)
            x = block.in_order(state.x)
        return self.model.unpatchify(x)
