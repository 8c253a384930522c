#!/usr/bin/env bash
# dist_run.sh TOOL GPUS [ARGS]: runs a tool in GPUS processes; called by dist_train.sh and dist_test.sh.
# Several machines: set NNODES, NODE_RANK, MASTER_ADDR and PORT on each.

TOOL=$1
GPUS=$2
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
PORT=${PORT:-29500}
MASTER_ADDR=${MASTER_ADDR:-"127.0.0.1"}

# An empty entry in PYTHONPATH would be the working directory.
PYTHONPATH="$(dirname "$0")/..${PYTHONPATH:+:$PYTHONPATH}" \
python -m torch.distributed.run \
    --nnodes="$NNODES" \
    --node_rank="$NODE_RANK" \
    --master_addr="$MASTER_ADDR" \
    --nproc_per_node="$GPUS" \
    --master_port="$PORT" \
    "$(dirname "$0")/$TOOL" "${@:3}" --launcher pytorch
