# Sourced by the scripts beside it: starts servers, waits for them, stops them all at the end.
#
#   MODEL     directory of the model (required)
#   STORAGE   directory that all servers share (default: a fresh one under $RUN)
#   DEVICE    gpu (default) or cpu
#   RUN       where logs go (default: a fresh directory)
#   VLLM      the vllm command (default: vllm)
#   PROXY     the proxy command (default: ucm-proxy)

set -euo pipefail

: "${MODEL:?set MODEL to the directory of a model}"
DEVICE=${DEVICE:-gpu}
RUN=${RUN:-$(mktemp -d -t ucm-pd.XXXXXX)}
STORAGE=${STORAGE:-$RUN/storage}
VLLM=${VLLM:-vllm}
PROXY=${PROXY:-ucm-proxy}
NAME=${NAME:-$(basename "$MODEL")}
WAIT_SECONDS=${WAIT_SECONDS:-600}
mkdir -p "$RUN" "$STORAGE"

case $DEVICE in
gpu)
  # A share of one GPU per server; two servers on the same GPU need 0.45 each.
  COMMON=(--max-model-len "${MAX_MODEL_LEN:-20000}" --gpu-memory-utilization "${GPU_MEMORY:-0.87}")
  CACHE_GB=${CACHE_GB:-32}
  ;;
cpu)
  export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1}
  export VLLM_CPU_OMP_THREADS_BIND=${VLLM_CPU_OMP_THREADS_BIND:-nobind}
  export VLLM_ENABLE_V1_MULTIPROCESSING=${VLLM_ENABLE_V1_MULTIPROCESSING:-0}
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TORCHDYNAMO_DISABLE=${TORCHDYNAMO_DISABLE:-1}
  COMMON=(--dtype bfloat16 --max-model-len "${MAX_MODEL_LEN:-4096}" --max-num-seqs 8)
  COMMON+=(--max-num-batched-tokens 4096 --enforce-eager)
  CACHE_GB=${CACHE_GB:-0.25}
  ;;
*)
  echo "DEVICE is gpu or cpu, not $DEVICE" >&2
  exit 2
  ;;
esac

cat >"$RUN/ucm.yaml" <<YAML
ucm_connectors:
  - ucm_connector_name: "UcmPipelineStore"
    ucm_connector_config:
      store_pipeline: "Cache|Posix"
      storage_backends: "$STORAGE"
      # Per rank: times the tensor parallel size on each server.
      cache_buffer_capacity_gb: $CACHE_GB
YAML

STARTED=()

stop() {
  trap - EXIT INT TERM
  if ((${#STARTED[@]})); then
    kill "${STARTED[@]}" 2>/dev/null || true
    wait "${STARTED[@]}" 2>/dev/null || true
  fi
}
trap stop EXIT
trap 'exit 130' INT TERM

# serve NAME PORT ROLE GPU [more options of vllm serve]
serve() {
  local name=$1 port=$2 role=$3 gpu=$4
  shift 4
  local connector='{"kv_connector": "UCMConnector", "kv_role": "'$role'",
    "kv_connector_module_path": "ucm.integration.vllm.ucm_connector",
    "kv_load_failure_policy": "recompute",
    "kv_connector_extra_config": {"UCM_CONFIG_FILE": "'$RUN/ucm.yaml'"}}'
  CUDA_VISIBLE_DEVICES=$gpu ASCEND_RT_VISIBLE_DEVICES=$gpu \
    "$VLLM" serve "$MODEL" --served-model-name "$NAME" --port "$port" --block-size 128 \
    "${COMMON[@]}" --kv-transfer-config "$connector" "$@" >"$RUN/$name.log" 2>&1 &
  STARTED+=($!)
  echo "$name: port $port, log $RUN/$name.log"
}

# ready NAME PORT: waits until a server answers; a server that died is told with its last lines.
ready() {
  local name=$1 port=$2 pid waited=0
  until curl -sf -o /dev/null "http://localhost:$port/health"; do
    for pid in "${STARTED[@]}"; do
      if ! kill -0 "$pid" 2>/dev/null; then
        echo "a server ended while $name was waited for; the ends of all logs:" >&2
        tail -n 15 "$RUN"/*.log >&2
        exit 1
      fi
    done
    if ((waited >= WAIT_SECONDS)); then
      echo "$name does not answer after $WAIT_SECONDS s, see $RUN/$name.log" >&2
      exit 1
    fi
    sleep 2
    waited=$((waited + 2))
  done
  echo "$name is up"
}

# proxy PORT [options]: starts the proxy and waits for it.
proxy() {
  local port=$1
  shift
  "$PROXY" --host localhost --port "$port" --access-log "$RUN/access.log" "$@" \
    2>"$RUN/proxy.log" &
  STARTED+=($!)
  ready proxy "$port"
}

# Says how to use it, asks once, and stays until Ctrl-C. With ONCE=1 it ends after the question.
finish() {
  local port=$1
  local body='{"model": "'$NAME'", "prompt": "What date is today?", "max_tokens": 20,
    "temperature": 0}'
  echo "curl http://localhost:$port/v1/completions -H 'Content-Type: application/json' -d '$body'"
  curl -sf "http://localhost:$port/v1/completions" -H 'Content-Type: application/json' -d "$body"
  echo
  [[ ${ONCE:-} == 1 ]] || wait
}
