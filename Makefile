# The entry point for every task. `make help` lists the targets.
PRESET ?= release
PYTHON ?= python3
BUILD  := build/$(PRESET)
VENV   := .venv
PEERS  := .venv-peers
JOBS   ?= $(shell nproc)
# lint reads FILES, or every file that the preset `lint` can compile.
NEEDS_CUDA := $(if $(shell command -v nvcc),,':!kernels/cuda/step.cc' ':!kernels/cuda/device_test.cc')
TIDIED     = $(or $(FILES),$(shell git ls-files '*.cc' ':!examples' $(NEEDS_CUDA)))
FORMATTED  = $(if $(FILES),$(filter %.h %.cc,$(FILES)),$(shell git ls-files '*.h' '*.cc'))

.DEFAULT_GOAL := build
.PHONY: build configure packages test test-long test-begin test-cpp test-python test-aarch64 test-fuzz build-fuzz fuzz fuzz-corpus \
        demo bench-peers bench-quality bench-memory install uninstall format style lint cuda-report clean help

help: ## this list
	@grep -hE '^[a-z0-9-]+:.*## ' Makefile | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'
	@echo "  PRESET=release|dev|asan|tsan chooses the build (build/PRESET/bin)"

packages: ## install the Debian packages that are missing
	@tools/setup.sh tools/packages.txt

# The virtual environment finds the package in python/ through a .pth file (its extension is compiled there with everything else), and the
# programs of the release build.
SEE_PACKAGE := "import site; print('$(CURDIR)/python', file=open(site.getsitepackages()[0] + '/orlop.pth', 'w'))"

$(VENV)/.ready: requirements.txt | packages
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	$(VENV)/bin/python -c $(SEE_PACKAGE)
	@ln -sf ../../build/release/bin/orlopd ../../build/release/bin/orlop $(VENV)/bin/
	@touch $@

ifeq ($(PRESET),release)
configure: packages $(VENV)/.ready ## packages, virtual environment, CMake
	@cmake --preset $(PRESET) -DORLOP_BUILD_PYTHON=ON -DPython_EXECUTABLE=$(CURDIR)/$(VENV)/bin/python > /dev/null
else
configure: packages
	@cmake --preset $(PRESET) > /dev/null
endif

build: configure ## build everything of one preset
	@$(CLOCK) build ninja -C $(BUILD) -j $(JOBS)

# The simulator's schedules and the kernels' tails are too many for every run. `make test` samples them from SEED on, so that a failure
# repeats; `make test SEED=...` takes another sample. `make test-long` runs all tails, and four times the schedules from a seed that is the
# commit's number, so that each commit runs others.
SEED   ?= 1
COMMIT  = $(shell printf %d 0x$$(git rev-parse --short=8 HEAD 2> /dev/null || echo 1))
SAMPLE  = ORLOP_SIM_SCHEDULES=100000 ORLOP_SIM_SEED=$(SEED) ORLOP_TAIL_STRIDE=$(STRIDE) ORLOP_TAIL_SEED=$(SEED)
STRIDE := 5
WHOLE   = ORLOP_SIM_SCHEDULES=400000 ORLOP_SIM_SEED=$(COMMIT) ORLOP_TAIL_STRIDE=1
TIMES  := build/times
CLOCK   = $(PYTHON) tests/times.py run $(TIMES)

ifeq ($(PRESET),release)
EVERY_TEST := test-cpp test-python test-fuzz $(if $(filter x86_64,$(shell uname -m)),test-aarch64)
else
EVERY_TEST := test-cpp
endif

test: test-begin $(EVERY_TEST) ## every test, by a sample of schedules and tails; with PRESET=asan or tsan: the C++ tests under sanitizers
	@$(PYTHON) tests/times.py table $(TIMES)

test-long: SAMPLE = $(WHOLE)
test-long: PYTEST_ARGS = --slow
test-long: test-begin $(EVERY_TEST) ## every test whole, with the long forms
	@$(PYTHON) tests/times.py table $(TIMES)

test-begin:
	@$(PYTHON) tests/times.py begin $(TIMES)
	@echo "sample: $(SAMPLE)"

test-cpp: build ## the C++ tests, the simulator last
	@ctest --preset $(PRESET) --show-only=json-v1 > $(TIMES)/cpp.json
	$(SAMPLE) $(CLOCK) cpp ctest --preset $(PRESET) -j $(JOBS) -E '^Simulator\.' --output-junit $(CURDIR)/$(TIMES)/cpp.xml
	$(SAMPLE) $(CLOCK) simulator ctest --preset $(PRESET) -V -R '^Simulator\.'

test-python: build ## the Python and whole-system tests
	ORLOP_BIN_DIR=$(CURDIR)/$(BUILD)/bin $(CLOCK) python $(VENV)/bin/python -m pytest --junit-xml=$(TIMES)/python.xml $(PYTEST_ARGS)

