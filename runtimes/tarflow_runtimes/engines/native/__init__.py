"""The native kernel (runtimes/native) as an engine: its C ABI through ctypes, and the loop around it."""
