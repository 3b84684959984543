# Every target sets up what it needs in .venv; nothing has to be installed beforehand but Python and make.
# Other versions of torch and of the trainers, and the check of external links, are sessions of nox: noxfile.py.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_OUTPUT ?= outputs/openmoji
BENCH_OUTPUT ?= outputs/bench
GPU_OUTPUT ?= outputs/gpu

.PHONY: demo test test-slow test-properties lint format typecheck docs clean
.PHONY: bench bench-once gpu test-gpu bench-gpu mutants release-check test-wheel

# Of the installed modules most are never imported, so none is compiled beforehand; those that are, are compiled once.
PIP_INSTALL := $(BIN)/python -m pip install --quiet --no-compile
export PYTHONDONTWRITEBYTECODE :=

$(VENV)/.base:
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --upgrade pip
	touch $@

$(VENV)/.examples: pyproject.toml examples/pyproject.toml | $(VENV)/.base
	@echo "Installing the examples into $(VENV): a minute or two."
	$(PIP_INSTALL) --editable '.[examples]' --editable examples
	touch $@

$(VENV)/.dev: pyproject.toml examples/pyproject.toml | $(VENV)/.base
	$(PIP_INSTALL) --editable '.[dev]' --editable examples
	touch $@ $(VENV)/.docs

$(VENV)/.release: pyproject.toml | $(VENV)/.base
	$(PIP_INSTALL) 'build>=1.2' 'twine>=6' 'check-wheel-contents>=0.6' 'uv>=0.5'
	touch $@

$(VENV)/.docs: pyproject.toml | $(VENV)/.base
	$(PIP_INSTALL) --editable '.[docs]'
	touch $@

## Train a small CLIP on OpenMoji as CLIP, as RankCLIP and with two encoders as teacher side by side, evaluate and draw.
demo: $(VENV)/.examples
	$(BIN)/python examples/demo/run.py --output $(DEMO_OUTPUT) $(DEMO_ARGS)

## A living study of examples/studies, `make study NAME=alignment PRESET=quick`: its missing trainings, then its report;
## DATA is the folder of Flickr8k, which some need; repeat to resume. Of a finished study the commands that repeat it,
## or one SEED of it. Without NAME all names.
PRESET ?= quick
.PHONY: study
study: $(VENV)/.studies
	$(BIN)/python -m studies $(NAME) $(if $(NAME),--preset $(PRESET)) $(if $(DATA),--data '$(DATA)') $(if $(SEED),--seed $(SEED)) \
		$(STUDY_ARGS)

$(VENV)/.studies: $(VENV)/.examples
	$(PIP_INSTALL) --editable '.[examples]' --editable 'examples[studies]'
	touch $@

# One worker per core, and one thread in each: most tests compute too little to share. Files come in their order: the
# trainings, few tests of many seconds, would else be last, one worker waiting for the other.
ON_ALL_CORES := OMP_NUM_THREADS=1
WORKERS ?= -n auto --dist loadfile --no-loadscope-reorder

## The test suite without its slow part. Of each property it draws the same 30 examples every time, so that a red run is
## red again; `make test-properties` draws others.
test: $(VENV)/.dev
	$(ON_ALL_CORES) $(BIN)/python -m pytest -m 'not slow' $(WORKERS) $(PYTEST_ARGS)

## The slow part: trainings under torchrun, installations.
test-slow: $(VENV)/.dev
	$(ON_ALL_CORES) $(BIN)/python -m pytest -m slow $(WORKERS) $(PYTEST_ARGS)

## Every property on 2,000 examples of a fresh seed, which the printed command shows; HYPOTHESIS_SEED=… draws those of
## another run again, and PYTEST_ARGS="-k …" of some properties.
HYPOTHESIS_SEED ?= $(shell $(PYTHON) -c 'import random; print(random.getrandbits(32))')
test-properties: $(VENV)/.dev
	$(ON_ALL_CORES) HYPOTHESIS_PROFILE=thorough $(BIN)/python -m pytest -m 'hypothesis and not slow' \
		--hypothesis-seed=$(HYPOTHESIS_SEED) $(WORKERS) $(PYTEST_ARGS)

## Style and spelling; `make typecheck` has the types. pre-commit runs the same.
lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files -z | xargs -0 $(BIN)/codespell

## Format the code and repair what ruff can.
format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

typecheck: $(VENV)/.dev
	$(BIN)/mypy

