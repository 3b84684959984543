# Every target sets up what it needs in .venv; nothing has to be installed beforehand but Python and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_OUTPUT ?= outputs/openmoji
MINIATURE_OUTPUT ?= outputs/miniature
BENCH_OUTPUT ?= outputs/bench
FUZZ_MINUTES ?= 10
GPU_OUTPUT ?= outputs/gpu
OPEN_CLIP_VERSIONS ?= 3.0.0 3.3.0
TRANSFORMERS_VERSIONS ?= 4.51.3 5.24.0
SENTENCE_TRANSFORMERS_VERSIONS ?= 6.2.0
LIGHTNING_VERSIONS ?= 2.4.0 2.6.6
# The lower bounds of pyproject.toml's dependencies, which a test compares with these.
LOWEST := torch==2.6.0 numpy==1.24.0

.PHONY: demo miniature miniature-full miniature-search miniature-question miniature-teacher miniature-all test test-slow test-matrix test-main test-run-clip test-gpu fuzz \
	lint typecheck bench bench-gpu docs links pictures notebooks release-check clean

$(VENV)/.base:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	touch $@

$(VENV)/.examples: pyproject.toml examples/pyproject.toml | $(VENV)/.base
	@echo "Installing the examples into $(VENV): a minute or two."
	$(BIN)/python -m pip install --quiet --editable '.[examples]' --editable examples
	touch $@

$(VENV)/.dev: pyproject.toml examples/pyproject.toml | $(VENV)/.base
	$(BIN)/python -m pip install --quiet --editable '.[dev]' --editable examples
	touch $@

$(VENV)/.docs: pyproject.toml | $(VENV)/.base
	$(BIN)/python -m pip install --quiet --editable '.[docs,plots]'
	touch $@

$(VENV)/.release: pyproject.toml | $(VENV)/.base
	$(BIN)/python -m pip install --quiet 'build>=1.2' 'twine>=6'
	touch $@

## Train a small CLIP on OpenMoji with --loss clip and --loss rankclip side by side, evaluate both and draw.
demo: $(VENV)/.examples
	$(BIN)/python examples/openmoji/run.py --output $(DEMO_OUTPUT) $(DEMO_ARGS)

## The paper in miniature: every loss, measure, table and figure, as a smoke test (about 15 minutes on 2 cores).
miniature: $(VENV)/.examples
	$(BIN)/python examples/miniature/run.py --preset quick --output $(MINIATURE_OUTPUT) $(MINIATURE_ARGS)

## The same at the size of the report in examples/miniature; interrupted, the same command continues.
miniature-full: $(VENV)/.examples
	$(BIN)/python examples/miniature/run.py --preset full --output $(MINIATURE_OUTPUT) $(MINIATURE_ARGS)

## Search for the setting in which the rank terms help most, and confirm it once (2.5 hours on 2 cores).
miniature-search: $(VENV)/.examples
	$(BIN)/python examples/miniature/study.py search --preset full --output $(MINIATURE_OUTPUT) $(SEARCH_ARGS)

## Does RankCLIP help? 38 trainings with fresh seeds, as examples/miniature/preregistration.md says; resumable (5
## core-hours on an idle machine: 1,120 steps of 0.3 to 0.4 s, then half a minute to measure).
miniature-question: $(VENV)/.examples
	$(BIN)/python examples/miniature/study.py question --preset full --output $(MINIATURE_OUTPUT) $(QUESTION_ARGS)

## Is ranking by a teacher better than the trainer's own distillation? A teacher, 67 trainings to choose a try for each of
## eight arms, 72 to confirm; resumable (about 14 core-hours: 110,000 steps of 0.3 to 0.4 s, 4,480 of the teacher's).
miniature-teacher: $(VENV)/.examples
	$(BIN)/python examples/miniature/study.py teacher --preset full --output $(MINIATURE_OUTPUT) $(TEACHER_ARGS)

