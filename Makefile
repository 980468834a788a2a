# Every target sets up what it needs: `make setup` builds .venv from requirements.lock once and costs a second after that.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Containers often set this, and then every process compiles PyTorch and the rest anew: 16 of the 22 s that imports take.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help setup lock test lint

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(VENV)/.installed  ## build .venv (uv inside it, every version from requirements.lock)

$(VENV)/.installed: requirements.lock setup.py
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 12) else \
	  f"Python {v[0]}.{v[1]} is not supported (3.10 to 3.12 are): make PYTHON=python3.11 setup")'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@VIRTUAL_ENV=$(abspath $(VENV)) $(BIN)/uv pip install --quiet --requirement requirements.lock
	@VIRTUAL_ENV=$(abspath $(VENV)) $(BIN)/uv pip install --quiet --no-deps --editable .
	@touch $@

lock: setup  ## resolve setup.py again into requirements.lock
	$(BIN)/uv pip compile setup.py --extra dev --extra eval --extra ray --extra spark --universal --python-version 3.10 --upgrade \
	  --quiet --no-annotate --no-header --output-file requirements.lock

test: setup  ## the whole suite, CPU only where there is no GPU
	$(BIN)/python -m pytest -n 2

lint: setup  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Arguments of `make data`; without SOURCE a small corpus is made of text on this machine, without TOKENIZER one is
# trained on the corpus, without WORKERS there is one for each core.
data: OUT ?= data
data: SEQ_LEN ?= 4096
data: VALIDATION_TOKENS ?= 2000000
data: BUDGET_TOKENS ?= 50000000000
data: MAX_BAD_LINES ?= 100
data: ENGINE ?= local
.PHONY: data
data: setup  ## text to shards: SOURCE= OUT= TOKENIZER= SEQ_LEN= VALIDATION_TOKENS= BUDGET_TOKENS= ENGINE=local|ray|spark WORKERS= REMOTE=
	$(BIN)/python -m data_prep --out '$(OUT)' --seq-len $(SEQ_LEN) --validation-tokens $(VALIDATION_TOKENS) \
	  --budget-tokens $(BUDGET_TOKENS) --max-bad-lines $(MAX_BAD_LINES) --engine $(ENGINE) \
	  $(if $(SOURCE),--source '$(SOURCE)') $(if $(TOKENIZER),--tokenizer '$(TOKENIZER)') \
	  $(if $(WORKERS),--workers $(WORKERS)) $(if $(REMOTE),--remote '$(REMOTE)')

.PHONY: hops
hops: OUT ?= data/hops
hops: setup  ## text of a task that needs depth, and its shards, for yamls/studies/hops_cpu.yaml: OUT=data/hops
	$(BIN)/python -m research k-hop data --out '$(OUT)_text'
	$(MAKE) data SOURCE='$(OUT)_text/source' TOKENIZER='$(OUT)_text/tokenizer' OUT='$(OUT)' SEQ_LEN=64 \
	  VALIDATION_TOKENS=400000 BUDGET_TOKENS=6144000

.PHONY: verify-data
verify-data: OUT ?= data
verify-data: setup  ## check what `make data` wrote, and write a page of decoded samples: OUT= WORKERS=
	$(BIN)/python -m data_prep.verify --out '$(OUT)' $(if $(WORKERS),--workers $(WORKERS))

.PHONY: bench-data
bench-data: setup  ## tokens/s of `make data` against two other pipelines and the bare tokenizer: SOURCE= TOKENIZER=tokenizer.model
	$(BIN)/python benchmarks/data.py --sample '$(or $(SOURCE),$(error SOURCE= is missing))' \
	  --tokenizer '$(or $(TOKENIZER),$(error TOKENIZER= is missing))'

.PHONY: quickstart bench
quickstart: setup  ## shards, three tiny models, and a page about them: SOURCE= TOKENIZER= OUT=quickstart
	$(BIN)/python -m research quickstart $(if $(OUT),--out '$(OUT)') $(if $(SOURCE),--source '$(SOURCE)') \
	  $(if $(TOKENIZER),--tokenizer '$(TOKENIZER)')

# On a GPU: make bench SIZES='162m 230m 466m' RESULTS=benchmarks/results
bench: SIZES ?= default
bench: STEM = $(RESULTS)/$(shell date +%F)
bench: setup  ## time and memory of a training step against its exact FLOPs and its peers: SIZES= RESULTS=<folder> ROUNDS=
	$(foreach size,$(SIZES),$(BIN)/python benchmarks/model_step.py $(if $(ROUNDS),--rounds $(ROUNDS)) \
	  $(if $(filter-out default,$(size)),--size $(size)) $(if $(RESULTS),--out '$(STEM)-step-$(size).csv') &&) true
	$(foreach size,$(SIZES),$(BIN)/python benchmarks/memory.py \
	  $(if $(filter-out default,$(size)),--size $(size)) $(if $(RESULTS),--out '$(STEM)-memory-$(size).csv') &&) true

.PHONY: export
export: setup  ## checkpoint to a Hugging Face folder: CHECKPOINT= OUT= DTYPE= TOKENIZER= TENSORBOARD= OVERWRITE=1
	$(BIN)/python -m itt_composer.export --checkpoint '$(or $(CHECKPOINT),$(error CHECKPOINT= is missing))' \
	  --out '$(or $(OUT),$(error OUT= is missing))' $(if $(DTYPE),--dtype $(DTYPE)) \
	  $(if $(TOKENIZER),--tokenizer '$(TOKENIZER)') $(if $(TENSORBOARD),--tensorboard '$(TENSORBOARD)') \
	  $(if $(OVERWRITE),--overwrite)

