"""One PyTorch thread: tiny tensors gain nothing from more, and on a busy machine lose much."""

import contextlib

with contextlib.suppress(ImportError):
    import torch

    torch.set_num_threads(1)
