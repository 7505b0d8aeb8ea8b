# Two commands are the whole set-up: `make repro` and `make test`.
.DEFAULT_GOAL := help
SHELL := /bin/bash
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: help env repro test smoke lab export readme lock release-check clean

help:           ## list the commands
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 22

env:            ## create or update .venv from the lock
	@scripts/setup.sh

repro: env      ## everything: environment, corpus, every result, figures, tables, paper/main.pdf
	@scripts/latex.sh
	@scripts/repro.sh

test: env       ## the library notebooks and tests/
	@scripts/test.sh

smoke: env      ## the whole pipeline in minutes, in a copy under .smoke/
	@scripts/latex.sh
	@scripts/smoke.sh

lab: env        ## JupyterLab on the notebooks
	@jupyter lab nbs

export: env     ## notebooks to mmqlora/, cleaned
	@nbdev_export && nbdev_clean

readme: env     ## README.md from nbs/index.ipynb
	@scripts/readme.sh

lock: env       ## requirements.txt from what .venv holds
	@{ sed -n '/^#/p' requirements.txt; pip freeze --all --exclude-editable --exclude pip; } > requirements.new && mv requirements.new requirements.txt

release-check: env  ## every number, table and figure of the paper exists; the pipeline is up to date
	@mmqlora check && dvc status

clean:          ## remove what can be made again; keeps data/, results/ and the environment
	@rm -rf artifacts .smoke paper/build _docs _proc .pytest_cache mmqlora.egg-info
