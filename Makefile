# SPDX-License-Identifier: Apache-2.0
PYTHON ?= .venv/bin/python

.PHONY: build
build:
	$(PYTHON) setup.py --quiet build_ext --inplace
