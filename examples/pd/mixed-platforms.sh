#!/usr/bin/env bash
# The half of a mixed set-up that runs on this machine: start it once on each machine.
#   on the prefill machine:  MODEL=... STORAGE=/mnt/ucm ./mixed-platforms.sh prefill
#   on the decode machine:   MODEL=... STORAGE=/mnt/ucm PREFILL_HOST=node1 ./mixed-platforms.sh decode
# The decode machine also runs the proxy. --dtype is written out: its default differs by platform.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

DTYPE=${DTYPE:-bfloat16}
case ${1:-} in
prefill)
  serve prefill 7800 kv_producer 0 --dtype "$DTYPE" --host 0.0.0.0
  ready prefill 7800
  wait
  ;;
decode)
  : "${PREFILL_HOST:?set PREFILL_HOST to the machine of the prefill server}"
  serve decode 7801 kv_consumer 0 --dtype "$DTYPE"
  ready decode 7801
  proxy 7802 --prefiller-host "$PREFILL_HOST" --prefiller-port 7800 \
    --decoder-host localhost --decoder-port 7801
  curl -s http://localhost:7802/healthcheck
  echo
  finish 7802
  ;;
*)
  echo "usage: $0 prefill|decode" >&2
  exit 2
  ;;
esac