## Everything that docs/evidence.md rests on; it resumes whatever is unfinished, and only reports what is finished.
miniature-all: miniature-question miniature-teacher miniature-full miniature-search

# One worker per core, and one thread in each: most tests compute too little to share.
ON_ALL_CORES := OMP_NUM_THREADS=1
WORKERS ?= -n auto --dist loadfile

## The test suite without its slow part.
test: $(VENV)/.dev
	$(ON_ALL_CORES) $(BIN)/python -m pytest -m 'not slow' $(WORKERS) $(PYTEST_ARGS)

## The slow part (trainings under torchrun, installations), then every property on 2,000 random examples.
test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)
	$(ON_ALL_CORES) HYPOTHESIS_PROFILE=thorough $(BIN)/python -m pytest -m 'not slow' $(WORKERS) $(PYTEST_ARGS)

## The core on the lowest torch and NumPy, and the integrations on the lowest and the newest supported version of each
## trainer, each in an environment of its own.
test-matrix: test-lowest test-versions-open_clip test-versions-transformers
test-matrix: test-versions-sentence-transformers test-versions-lightning

.PHONY: test-versions-open_clip test-versions-transformers test-versions-sentence-transformers test-versions-lightning
test-versions-open_clip: $(addprefix test-open_clip-,$(OPEN_CLIP_VERSIONS))
test-versions-transformers: $(addprefix test-transformers-,$(TRANSFORMERS_VERSIONS))
test-versions-sentence-transformers: $(addprefix test-sentence-transformers-,$(SENTENCE_TRANSFORMERS_VERSIONS))
test-versions-lightning: $(addprefix test-lightning-,$(LIGHTNING_VERSIONS))

# With Python 3.10 or 3.11, the only ones that this NumPy has wheels for, and with the pip that they bring.
.PHONY: test-lowest
test-lowest:
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/python -m pip install --quiet --editable '.[test]' $(LOWEST)
	$(ON_ALL_CORES) $(VENV)-lowest/bin/python -m pytest tests/test_*.py $(wildcard tests/conditions) rankloss README.md $(WORKERS) $(PYTEST_ARGS)

test-open_clip-%:
	$(PYTHON) -m venv $(VENV)-open_clip-$*
	$(VENV)-open_clip-$*/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-open_clip-$*/bin/python -m pip install --quiet --editable '.[test]' 'open_clip_torch[training]==$*'
	$(VENV)-open_clip-$*/bin/python -m pytest tests/rankloss_open_clip tests/test_losses.py tests/test_distributed.py $(PYTEST_ARGS)

# An extra with one version of its trainer. Older releases warn of what newer ones of torch and NumPy deprecate.
define test_trainer
	$(PYTHON) -m venv $(VENV)-$(1)-$*
	$(VENV)-$(1)-$*/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-$(1)-$*/bin/python -m pip install --quiet --editable '.[$(1)]' pytest hypothesis '$(1)==$*'
	$(VENV)-$(1)-$*/bin/python -m pytest -W default $(wildcard tests/rankloss_trainers/$(2)) $(PYTEST_ARGS)
endef

test-transformers-%:
	$(call test_trainer,transformers,test_transformers*.py)

test-sentence-transformers-%:
	$(call test_trainer,sentence-transformers,test_sentence_transformers.py)

test-lightning-%:
	$(call test_trainer,lightning,test_lightning.py)

## The integration on a checkout of open_clip's main branch, which no registry has: CHECKOUT=…/open_clip.
test-main: $(VENV)/.dev
	RANKLOSS_OPEN_CLIP_CHECKOUT=$(CHECKOUT) $(BIN)/python -m pytest tests/rankloss_open_clip/test_main_branch.py tests/rankloss_trainers/test_trainers_page.py $(PYTEST_ARGS)