build/aarch64-sysroot/.ready: tools/sysroot.sh tools/packages-aarch64-sysroot.txt
	@tools/sysroot.sh arm64 tools/packages-aarch64-sysroot.txt $(@D)
	@touch $@

test-aarch64: STRIDE := 15
test-aarch64: build/aarch64-sysroot/.ready | packages ## the kernels' tests on an emulated AArch64
	@tools/setup.sh tools/packages-aarch64.txt
	@cmake --preset aarch64 > /dev/null
	@$(CLOCK) build-aarch64 ninja -C build/aarch64 -j $(JOBS)
	@ctest --preset aarch64 --show-only=json-v1 > $(TIMES)/aarch64.json
	$(SAMPLE) $(CLOCK) aarch64 ctest --preset aarch64 -j $(JOBS) --output-junit $(CURDIR)/$(TIMES)/aarch64.xml

# The fuzzers link the archives of the release build (cmake/fuzz.cmake).
build-fuzz: build
	@tools/setup.sh tools/packages-fuzz.txt
	@cmake --preset fuzz > /dev/null
	@$(CLOCK) build-fuzz ninja -C build/fuzz -j $(JOBS) orlop_fuzz

test-fuzz: build-fuzz ## the corpus of every fuzzer, and 2 seconds of new inputs
	@$(CLOCK) fuzz $(PYTHON) tools/fuzz.py build/fuzz --jobs $(JOBS) --seed $(SEED) $(TARGETS)

RUNS ?= 1000000
fuzz: build-fuzz ## fuzz every decoder long: RUNS inputs each, and the lines that they reach (TARGETS="chunk flush")
	$(PYTHON) tools/fuzz.py build/fuzz --jobs $(JOBS) --seed $(SEED) --runs $(RUNS) $(TARGETS)

fuzz-corpus: build-fuzz ## add to fuzz/corpus what `make fuzz` has found
	$(PYTHON) tools/fuzz.py build/fuzz --jobs $(JOBS) --grow $(TARGETS)

demo: build ## train a small GPT through two servers and two workers, beside plain torch
	$(VENV)/bin/python -m demo.run

$(PEERS)/.ready: bench/peers/requirements.txt | packages
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install --quiet --disable-pip-version-check -r $<
	$(PEERS)/bin/python -c $(SEE_PACKAGE)
	@touch $@

bench-peers: build $(PEERS)/.ready ## AdamW beside torch's, DeepSpeed's and others', into bench/RESULTS.md (ARGS="--rounds 15")
	$(PEERS)/bin/python bench/peers/adamw.py $(ARGS)

bench-quality: build $(PEERS)/.ready ## train the demo with every state format beside fp32 and bitsandbytes, into bench/RESULTS.md
	$(PEERS)/bin/python -m bench.quality $(ARGS)

bench-memory: build $(PEERS)/.ready ## bytes per parameter of a step on one host beside torch and bitsandbytes, into bench/RESULTS.md
	ORLOP_BIN_DIR=$(CURDIR)/$(BUILD)/bin $(PEERS)/bin/python -m bench.memory $(ARGS)

install: build ## install orlopd, orlop and the C++ client (PREFIX=/usr/local)
	cmake --install $(BUILD) --prefix $(or $(PREFIX),/usr/local)

uninstall: ## remove what `make install` put down
	cmake --build $(BUILD) --target uninstall

format: ## clang-format every C++ file
	@tools/setup.sh tools/packages-lint.txt
	clang-format -i $$(git ls-files '*.h' '*.cc')

style: packages $(VENV)/.ready ## the house, line lengths, formats and ruff: the part of lint that takes seconds
	@tools/setup.sh tools/packages-lint.txt
	@$(PYTHON) tools/house.py
	@$(PYTHON) tools/lines.py
	@$(VENV)/bin/ruff check .
	@$(if $(FORMATTED),clang-format --dry-run -Werror $(FORMATTED))

lint: style ## style, clang-tidy and thread safety (FILES=... for some C++ files)
	@tools/setup.sh tools/packages-fuzz.txt  # the headers of what the fuzzers compile
	@cmake --preset lint -DORLOP_BUILD_PYTHON=ON -DPython_EXECUTABLE=$(CURDIR)/$(VENV)/bin/python > /dev/null
	@ninja -C build/lint orlop_generated > /dev/null
	@$(PYTHON) tools/tidy.py build/lint $(JOBS) $(TIDIED)

cuda-report: configure ## registers and spills of every CUDA kernel
	@$(PYTHON) tools/cuda_report.py $(BUILD)

clean: ## remove build directories and the virtual environments
	rm -rf build $(VENV) $(PEERS)
