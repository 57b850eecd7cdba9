# Sourced by the other scripts: a virtual environment in .venv with the package and everything it needs,
# at the versions of scripts/constraints.txt. Installs only when they or pyproject.toml have changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: Python 3.11 or newer is needed; set PYTHON=/path/to/it." >&2
    exit 2
fi
stamp="$(cat pyproject.toml scripts/constraints.txt)"
# The stamp is written last, so an interrupted installation is taken up again.
if [ ! -f "$VENV/.installed" ] || [ "$(cat "$VENV/.installed")" != "$stamp" ]; then
    echo "==> Installing into $VENV (a few minutes, once)"
    "$PYTHON" -m venv "$VENV"
    "$VENV/bin/python" -m pip install --quiet "$(grep '^torch==' scripts/constraints.txt)"
    "$VENV/bin/python" -m pip install --quiet -c scripts/constraints.txt -e '.[test]'
    printf '%s\n' "$stamp" >"$VENV/.installed"
fi
export PATH="$PWD/$VENV/bin:$PATH"
# The recipes use one thread per process; TRL and datasets need not call home.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false
