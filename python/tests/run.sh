#!/usr/bin/env bash
# run.sh [unit|vllm|all] [VERSION ...]: the Python tests; installs what they need below target/python-test.
#   unit   style, types, the binding against libucm.so, the wheel in an empty environment
#   vllm   the connector under vLLM's schedulers, and real vLLM on the CPU (default version: 0.26.0)
# UCM_TEST_VENV=DIR takes a virtual environment with vLLM that is already there.
set -euo pipefail
kind=${1:-all}
[ $# -gt 0 ] && shift
root=$(cd "$(dirname "$0")/../.." && pwd)
work=$root/target/python-test
mkdir -p "$work"
cd "$root"
say() { printf '== %s\n' "$*"; }

if ! command -v uv >/dev/null; then
  [ -x "$work/uv/bin/uv" ] || { python3 -m venv "$work/uv" && "$work/uv/bin/pip" install -q uv; }
  PATH=$work/uv/bin:$PATH
fi
say "building libucm.so"
cargo build -q --lib
export UCM_LIBRARY=${CARGO_TARGET_DIR:-$root/target}/debug/libucm.so
export PYTHONPATH=$root/python

unit() {
  local venv=$work/unit
  [ -x "$venv/bin/python" ] || uv venv -q "$venv"
  uv pip install -q --python "$venv/bin/python" numpy pyyaml types-PyYAML pytest mypy==1.18.2 ruff==0.14.5
  say "ruff and mypy"
  (cd python && "$venv/bin/ruff" format --check -q . && "$venv/bin/ruff" check -q . && PYTHONPATH= "$venv/bin/mypy")
  say "binding"
  "$venv/bin/python" -m pytest python/tests/test_store.py python/tests/test_hashing.py python/tests/test_config.py
  say "wheel"
  rm -rf "$work/dist"
  UCM_CARGO_PROFILE=dev uv build -q --wheel --out-dir "$work/dist" python
  uv venv -q --clear "$work/wheel"
  uv pip install -q --python "$work/wheel/bin/python" "$work"/dist/*.whl pytest
  (cd "$work" && env -u PYTHONPATH -u UCM_LIBRARY "$work/wheel/bin/python" -m pytest -p no:cacheprovider \
    "$root/python/tests/test_store.py" -k "round_trip or other_process")
  "$work/wheel/bin/ucm" --version
}

vllm() {
  for version in "${@:-0.26.0}"; do
    local venv=${UCM_TEST_VENV:-$work/vllm-$version}
    if [ ! -x "$venv/bin/python" ]; then
      say "installing vLLM $version"
      python/tests/tools/install_vllm.sh "$venv" "$version"
    fi
    say "vLLM $version"
    PATH=$venv/bin:$PATH "$venv/bin/python" -m pytest --durations=5 -s python/tests
  done
}

case $kind in
  unit) unit ;;
  vllm) vllm "$@" ;;
  all) unit; vllm "$@" ;;
  *) sed -n '2,5p' "$0"; exit 2 ;;
esac
say "passed"
