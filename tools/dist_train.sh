#!/usr/bin/env bash
# dist_train.sh CONFIG GPUS [ARGS of tools/train.py]

bash "$(dirname "$0")/dist_run.sh" train.py "$2" "$1" "${@:3}"
