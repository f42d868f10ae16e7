# Everything runs in .venv, which the first command makes and installs into; later ones find it there and install nothing.

PYTHON ?= python3
ARGS ?=
# The two Pythons that constraints.txt is made with: the oldest supported, then one that gets the newest jax.
PYTHONS ?= python3.11 python3.12

version := $(shell $(PYTHON) -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null)
bin := .venv/bin
# Named by the Python that made .venv: another PYTHON finds no such file and makes .venv anew.
made := .venv/made-by-python-$(version)
installed := .venv/installed-test
installed_dev := .venv/installed-dev
installed_bench := .venv/installed-bench
installed_docs := .venv/installed-docs
# Without compiling every module of every package, which takes longer than the rest: Python compiles what is imported,
# and keeps it.
install := $(bin)/python -m pip install -qq --no-input --no-compile --disable-pip-version-check -c constraints.txt
export PYTHONDONTWRITEBYTECODE :=
scratch := build/notebooks

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-as-shipped fuzz bench paper lint notebooks docs check constraints clean

help:
	@echo 'make demo         the sensitivity of a packing to the size of half its particles: demo/demo.png'
	@echo 'make test         the tests; some of them: make test ARGS="-k name"'
	@echo 'make test-as-shipped  some tests with all of the compiler'"'"'s optimizations on, as in use'
	@echo 'make fuzz         all of the tests: 3,000 generated systems, all jammed packings, the long ones; hours'
	@echo 'make bench        the benchmarks, small, beside their peers: benchmarks/results/README.md'
	@echo 'make paper        the experiments of arXiv:2105.15183, some minutes: benchmarks/paper/README.md'
	@echo 'make lint         ruff check, ruff format --check, pyright'
	@echo 'make notebooks    run every notebook, on copies in $(scratch)'
	@echo 'make docs         the documentation site: build/docs/index.html; runs the notebooks unless they have run'
	@echo 'make check        test, lint, notebooks and docs: what CI runs'
	@echo 'make constraints  constraints.txt anew, from what pip resolves today for: $(PYTHONS)'
	@echo 'make clean        remove .venv and all that was built or run'
	@echo
	@echo 'Another Python: make test PYTHON=python3.12 (now $(PYTHON), $(or $(version),which is not to be found); 3.11 or later is needed).'

demo: $(installed)
	@mkdir -p demo
	$(bin)/mdsens sensitivity seed_packing_2d --wrt "sigma[1]" --plot demo/demo.png --out demo/demo.npz $(ARGS)

test: $(installed)
	$(bin)/python -m pytest $(ARGS)

# As users run it: the tests compile without most of XLA's optimizations, to be quick, and so leave the code that ships untested.
# One of each kind here: forces and Hessian, relaxation, forward and reverse, a linear solve, moduli, charges.
test-as-shipped: export MDSENS_TESTS_OPTIMIZED := 1
test-as-shipped: $(installed)
	$(bin)/python -m pytest -m as_shipped $(ARGS)

fuzz: $(installed)
	MDSENS_FUZZ_CASES=$${MDSENS_FUZZ_CASES:-3000} $(bin)/python -m pytest $(ARGS)

bench: $(installed_bench)
	$(bin)/python -m benchmarks.relaxation --sizes 1024 --json benchmarks/results/relaxation.json
	$(bin)/python -m benchmarks.sensitivity --sizes 1024 --spheres 0 --json benchmarks/results/sensitivity.json
	$(bin)/python -m benchmarks.jacobian --json benchmarks/results/jacobian.json
	$(bin)/python -m benchmarks.jamming --json benchmarks/results/jamming.json
	$(bin)/python -m benchmarks.product --json benchmarks/results/product.json
	$(bin)/python -m benchmarks.batch --json benchmarks/results/batch.json
	$(bin)/python -m benchmarks.elasticity --json benchmarks/results/elasticity.json
	$(bin)/python -m benchmarks.design --seeds 2 --problems 0 --json benchmarks/results/design.json
	$(bin)/python -m benchmarks.ensemble --members 16 --json benchmarks/results/ensemble.json
	$(bin)/python -m benchmarks.atoms --json benchmarks/results/atoms.json
	$(bin)/python -m benchmarks.first_answer --json benchmarks/results/first_answer.json
	$(bin)/python -m benchmarks.glass --sizes 1000 4000 --systems glass silicon copper spheres --json benchmarks/results/glass.json
	$(bin)/python -m benchmarks.scaling --json benchmarks/results/scaling.json
	$(bin)/python -m benchmarks.honesty --json benchmarks/results/honesty.json
	$(bin)/python -m benchmarks.gpu --json benchmarks/results/gpu.json
	$(bin)/python -m benchmarks.plots

