"""Every graph that a bundle can hold, as docs/BUNDLE.md lists them."""

KINDS = {
    "portable": ("forward", "step", "gradient"),
    "ort-cpu": (
        *(f"{kind}{form}" for kind in ("step", "window") for form in ("", "_guided", "_tempered")),
        *("vjp_forward", "vjp_backward"),
    ),
    "ort-cuda": ("step", "window"),
    "trt": ("step", "window"),
}
"""The graphs of each provider."""

PROVIDERS = {
    "float32": ("portable", "ort-cpu", "ort-cuda", "trt"),
    "float16": ("portable", "ort-cpu", "ort-cuda", "trt"),
    "bfloat16": ("portable", "ort-cuda", "trt"),
    "int8": ("portable", "ort-cpu"),
}
"""The providers of each precision."""
