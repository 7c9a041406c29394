"""How a batch is cut and a block inverted: plans, one patch after the other, windows, threads that share a batch."""