paper: $(installed_bench)
	@for name in $(filter-out __init__ _common,$(basename $(notdir $(wildcard benchmarks/paper/*.py)))); do \
	  began=$$(date +%s); $(bin)/python -m benchmarks.paper.$$name && echo "$$name: $$(( $$(date +%s) - began )) s" || exit 1; \
	done

lint: $(installed_dev)
	$(bin)/ruff check
	$(bin)/ruff format --check
	$(bin)/pyright --warnings

# On copies, in a folder of their own: a notebook must neither need this checkout around it nor leave anything in it.
# Six packings in the first one in place of 40; MDSENS_NOTEBOOK_SEEDS=40 MDSENS_NOTEBOOK_FULL=1 for all in full.
notebooks: export MDSENS_NOTEBOOK_SEEDS ?= 6
# Compiling is most of their time, and so it takes a third less; flags of the jax that Python 3.11 gets.
notebooks: export JAX_DISABLE_MOST_OPTIMIZATIONS ?= 1
notebooks: export XLA_FLAGS ?= $(if $(filter 3.11.%,$(version)),--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1)
# Two at a time.
notebooks: $(installed)
	@rm -rf $(scratch) && mkdir -p $(scratch)
	@ls notebooks/*.ipynb | xargs -P 2 -I @ sh -c 'began=$$(date +%s); cp @ $(scratch)/; \
	  $(bin)/jupyter execute --inplace --kernel_name=python3 --timeout=300 "$(scratch)/$$(basename @)" \
	    && echo "@: ran in $$(( $$(date +%s) - began )) s" || { echo "@: failed" >&2; exit 1; }'

# The notebooks with the outputs of their last run; they run now if one has not run since it changed. Every warning is an error.
docs: $(installed_docs)
	@for file in notebooks/*.ipynb; do \
	  [ "$(scratch)/$${file##*/}" -nt "$$file" ] || { $(MAKE) --no-print-directory notebooks && break; } || exit 1; \
	done
	@rm -rf docs/notebooks && mkdir -p docs/notebooks && cp $(scratch)/*.ipynb docs/notebooks/
	$(bin)/sphinx-build -q -W --keep-going -b html -d build/doctrees docs build/docs
	@echo 'build/docs/index.html'

check: test lint notebooks docs

$(made):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo 'mdsens needs Python 3.11 or later, and PYTHON=$(PYTHON) is $(or $(version),not to be found).' >&2; \
	  echo 'Name one that is, for example: make $(MAKECMDGOALS) PYTHON=python3.11' >&2; \
	  exit 1; }
	@rm -rf .venv
	@$(PYTHON) -m venv .venv
	@touch $@

$(installed): $(made) pyproject.toml constraints.txt
	@echo 'Installing mdsens and what its tests need into .venv (Python $(version)): 250 MB to fetch, 1 GB on disk, half a'
	@echo 'minute on a fast machine and network, up to three on others ...'
	@$(install) -e '.[test]'
	@touch $@

$(installed_bench): $(installed)
	@echo 'Installing the peers that the benchmarks measure into .venv ...'
	@$(install) -e '.[bench]'
	@touch $@

$(installed_docs): $(installed)
	@echo 'Installing Sphinx, which makes the site, into .venv ...'
	@$(install) -e '.[docs]'
	@touch $@

$(installed_dev): $(installed)
	@echo 'Installing ruff, pyright and Sphinx into .venv ...'
	@$(install) -e '.[dev]'
	@touch $(installed_docs) $@

# One fresh environment for each of PYTHONS. A package that both get at the same version has one line; where they differ,
# the first one's version is for Python 3.11, the second one's for 3.12 and later.
constraints:
	@set -e; work=$$(mktemp -d); trap 'rm -rf "$$work"' EXIT; \
	for python in $(PYTHONS); do \
	  echo "Resolving for $$python, about a minute ..."; \
	  rm -rf "$$work/venv"; $$python -m venv "$$work/venv"; \
	  "$$work/venv/bin/python" -m pip install -qq --no-input '.[dev]'; \
	  "$$work/venv/bin/python" -m pip freeze --exclude mdsens \
	    > "$$work/$${python##*/}.txt"; \
	done; \
	sed -n '/^#/!q;p' constraints.txt > "$$work/constraints.txt"; \
	awk -F== ' \
	  NR == FNR { first[$$1] = $$2; next } \
	  { second[$$1] = $$2 } \
	  END { \
	    for (name in first) \
	      if (!(name in second) || first[name] == second[name]) print name "==" first[name]; \
	      else print name "==" first[name] "; python_version < \"3.12\"\n" name "==" second[name] "; python_version >= \"3.12\""; \
	    for (name in second) if (!(name in first)) print name "==" second[name] \
	  }' $(foreach python,$(PYTHONS),"$$work/$(notdir $(python)).txt") | LC_ALL=C sort -f >> "$$work/constraints.txt"; \
	cp "$$work/constraints.txt" constraints.txt

clean:
	rm -rf .venv build dist demo .pytest_cache .hypothesis .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
