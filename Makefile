# `make` prints the table of contents. Everything needs only Python >= 3.11, make and a C compiler:
# each target makes .venv itself when it is missing, half made, moved, or older than pyproject.toml.

PYTHON     ?= python3
PIP_ARGS   ?=
PRECISION  ?= fp32 fp16
PRECISIONS ?= $(PRECISION)
WORKERS    ?= auto
PYTEST_ARGS ?=
FUZZ_RUNS  ?= 1000000
KILLS      ?= 200
REQUESTS   ?= 1000
MATRIX_ARGS ?=
MUTATE_ARGS ?=
BUNDLES    ?=
PROCESSOR_ARGS ?=
GPU_CHECK_ARGS ?=
GPU_SMS    ?= 80 90
STUB_ARGS  ?=
BENCH_DIR  ?= build/bench
BENCH_ARGS ?=

PACKAGES   := models export runtime calib cli
REFERENCES := vit minilm bert gpt transformer seq2seq seq2seq-fixed clip show_attend_tell flamingo perceiver perceiver_bytes vit_hybrid swin swinv2
VENV       := .venv
WHEEL_VENV := build/wheel-venv

# Raw, and handed to recipes through the environment: a path may hold spaces, quotes or dollars.
override CHECKPOINT := $(value CHECKPOINT)
override CALIBRATION_DATA := $(value CALIBRATION_DATA)
FOR        ?=
export CHECKPOINT CALIBRATION_DATA PRECISIONS FOR

# The stamp is written last and holds the folder's path, so that a .venv whose making was
# interrupted, that was moved, or whose Python is gone counts as none.
STAMP := $(VENV)/.transom-dev
SOUND := $(shell [ "$$(cat $(STAMP) 2>/dev/null)" = "$$(pwd -P)" ] && $(VENV)/bin/python -c '' 2>/dev/null && echo yes)

# One thread per worker: torch would start one per core in each of them. More than 4 workers would
# spend their time and memory on importing torch. loadfile keeps a file's own fixtures in one worker. In their own order
# the last files are short; in that of their numbers of tests they are long, and a worker waits for the other's.
PYTEST := OMP_NUM_THREADS=1 TRANSOM_REPO="$$PWD"
# What a wheel may lack is a module, a data file or a command. These look for every file, import every module, and do
# with the families what their users do; the rest would compare numbers of code that is the same in both.
ON_WHEEL := project/test_packaging project/test_families project/test_examples export/test_reference_models export/quantization/test_quantize export/test_debug cli/test_doctor cli/test_run runtime/native/test_library runtime/native/test_row_kernels
# On emulated processors: the runtime's own tests. None needs torch there: what they export, a run here exports first.
ON_X86 := runtime/backends/test_integer_sums runtime/test_saturation runtime/test_earlier_bundles
ON_ARM := $(ON_X86) runtime/test_session runtime/backends/test_ort_cache runtime/test_kv_cache runtime/test_threads runtime/text/test_detokenizer runtime/test_host cli/test_run cli/test_run_generation cli/test_bench
PYTEST_PARALLEL := -n $(WORKERS) --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

ENGINES    ?= triton ray kserve
# What the engines' tests serve beside the small bundles of tests/bundles
SERVED     := minilm gpt vit clip transformer show_attend_tell flamingo

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help dev export check test suite native native-sanitize wheel test-wheel serving-env test-serving sweep build-matrix mutate test-gpu bench bench-env bench-gpu gpu-check gpu-check-build test-cuda-stubs \
        test-arm test-x86 clean typing again

help: ## this table of contents
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo '  make export PRECISION=int8                                            or int4, bf16, "fp32 int8", ...'
	@echo '  make export CHECKPOINT=path-or-hub-id [CALIBRATION_DATA=file]         your own model, into bundles/'
	@echo '  make export FOR=cpu                                                   without graphs for TensorRT'
	@echo '  make test PYTEST_ARGS="-k bert"                                       a part of the suite'
	@echo '  make sweep FUZZ_RUNS=20000 KILLS=20 REQUESTS=50                       minutes instead of an hour'
	@echo '  make build-matrix MATRIX_ARGS="--models vit --targets rtx-sm86"       a part of the matrix'
	@echo '  make test-serving ENGINES=kserve PYTEST_ARGS="-k grpc"                a part of the engines tests'
	@echo '  make mutate MUTATE_ARGS="--only manifest"                             a part of the guards'
	@echo '  make gpu-check GPU_CHECK_ARGS="--only step --minutes 3"               a part; --dry-run needs no GPU'
	@echo '  make test-arm PROCESSOR_ARGS="--parts selftest --models vit gpt"      a part; --processors, --precisions'
	@echo '  make bench BENCH_ARGS="--only bert-s128-b1 --json FILE"               a part; --all, --earlier PYTHON, --again'
	@echo '  make dev PYTHON=python3.12 PIP_ARGS="--extra-index-url URL"           another Python, a smaller torch'

