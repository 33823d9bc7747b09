#!/bin/sh
# Make the environment in the folder $1 and install the project with its development extras.
# uv installs several times faster than pip and is tried first; where it cannot reach the packages, pip does it.
set -eu
venv=$1
python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))'; then
    echo "error: Python 3.10 to 3.13 is needed, $("$python" --version 2>&1) was found; name another with PYTHON=python3.12 make ..." >&2
    exit 1
fi
echo "making the environment in $venv (about 6 GB on disk)"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
if [ "${MTKD_INSTALLER:-uv}" = uv ] && "$venv/bin/python" -m pip install --quiet uv 2>/dev/null \
    && VIRTUAL_ENV="$venv" "$venv/bin/uv" pip install --quiet --python "$venv/bin/python" -e '.[dev,fast]'; then
    exit 0
fi
echo "installing with pip"
exec "$venv/bin/python" -m pip install --quiet -e '.[dev,fast]'
