"""TensorRT: networks from a bundle's graphs, builds, and the cache of engines, one code for both of NVIDIA's packages.

Words: a *network* is a parsed graph, an *engine* is the built one as bytes, a *profile* is a range of shapes that an
engine takes, a *target* is a GPU architecture (`sm_89`), a *sidecar* is the JSON file beside an engine.
"""
