"""The inverse of a block: batches, plans, sequential and parallel decoding, and the threads that share a batch."""
