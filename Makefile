# Aliases for `itt ...` and `python -m research ...`, each of which first builds .venv where it is missing.
# A variable of the command line is an option: make data SEQ_LEN=256 is itt data --seq-len 256. The environment is not read.
PYTHON ?= python3
BIN := .venv/bin
RUN := $(BIN)/python -m

# Containers often set this, and then every process compiles PyTorch and the rest anew: 16 of the 22 s that imports take.
export PYTHONDONTWRITEBYTECODE :=

# Variables that a target accepts; others are refused.
VARIABLES.data := SOURCE OUT TOKENIZER SEQ_LEN VALIDATION_TOKENS VALIDATION_SHARES BUDGET_TOKENS TEXT_FIELD WORKERS ENGINE \
  MAX_BAD_LINES REMOTE
VARIABLES.verify-data := OUT WORKERS
VARIABLES.export := CHECKPOINT OUT DTYPE TOKENIZER TENSORBOARD OVERWRITE
VARIABLES.eval-data := SOURCE OUT
VARIABLES.eval := MODEL EVAL_DATA TOKEN_RATIOS SELECTION TASK SHOTS ROW OUT LIMIT BATCH_TOKENS
VARIABLES.calibrate := MODEL DATA RATIOS SEQUENCES BATCH_SIZE
VARIABLES.sweep := MODEL DATA RATIOS SEQUENCES BATCH_SIZE OUT
VARIABLES.elastic := $(VARIABLES.sweep)
VARIABLES.tokens := MODEL TEXT SELECTION RATIOS LIMIT OUT
VARIABLES.see := $(VARIABLES.tokens)
VARIABLES.quickstart := SOURCE TOKENIZER OUT
VARIABLES.figures := MODEL DENSE DATA AQUA TENSORBOARD SCORES SEQUENCES SAMPLES SELECTION OUT
VARIABLES.study := STUDY OUT SET STORED
VARIABLES.study-report := STUDY SET RESULTS OUT
VARIABLES.k-hop-data := OUT
VARIABLES.k-hop-answers := OUT DATA
VARIABLES.bench := SIZES RESULTS ROUNDS
VARIABLES.bench-kernels := RESULTS
VARIABLES.bench-data := SOURCE TOKENIZER

GIVEN := $(foreach v,$(filter-out PYTHON -%,$(.VARIABLES)),$(if $(filter command,$(firstword $(origin $v))),$v))
KNOWN := $(foreach goal,$(MAKECMDGOALS),$(VARIABLES.$(goal)))
ifneq ($(filter-out $(KNOWN),$(GIVEN)),)
$(error make $(MAKECMDGOALS): unknown variable $(filter-out $(KNOWN),$(GIVEN)); known are $(or $(KNOWN),none))
endif

# The value as it was typed, quoted for the shell: neither make nor the shell reads a $ or a quote in it.
quoted = '$(subst ','\'',$(value $1))'
given = $(filter $1,$(GIVEN))
option = --$(shell echo $1 | tr A-Z_ a-z-)
options = $(foreach v,$(filter-out $1,$(call given,$(VARIABLES.$@))),$(call option,$v) $(call quoted,$v))
# A list separated by spaces becomes a repeated option.
repeated = $(if $(call given,$1),$(foreach w,$(value $1),$(call option,$1) '$(subst ','\'',$w)'))
needed = $(if $(call given,$1),$(call quoted,$1),$(error make $@: $1= is missing: $2))

.PHONY: help setup lock test lint $(patsubst VARIABLES.%,%,$(filter VARIABLES.%,$(.VARIABLES))) bench-decode

help:  ## list the targets
	@grep -hE '^[a-z -]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 16
	@$(foreach t,$(sort $(patsubst VARIABLES.%,%,$(filter VARIABLES.%,$(.VARIABLES)))),echo '  $t: $(VARIABLES.$t:%=%=)';)

setup: .venv/.installed  ## build .venv (uv inside it, every version from requirements.lock)

.venv/.installed: requirements.lock setup.py
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 12) else \
	  f"Python {v[0]}.{v[1]} is not supported (3.10 to 3.12 are): make PYTHON=python3.11 setup")'
	@$(RUN) pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv
	@$(RUN) pip install --quiet --disable-pip-version-check uv
	@VIRTUAL_ENV="$$PWD/.venv" $(BIN)/uv pip install --quiet --requirement requirements.lock
	@VIRTUAL_ENV="$$PWD/.venv" $(BIN)/uv pip install --quiet --no-deps --editable .
	@touch $@

