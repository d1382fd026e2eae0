#!/usr/bin/env bash
# Everything on a fresh machine: makes an environment beside the sources where it needs one, and runs
#   tools/run.sh finetune [OPTION...]   the main job (losia-fx finetune)
#   tools/run.sh test [OPTION...]       style, types and the tests (pytest)
#   tools/run.sh test --torch VERSION [--extra NAME] [OPTION...]
#                                       the tests alone, with that torch, in .venv-torch-VERSION; with the lowest that
#                                       losia_fx takes, the lowest of what it needs as well. NAME: models, for example
#   tools/run.sh gpu [OPTION...]        on a machine with a GPU and its torch: the tests that want one, and the bench
# PYTHON names the python to start from (python3). What it has is used: all of it, or a torch that losia_fx takes.
set -euo pipefail
cd "$(dirname "$0")/.."
base=${PYTHON:-python3}
needs() { "$1" tools/requirements.py "${@:2}" 2>/dev/null; } # a python too bare to tell has not what is asked for

# environment EXTRA: $python has what the extra needs
environment() {
  python=.venv/bin/python
  local stamp=.venv/losia-fx-$1
  if [ ! -x $python ]; then
    if needs "$base" met "$1"; then # as it is: a machine without a network may have everything
      python=$base
      return
    fi
    "$base" -m venv .venv
    if needs "$base" torch; then
      # not --system-site-packages: of a python that is a virtual environment itself it shows the one behind that
      "$base" -c 'import site; print(*site.getsitepackages(), sep="\n")' \
        >"$($python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
    fi
  fi
  if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
    # torch by itself and pinned: a range lets pip take the newest build, on some machines with gigabytes of CUDA
    needs $python torch || $python -m pip install --quiet 'torch==2.13.0'
    $python -m pip install --quiet --editable ".[$1]"
    touch "$stamp"
  fi
}

# environment_with TORCH EXTRA...: $python is one of its own, with that torch and what the extras need
environment_with() {
  local torch=$1 extras=${*:2} pins
  pins=$("$base" tools/requirements.py pins "$torch") || exit 2
  local venv=.venv-torch-$torch
  local stamp=$venv/losia-fx-${extras// /-}
  python=$venv/bin/python
  [ -x "$python" ] || "$base" -m venv "$venv"
  if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
    echo "$pins" >"$venv/pins.txt"
    "$python" -m pip install --quiet --constraint "$venv/pins.txt" --editable ".[${extras// /,}]"
    touch "$stamp"
  fi
}

what=${1:-}
[ $# = 0 ] || shift
case $what in
  finetune)
    environment cli
    exec "$python" -m losia_fx.cli finetune "$@"
    ;;
  test)
    torch='' extras=(tests)
    while [ $# -gt 1 ]; do
      case $1 in
        --torch) torch=$2 ;;
        --extra) extras+=("$2") ;;
        *) break ;;
      esac
      shift 2
    done
    if [ -n "$torch" ]; then
      environment_with "$torch" "${extras[@]}"
    elif [ ${#extras[@]} -gt 1 ]; then
      echo "--extra needs --torch: it brings packages that fit one torch" >&2
      exit 2
    else
      environment dev
      "$python" -m ruff check .
      "$python" -m ruff format --check .
      "$python" -m mypy
    fi
    # two processes of one thread each: two that both want two threads would wait for each other
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TORCHINDUCTOR_COMPILE_THREADS=${TORCHINDUCTOR_COMPILE_THREADS:-1}
    exec "$python" -m pytest -n 2 --dist worksteal "$@"
    ;;
  gpu) # with the python that has a torch for the GPU; nothing is installed, as such machines may have no network
    exec "$base" -m losia_fx.tools.gpu "$@"
    ;;
  *)
    sed -n '2,9s/^# //p' "$0" >&2
    exit 2
    ;;
esac
