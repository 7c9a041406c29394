# make demo   environment and native kernel, export of the shipped checkpoint, sampling on the CPU, demo.png
# make native   the native kernel, put into the package (needs a C++ compiler)
# make test   environment, all tests but the long ones of libtarflow
# make test-native   those of the native kernel alone; make native-deps brings what they compile for other machines with
# make native-wasm   the kernel as a WebAssembly module (needs clang and lld)
# make cpp-deps   what libtarflow is built with, from Debian's packages
# make test-cpp   libtarflow: all of its tests, sanitizers, consumers, the matrix of models against Python
# make fuzz-cpp   libtarflow: damaged bundles for FUZZ_SECONDS (needs clang)
# make lint   ruff and mypy
#
# PYTHON chooses the interpreter, TORCH the PyTorch requirement (a CPU build is enough).

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN = $(VENV)/bin
CHECKPOINT = examples/01_train_mnist/mnist_model_4_128_4_4_0.10.safetensors
PYTEST_OPTIONS ?=
FUZZ_SECONDS ?= 600
NATIVE_PLACE = --output build/native --into runtimes/tarflow_runtimes/engines/native
NATIVE_PACKAGES = clang cmake g++ g++-aarch64-linux-gnu libc6-dev-arm64-cross lld qemu-user
CPP_PACKAGES = cmake g++ make nlohmann-json3-dev libpng-dev pkgconf

.PHONY: demo native native-wasm native-deps test-native test cpp-deps test-cpp fuzz-cpp lint format clean

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

demo: $(VENV)/ready
	$(BIN)/python runtimes/native/native_build.py $(NATIVE_PLACE) || echo "no C++ compiler: engine ort-cpu it is"
	$(BIN)/tarflow-export $(CHECKPOINT) -o mnist.tarflow --overwrite
	$(BIN)/tarflow-infer mnist.tarflow -n 100 --labels all --guidance 2 --seed 0 --captions -o demo.png \
		--overwrite
	@echo "look at demo.png"

native:
	$(PYTHON) runtimes/native/native_build.py $(NATIVE_PLACE)

native-wasm:
	$(PYTHON) runtimes/native/native_build.py --output build/native --wasm --compiler clang++

native-deps:
	dpkg --status $(NATIVE_PACKAGES) >/dev/null 2>&1 || { apt-get --quiet update && \
		apt-get --quiet install --yes --no-install-recommends $(NATIVE_PACKAGES); }

test-native: $(VENV)/ready
	$(BIN)/python -m pytest tests/native $(PYTEST_OPTIONS)

test: $(VENV)/ready
	$(BIN)/python -m pytest -m "not cpp" -n 2 $(PYTEST_OPTIONS)

cpp-deps:
	dpkg --status $(CPP_PACKAGES) >/dev/null 2>&1 || { apt-get --quiet update && \
		apt-get --quiet install --yes --no-install-recommends $(CPP_PACKAGES); }
	runtimes/cpp/cmake/fetch_onnxruntime_headers.sh

test-cpp: $(VENV)/ready native
	$(BIN)/python -m pytest -k "test_cpp or embed_c" tests/project $(PYTEST_OPTIONS)

fuzz-cpp:
	cmake -S runtimes/cpp -B build/cpp-fuzz -DCMAKE_C_COMPILER=clang -DCMAKE_CXX_COMPILER=clang++ -DTARFLOW_FUZZ=ON \
		-DTARFLOW_SANITIZE=address,undefined -DTARFLOW_BUILD_TOOL=OFF -DCMAKE_BUILD_TYPE=None -DCMAKE_CXX_FLAGS=-O1 \
		-DONNXRUNTIME_INCLUDE_DIR="$$(runtimes/cpp/cmake/fetch_onnxruntime_headers.sh)"
	cmake --build build/cpp-fuzz --parallel 2 --target tarflow_fuzz_bundle
	cd build/cpp-fuzz/tests/fuzz && ./tarflow_fuzz_bundle -max_total_time=$(FUZZ_SECONDS) \
		-dict=$(CURDIR)/runtimes/cpp/tests/fuzz/manifest.dict corpus/bundle

lint: $(VENV)/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build mnist.tarflow demo.png .mypy_cache .pytest_cache .ruff_cache .hypothesis
