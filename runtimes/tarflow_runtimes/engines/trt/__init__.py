"""TensorRT: networks from a bundle's graphs, builds, and the cache of engines, shared by both of NVIDIA's packages.

Terms: a *network* is a parsed graph, an *engine* is its built form as bytes, a *profile* is a range of shapes that an
engine accepts, a *target* is a GPU architecture (`sm_89`), a *sidecar* is the JSON file beside an engine.
"""