lock: setup  ## resolve setup.py again into requirements.lock
	$(BIN)/uv pip compile setup.py --extra dev --extra eval --extra ray --universal --python-version 3.10 --upgrade \
	  --quiet --no-annotate --no-header --output-file requirements.lock

test: setup  ## the complete suite, CPU only where there is no GPU
	$(RUN) pytest -n 2

lint: setup  ## ruff, codespell and mypy
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) codespell_lib
	$(RUN) mypy

quickstart: setup  ## shards, three tiny models, and a page about them
	$(RUN) research quickstart $(options)

data verify-data eval-data: setup  ## itt data, itt verify-data, itt eval-data
	$(RUN) itt_composer $@ $(options)

export: setup  ## itt export: a checkpoint to a Hugging Face folder; OVERWRITE=1 replaces one
	$(RUN) itt_composer export $(call options,OVERWRITE) $(if $(call given,OVERWRITE),--overwrite)

eval: setup  ## itt eval: a row of Table 1; MODEL='a b' for several seeds of a model
	$(RUN) itt_composer eval $(call repeated,MODEL) $(call options,MODEL)

calibrate: setup  ## itt calibrate: thresholds for other ratios; RATIOS='0.7/0.7/0.9 0.5/0.5/0.5'
	$(RUN) itt_composer calibrate $(call needed,MODEL,an exported folder) $(call repeated,RATIOS) $(call options,MODEL RATIOS)

sweep elastic: setup  ## itt sweep: perplexity against FLOPs at the settings of Tables 2 and 4
	$(RUN) itt_composer sweep $(call needed,MODEL,an exported folder) $(call repeated,RATIOS) $(call options,MODEL RATIOS)

tokens see: setup  ## itt tokens: a page with the tokens of a text, shaded by their number of extra steps
	$(RUN) itt_composer tokens $(call needed,MODEL,an exported folder) $(call options,MODEL)

figures: setup  ## the paper's figures, from models or from stored tables
	$(RUN) research figures $(options)

study: setup  ## train the missing runs of a study and write its report; SET holds overrides: SET='seeds=[17] where.concurrent=1'
	$(RUN) research study $(call needed,STUDY,headline ...) $(value SET) $(call repeated,STORED) $(call options,STUDY SET STORED)

study-report: setup  ## tables and figures of a study from its stored results
	$(RUN) research report $(call needed,STUDY,headline ...) $(value SET) $(call options,STUDY SET)

k-hop-data: setup  ## shards of the k-hop task, for the study k_hop
	out=$(if $(call given,OUT),$(call quoted,OUT),data/hops); $(RUN) research k-hop data --out "$${out}_text" && \
	$(RUN) itt_composer data --source "$${out}_text/source" --tokenizer "$${out}_text/tokenizer" --out "$$out" \
	  --seq-len 64 --validation-tokens 400000 --budget-tokens 6144000

k-hop-answers: setup  ## loss of each kind of token for the models of the study k_hop
	$(RUN) research k-hop answers $(if $(call given,OUT),$(call quoted,OUT),runs/studies/k_hop) $(call options,OUT)

# On a GPU: make bench SIZES='162m 230m 466m' RESULTS=benchmarks/results
bench: STEM = $(if $(call given,RESULTS),$(call quoted,RESULTS)/$(shell date +%F))
bench: SIZES_OR_DEFAULT = $(if $(call given,SIZES),$(SIZES),default)
bench: setup  ## time and memory of a training step relative to its exact FLOPs and to Hugging Face's LLaMA
	$(foreach size,$(SIZES_OR_DEFAULT),$(BIN)/python benchmarks/model_step.py $(call options,SIZES RESULTS) \
	  $(if $(filter-out default,$(size)),--size $(size)) $(if $(STEM),--profile --out $(STEM)-step-$(size).csv) &&) true
	$(foreach size,$(SIZES_OR_DEFAULT),$(BIN)/python benchmarks/memory.py \
	  $(if $(filter-out default,$(size)),--size $(size)) $(if $(STEM),--out $(STEM)-memory-$(size).csv) &&) true

bench-data: setup  ## tokens/s of `itt data` against two other pipelines and the tokenizer alone
	$(BIN)/python benchmarks/data.py --sample $(call needed,SOURCE,a folder of text) \
	  --tokenizer $(call needed,TOKENIZER,a tokenizer.model)

bench-kernels: setup  ## time each kernel against PyTorch's operators and the fastest library
	$(BIN)/python benchmarks/kernels.py $(if $(call given,RESULTS),--out $(call quoted,RESULTS)/$(shell date +%F)-kernels.csv)

bench-decode: setup  ## tokens/s of generate() with and without a cache against Hugging Face's LLaMA
	$(BIN)/python benchmarks/decode.py
