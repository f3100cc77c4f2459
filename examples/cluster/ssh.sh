#!/usr/bin/env bash
# Runs a command of Perennial on several machines over plain ssh, under torchrun.
#
#   HOSTS="node1 node2" PROCESSES=8 examples/cluster/ssh.sh doctor --folder runs
#   HOSTS="node1 node2" PROCESSES=8 examples/cluster/ssh.sh train my_recipe.yaml --out runs/base
#
# Ctrl-C, SIGTERM, and a connection that is lost, all ask the run to save and stop; the same command goes on with it.
# Exit code: 0 complete, 130 stopped, 2 bad input, 1 a crash that restarting did not mend.
#
# Settings, as environment variables:
#   HOSTS         names or addresses of the machines by which they reach each other, and this one reaches them
#   PROCESSES     processes on each machine (default: 1): one for each GPU, or for a part of the cores
#   MAX_RESTARTS  how often all start again, from the newest checkpoint, when a process crashes (default: 3)
#   PORT          a free port of the first machine (default: 29400)
#   DIRECTORY     where to run on every machine (default: this folder), on a file system that they share
#   PYTHON        the Python to run (default: python3)
#   SSH           the ssh command (default: ssh), as in SSH="ssh -i key"
#   ENVIRONMENT   names of variables to pass on, besides those below, as in ENVIRONMENT="HF_HOME WANDB_MODE"
set -euo pipefail

hosts=(${HOSTS:?"names of the machines, as in HOSTS='node1 node2'"})
ssh=(${SSH:-ssh})
passed_on=(OMP_NUM_THREADS GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME ${ENVIRONMENT:-})

# Saving may take longer than the 30 s after which torchrun would kill what it has asked to stop.
variables="OMP_WAIT_POLICY=PASSIVE TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600"
for name in "${passed_on[@]}"; do
    [[ -v $name ]] && variables+=" $name=$(printf %q "${!name}")"
done

directory=$(printf %q "${DIRECTORY:-$PWD}")
# Bad input is told once, by one process, before many are started.
if [[ ${1:-} == train ]]; then
    check=$(printf '%q ' "${PYTHON:-python3}" -m perennial "$@" --dry-run)
    "${ssh[@]}" -o BatchMode=yes "${hosts[0]}" "cd $directory && env $variables $check" < /dev/null > /dev/null
fi

# The machines' standard input stays open as long as the run may go on. When it closes, each asks torchrun to stop.
hold=$(mktemp -u)
mkfifo -m 600 "$hold"
exec 9<>"$hold"
trap 'rm -f "$hold"' EXIT
stopped=""
trap 'stopped=yes; exec 9>&-' INT TERM HUP

run_id=perennial-$$-$(date +%s)
pids=()
for number in "${!hosts[@]}"; do
    host=${hosts[$number]}
    torchrun=("${PYTHON:-python3}" -m perennial.train.torchrun
        --nnodes "${#hosts[@]}" --nproc-per-node "${PROCESSES:-1}" --max-restarts "${MAX_RESTARTS:-3}"
        --rdzv-backend c10d --rdzv-id "$run_id" --rdzv-endpoint "${hosts[0]}:${PORT:-29400}"
        --rdzv-conf "is_host=$((number == 0))" --local-addr "$host"
        -m perennial "$@")
    remote="cd $directory || exit 2
        env $variables $(printf '%q ' "${torchrun[@]}") < /dev/null & run=\$!
        { cat > /dev/null; kill -TERM \$run 2> /dev/null; } <&0 & watch=\$!
        wait \$run; code=\$?
        kill \$watch 2> /dev/null
        exit \$code"
    quoted="'${remote//\'/\'\\\'\'}'" # whatever shell the login gives
    "${ssh[@]}" -o BatchMode=yes -o ServerAliveInterval=15 "$host" "exec bash -c $quoted" < "$hold" 9>&- &
    pids+=($!)
done

code=0
while ((${#pids[@]})); do
    running=()
    for pid in "${pids[@]}"; do
        if kill -0 "$pid" 2> /dev/null; then
            running+=("$pid")
            continue
        fi
        ended=0
        wait "$pid" || ended=$?
        if ((ended && !code)); then
            code=$ended
            exec 9>&- # the others cannot go on without it
        fi
    done
    pids=(${running[@]+"${running[@]}"})
    sleep 0.3 || true # a signal ends it early
done
[[ -z $stopped ]] || code=130
exit "$code"
