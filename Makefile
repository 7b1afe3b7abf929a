# make demo and make test are all a newcomer needs; the others are for development.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
RUN := runs/demo
PARALLEL := -n auto --dist worksteal

.PHONY: install demo demo-dense docs test test-slow test-compiled test-sanitized test-browser test-timm wheels test-wheels lint types bench clean

install: $(VENV)/installed

# pip reads the lock; the package itself is built with the locked PyTorch, so that nothing is fetched twice.
$(VENV)/installed: requirements.lock pyproject.toml CMakeLists.txt $(wildcard src/vimamba/ops/cpu/*.cpp src/vimamba/ops/cpu/*.h*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	$(BIN)/vimamba info
	touch $@

demo: install
	$(BIN)/vimamba train --config recipes/mnist.yaml --output $(RUN) --overwrite
	$(BIN)/vimamba eval $(RUN) --data mnist
	$(BIN)/vimamba predict $(RUN) $(RUN)/digits/*.png
	@echo "Pictures: $(RUN)/curves.png $(RUN)/confusion.png and the digits in $(RUN)/digits/"

# A class for each pixel and a box and a mask for each digit, of the built-in scenes; about half an hour on two cores.
DENSE := runs/demo-dense
demo-dense: install
	$(BIN)/vimamba train --config recipes/scenes_seg.yaml --output $(DENSE)/seg --overwrite
	$(BIN)/vimamba eval $(DENSE)/seg
	$(BIN)/vimamba predict $(DENSE)/seg $(DENSE)/seg/scenes/*.png --output $(DENSE)/seg/pictures
	$(BIN)/vimamba train --config recipes/scenes_det.yaml --output $(DENSE)/det --overwrite
	$(BIN)/vimamba eval $(DENSE)/det
	$(BIN)/vimamba predict $(DENSE)/det $(DENSE)/det/scenes/*.png --output $(DENSE)/det/pictures
	@echo "Pictures: $(DENSE)/seg/pictures/ and $(DENSE)/det/pictures/"

# The site, in build/site; index.html opens as a file.
docs: install
	$(BIN)/python docs/drawings.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# A process a core; threads that a test asks for sleep while they wait.
ALONE := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
test: lint types
	$(ALONE) $(BIN)/python -m pytest $(PARALLEL)
	$(ALONE) TRITON_INTERPRET=1 $(BIN)/python -m pytest $(PARALLEL) tests/ops/interpreted

# The rest: every option and each two that meet, every block of every page, every export, servers under pressure.
test-slow: install
	$(ALONE) $(BIN)/python -m pytest $(PARALLEL) -m slow
	$(ALONE) TRITON_INTERPRET=1 $(BIN)/python -m pytest $(PARALLEL) -m slow tests/ops/interpreted

# C++ programs: the example that runs a package without Python, and the kernels alone under the sanitizers.
test-compiled: install
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest -m compiled tests/export tests/ops

# The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, in a library beside the installed one.
SANITIZERS = $(shell for name in asan ubsan stdc++; do $(CXX) -print-file-name=lib$$name.so; done)
test-sanitized: install
	$(BIN)/cmake -S . -B build/sanitized -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	  -DPython_EXECUTABLE=$(abspath $(BIN))/python -DVIMAMBA_SANITIZE=ON
	$(BIN)/cmake --build build/sanitized
	LD_PRELOAD="$(SANITIZERS)" ASAN_OPTIONS=detect_leaks=0 VIMAMBA_CPU_LIBRARY=build/sanitized/_kernels.so FUZZ_CASES=400 \
	  $(BIN)/python -m pytest -m 'not compiled' tests/ops/test_cpu_kernels.py tests/ops/test_blocks.py \
	    tests/ops/test_quantized.py tests/ops/test_fuzz.py

# The page in headless Chromium, of a server and of a folder that runs the model by onnxruntime-web.
BROWSER := build/browser
test-browser: install
	which chromium || apt-get install -y --no-install-recommends chromium
	mkdir -p $(BROWSER) && cp tests/serve/package.json $(BROWSER)/ && npm install --silent --no-audit --no-fund --prefix $(BROWSER)
	BROWSER_MODULES=$(abspath $(BROWSER))/node_modules OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m browser tests/serve/test_page.py

# timm's own tests of a model, from its source distribution, for every model of ours; about ten minutes.
TIMM := 1.0.31
TIMM_TESTS := build/timm
test-timm: install
	$(BIN)/python -m tests.timm_suite.prepare $(TIMM_TESTS) $(TIMM)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(PARALLEL) -p tests.timm_suite.plugin -c $(TIMM_TESTS)/timm-$(TIMM)/pyproject.toml \
		--rootdir $(TIMM_TESTS) $(TIMM_TESTS)/test_models.py -W ignore

# Wheels for every Python, none of whose kernels knows it: x86-64, 64-bit Arm (Debian's g++-aarch64-linux-gnu) and without
# kernels; and the source distribution. auditwheel says how old a glibc they run on: PyTorch's own wheels ask for 2.28.
DIST := dist
WHEEL = PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip wheel . --quiet --no-deps --no-build-isolation
CROSS := CMAKE_SYSTEM_NAME=Linux CMAKE_SYSTEM_PROCESSOR=aarch64 CMAKE_CXX_COMPILER=aarch64-linux-gnu-g++
wheels: install
	rm -rf build/wheels $(DIST)
	which aarch64-linux-gnu-g++ || apt-get install -y --no-install-recommends g++-aarch64-linux-gnu
	$(WHEEL) --wheel-dir build/wheels -C cmake.define.VIMAMBA_MANYLINUX=ON
	_PYTHON_HOST_PLATFORM=linux-aarch64 $(WHEEL) --wheel-dir build/wheels -C build-dir=build/aarch64 \
	  -C cmake.define.VIMAMBA_MANYLINUX=ON $(addprefix -C cmake.define.,$(CROSS))
	for machine in x86_64 aarch64; do PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --wheel-dir $(DIST) \
	  --exclude libtorch_cpu.so build/wheels/*-linux_$$machine.whl || exit 1; done
	if ls $(DIST) | grep -E 'manylinux_2_(29|[3-9])|-linux_'; then echo 'needs a newer glibc than PyTorch does' >&2; exit 1; fi
	$(WHEEL) --wheel-dir $(DIST) -C wheel.cmake=false
	$(BIN)/python -c "from scikit_build_core.build import build_sdist; build_sdist('$(DIST)')"
	ls -l $(DIST)

# Their operators' tests in clean environments without a compiler, one at a time: each Python with the oldest PyTorch and the
# newest, and a table of what ran; the Arm kernels in qemu.
PYTHONS ?= python3.10 python3.11 python3.12 python3.13 python3.14
KERNELS := src/vimamba/ops/cpu
test-wheels: install
	which aarch64-linux-gnu-g++ qemu-aarch64 || apt-get install -y --no-install-recommends g++-aarch64-linux-gnu qemu-user
	mkdir -p build
	aarch64-linux-gnu-g++ -std=c++20 -O2 -static -I$(KERNELS) tests/ops/cpu_kernels_alone.cpp $(KERNELS)/kernels.cpp -o build/alone
	qemu-aarch64 build/alone
	$(BIN)/python -m tests.installed $(DIST) $(PYTHONS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

bench: install
	$(BIN)/python benchmarks/scan_cpu.py
	$(BIN)/python benchmarks/scan_torch.py
	$(BIN)/python benchmarks/linear.py
	$(BIN)/python benchmarks/models.py

clean:
	rm -rf build dist runs $(VENV)
	rm -f src/vimamba/ops/cpu/*.so
