"""One PyTorch thread: tiny tensors gain nothing from more, and on a busy machine lose much. Interrupts as in a shell.

A shell starts what it puts in the background with interrupts ignored, and the tests of Ctrl-C would wait for ever.
"""

import contextlib
import signal

signal.signal(signal.SIGINT, signal.default_int_handler)

with contextlib.suppress(ImportError):
    import torch

    torch.set_num_threads(1)
