#!/usr/bin/env bash
# Two servers that do both and share their prefix cache, the proxy. GPUs 0 and 1, or DEVICE=cpu.
#   MODEL=/home/models/Qwen2.5-7B-Instruct STORAGE=/mnt/ucm ./prefix-cache.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

serve worker-1 7800 kv_both 0
serve worker-2 7801 kv_both 1
ready worker-1 7800
ready worker-2 7801
proxy 7802 --worker-hosts localhost localhost --worker-ports 7800 7801
finish 7802
