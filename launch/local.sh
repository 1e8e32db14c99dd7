#!/usr/bin/env bash
# Train on this host, one rank for each GPU, or on a host without GPUs as many ranks as NPROC_PER_NODE says:
#
#   launch/local.sh --config configs/market2duke.yaml --source S --target T --output_dir R
#   NPROC_PER_NODE=2 launch/local.sh --config configs/demo.yaml --source S --target T --output_dir R
#   MODULE=ecn_dist.doctor launch/local.sh --source S --target T --output_dir R
#
# Options go to the module. Environment: see common.sh, and
#   MAX_RESTARTS   how often ranks that failed are started again, from the newest checkpoint (default 0)
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

whole_number MAX_RESTARTS 0 "how often ranks that failed are started again"
prepare_host
exec "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$NPROC_PER_NODE" \
  --max_restarts "${MAX_RESTARTS:-0}" -m "$MODULE" "$@"
