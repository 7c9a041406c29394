"""The engine `native`: the C ABI of the native kernel (runtimes/native) through ctypes, and the loop around it."""
