"""The inverse of a block: plans, sequential and parallel decoding, and the threads that share a batch."""
