# make demo and make test are all a newcomer needs; the others are for development.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
RUN := runs/demo
PARALLEL := -n auto --dist worksteal

.PHONY: install demo demo-dense docs test test-sanitized test-browser test-timm lint types bench clean

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

test: lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest $(PARALLEL) tests/ops/interpreted

# The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, in a library beside the installed one.
SANITIZERS = $(shell for name in asan ubsan stdc++; do $(CXX) -print-file-name=lib$$name.so; done)
test-sanitized: install
	$(BIN)/cmake -S . -B build/sanitized -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	  -DPython_EXECUTABLE=$(abspath $(BIN))/python -DVIMAMBA_SANITIZE=ON
	$(BIN)/cmake --build build/sanitized
	LD_PRELOAD="$(SANITIZERS)" ASAN_OPTIONS=detect_leaks=0 VIMAMBA_CPU_LIBRARY=build/sanitized/_kernels.so FUZZ_CASES=400 \
	  $(BIN)/python -m pytest tests/ops/test_cpu_kernels.py tests/ops/test_fuzz.py

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
