# make demo    build what this machine can run, then denoise a photograph by attention
# make test    build everything, then every check that continuous integration runs
#
# make docs    build the site of the docs into build/site
# make release build a wheel for all Pythons and check it in each: tools/release.py
#
# They work in a virtual environment of their own, .venv. They need python3 >= 3.10 and a C++17
# compiler. GPU kernels are built where nvcc is found; for the demo only where there is also a GPU
# of a supported architecture.
#
#   PYTHON=python3.12       another interpreter
#   TORCH=torch==2.12.0     this torch, from the package index; the default is a torch >= 2.10 that
#                           PYTHON can import, else the CPU build of torch 2.13.0
#   SPARSE_FMHA_ARCHS=none  no GPU kernels; 90a: GPU kernels for Hopper, whatever GPU there is

PYTHON ?= python3
VENV ?= .venv
TORCH ?=

.PHONY: demo docs test build release clean
demo docs test build:
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; install Python 3.10 or newer, or set PYTHON" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: Python 3.10 or newer is needed; $(PYTHON) is `$(PYTHON) -V 2>&1`; set PYTHON" >&2; exit 1; }
	@$(PYTHON) tools/bootstrap.py $@ --venv "$(VENV)" --torch "$(TORCH)"

release:
	@$(PYTHON) tools/release.py --venv "$(VENV)"

clean:
	rm -rf build dist $(VENV) python/*.egg-info
