"""What is measured of a bundle on an engine: agreement with PyTorch, the fastest plan, speed, the machine itself."""
