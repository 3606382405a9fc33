# make serve   set up, build, make the demo model on first use, serve it on 127.0.0.1:8000
# make test    set up, build, run every test (WORKERS at once, 2 GB of memory for each)
# make quick   unit tests but for the slow ones, and a seventh of the cases of two back ends
# make recall  measure recall and perplexity of the demo model, as docs/recall.md shows them
# make recall-qwen        the same of the second model, as docs/linearize.md shows it
# make recall-remade      make the demo model anew by one command, and measure both
# make choices train small models that differ in one choice each, and measure their recall
# make docs    the documentation as a site, in build/site
# make lint    formatting, lint and type checks
# make tidy    clang-tidy on the C++ sources
# make sanitize           the C++ ops' tests under AddressSanitizer and UBSan
# make compile_commands   compile_commands.json, for clangd and clang-tidy

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
MODEL ?= models/smollm2-lola
HOST ?= 127.0.0.1
PORT ?= 8000
WORKERS ?= 2

# Threads that spin while they wait slow each other down when the machine has other work, and
# pinning would put two engines on the same core. `lola-vllm serve` chooses by itself.
test quick recall recall-qwen recall-remade choices sanitize: export OMP_WAIT_POLICY ?= PASSIVE
export VLLM_CPU_OMP_THREADS_BIND ?= nobind

.PHONY: setup serve test quick docs recall recall-qwen recall-remade choices lint tidy sanitize \
	compile_commands format clean

setup: $(VENV)/.ready

# What serving needs.
$(VENV)/.serves: pyproject.toml setup.py tools/setup.sh tools/vllm-cpu-alias/pyproject.toml \
		$(wildcard csrc/* csrc/*/*)
	PYTHON=$(PYTHON) VENV=$(VENV) tools/setup.sh
	@touch $@

# What everything else needs besides: the requirements of extras, the project being there already.
$(VENV)/.ready: $(VENV)/.serves
	$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile \
		--no-warn-conflicts "lola-vllm[distill,dev]"
	@touch $@

models/smollm2-lola: $(wildcard lola_vllm/models/smollm2/*) lola_vllm/models/shipped.py | $(VENV)/.serves
	$(BIN)/lola-vllm demo-model --out $@ --base-out models/smollm2-base --force

models/qwen-lola: $(wildcard lola_vllm/models/qwen2_5_coder/*) lola_vllm/models/shipped.py | $(VENV)/.serves
	$(BIN)/lola-vllm demo-model --base qwen2.5-coder-0.5b --out $@ --base-out models/qwen-base \
		--force

serve: $(VENV)/.serves | $(MODEL)
	@echo
	@echo "When the server says 'Application startup complete', try:"
	@echo "  curl http://$(HOST):$(PORT)/v1/chat/completions -H 'Content-Type: application/json' \\"
	@echo "    -d '{\"model\": \"$(notdir $(abspath $(MODEL)))\", \"messages\": [{\"role\": \"user\", \"content\": \"What is gravity?\"}], \"max_tokens\": 60}'"
	@echo
	$(BIN)/lola-vllm serve $(MODEL) --host $(HOST) --port $(PORT)

PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadscope --no-loadscope-reorder --durations=10

test: $(VENV)/.ready | models/smollm2-lola
	$(PYTEST) $(PYTEST_ARGS)

# Each 7th case: a prime, so that every value of a parameter is in some case.
quick: $(VENV)/.ready | models/smollm2-lola
	$(PYTEST) -m "not slow" tests/unit tests/ops/conformance \
		--backend torch --backend cpp --every 7 $(PYTEST_ARGS)

docs: $(VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "build/site/index.html"

recall: $(VENV)/.ready | models/smollm2-lola
	benchmarks/recall.sh

recall-qwen: $(VENV)/.ready | models/qwen-lola
	benchmarks/qwen.sh

recall-remade: $(VENV)/.ready | models/smollm2-lola
	benchmarks/remade.sh

choices: $(VENV)/.ready | models/smollm2-lola
	benchmarks/choices.sh

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh')

compile_commands: compile_commands.json

compile_commands.json: $(VENV)/.ready $(wildcard csrc/*.cpp csrc/cpu/*.cpp)
	$(BIN)/python tools/compile_commands.py

tidy: compile_commands.json
	git ls-files 'csrc/*.cpp' | xargs -P $(WORKERS) -n 1 $(BIN)/clang-tidy --quiet -p .

# The package with its own build of the extension, and the tests beside it, which import that one.
sanitize: $(VENV)/.ready
	LOLA_VLLM_SANITIZE=1 LOLA_VLLM_REQUIRE_EXT=1 $(BIN)/python setup.py --quiet build \
		--build-base build/sanitize --build-lib build/sanitize/lib
	rm -rf build/sanitize/lib/tests && cp -r tests build/sanitize/lib/
	cd build/sanitize/lib && \
		LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=. \
		$(CURDIR)/$(BIN)/pytest tests/ops -k cpp $(PYTEST_ARGS)

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh')

clean:
	rm -rf $(VENV) build compile_commands.json *.egg-info lola_vllm/*.so