dev: $(STAMP) ## .venv with everything that export, tests and checks need, .venv/bin/transom among it

export: $(STAMP) ## export, check and report on the reference models in each precision; ends in one table
	@trap 'exit 130' INT; mkdir -p reports; \
	if [ -n "$$CHECKPOINT" ]; then set -- "$$CHECKPOINT"; else set -- $(REFERENCES); fi; \
	sources=$$#; failed=; \
	for source in "$$@"; do \
	    if [ -d "$$source" ]; then name=$$(cd -- "$$source" && pwd); else name=$$source; fi; \
	    name=$$(basename -- "$$name"); \
	    for precision in $$PRECISIONS; do \
	        bundle=bundles/$$name; \
	        [ "$$precision" = fp32 ] || bundle=$$bundle-$$precision; \
	        printf '\n== %s, %s: %s\n' "$$source" "$$precision" "$$bundle"; \
	        case $$precision in int*) data=$$CALIBRATION_DATA again=verify ;; *) data= again=selftest ;; esac; \
	        if $(VENV)/bin/transom export "$$source" --precision "$$precision" --out "$$bundle" --force \
	                $${FOR:+--for "$$FOR"} \
	                $${data:+--calibration-data "$$data"} \
	            && $(VENV)/bin/transom selftest "$$bundle" \
	            && { [ $$again = selftest ] \
	                || $(VENV)/bin/transom verify "$$bundle" $${data:+--calibration-data "$$data"}; } \
	            && $(VENV)/bin/transom report "$$bundle" --out "reports/$${bundle#bundles/}.html" --force; \
	        then set -- "$$@" "$$bundle"; else failed="$$failed, $$source in $$precision"; fi; \
	    done; \
	done; \
	shift $$sources; echo; \
	if [ $$# -gt 0 ]; then $(VENV)/bin/transom table "$$@" || failed="$$failed, the table"; fi; \
	if [ -n "$$failed" ]; then echo "make export: failed: $${failed#, }; the reasons are above" >&2; exit 1; fi

check: $(STAMP) typing ## ruff, mypy --strict over all packages, the import boundaries between them
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy -p transom
	$(PYTEST) $(VENV)/bin/pytest -q tests/project/test_layering.py

test: check suite test-wheel ## check, then the suite on the working tree, then test-wheel

# Beside its sources, where an editable installation looks for it. It is optional: without a compiler it says why.
NATIVE := runtime/native/libtransom_kernels.so

native: $(NATIVE) ## the native library of kernels, compiled in place; needs a C compiler, no .venv

$(NATIVE): runtime/native/build.py $(shell find runtime/native/src -type f 2>/dev/null)
	$(PYTHON) runtime/native/build.py

# What preloads a sanitizer is Python, which loads the library. TSan looks at the pool alone, in a program in C: it does
# not know of locks that Python itself was compiled with. setarch: GCC 12's needs addresses that are not random.
SANITIZED := $(CURDIR)/build/native-sanitize
SANITIZERS = $(shell $(CC) -print-file-name=libasan.so) $(shell $(CC) -print-file-name=libubsan.so)

native-sanitize: $(STAMP) ## the kernels' tests under the address and undefined-behaviour sanitizers, the pool's under TSan
	@mkdir -p $(SANITIZED)
	$(PYTHON) runtime/native/build.py $(SANITIZED)/libtransom_kernels.so \
	    -g -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
	$(CC) -std=gnu17 -g -O1 -pthread -fsanitize=thread -Iruntime/native/src \
	    runtime/native/src/threads.c tests/runtime/native/pool_callers.c -o $(SANITIZED)/pool_callers
	setarch -R $(SANITIZED)/pool_callers
	ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$(strip $(SANITIZERS))" \
	    TRANSOM_NATIVE_LIBRARY=$(SANITIZED)/libtransom_kernels.so \
	    $(PYTEST) $(VENV)/bin/python -m pytest $(PYTEST_ARGS) tests/runtime/native

suite: $(STAMP) ## the suite on the working tree alone
	@$(MAKE) --no-print-directory native || echo 'make suite: without native kernels, as above' >&2
	$(PYTEST) $(VENV)/bin/pytest $(PYTEST_PARALLEL) tests

# With the kernels, of this system, and in dist/pure one for any. Without a C compiler both are for any.
wheel: $(STAMP) ## dist/transom-*.whl with the native kernels of this system, and dist/pure/transom-*.whl without
	@rm -rf dist/transom-*.whl dist/pure && mkdir -p build
	@# setuptools would pack files that an earlier build left in build/lib, or listed in the egg-info
	@for pure in 0 1; do \
	    rm -rf build/lib build/bdist.* *.egg-info; \
	    [ $$pure = 1 ] && out=dist/pure || out=dist; \
	    TRANSOM_PURE=$$pure $(VENV)/bin/python -m build --wheel --no-isolation --outdir $$out . >build/wheel.log 2>&1 \
	        || { cat build/wheel.log >&2; exit 1; }; \
	    grep 'without its native kernels' build/wheel.log || true; \
	done
	@ls dist/transom-*.whl dist/pure/transom-*.whl

# The libraries come from .venv through a .pth, whose own .pth files Python then does not read: the
# editable transom stays invisible. The tests run from a copy, away from the packages' folders.
test-wheel: wheel ## the tests that use all of a wheel, on the wheel in an environment of its own
	@rm -rf $(WHEEL_VENV) build/wheel-tests && mkdir -p build/wheel-tests
	$(VENV)/bin/python -m venv --without-pip $(WHEEL_VENV)
	$(VENV)/bin/python -m pip --python $(WHEEL_VENV)/bin/python install --quiet --no-index --no-deps dist/transom-*.whl
	@paths='import sysconfig; print(sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), sep="\n")'; \
	$(VENV)/bin/python -c "$$paths" >"$$($(WHEEL_VENV)/bin/python -c "$$paths" | head -n 1)/libraries-of-dev.pth"
	@cp -R tests pyproject.toml build/wheel-tests/
	cd build/wheel-tests && OMP_NUM_THREADS=1 TRANSOM_REPO="$$OLDPWD" TRANSOM_TEST_WHEEL=1 \
	    ../../$(WHEEL_VENV)/bin/python -P -m pytest $(PYTEST_PARALLEL) $(ON_WHEEL:%=tests/%.py)

# Each by the steps of its file in examples/containers, since Triton, Ray and KServe want other versions of things.
serving-env: wheel ## build/serving/{triton,ray,kserve}: environments of the engines, each some minutes and a download
	PIP_ARGS='$(PIP_ARGS)' PYTHONPATH=tests/support $(VENV)/bin/python -m container_steps build/serving $(ENGINES)

test-serving: serving-env ## the engines' own tests: Triton, Ray and KServe are started and asked, each in its environment
	@for name in $(SERVED); do \
	    [ -e bundles/$$name/bundle.json ] || $(VENV)/bin/transom export "$$name" --out bundles/$$name || exit 1; \
	done
	@failed=; for engine in $(ENGINES); do printf '\n== %s\n' $$engine; \
	    $(PYTEST) build/serving/$$engine/bin/python -P -m pytest --confcutdir=tests/serving -W default \
	        $(PYTEST_ARGS) tests/serving/$$engine || failed="$$failed $$engine"; \
	done; [ -z "$$failed" ] || { echo "make test-serving: failed:$$failed" >&2; exit 1; }

sweep: $(STAMP) ## damaged manifests by the million, kill -9 at 200 moments of an export, 32 threads on one bundle
	@for name in $(REFERENCES); do \
	    [ -e bundles/$$name/bundle.json ] || $(VENV)/bin/transom export "$$name" --out bundles/$$name || exit 1; \
	done
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) atheris \
	    || echo "make sweep: atheris cannot be installed here; manifests are damaged without looking at coverage" >&2
	OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/fuzz_manifests.py --runs $(FUZZ_RUNS) $(REFERENCES:%=bundles/%)
	$(VENV)/bin/python benchmarks/fuzz_lists.py --runs $$(( $(FUZZ_RUNS) / 10 ))
	OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/kill_export.py --kills $(KILLS)
	OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/threads.py --requests $(REQUESTS) $(REFERENCES:%=bundles/%)

