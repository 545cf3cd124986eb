# make quickstart   install into .venv, then data, training, evaluation, release and one answer (no network after it)
# make quickstart-med3dvlm  the same for Med3DVLM: retrieval, questions and reports
# make test         install into .venv, then lint, types and all tests
# make clean        remove .venv and what the quickstart wrote
#
# PYTHON=python3.12      the interpreter that makes .venv (3.11 or newer)
# PIP_EXTRA_INDEX_URL=...  pip's own setting: a further package index, for example PyTorch's of CPU builds, or of builds
#                        for an older CUDA driver
# EXTRAS=dev,eval        optional dependencies to install, see pyproject.toml

PYTHON ?= python3
EXTRAS ?= dev

BIN := .venv/bin
INSTALLED := .venv/installed
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
QUICKSTART := runs/quickstart
MED3DVLM := runs/quickstart_med3dvlm

.PHONY: install test quickstart quickstart-med3dvlm clean
.DEFAULT_GOAL := test

install: $(INSTALLED)

# Which build of torch: with a GPU any but the CPU build, without one the CPU build. Where pip finds no CPU build the
# plain one is taken: on Linux that is the CUDA build, several GB larger, which also runs without a GPU. torch comes
# first and alone, so that nothing installed later can choose its build; the last line checks that it is still the
# one that was chosen. DS_BUILD_OPS=0: DeepSpeed compiles nothing.
$(INSTALLED): pyproject.toml constraints.txt $(wildcard */__init__.py)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "error: $(PYTHON) is missing or older than 3.11; run make PYTHON=<path of python 3.11 or newer>" >&2; exit 1; }
	@$(PYTHON) -m venv .venv || \
	  { echo "error: $(PYTHON) -m venv failed; on Debian and Ubuntu install python3-venv" >&2; exit 1; }
	@set -e; pip="$(BIN)/python -m pip --disable-pip-version-check"; \
	if nvidia-smi -L >/dev/null 2>&1; then \
	  build=cuda; torch='torch==$(TORCH),!=$(TORCH)+cpu'; \
	elif $$pip install -q --dry-run --no-deps 'torch===$(TORCH)+cpu' >/dev/null 2>&1; then \
	  build=cpu; torch='torch===$(TORCH)+cpu'; \
	else \
	  build=any; torch='torch==$(TORCH)'; \
	  echo "note: pip finds no CPU build of torch $(TORCH); taking the plain one (PIP_EXTRA_INDEX_URL names a further index)"; \
	fi; \
	set -x; \
	$$pip install -q -c constraints.txt "$$torch"; \
	DS_BUILD_OPS=0 $$pip install -q -c constraints.txt -e '.[$(EXTRAS)]'; \
	$(BIN)/python -m mllm3d.cli doctor --install $$build
	@touch $@

test: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy mllm3d $(wildcard photon med3dvlm medpruner)
	$(BIN)/python -m pytest

# A small Photon through its phases on generated phantoms: vision, questions, patch embedding, token dropping.
quickstart: $(INSTALLED)
	rm -rf $(QUICKSTART)
	$(BIN)/python data/phantom/prepare.py --out $(QUICKSTART)/data --cases 1000 --seed 0 --tasks existence --priors 0
	$(BIN)/python train.py --config quickstart/vision
	$(BIN)/python train.py --config quickstart/backbone
	$(BIN)/python train.py --config quickstart/phase1
	$(BIN)/python train.py --config quickstart/phase2
	$(BIN)/python eval.py --config quickstart/phase2
	$(BIN)/mllm3d release --overwrite $(QUICKSTART)/phase2 $(QUICKSTART)/release
	volume=$$(sed -n 's/.*"split": *"test".*"volume": *"\([^"]*\)".*/\1/p' $(QUICKSTART)/data/manifest.jsonl | head -n 1); \
	$(BIN)/mllm3d predict --checkpoint $(QUICKSTART)/release --volume $(QUICKSTART)/data/$$volume \
	  --question "Is there a pleural effusion?" --evidence $(QUICKSTART)/evidence.png
	@echo "data         $(QUICKSTART)/data"
	@echo "runs         $(QUICKSTART)/{vision,backbone,phase1,phase2}, each with a README"
	@echo "results      $(QUICKSTART)/phase2/evaluation/test/table.md"
	@echo "checkpoint   $(QUICKSTART)/release"
	@echo "evidence     $(QUICKSTART)/evidence.png"
	@echo; cat $(QUICKSTART)/phase2/evaluation/test/table.md

# A small Med3DVLM through its three stages on generated phantoms, after small text models that stand in for pretrained
# ones.
quickstart-med3dvlm: $(INSTALLED)
	rm -rf $(MED3DVLM)
	$(BIN)/python data/phantom/prepare.py --out $(MED3DVLM)/data --cases 1500 --seed 0 --shape 64,112,112 --priors 0 \
	  --splits 0.866,0.067,0.067 --tasks report existence phase location organ abnormality \
	  --findings "pleural effusion" "pericardial effusion" cardiomegaly splenomegaly "fatty liver" consolidation \
	  "kidney cyst" "liver lesion"
	$(BIN)/python train.py --config quickstart/med3dvlm/bert
	$(BIN)/python train.py --config quickstart/med3dvlm/decoder
	$(BIN)/python train.py --config quickstart/med3dvlm/contrastive
	$(BIN)/python eval.py --config quickstart/med3dvlm/contrastive
	$(BIN)/python train.py --config quickstart/med3dvlm/projector
	$(BIN)/python train.py --config quickstart/med3dvlm/finetune
	$(BIN)/python eval.py --config quickstart/med3dvlm/finetune
	$(BIN)/python data/phantom/score_reports.py --manifest $(MED3DVLM)/data/manifest.jsonl \
	  --predictions $(MED3DVLM)/finetune/evaluation/test/predictions-none.jsonl
	$(BIN)/mllm3d release --overwrite --merge-lora $(MED3DVLM)/finetune $(MED3DVLM)/release
	$(BIN)/mllm3d embed --checkpoint $(MED3DVLM)/contrastive --manifest $(MED3DVLM)/data/manifest.jsonl --split test \
	  --out $(MED3DVLM)/archive
	$(BIN)/mllm3d retrieve --index $(MED3DVLM)/archive --text "Bilateral pleural effusion." -k 3
	volume=$$(sed -n 's/.*"split": *"test".*"volume": *"\([^"]*\)".*/\1/p' $(MED3DVLM)/data/manifest.jsonl | head -n 1); \
	$(BIN)/mllm3d predict --checkpoint $(MED3DVLM)/release --volume $(MED3DVLM)/data/$$volume \
	  --question "Write the findings report of this CT scan." --max-new-tokens 256
	@echo "runs         $(MED3DVLM)/{bert,decoder,contrastive,projector,finetune}, each with a README"
	@echo "checkpoint   $(MED3DVLM)/release"
	@echo; cat $(MED3DVLM)/contrastive/evaluation/test/table.md $(MED3DVLM)/finetune/evaluation/test/table.md

clean:
	rm -rf .venv $(QUICKSTART) $(MED3DVLM) *.egg-info
