#!/usr/bin/env bash
# One prefill server, one decode server, the proxy. GPUs 0 and 1, or DEVICE=cpu.
#   MODEL=/home/models/Qwen2.5-7B-Instruct STORAGE=/mnt/ucm ./1p1d.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

serve prefill 7800 kv_producer 0
serve decode 7801 kv_consumer 1
ready prefill 7800
ready decode 7801
proxy 7802 --pd-disaggregation --prefiller-host localhost --prefiller-port 7800 \
  --decoder-host localhost --decoder-port 7801
finish 7802
