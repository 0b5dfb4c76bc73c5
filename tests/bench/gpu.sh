#!/bin/sh
# The table of bench_gpu.py on a machine with a GPU, after the tests of the GPU path. Any arguments go to bench_gpu.py.
set -e
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-.venv/bin/python}
"$PYTHON" -c 'import torch; assert torch.cuda.is_available(), "torch finds no GPU"; print(torch.cuda.get_device_name())'
"$PYTHON" -c 'import pynvml' 2>/dev/null || echo "no utilisation: pip install nvidia-ml-py"
"$PYTHON" -m pytest -q tests/unit/test_gpu.py
PYTHONPATH=.:tests:tests/bench exec "$PYTHON" tests/bench/bench_gpu.py "$@"
