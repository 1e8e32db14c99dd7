"""Imported by the fork server of the loader workers alone, which end where it is gone: it must outlive signals, too."""

import signal

import ecn_dist.data.loader  # noqa: F401  loaded once here, shared by all workers

for _number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(_number, signal.SIG_IGN)
