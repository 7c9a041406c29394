"""`GraphedSampler`: the fastest sequential decoder in plain PyTorch on a GPU: static caches and a CUDA graph.

One step is captured for each block; it reads and increments its position on the device, so that the host only replays
it.
Linear layers and caches are of the chosen dtype, norms, softmax, residual stream and exp of float32, by autocast. On a
CPU the same step runs without a graph.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from _compiled import _stacked, _State, _step, _Weights
from torch import Tensor

from tarflow_sdk import NULL_LABEL, Guidance, TarFlow

NORMS = {0, 1, 6, 7}
"""Places of the norms' weights and biases among the tensors of a layer; the others are of linear layers."""

WARM_UPS = 3
"""Steps before a capture: libraries allocate their workspaces, which a capture forbids."""


class GraphedSampler:
    """`decode` of a model on a device, in float32, float16 or bfloat16."""

    def __init__(self, model: TarFlow, *, device: str, dtype: torch.dtype) -> None:
        self.model = model.eval().to(device)
        self.device, self.dtype = torch.device(device), dtype
        self.weights = [_halved(_stacked(block), dtype) for block in self.model.flow_blocks]
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        self._shape: tuple[int, bool] | None = None

    @torch.no_grad()
    def __call__(self, z: Tensor, labels: Tensor | None = None, guidance: Guidance | None = None) -> Tensor:
        """Latents z [B, N, D] -> images [B, C, height, width] on the device, as `tarflow_sdk.decode`."""
        guidance, z = guidance or Guidance(), z.to(self.device)
        batch, patches, _ = z.shape
        self._prepare(batch, guided=guidance.active)
        null = torch.full((batch,), NULL_LABEL, device=self.device)
        both = torch.cat([null if labels is None else labels.to(self.device), null])[: len(self._state.class_rows)]
        self._state.inverse_temperature[batch:] = 1 / guidance.attention_temperature
        self._state.guidance.copy_(guidance.weights(patches))
        x = z * self.model.var.sqrt()
        for block, step in zip(reversed(self.model.flow_blocks), reversed(self._steps), strict=True):
            class_rows = block.class_rows(both)
            if class_rows is not None:
                self._state.class_rows.copy_(class_rows)
            self._state.x.copy_(block.in_order(x))
            self._position.zero_()
            for _ in range(patches - 1):
                step()
            x = block.in_order(self._state.x).clone()
        return self.model.unpatchify(x)

    def _prepare(self, batch: int, *, guided: bool) -> None:
        """The state of a batch at a fixed address, and a step of each block on it; those of the last shape are kept."""
        if self._shape == (batch, guided):
            return
        config, rows = self.model.config, batch * (2 if guided else 1)
        place = {"device": self.device}
        self._steps: list[Callable[[], None]] = []
        shape = (rows, config.heads, config.patches, config.head_dim)
        caches = [torch.zeros(shape, dtype=self.dtype, **place) for _ in range(2 * config.layers)]
        self._state = _State(
            x=torch.zeros(batch, config.patches, config.patch_values, **place),
            caches=tuple(zip(caches[::2], caches[1::2], strict=True)),
            class_rows=torch.zeros(rows, 1, config.width, **place),
            inverse_temperature=torch.ones(rows, 1, 1, 1, **place),
            guidance=torch.zeros(2, config.patches, **place),
        )
        self._steps = [self._stepper(weights, guided=guided) for weights in self.weights]
        self._shape = (batch, guided)

    def _stepper(self, weights: _Weights, *, guided: bool) -> Callable[[], None]:
        """One step of a block: the next patch, and the position incremented by one."""
        state, half = self._state, self.dtype != torch.float32

        def step() -> None:
            with torch.autocast(self.device.type, self.dtype, enabled=half, cache_enabled=False):
                _step(weights, state, self._position, self.model.config.nvp, guided)
            self._position.add_(1)

        return step if self.device.type == "cpu" else self._captured(step)

    def _captured(self, step: Callable[[], None]) -> Callable[[], None]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._position.zero_()
            for _ in range(min(WARM_UPS, self.model.config.patches - 1)):
                step()
            self._position.zero_()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay


def _halved(weights: _Weights, dtype: torch.dtype) -> _Weights:
    """Linear layers in `dtype`, so that no step casts them; norms and embeddings as they are."""
    layers = tuple(tensor if place in NORMS else tensor.to(dtype) for place, tensor in enumerate(weights.layers))
    proj_in, proj_out = ((weight.to(dtype), bias.to(dtype)) for weight, bias in (weights.proj_in, weights.proj_out))
    return weights._replace(proj_in=proj_in, proj_out=proj_out, layers=layers)
