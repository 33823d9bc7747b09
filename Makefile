# make demo, make test: each makes its own environment in .venv, installs, and does the job.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo test docs clean
install: $(STAMP)

$(STAMP): setup.cfg pyproject.toml tools/install.sh
	PYTHON=$(PYTHON) sh tools/install.sh $(VENV)
	@touch $@

demo: $(STAMP)
	$(BIN)/python tools/demo.py

test: $(STAMP)
	$(BIN)/python -m pytest

docs: $(STAMP)
	$(BIN)/python tools/docs.py

clean:
	rm -rf $(VENV) runs data/cache build *.egg-info
