"""Read and write image files and arrays."""
