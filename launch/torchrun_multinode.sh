#!/usr/bin/env bash
# One host's part of a run over several hosts. On host number 0 to NNODES - 1, at about the same time:
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=host0 launch/torchrun_multinode.sh --config C --source S --target T --output_dir R
#
# Elastic, with as many hosts between MIN and MAX as are there; the same on every host, and at any time:
#
#   NNODES=1:2 MASTER_ADDR=host0 MAX_RESTARTS=5 launch/torchrun_multinode.sh --config C ...
#
# Options go to the module. The folders S and R must be the same on all hosts. Environment: see common.sh, and
#   NNODES        hosts, or MIN:MAX
#   MASTER_ADDR   the name of the host where all meet
#   MASTER_PORT   a free port there (default 29500)
#   MAX_RESTARTS  how often the ranks are started again when one failed, from the newest checkpoint (default 0)
#   NODE_RANK     this host's number (default: SLURM's or Kubernetes' own); 0 is MASTER_ADDR. Not with MIN:MAX or
#                 MAX_RESTARTS: the hosts then meet anew at every start, and are numbered as they come. For these,
#   RUN_ID        a name that the hosts of this run alone give (default ecn)
#   RDZV_CONF     of the rendezvous, such as last_call_timeout=10,join_timeout=600 (seconds)
#   TORCH_ELASTIC_SHUTDOWN_TIMEOUT   seconds that ranks have to save and end after a signal (default 120)
#   GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME   the network device between the hosts, where the wrong one is chosen
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

[[ -n "${NNODES:-}" ]] || fail "NNODES is not set: the number of hosts, or MIN:MAX"
[[ -n "${MASTER_ADDR:-}" ]] || fail "MASTER_ADDR is not set: the name of the host where all meet"
[[ "$NNODES" =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]] || fail "NNODES is '$NNODES'; give the number of hosts, or MIN:MAX"
whole_number MAX_RESTARTS 0 "how often ranks that failed are started again"
whole_number MASTER_PORT 1 "a free port on $MASTER_ADDR"
whole_number NODE_RANK 0 "the number of this host, at most NNODES - 1"
node_rank=${NODE_RANK:-${SLURM_NODEID:-${JOB_COMPLETION_INDEX:-}}}
meeting=$MASTER_ADDR:${MASTER_PORT:-29500}

# A host whose ranks are started again must find the others at the same attempt. With numbers given beforehand every
# launcher counts attempts by itself, and once they differ the ranks wait for each other in vain.
if [[ "$NNODES" == *:* || "${MAX_RESTARTS:-0}" -gt 0 ]]; then
  # With one store for rendezvous and ranks, torch 2.13 cannot take a host in again: the ranks look for the store of
  # the round before.
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}
  where=(--rdzv_backend c10d --rdzv_endpoint "$meeting" --rdzv_id "${RUN_ID:-ecn}" --rdzv_conf "${RDZV_CONF:-}")
else
  [[ -n "$node_rank" ]] || fail "NODE_RANK is not set: the number of this host, from 0 to NNODES - 1"
  where=(--node_rank "$node_rank" --master_addr "$MASTER_ADDR" --master_port "${meeting##*:}")
fi

prepare_host
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}
# SIGUSR1 is what schedulers announce the end of a job with. Unless the launcher passes it on, it dies of it.
exec "$PYTHON" -m torch.distributed.run --nnodes "$NNODES" --nproc_per_node "$NPROC_PER_NODE" "${where[@]}" \
  --max_restarts "${MAX_RESTARTS:-0}" --signals_to_handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 -m "$MODULE" "$@"
