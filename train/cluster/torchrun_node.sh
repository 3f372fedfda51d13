#!/usr/bin/env bash
# One machine's part of a run over several machines: an agent of torchrun, which starts a process per GPU, restarts
# them when one fails, and meets the agents of the other machines. Start the same line on every machine; slurm.sbatch
# and kubernetes.yaml do. The arguments are those of `parrot`:
#
#   NNODES=2 NODE_RANK=0 RDZV_HOST=10.0.0.1 train/cluster/torchrun_node.sh train --config parrot_7b ...   # on 10.0.0.1
#   NNODES=2 NODE_RANK=1 RDZV_HOST=10.0.0.1 train/cluster/torchrun_node.sh train --config parrot_7b ...   # on 10.0.0.2
#
# docs/multi_node.md explains the settings and what to do when a machine fails.
set -euo pipefail

# ------------------------------------------------------------------------------------------ settings (environment wins)
: "${NNODES:?set NNODES to the number of machines}"
# Which machine this is, from 0; Slurm and Kubernetes (Indexed Jobs) say it themselves.
NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-${JOB_COMPLETION_INDEX:?set NODE_RANK to the number of this machine, from 0}}}
# Name or address of machine 0, where the agents meet, as the other machines reach it.
: "${RDZV_HOST:?set RDZV_HOST to the address of machine 0}"
RDZV_PORT=${RDZV_PORT:-29400}
# Tells runs apart that meet at one address. Alike on all machines.
RUN_ID=${RUN_ID:-parrot}
# Processes of this machine: `gpu` is one per GPU.
NPROC_PER_NODE=${NPROC_PER_NODE:-gpu}
# Network interface of the traffic between machines, such as eth0 or bond0. Unset, NCCL, gloo and torchrun each choose
# one, and on machines with several they choose a wrong one sooner or later.
INTERFACE=${INTERFACE:-}
# Address at which the others reach this machine; unset, that of INTERFACE, else torchrun takes the host name.
LOCAL_ADDRESS=${LOCAL_ADDRESS:-}
# How often the processes of this machine may fail before its agent gives up. A machine that joins again costs nothing.
MAX_RESTARTS=${MAX_RESTARTS:-10}
# Seconds an agent waits for the missing ones, at the start and after a failure; then it ends with an error, so that
# what started it (Slurm, Kubernetes, a person) sees it.
JOIN_TIMEOUT=${JOIN_TIMEOUT:-1800}
# Seconds between signs of life of an agent; after three without one it counts as lost.
HEARTBEAT=${HEARTBEAT:-5}
# Seconds an agent waits for machine 0 to be up, and for each of its answers, before it counts machine 0 as lost and ends.
STORE_TIMEOUT=${STORE_TIMEOUT:-120}
# Seconds between SIGTERM and SIGKILL to a process: the time to write a last checkpoint.
SHUTDOWN_TIMEOUT=${SHUTDOWN_TIMEOUT:-300}
# Logs of each process of this machine, by attempt; best on a disk that outlives the machine.
LOG_DIR=${LOG_DIR:-logs}
PYTHON=${PYTHON:-python}

# ------------------------------------------------------------------------------------------------------------- network
if [[ -n $INTERFACE ]]; then
    # "=": this name exactly; NCCL takes a plain name for the beginning of one (eth1 is also eth10).
    export NCCL_SOCKET_IFNAME="=$INTERFACE" GLOO_SOCKET_IFNAME="$INTERFACE"
    if [[ -z $LOCAL_ADDRESS ]]; then
        LOCAL_ADDRESS=$(ip -4 -o address show dev "$INTERFACE" | awk '{ sub("/.*", "", $4); print $4; exit }')
        : "${LOCAL_ADDRESS:?$INTERFACE has no IPv4 address}"
    fi
fi
# Each round of the rendezvous gets a store of its own. With the shared one, an agent that was there before keeps the
# address of a lost machine's store, and its processes wait there for ever.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="$SHUTDOWN_TIMEOUT"
# torchrun's own log: who joined, what failed, what is started again.
export LOGLEVEL="${LOGLEVEL:-INFO}"
# Fewer threads than cores a process: the data workers want some too.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# ----------------------------------------------------------------------------------------------------------------- run
# is_host is said, not guessed: torchrun guesses by host name, which fails with addresses, aliases and services.
is_host=$((NODE_RANK == 0))
conf="is_host=$is_host,join_timeout=$JOIN_TIMEOUT,read_timeout=$STORE_TIMEOUT,keep_alive_interval=$HEARTBEAT"
# c10d, not static: only there may a machine come back. It numbers the machines itself, by address.
# Every process logs to a file; the first one of each machine also to the terminal.
exec "$PYTHON" -m torch.distributed.run \
    --nnodes "$NNODES" --nproc-per-node "$NPROC_PER_NODE" ${LOCAL_ADDRESS:+--local-addr "$LOCAL_ADDRESS"} \
    --rdzv-backend c10d --rdzv-endpoint "$RDZV_HOST:$RDZV_PORT" --rdzv-id "$RUN_ID" --rdzv-conf "$conf" \
    --max-restarts "$MAX_RESTARTS" --log-dir "$LOG_DIR/node$NODE_RANK" --redirects 3 --tee 0:3 \
    -m parrot_sys "$@"
