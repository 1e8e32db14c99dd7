# shellcheck shell=bash
# What the launch scripts share; sourced by them, not run. It reads, all optional:
#
#   ECN_SETUP        a file that is sourced on every host first: module load, conda activate, exports
#   PYTHON           the interpreter (default: the repository's .venv if there is one, else python3)
#   MODULE           what to run (default ecn_dist.train; also ecn_dist.doctor, ecn_dist.evaluate)
#   NPROC_PER_NODE   ranks on this host (default: one for each GPU; without GPUs one)
#   OMP_NUM_THREADS  threads of a rank (default: this host's cores divided by its ranks)

fail() {
  echo "${0##*/}: $*" >&2
  exit 2
}

# whole_number NAME LEAST WHAT: refuses a variable that is set to anything but a decimal number from LEAST (0 or 1) on.
whole_number() {
  local value=${!1:-}
  [[ -z "$value" || "$value" =~ ^[1-9][0-9]{0,8}$ || ("$value" == 0 && "$2" == 0) ]] ||
    fail "$1 is '$value'; give a whole number from $2 on: $3"
}

prepare_host() {
  local home
  if [[ -n "${ECN_SETUP:-}" ]]; then
    # shellcheck source=/dev/null
    . "$ECN_SETUP"
  fi
  home=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
  if [[ -z "${PYTHON:-}" ]]; then
    PYTHON=python3
    [[ ! -x "$home/.venv/bin/python" ]] || PYTHON=$home/.venv/bin/python
  fi
  MODULE=${MODULE:-ecn_dist.train}
  whole_number NPROC_PER_NODE 1 "the ranks on this host; or leave it unset for one for each GPU"
  [[ "${SLURM_GPUS_ON_NODE:-0}" == 0 ]] || NPROC_PER_NODE=${NPROC_PER_NODE:-$SLURM_GPUS_ON_NODE}
  NPROC_PER_NODE=${NPROC_PER_NODE:-}
  if [[ -z "$NPROC_PER_NODE" ]]; then
    NPROC_PER_NODE=$("$PYTHON" -c 'import torch; print(max(torch.accelerator.device_count(), 1))') ||
      fail "$PYTHON cannot import torch on $(hostname); set PYTHON to an interpreter that can, or ECN_SETUP"
  fi
  if [[ -z "${OMP_NUM_THREADS:-}" ]]; then
    OMP_NUM_THREADS=$(($(nproc) / NPROC_PER_NODE))
    ((OMP_NUM_THREADS >= 1)) || OMP_NUM_THREADS=1
    export OMP_NUM_THREADS
  fi
}