build-matrix: $(STAMP) ## BERT-base, GPT-2, ViT-B, CLIP-B, a Transformer: engines for every RTX target, no GPU needed
	OMP_NUM_THREADS=2 $(VENV)/bin/python benchmarks/build_matrix.py --out build/build-matrix $(MATRIX_ARGS)

mutate: $(STAMP) ## break every guard of tests/guards on purpose, and show which test notices
	PYTHONPATH=tests/support $(VENV)/bin/python -m mutate $(MUTATE_ARGS)

test-gpu: $(STAMP) ## on a machine with a GPU: parity of every family and precision there, into docs/results/
	TRANSOM_GPU_RESULTS=docs/results TRANSOM_REPO="$$PWD" $(VENV)/bin/pytest $(PYTEST_ARGS) tests/gpu
	@# The kernel's own tests once more, compiled and launched by Triton there
	TRANSOM_KERNEL_DEVICE=cuda TRANSOM_REPO="$$PWD" $(VENV)/bin/pytest $(PYTEST_ARGS) tests/export/plugins/test_flash_attention.py

test-cuda-stubs: $(STAMP) typing ## without a GPU: every kept bundle in ONNX Runtime's CUDA provider, over stubs of CUDA
	PYTHONPATH=tests/support TRANSOM_REPO="$$PWD" $(VENV)/bin/python -m stub_cuda $(STUB_ARGS)

