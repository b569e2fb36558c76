# Every target works on a fresh clone: it needs Python >= 3.10 with pip, make and a C++20 compiler, nothing else.
PYTHON ?= python3
BIN := .venv/bin
HEADERS := $(shell find include -name '*.hpp')
TEST_HEADERS := $(wildcard tests/*/*.hpp)
UNITS := $(wildcard csrc/*.cpp)
PROGRAMS := $(wildcard tests/*/*.cpp)
# clang too, by whichever name there is one that knows all instruction sets: 16 or newer.
CLANGS := clang++ $(addprefix clang++-,$(shell seq 30 -1 16))
CLANG := $(shell for c in $(CLANGS); do v=$$($$c -dumpversion 2>/dev/null | cut -d. -f1); test "$${v:-0}" -ge 16 && echo $$c && break; done)
COMPILERS := $(CXX) $(CLANG)
EACH := xargs -P $(shell nproc) -I {}
WARN := -std=c++20 -O2 -Wall -Wextra -Werror -Iinclude -c -o /dev/null

.PHONY: demo test exhaustive sanitize floors aarch64 aarch64-tools wheel wheel-test bench lint docs links chromium clean

demo: .venv/built
	$(BIN)/python examples/minilm.py

# The tests fork thousands of children: with its heap in huge pages a process has fewer page tables to copy for each. Two
# processes of tests share the CPUs: OpenMP's threads wait asleep, not spinning, which was half of the time of small
# products. Bytecode is kept for the interpreters that tests start, and the next run, whatever the environment says.
PYTEST := GLIBC_TUNABLES=glibc.malloc.hugetlb=1 GOMP_SPINCOUNT=0 PYTHONDONTWRITEBYTECODE= $(BIN)/pytest -q -n 2
test: .venv/built
	$(PYTEST)

# What `test` samples in full, and long sweeps: in parts of at most half an hour on 2 cores, each of which says how long
# it took. One of them: make exhaustive PART=5/24.
PARTS := 24
exhaustive: .venv/built
	set -e; for part in $(if $(PART),$(PART),$(foreach i,$(shell seq $(PARTS)),$(i)/$(PARTS))); do \
	  echo "part $$part"; $(PYTEST) -m exhaustive --part $$part; \
	done

# Instrumented builds have a folder of their own. SHORT=--short is what continuous integration runs.
sanitize: .venv/ready
	$(BIN)/python tests/sanitize/run.py address $(SHORT)
	$(BIN)/python tests/sanitize/run.py thread $(SHORT)

# As on lesser CPUs: what the suite is for each ISA below a limit, and a smoke test on older CPUs that QEMU imitates
# (Debian: qemu-user), where an instruction too many is fatal.
SMOKE := tests/kernel/test_exact.py tests/layer/test_linear.py tests/spec
floors: .venv/built
	set -e; for isa in scalar avx2; do \
	  FASTLINEAR_MAX_ISA=$$isa $(BIN)/python tests/floors.py; FASTLINEAR_MAX_ISA=$$isa $(PYTEST) $(SMOKE); \
	done
	set -e; for cpu in Haswell Nehalem; do qemu-x86_64 -cpu $$cpu $(BIN)/python tests/floors.py --short; done

# The library for aarch64, with its scalar kernels: its C++ tests on CPUs that QEMU imitates, and its modules, built only.
aarch64: .venv/ready
	$(BIN)/python tests/aarch64/run.py $(SHORT)

aarch64-tools:
	apt-get install -y g++-aarch64-linux-gnu qemu-user

# The source distribution and a wheel for each Python that is here, or each of PYTHONS, in dist/: by PyPI's clang, and
# checked. TWICE=--twice builds each a second time, in another folder, and compares the bytes.
wheel: .venv-wheel/ready
	.venv-wheel/bin/python tests/wheel/build.py --python $(PYTHONS) $(TWICE)

.venv-wheel/ready: tests/wheel/requirements.txt
	$(PYTHON) -m venv .venv-wheel && .venv-wheel/bin/pip install -q -r $<
	touch $@

# Both in empty environments, without a compiler and without torch; TORCH="2.13.0 2.14.1" for other versions of it.
wheel-test:
	$(PYTHON) tests/wheel/check.py $(if $(TORCH),--torch $(TORCH))

bench: .venv/built
	$(BIN)/python benchmarks/bench.py

lint: .venv/ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	PATH="$(BIN):$$PATH" cython-lint fastlinear/*.pyx fastlinear/*.px[di]
	$(BIN)/clang-format --dry-run -Werror $(HEADERS) $(TEST_HEADERS) $(UNITS) $(PROGRAMS)
	set -e; for cxx in $(COMPILERS); do \
	  printf '%s\n' $(UNITS) $(PROGRAMS) | $(EACH) $$cxx $(WARN) {}; \
	  printf '%s\n' $(wildcard $(addprefix include/fastlinear/,$(addsuffix /*.hpp,contract host formats weight driver))) | $(EACH) $$cxx $(WARN) -include {} -x c++ /dev/null; \
	done

# The site of docs/ and of the docstrings, in build/docs; a link that leads nowhere, within it, is an error.
docs: .venv/built .venv/docs
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs

# The links that leave it, too; needs the network.
links: .venv/built .venv/docs
	$(BIN)/python -m sphinx -q -W --keep-going -b linkcheck docs build/links

# What the tests of the report's page draw it with; without it they are skipped.
chromium:
	apt-get install -y chromium

.venv/docs: .venv/ready docs/requirements.txt
	$(BIN)/pip install -q -r docs/requirements.txt
	touch $@

.venv/ready: requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -r requirements-dev.txt
	touch $@

# In pip's build isolation, as a user gets it; editable, so that only C++ and Cython changes need a build.
.venv/built: .venv/ready setup.py pyproject.toml $(HEADERS) $(UNITS) $(wildcard fastlinear/*.pyx fastlinear/*.px[di])
	$(BIN)/pip install -q --no-deps -e .
	touch $@

clean:
	rm -rf .venv .venv-peers .venv-wheel dist build *.egg-info fastlinear/*.so fastlinear/_*.cpp .mypy_cache .pytest_cache .ruff_cache .hypothesis
