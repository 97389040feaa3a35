# Everything is set up under .venv/ and .host/; run `make` for the list of targets.

SYSTEM_PYTHON ?= $(shell command -v python3.11 || command -v python3)
PYTHON := .venv/bin/python
AE_MINUTES ?= 60
UNET_MINUTES ?= 600
ARGS ?=

export COMFYUI_PATH COMFYUI_PYTHON TORCH_INDEX_URL

.DEFAULT_GOAL := help
.PHONY: help setup setup-browser setup-newest demo test test-newest test-hosts test-nightly serve lint report bench gpu demo-prior demo-cse clean

help:
	@echo "make demo         restore pictures with the small prior in a real ComfyUI (sets it up first)"
	@echo "make test         run the tests, also those in ComfyUI and in a browser (ARGS=... goes to pytest); .ci/run runs all"
	@echo "make test-newest  run those of ComfyUI and the browser once more in the newest ComfyUI that the package registry has"
	@echo "make test-hosts   run those of the nodes and the server in every ComfyUI from 0.3.52 on that the package registry has (hours;"
	@echo "                  ARGS=\"--host 0.16.3\": in that one), and show a table"
	@echo "make test-nightly run every test there is, also those too dear for .ci/run, and make test-newest and make test-hosts (hours)"
	@echo "make serve        leave ComfyUI with this pack running and print its address (PORT=8188 chooses the port)"
	@echo "make lint         check the code's style and the types of dmap_core"
	@echo "make report       the paper's tables and studies on the small prior, into docs/report/ (hours; QUICK=1: minutes, few pictures)"
	@echo "make bench        time guided steps on the CPU and weigh them, against a plain reference (an hour; ARGS=\"--models demo\": minutes)"
	@echo "make gpu          measure guided steps on a CUDA device: precision, memory, seconds (minutes; writes gpu.json)"
	@echo "make demo-prior   train the small prior again (hours; AE_MINUTES and UNET_MINUTES set the time)"
	@echo "make demo-cse     train the CSEs of the small prior again, with 100 pictures and with self-generated ones (two hours)"
	@echo "make setup        only set up: a Python environment in .venv/ and a ComfyUI in .host/"
	@echo "make clean        remove what set-up made"
	@echo
	@echo "COMFYUI_PATH=/path/to/ComfyUI   use your own ComfyUI (nothing is written to it)"
	@echo "COMFYUI_PYTHON=/path/to/python  what runs it (otherwise its own venv, or .venv/)"
	@echo "TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu  take torch from there (a smaller download without a GPU)"

setup:
	@$(SYSTEM_PYTHON) tools/setup_host.py

setup-browser:
	@$(SYSTEM_PYTHON) tools/setup_host.py --browser

setup-newest:
	@env -u COMFYUI_PATH $(SYSTEM_PYTHON) tools/setup_host.py --browser --newest

demo: setup
	@$(PYTHON) demo/run.py $(ARGS)

test: setup-browser
	@$(PYTHON) tests/run.py $(ARGS)

# Under dynamic VRAM, as it runs on most people's cards.
test-newest: export COMFYUI_PATH := $(CURDIR)/.host/ComfyUI-newest
test-newest: export COMFYUI_PYTHON := $(CURDIR)/.host/newest/bin/python
test-newest: export DMAP_TESTS_DYNAMIC_VRAM := 1
test-newest: setup-newest
	@$(PYTHON) tests/run.py $(or $(ARGS),--in-comfyui)

test-hosts: setup
	@env -u COMFYUI_PATH -u COMFYUI_PYTHON $(PYTHON) tools/test_hosts.py $(ARGS)

test-nightly: export DMAP_TESTS_ALL := nightly
test-nightly:
	@$(MAKE) test ARGS=
	@$(MAKE) test-newest ARGS=
	@$(MAKE) test-hosts ARGS=

serve: setup
	@$(PYTHON) tests/host.py $(if $(PORT),--port $(PORT)) $(ARGS)

lint: setup
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m basedpyright --level error

# Goes on where it was cut: every finished picture is kept below output/report/.
report: setup
	@$(PYTHON) demo/report.py $(if $(QUICK),--quick) $(ARGS)

bench: setup
	@$(PYTHON) -m benchmarks $(ARGS)

gpu: setup
	@$(PYTHON) -m benchmarks gpu $(ARGS)

# Each stage resumes from its .state file, so an interrupted training goes on where it was.
demo-prior: setup
	@mkdir -p demo/run
	$(PYTHON) demo/train.py autoencoder --minutes $(AE_MINUTES) --out demo/run/autoencoder.safetensors
	$(PYTHON) demo/train.py unet --minutes $(UNET_MINUTES) --init demo/run/autoencoder.safetensors --out demo/run/unet.safetensors
	cp demo/run/unet.safetensors models/checkpoints/dmap-demo-prior.safetensors

demo-cse: setup
	$(PYTHON) demo/cse.py 100 $(ARGS)
	$(PYTHON) demo/cse.py self $(ARGS)

clean:
	rm -rf .venv .host .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