## transformers' own run_clip.py, from a checkout, which no registry has: CHECKOUT=…/transformers.
test-run-clip: $(VENV)/.dev
	RANKLOSS_TRANSFORMERS_CHECKOUT=$(CHECKOUT) $(BIN)/python -m pytest tests/rankloss_trainers/test_transformers_example.py $(PYTEST_ARGS)

## Random options and data against the NumPy reference for FUZZ_MINUTES; then the worst errors by option, or a finding.
fuzz: $(VENV)/.dev
	$(BIN)/python tests/fuzz.py --minutes $(FUZZ_MINUTES) $(FUZZ_ARGS)

## The core's tests on a CUDA card, the kernels compiled instead of interpreted; needs a CUDA build of torch.
GPU_TESTS := tests/kernels tests/test_functional.py tests/test_losses.py tests/test_cyclip.py tests/test_alip.py
test-gpu: $(VENV)/.dev
	RANKLOSS_TEST_DEVICE=cuda $(BIN)/python -m pytest -m 'not slow' $(GPU_TESTS) $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(VENV)/.dev
	$(BIN)/mypy

## Time and memory of the losses against open_clip's ClipLoss and the naive rank loss: tables, plots and whether the
## targets are met, in outputs/bench (about 25 minutes on 2 cores). SCALING_ARGS=--largest adds N = 32,768.
bench: $(VENV)/.dev
	mkdir -p $(BENCH_OUTPUT)
	$(BIN)/python -m pytest benchmarks -p no:cacheprovider -o testpaths=benchmarks -o python_files='bench_*.py' --benchmark-columns=median,iqr,rounds --benchmark-json=$(BENCH_OUTPUT)/pytest-benchmark.json $(BENCH_ARGS)
	$(BIN)/python benchmarks/scaling.py --output $(BENCH_OUTPUT) $(SCALING_ARGS)
	$(BIN)/python benchmarks/bin_error.py --output $(BENCH_OUTPUT)
	$(BIN)/python benchmarks/distributed.py --output $(BENCH_OUTPUT) $(DISTRIBUTED_ARGS)

## The losses on one CUDA card: agreement, waits, precision, time and memory, in outputs/gpu (under nine minutes; repeat
## the command to resume). GPU_ARGS='--write docs/gpu.md' fills the tables into the document.
bench-gpu: $(VENV)/.dev
	$(BIN)/python benchmarks/gpu.py --output $(GPU_OUTPUT) $(GPU_ARGS)

## The documentation site, in outputs/site: warnings are errors, links are checked, examples run. Needs npm.
docs: $(VENV)/.docs docs/vendor/katex
	$(BIN)/python -m doctest $(wildcard docs/*.md)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

## Request every external link of the documents; says which are broken, and which cannot be reached from here.
links:
	$(PYTHON) tools/check_links.py

# Renders the formulas; the site has its own copy.
docs/vendor/katex:
	mkdir -p docs/vendor
	cd docs/vendor && npm pack --silent katex@0.19 | xargs tar -xzf && rm katex-*.tgz
	mkdir $@
	cd docs/vendor/package && mv LICENSE dist/katex.min.js dist/katex.min.css dist/fonts ../katex
	rm -r docs/vendor/package docs/vendor/katex/fonts/*.ttf docs/vendor/katex/fonts/*.woff

## The pictures in docs/assets, from code, docs/performance.md's table and a copy of the demo's agreement.json.
pictures: $(VENV)/.docs
	$(BIN)/python tools/pictures

## Run the notebooks and store what they show, over $(DEMO_OUTPUT); NOTEBOOKS=openmoji runs one of them.
notebooks: $(VENV)/.dev
	OPENMOJI_OUTPUT=$(abspath $(DEMO_OUTPUT)) $(BIN)/python tools/run_notebooks.py $(NOTEBOOKS)

## Build what a release would publish; install, import and uninstall it in fresh environments, once per extra.
release-check: $(VENV)/.release
	$(BIN)/python tools/release_check.py $(RELEASE_ARGS)

clean:
	rm -rf $(VENV) $(VENV)-* build dist
