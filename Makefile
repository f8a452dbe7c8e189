# make demo   stages 1-4, the token-level baseline and the evaluation on the embedded default -> runs/demo/
# make real   the same on MMRole: make real DATA=<folder of the data set, as published> -> runs/real/
# make test   the tests
# Each sets up what it needs in .venv. A finished stage is not run again; `rm -rf runs/demo` starts afresh.

PY := .venv/bin/python
D := runs/demo
R := runs/real
SEED ?= 0
RL_STEPS ?= 100
REAL_STEPS ?= 40

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

demo: .venv/ready runs/world/world.json
	$(PY) stage1_projector.py --seed $(SEED) --out $D/stage1
	$(PY) stage2_codebook.py --seed $(SEED) --projector $D/stage1 --out $D/stage2
	$(PY) stage3_bc.py --seed $(SEED) --init $D/stage2 --out $D/stage3
	$(PY) stage3_bc.py --seed $(SEED) --actions token --out $D/sft
	$(PY) stage4_latent_rl.py --seed $(SEED) --steps $(RL_STEPS) --init $D/stage3 --out $D/rl_latent
	$(PY) stage4_latent_rl.py --seed $(SEED) --steps $(RL_STEPS) --actions token --init $D/sft --out $D/rl_token
	$(PY) evaluate.py --sft $D/sft --bc $D/stage3 --token $D/rl_token --latent $D/rl_latent --codebook $D/stage2 --out $D
