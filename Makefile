# Every target sets up what it needs in .venv; nothing has to be installed beforehand but Python and make.
# Other versions of torch and of the trainers, and the check of external links, are sessions of nox: noxfile.py.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_OUTPUT ?= outputs/openmoji
BENCH_OUTPUT ?= outputs/bench
GPU_OUTPUT ?= outputs/gpu

.PHONY: demo test test-slow lint format typecheck docs bench gpu test-gpu bench-gpu mutants release-check clean

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
	$(PIP_INSTALL) 'build>=1.2' 'twine>=6' 'check-wheel-contents>=0.6'
	touch $@

$(VENV)/.docs: pyproject.toml | $(VENV)/.base
	$(PIP_INSTALL) --editable '.[docs]'
	touch $@

## Train a small CLIP on OpenMoji as CLIP, as RankCLIP and with two encoders' ranks side by side, evaluate and draw.
demo: $(VENV)/.examples
	$(BIN)/python examples/demo/run.py --output $(DEMO_OUTPUT) $(DEMO_ARGS)

## A study of examples/studies, `make study NAME=lists PRESET=quick`: its missing trainings, then its report. Without
## NAME their names; DATA is the folder of Flickr8k, which some need. Repeat to resume.
PRESET ?= quick
.PHONY: study
study: $(VENV)/.studies
	$(BIN)/python -m studies $(if $(NAME),$(NAME) --preset $(PRESET),--help) $(if $(DATA),--data '$(DATA)') $(STUDY_ARGS)

$(VENV)/.studies: $(VENV)/.examples
	$(PIP_INSTALL) --editable '.[examples]' --editable 'examples[studies]'
	touch $@

# One worker per core, and one thread in each: most tests compute too little to share. Files come in their order: the
# trainings, few tests of many seconds, would else be last, one worker waiting for the other.
ON_ALL_CORES := OMP_NUM_THREADS=1
WORKERS ?= -n auto --dist loadfile --no-loadscope-reorder

## The test suite without its slow part.
test: $(VENV)/.dev
	$(ON_ALL_CORES) $(BIN)/python -m pytest -m 'not slow' $(WORKERS) $(PYTEST_ARGS)

## The slow part (trainings under torchrun, installations), then every property on 2,000 random examples.
test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)
	$(ON_ALL_CORES) HYPOTHESIS_PROFILE=thorough $(BIN)/python -m pytest -m 'not slow' $(WORKERS) $(PYTEST_ARGS)

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

## Time and memory of the losses against open_clip's ClipLoss and the naive rank loss, as ratios within one run: tables
## and whether the targets are met, in outputs/bench (about 25 minutes on 2 cores). SCALING_ARGS=--largest adds
## N = 32,768.
bench: $(VENV)/.dev
	$(BIN)/python benchmarks/scaling.py --output $(BENCH_OUTPUT) $(SCALING_ARGS)
	$(BIN)/python benchmarks/bin_error.py --output $(BENCH_OUTPUT)
	$(BIN)/python benchmarks/distributed.py --output $(BENCH_OUTPUT)
	$(BIN)/python benchmarks/ranked_lists.py --output $(BENCH_OUTPUT)

## On a CUDA card, with a CUDA build of torch: the core's tests, the kernels compiled instead of interpreted; and what
## the losses cost there, in outputs/gpu (under nine minutes; repeat the command to resume). GPU_ARGS='--write
## docs/gpu.md' fills the tables into the document.
GPU_TESTS := tests/rankloss_triton tests/test_functional.py tests/test_losses.py tests/gpu
gpu: test-gpu bench-gpu
test-gpu: $(VENV)/.dev
	RANKLOSS_TEST_DEVICE=cuda $(BIN)/python -m pytest -m 'not slow' $(wildcard $(GPU_TESTS)) $(PYTEST_ARGS)
bench-gpu: $(VENV)/.dev
	$(BIN)/python benchmarks/gpu.py --output $(GPU_OUTPUT) $(GPU_ARGS)

## Mutation testing: the share of small faults in these files that these tests notice, and the survivors, in
## outputs/mutants (a minute or two each; repeated, the command goes on). MUTANTS_ARGS='--count 100' draws more of them.
MUTATED := rankloss/dense.py rankloss/engine.py rankloss/batch.py rankloss/ranking.py \
	rankloss/distributed.py \
	integrations/rankloss_trainers/runtime.py
KILLERS := tests/test_dense.py tests/test_engine.py tests/test_ranking.py tests/test_batch.py \
	tests/test_functional.py tests/test_losses.py tests/test_distributed.py tests/conditions tests/docs/test_bad_input.py \
	tests/rankloss_trainers/test_runtime.py
mutants: $(VENV)/.dev
	$(BIN)/python tools/mutants.py $(MUTANTS_ARGS) $(MUTATED) -- $(KILLERS)

## Build what a release would publish; install, import and uninstall it in fresh environments, once per extra.
release-check: $(VENV)/.release
	$(BIN)/python tools/release_check.py $(RELEASE_ARGS)

clean:
	rm -rf $(VENV) .nox build dist