.PHONY: eval-data eval
eval-data: OUT ?= eval_data
eval-data: setup  ## evaluation files to a folder for offline tasks: SOURCE=<folder with arc_easy.jsonl ...> OUT=
	$(BIN)/python -m itt_composer.evaluation.convert --out '$(OUT)' $(if $(SOURCE),--source '$(SOURCE)')

eval: setup  ## a row of Table 1: MODEL='a b' EVAL_DATA= TOKEN_RATIOS= SELECTION= ROW= OUT= LIMIT= BATCH_TOKENS=
	$(BIN)/python -m itt_composer.evaluation \
	  $(addprefix --model ,$(or $(MODEL),$(error MODEL= is missing: exported folders or checkpoints))) \
	  $(if $(EVAL_DATA),--eval-data '$(EVAL_DATA)') $(if $(TOKEN_RATIOS),--token-ratios '$(TOKEN_RATIOS)') \
	  $(if $(SELECTION),--selection $(SELECTION)) $(if $(ROW),--row $(ROW)) $(if $(OUT),--out '$(OUT)') \
	  $(if $(LIMIT),--limit $(LIMIT)) $(if $(BATCH_TOKENS),--batch-tokens $(BATCH_TOKENS))

# Arguments of `make calibrate` and `make elastic`; ratios are written 0.7/0.7/0.9, several of them apart by blanks.
calibrate elastic: DATA ?= data/redpajama
.PHONY: calibrate
calibrate: setup  ## thresholds for other ratios into a Hugging Face folder: MODEL= RATIOS= DATA= ROWS=
	$(BIN)/python -m itt_composer.evaluation.calibrate '$(or $(MODEL),$(error MODEL= is missing))' --data '$(DATA)' \
	  $(foreach r,$(or $(RATIOS),$(error RATIOS= is missing, 0.7/0.7/0.9 for example)),--ratios $(r)) \
	  $(if $(ROWS),--rows $(ROWS))

.PHONY: elastic
elastic: setup  ## perplexity against FLOPs at the settings of Tables 2 and 4, both rules: MODEL= DATA= RATIOS= ROWS= OUT=
	$(BIN)/python -m itt_composer.evaluation.sweep '$(or $(MODEL),$(error MODEL= is missing))' --data '$(DATA)' \
	  $(foreach r,$(RATIOS),--ratios $(r)) $(if $(ROWS),--rows $(ROWS)) $(if $(OUT),--out '$(OUT)')

.PHONY: figures see
figures: setup  ## the paper's pictures, from models or from stored tables: MODEL= PLAIN= DATA= AQUA= TENSORBOARD= ROWS= SAMPLES= OUT=figures
	$(BIN)/python -m research figures $(if $(MODEL),--model '$(MODEL)') $(if $(PLAIN),--plain '$(PLAIN)') \
	  $(if $(DATA),--data '$(DATA)') $(if $(AQUA),--aqua '$(AQUA)') $(if $(TENSORBOARD),--tensorboard '$(TENSORBOARD)') \
	  $(if $(ROWS),--rows $(ROWS)) $(if $(SAMPLES),--samples $(SAMPLES)) $(if $(SELECTION),--selection $(SELECTION)) \
	  $(if $(OUT),--out '$(OUT)')

# TEXT comes through the environment, where make puts what its command line sets, so that quotes in it are no matter.
see: setup  ## a page with the tokens of a text shaded by depth: MODEL= TEXT=<text or file> SELECTION=threshold|top_k RATIOS= OUT=see.html
	@test -n "$$TEXT" || { echo 'see: TEXT= is missing: a text, or a file with one'; exit 1; }
	$(BIN)/python -m itt_composer.evaluation.tokens '$(or $(MODEL),$(error MODEL= is missing))' --text "$$TEXT" \
	  $(if $(SELECTION),--selection $(SELECTION)) $(if $(RATIOS),--ratios $(RATIOS)) $(if $(OUT),--out '$(OUT)')

.PHONY: bench-kernels
bench-kernels: setup  ## time each kernel against PyTorch's way and the library's best: RESULTS=<folder>
	$(BIN)/python benchmarks/kernels.py $(if $(RESULTS),--out $(RESULTS)/$(shell date +%F)-kernels.csv)

.PHONY: bench-decode
bench-decode: setup  ## tokens/s of generate() with and without a cache against Hugging Face's LLaMA
	$(BIN)/python benchmarks/decode.py

# `make study` and `make study-report`; SET holds overrides of the study file, seeds=[17] where.at_once=1 for example.
.PHONY: study study-report
study: setup  ## train what is missing of a study and write its report: STUDY=yamls/studies/headline_cpu.yaml OUT= SET= STORED='a b'
	$(BIN)/python -m research study '$(or $(STUDY),$(error STUDY= is missing: yamls/studies/headline_cpu.yaml ...))' \
	  $(SET) $(if $(OUT),--out '$(OUT)') $(foreach s,$(STORED),--stored '$(s)')

study-report: setup  ## tables and pictures of a study from its stored results: STUDY= SET= RESULTS=research/results/<study> OUT=
	$(BIN)/python -m research report '$(or $(STUDY),$(error STUDY= is missing))' \
	  $(SET) $(if $(RESULTS),--results '$(RESULTS)') $(if $(OUT),--out '$(OUT)')

.PHONY: hops-answers
hops-answers: setup  ## what each kind of token costs the models of the hops study: OUT=runs/studies/hops_cpu DATA=data/hops
	$(BIN)/python -m research k-hop answers '$(or $(OUT),runs/studies/hops_cpu)' $(if $(DATA),--data '$(DATA)')
