#!/usr/bin/env bash
# Install what the tests need and run all of them; arguments go to pytest.
source "$(dirname "$0")/environment.sh"
HF_HUB_OFFLINE=1 exec python -m pytest "$@"
