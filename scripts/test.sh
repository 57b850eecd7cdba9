#!/usr/bin/env bash
# Install what the tests need and run all of them; arguments go to pytest (-n 0: in one process, for a debugger).
source "$(dirname "$0")/environment.sh"
# Two files at a time, in their order: the slowest come first.
HF_HUB_OFFLINE=1 exec python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
