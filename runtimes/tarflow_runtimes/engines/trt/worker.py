"""The process in which an engine is built; see `build`."""

import sys

from tarflow_runtimes.engines.trt.build import work

if __name__ == "__main__":
    work(int(sys.argv[1]))
