#!/usr/bin/env bash
# Train by DeepSpeed's own launcher with --engine deepspeed: on this host, or by ssh on those of a hostfile.
#
#   launch/deepspeed.sh --config configs/market2duke.yaml --source S --target T --output_dir R
#   HOSTFILE=hosts launch/deepspeed.sh ...      one line a host: NAME slots=GPUS
#
# All other scripts run the same engine with the option --engine deepspeed, and they let the ranks save when a job is
# asked to end. DeepSpeed's launcher ends its ranks at once. So this script is for clusters that are driven by ssh.
#
# Options go to the module. Environment: see common.sh, and
#   HOSTFILE      hosts and their GPUs; the interpreter and the folders must be at the same paths on all of them
#   MASTER_ADDR   the name of the first host, where asking it by ssh finds the wrong network
#   MASTER_PORT   a free port there (default 29500)
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

whole_number MASTER_PORT 1 "a free port on the first host"
prepare_host
"$PYTHON" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("deepspeed") is None)' || fail "$PYTHON has no deepspeed; pip install 'ecn_dist[deepspeed]'"
where=(--master_port "${MASTER_PORT:-29500}")
if [[ -n "${HOSTFILE:-}" ]]; then
  where+=(--hostfile "$HOSTFILE")
  [[ -z "${MASTER_ADDR:-}" ]] || where+=(--master_addr "$MASTER_ADDR")
else
  where+=(--num_gpus "$NPROC_PER_NODE")
fi
exec "$PYTHON" -m deepspeed.launcher.runner "${where[@]}" --module --no_local_rank "$MODULE" --engine deepspeed "$@"
