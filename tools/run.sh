#!/usr/bin/env bash
# Everything on a fresh machine: makes .venv beside the sources, installs losia_fx into it, and runs
#   tools/run.sh finetune [OPTION...]   the main job (losia-fx finetune)
#   tools/run.sh test [OPTION...]       style, types and the tests (pytest)
#   tools/run.sh gpu [OPTION...]        on a machine with a GPU and its torch: the tests that want one, and the bench
set -euo pipefail
cd "$(dirname "$0")/.."
what=${1:-}
case $what in
  finetune) extra=cli ;;
  test) extra=dev ;;
  gpu) # with the python that has a torch for the GPU; nothing is installed, as such machines may have no network
    exec "${PYTHON:-python3}" -m losia_fx.tools.gpu "${@:2}" ;;
  *) sed -n '2,5s/^# //p' "$0" >&2; exit 2 ;;
esac
shift
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
stamp=.venv/losia-fx-$extra
if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
  # torch by itself and pinned: a range lets pip take the newest build, on some machines with gigabytes of CUDA
  .venv/bin/python -c 'import torch' 2>/dev/null || .venv/bin/pip install --quiet 'torch==2.13.0'
  .venv/bin/pip install --quiet --editable ".[$extra]"
  touch "$stamp"
fi
if [ "$what" = finetune ]; then
  exec .venv/bin/losia-fx finetune "$@"
fi
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
# two processes of one thread each: two that both want two threads would wait for each other
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec .venv/bin/python -m pytest -n 2 --dist worksteal "$@"
