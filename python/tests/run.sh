#!/usr/bin/env bash
# run.sh [unit|vllm|ci|all|gpu] [VERSION ...]: the Python tests; installs what they need below target/python-test.
#   unit   style, types, the binding against libucm.so, the wheel in an empty environment
#   vllm   the connector under vLLM's schedulers, and real vLLM on the CPU (default version: 0.26.0)
#   ci     vllm, of 0.26 everything; of 0.17 the schedulers, and blocks that it saved loaded by both others; of
#          0.32 the schedulers and a hybrid model
#   gpu    the connector under the vLLM of this python3 on its GPU: runners, backends, graphs, faults, servers;
#          installs nothing: pip install vllm pytest pytest-xdist first. UCM_LIBRARY=FILE takes a built libucm.so,
#          UCM_TEST_JOBS=N runs N tests at a time
# UCM_TEST_VENV=DIR takes a virtual environment with vLLM that is already there; for ci, UCM_TEST_VENVS=DIR has
# one for each version, called vllm-VERSION.
set -euo pipefail
kind=${1:-all}
[ $# -gt 0 ] && shift
root=$(cd "$(dirname "$0")/../.." && pwd)
work=$root/target/python-test
mkdir -p "$work"
cd "$root"
say() { printf '== %s\n' "$*"; }

# Several processes share the GPU: each takes a gigabyte for KV memory.
gpu() {
  if [ -z "${UCM_LIBRARY:-}" ]; then
    cargo build -q --release --lib
    export UCM_LIBRARY=${CARGO_TARGET_DIR:-$root/target}/release/libucm.so
  fi
  export UCM_TEST_DEVICE=cuda PYTHONPATH=$root/python${PYTHONPATH:+:$PYTHONPATH}
  nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
  python3 -c 'import torch, vllm; print("vLLM", vllm.__version__, "torch", torch.__version__)'
  python3 -m pytest -p no:cacheprovider --durations=10 -rA -n "${UCM_TEST_JOBS:-4}" --dist worksteal "$@" \
    python/tests/test_vllm_gpu.py python/tests/test_vllm.py python/tests/test_serve.py
}

if [ "$kind" = gpu ]; then
  gpu "$@"
  say "passed"
  exit
fi

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
  uv pip install -q --python "$venv/bin/python" numpy pyyaml types-PyYAML pytest hatchling mypy==1.18.2 ruff==0.14.5
  say "ruff and mypy"
  (cd python && "$venv/bin/ruff" format --check -q . && "$venv/bin/ruff" check -q . && PYTHONPATH= "$venv/bin/mypy")
  say "binding"
  "$venv/bin/python" -m pytest python/tests/test_store.py python/tests/test_hashing.py python/tests/test_config.py \
    python/tests/test_ranks.py python/tests/test_streams.py python/tests/test_siblings.py python/tests/test_wheel.py
  say "wheel"
  rm -rf "$work/dist"
  UCM_CARGO_PROFILE=dev uv build -q --wheel --out-dir "$work/dist" python
  uv venv -q --clear "$work/wheel"
  uv pip install -q --python "$work/wheel/bin/python" "$work"/dist/*.whl pytest
  (cd "$work" && env -u PYTHONPATH -u UCM_LIBRARY "$work/wheel/bin/python" -m pytest -p no:cacheprovider \
    "$root/python/tests/test_store.py" -k "round_trip or other_process")
  "$work/wheel/bin/ucm" --version
}

# venv_of VERSION: sets $venv, and installs vLLM there if it is not.
venv_of() {
  venv=${UCM_TEST_VENV:-${UCM_TEST_VENVS:-$work}/vllm-$1}
  if [ ! -x "$venv/bin/python" ]; then
    say "installing vLLM $1"
    python/tests/tools/install_vllm.sh "$venv" "$1"
  fi
}

# tests VENV ARGUMENT...: pytest with the vLLM of an environment.
tests() {
  local venv=$1
  shift
  PATH=$venv/bin:$PATH "$venv/bin/python" -m pytest -p no:cacheprovider --durations=5 "$@"
}

vllm() {
  local venv
  for version in "${@:-0.26.0}"; do
    venv_of "$version"
    say "vLLM $version"
    tests "$venv" -s python/tests
  done
}

# Two at a time: a vLLM of these tests keeps one processor busy.
ci() {
  local venv old main new start=$SECONDS
  venv_of 0.26.0 && main=$venv
  venv_of 0.17.0 && old=$venv
  venv_of 0.32.0 && new=$venv
  say "installed vLLM in $((SECONDS - start)) s"
  export UCM_TEST_OTHER_PYTHON=$old/bin/python
  local others=$work/others.log failed=0
  {
    tests "$old" python/tests/test_scheduling.py python/tests/test_namespace.py &&
      tests "$new" python/tests/test_scheduling.py python/tests/test_groups.py python/tests/test_namespace.py \
        python/tests/test_storage_tier.py python/tests/test_hybrid.py &&
      tests "$main" python/tests/test_serve.py
  } >"$others" 2>&1 &
  say "vLLM 0.26.0"
  tests "$main" python/tests/test_scheduling.py python/tests/test_namespace.py python/tests/test_geometry.py \
    python/tests/test_convert.py python/tests/test_storage_tier.py python/tests/test_vllm.py || failed=1
  wait $! || failed=1
  say "vLLM 0.17.0 and 0.32.0, and servers over HTTP"
  cat "$others"
  say "vLLM tests took $((SECONDS - start)) s"
  return $failed
}

case $kind in
  unit) unit ;;
  vllm) vllm "$@" ;;
  ci) ci ;;
  all) unit; vllm "$@" ;;
  *) sed -n '2,11p' "$0"; exit 2 ;;
esac
say "passed"
