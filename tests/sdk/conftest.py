"""Tiny models run fastest on one thread: handing their small matrices to others costs more than it saves."""

import torch

torch.set_num_threads(1)
