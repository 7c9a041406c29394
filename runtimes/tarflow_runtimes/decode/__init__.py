"""How a block is inverted: plans, one patch after the other, windows of patches, and the threads that share a batch."""
