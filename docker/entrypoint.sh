#!/usr/bin/env bash
# Checks what a container is most often started without, and then becomes the command it was given.
#
#   ECN_CHECKS="accelerator shm"   the checks of `ecn-dist doctor` made at start; empty: none
set -euo pipefail

for check in ${ECN_CHECKS-accelerator shm}; do
  checks+=(--only "$check")
done
if [[ -v checks ]]; then
  python -m ecn_dist.doctor --quiet "${checks[@]}" || {
    echo "entrypoint: the container is not fit to run (see above); ECN_CHECKS= starts it all the same" >&2
    exit 2
  }
fi
exec "$@"
