#!/usr/bin/env bash
# Two prefill and two decode servers, the proxy. GPUs 0 to 3, or DEVICE=cpu.
#   MODEL=/home/models/Qwen2.5-7B-Instruct STORAGE=/mnt/ucm ./2p2d.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

serve prefill-1 7800 kv_producer 0
serve prefill-2 7801 kv_producer 1
serve decode-1 7802 kv_consumer 2
serve decode-2 7803 kv_consumer 3
ready prefill-1 7800
ready prefill-2 7801
ready decode-1 7802
ready decode-2 7803
proxy 7805 --prefiller-hosts localhost localhost --prefiller-ports 7800 7801 \
  --decoder-hosts localhost localhost --decoder-ports 7802 7803
finish 7805