## The documentation site, in outputs/site: warnings are errors, links are checked, examples run. Needs npm.
docs: $(VENV)/.docs docs/vendor/katex
	$(BIN)/python -m doctest $(wildcard docs/*.md)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Renders the formulas; the site has its own copy.
docs/vendor/katex:
	mkdir -p docs/vendor
	cd docs/vendor && npm pack --silent katex@0.19 | xargs tar -xzf && rm katex-*.tgz
	mkdir $@
	cd docs/vendor/package && mv LICENSE dist/katex.min.js dist/katex.min.css dist/fonts ../katex
	rm -r docs/vendor/package docs/vendor/katex/fonts/*.ttf docs/vendor/katex/fonts/*.woff

## Time and memory of the losses beside open_clip's and a naive one, as pytest-benchmark's JSON in outputs/bench; from
## it the tables and the chart of docs/performance.md, and the bytes and launches of a step on a GPU, counted without one.
## A quarter of an hour on 2 idle cores.
## BENCH_AGAINST=REVISION leaves the page as it is, runs them on that revision's rankloss too, and compares.
## BENCH_ARGS="-k 'test_loss and 4096'" runs a part.
BENCH := $(BIN)/pytest --benchmark-only --benchmark-json
AGAINST = $(BENCH_OUTPUT)/$(subst /,-,$(BENCH_AGAINST))
ifndef BENCH_AGAINST
bench: $(VENV)/.dev
	mkdir -p $(BENCH_OUTPUT)
	$(BENCH) $(BENCH_OUTPUT)/bench.json benchmarks $(BENCH_ARGS)
	$(BIN)/python benchmarks/page.py $(BENCH_OUTPUT)/bench.json docs/performance.md
	$(BIN)/python tools/pictures
	PYTHONPATH=tests $(BIN)/python benchmarks/traffic.py
else
bench: $(VENV)/.dev
	rm -rf $(AGAINST)
	$(PIP_INSTALL) --no-deps --no-build-isolation --target $(AGAINST) \
		"git+file://$(CURDIR)@$$(git rev-parse $(BENCH_AGAINST))"
	PYTHONPATH=$(AGAINST) $(BENCH) $(AGAINST).json benchmarks $(BENCH_ARGS)
	$(BENCH) $(BENCH_OUTPUT)/this.json benchmarks $(BENCH_ARGS)
	$(BIN)/pytest-benchmark compare $(AGAINST).json $(BENCH_OUTPUT)/this.json \
		--group-by=fullname --columns=median,iqr,rounds --sort=fullname
endif

## Every benchmark once, on small sizes, untimed.
bench-once: $(VENV)/.dev
	$(ON_ALL_CORES) $(BIN)/pytest benchmarks --benchmark-disable

## On a CUDA card, with a CUDA build of torch: the core's tests, the kernels compiled instead of interpreted; and what
## the losses cost there, as JSON in outputs/gpu and as tables in docs/performance.md.
GPU_TESTS := tests/rankloss_triton tests/test_functional.py tests/test_losses.py tests/gpu
gpu: test-gpu bench-gpu
test-gpu: $(VENV)/.dev
	RANKLOSS_TEST_DEVICE=cuda $(BIN)/python -m pytest -m 'not slow' $(wildcard $(GPU_TESTS)) $(PYTEST_ARGS)
ON_A_CARD := test_losses.py test_training_step.py
bench-gpu: $(VENV)/.dev
	mkdir -p $(GPU_OUTPUT)
	RANKLOSS_TEST_DEVICE=cuda $(BENCH) $(GPU_OUTPUT)/bench.json $(addprefix benchmarks/,$(ON_A_CARD)) $(BENCH_ARGS)
	$(BIN)/python benchmarks/page.py $(GPU_OUTPUT)/bench.json docs/performance.md gpu

## Mutation testing: the share of small faults in these files that these tests notice, and the survivors, in
## outputs/mutants (a minute or two each; repeated, the command goes on). MUTANTS_ARGS='--count 100' draws more of them.
MUTATED := rankloss/dense.py rankloss/engine.py rankloss/batch.py rankloss/ranking.py \
	rankloss/distributed.py \
	$(addprefix integrations/rankloss_trainers/,runtime.py teaching.py host.py entries.py)
KILLERS := tests/test_dense.py tests/test_engine.py tests/test_ranking.py tests/test_batch.py \
	tests/test_functional.py tests/test_losses.py tests/test_distributed.py tests/conditions tests/docs/test_bad_input.py \
	$(addprefix tests/rankloss_trainers/test_,runtime.py teaching.py entries.py)
mutants: $(VENV)/.dev
	$(BIN)/python tools/mutants.py $(MUTANTS_ARGS) $(MUTATED) -- $(KILLERS)

## Build what a release would publish; install, import and uninstall it in fresh environments, for each extra with the
## newest and the lowest versions; check its types. RELEASE_ARGS="--python 3.10 3.13" does so for other Pythons.
release-check: $(VENV)/.release
	$(BIN)/python tools/release_check.py $(RELEASE_ARGS)

## The tests that need nothing but the library, against the built wheel in an environment of its own.
WHEEL_TESTS ?= tests/test_*.py tests/conditions tests/rankloss_trainers/test_imports.py
test-wheel: $(VENV)/.release
	$(ON_ALL_CORES) $(BIN)/python tools/release_check.py $(RELEASE_ARGS) --tests $(foreach x,$(WHEEL_TESTS),'$(x)')

clean:
	rm -rf $(VENV) .nox build dist
