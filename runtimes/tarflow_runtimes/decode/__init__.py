"""How a batch is cut and a block inverted: plans, one patch after the other, windows, the threads that share a batch."""
