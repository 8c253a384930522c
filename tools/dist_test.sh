#!/usr/bin/env bash
# dist_test.sh CONFIG CHECKPOINT GPUS [ARGS of tools/test.py]

bash "$(dirname "$0")/dist_run.sh" test.py "$3" "$1" "$2" "${@:4}"