# Both take BENCH_ARGS, so that what is prepared is what runs. What is prepared is kept in BENCH_DIR and is not part of a
# run's 30 minutes; an interrupted run goes on where it was.
BENCH := PYTHONPATH=benchmarks $(VENV)/bin/python -m bench

bench-env: $(STAMP) ## environments, exports and quantised models of `make bench`, kept in build/bench
	$(BENCH) prepare --dir '$(BENCH_DIR)' --pip-args='$(PIP_ARGS)' $(BENCH_ARGS)

bench: bench-env ## beside PyTorch, ONNX Runtime, OpenVINO, CTranslate2 and llama.cpp, into docs/results/ and the README
	$(BENCH) run --dir '$(BENCH_DIR)' $(BENCH_ARGS)

bench-gpu: $(STAMP) ## on a machine with a GPU: latency beside PyTorch and ONNX Runtime, into docs/results/
	$(VENV)/bin/python benchmarks/gpu_latency.py --out docs/results

# A GPU runs the PTX of its own SM, or of the last one below SM90 that is there.
gpu-check-build: wheel ## without a GPU: build/gpu-check/, which make gpu-check needs: the wheel, the kernels as PTX
	PYTHONPATH=benchmarks $(VENV)/bin/python -m gpu_check.build --wheel dist/pure/transom-*.whl --out build/gpu-check --sms $(GPU_SMS)

# That machine needs torch, numpy and cuda-bindings alone: no .venv, no Triton, no installation.
gpu-check: ## on a machine with a GPU, in 8 minutes: the attention kernel beside PyTorch's, into docs/results/
	PYTHONPATH=benchmarks $(if $(SOUND),$(VENV)/bin/python,$(PYTHON)) -m gpu_check $(GPU_CHECK_ARGS)

# The machine needs Debian's or Ubuntu's packages and a network the first time, no more.
test-arm: $(STAMP) ## on three emulated Arm processors: every bundle's self-test, the runtime's tests, the commands
	PYTHONPATH=tests/support $(VENV)/bin/python -m processors arm $(if $(BUNDLES),--bundles "$(BUNDLES)") \
	    --tests $(ON_ARM) $(PROCESSOR_ARGS)

test-x86: $(STAMP) ## on emulated Haswell and Nehalem, which have no VNNI: integer bundles, sums of integers
	PYTHONPATH=tests/support $(VENV)/bin/python -m processors x86 $(if $(BUNDLES),--bundles "$(BUNDLES)") \
	    --tests $(ON_X86) $(PROCESSOR_ARGS)

clean: ## removes what was made here, except .venv, bundles/ and reports/
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# mypy and pyright do not see the mapping of folders to transom.*: they get it as links.
typing:
	@rm -rf build/typing && mkdir -p build/typing/transom
	@for package in $(PACKAGES); do ln -s "../../../$$package" "build/typing/transom/$$package"; done

$(STAMP): pyproject.toml $(if $(SOUND),,again)
	@rm -f $(STAMP)
ifeq ($(SOUND),)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "make: PYTHON=$(PYTHON) is '$$($(PYTHON) --version 2>&1)'; Transom needs Python 3.11 or newer." \
	         "Name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
endif
	$(VENV)/bin/python -m pip install --disable-pip-version-check $(PIP_ARGS) -e '.[dev]'
	@pwd -P >$(STAMP)
