# The commands of the README. Each makes .venv on its first use.
PYTHON ?= python3
BIN = .venv/bin
DIGITS = demo/digits
VAE = examples/digits/vae
EMOJI = examples/emoji
SUDO = $(if $(filter 0,$(shell id -u)),,sudo)
# Tests: a file at a time on each of two workers, one thread each, in the order of tests/conftest.py.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --durations=10
IN_TWO = -n 2 --dist loadfile --no-loadscope-reorder
# What the demo draws by words. Those of the last line are no emoji.
PROMPTS = "a green apple" "red square" "cat with a hat" "smiling face" "cat face" "dog face" flag person \
  "purple cat face" "green dog face" "blue mouse face" "orange smiling face"
DEMO_FLAGS = --vae $(VAE) --class-labels 0 1 2 3 4 5 6 7 8 9 --num-sampling-steps 50 --cfg-scale 1.5

.PHONY: demo page lint test test-long browser

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet "torch>=2.14" "torchvision>=0.29" \
	  ".[digits,emoji,clips,track,evaluate,text,demo,notebook,test,lint]"
	touch $@

# Emoji by words, and digits, from the committed weights; then a network trained from scratch for
# two minutes, and digits from that.
demo: .venv/installed
	mkdir -p demo
	$(BIN)/python sample.py --ckpt $(EMOJI)/text.safetensors --vae $(EMOJI)/vae --steps 20 --cfg-scale 4 \
	  --seed 1 --prompt $(PROMPTS) --output demo/emoji.png
	$(BIN)/python sample.py --ckpt examples/digits/dit.safetensors $(DEMO_FLAGS) --output demo/digits.png
	$(BIN)/python examples/digits/make_dataset.py --output $(DIGITS)
	$(BIN)/python train.py --data-path $(DIGITS)/train --results-dir demo/results --vae $(VAE) \
	  --model DiT-Ti/1 --image-size 32 --num-classes 10 --no-flip --global-batch-size 64 \
	  --max-steps 1300 --lr 2e-3 --ema-decay 0.99 --num-workers 1
	$(BIN)/python sample.py --ckpt $$(ls -d demo/results/* | tail -1) $(DEMO_FLAGS) --output demo/two-minutes.png

# A page for sampling, at http://127.0.0.1:7860, with the committed weights.
page: .venv/installed
	$(BIN)/python app.py

# Style, and that what calls what with which types holds together.
lint: .venv/installed
	$(BIN)/ruff check
	$(BIN)/mypy

test: .venv/installed
	$(PYTEST) $(IN_TWO)

# What takes longer, such as every documented command and the page in a browser; then, alone and with all threads,
# what is timed: the demo.
test-long: .venv/installed browser
	$(PYTEST) $(IN_TWO) -m "long and not alone"
	$(BIN)/python -m pytest --durations=10 -m alone

# Chromium and what drives it. Chromium comes from the system, which keeps it up to date.
browser: .venv/installed
	$(BIN)/pip install --quiet ".[browser]"
	command -v chromium || { $(SUDO) apt-get update && $(SUDO) apt-get install -y --no-install-recommends chromium; } || \
	  { echo "make test-long: no chromium, and apt-get cannot install it; put one into the PATH by other means" >&2; exit 1; }
