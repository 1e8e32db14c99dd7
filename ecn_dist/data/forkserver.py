"""Imported by the fork server that loader workers come from, and by nothing else: it must outlive what they outlive.

Workers that lost their fork server would take the training process for gone, and end.
"""

import signal

import ecn_dist.data.loader  # noqa: F401  loaded once here, shared by all workers

for _number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(_number, signal.SIG_IGN)
