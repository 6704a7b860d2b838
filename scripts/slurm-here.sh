#!/usr/bin/env bash
# A Slurm of its own on this machine, for as long as one command runs:
#
#     scripts/slurm-here.sh bash                 # then: sbatch, squeue, scontrol, srun
#     scripts/slurm-here.sh --nodes 2 COMMAND    # two nodes of 4 CPUs each, both this machine
#
# Controller, nodes and munge run without systemd, with files in a temporary folder and ports of their own; SLURM_CONF
# leads the clients to them. At the end all jobs are cancelled and everything is stopped and removed. Needs root and
# the Debian packages slurm-wlm and munge. The CPUs are a claim, so four tasks start on a laptop with two cores.
set -euo pipefail

nodes=1
if [ "${1:-}" = --nodes ]; then
    nodes=${2:-}
    shift 2 || true
fi

main() {
    [[ $nodes =~ ^[1-9]$ ]] || fail "--nodes takes a number from 1 to 9"
    [ $# -gt 0 ] || fail "expected a command, such as: scripts/slurm-here.sh bash"
    [ "$(id -u)" = 0 ] || fail "Slurm's daemons need root here"
    for program in munged slurmctld slurmd; do
        command -v "$program" >/dev/null || fail "no $program: apt-get install slurm-wlm munge"
    done

    folder=$(mktemp -d -t slurm-here.XXXXXX)
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
    trap stop EXIT
    start
    "$@"
}

start() {
    mkdir -m 755 "$folder/munge" "$folder/state"
    head -c 128 /dev/urandom >"$folder/munge/key"
    chmod 400 "$folder/munge/key"
    write_conf >"$folder/slurm.conf"
    export SLURM_CONF=$folder/slurm.conf

    # munged trusts no folder below one that others may write to, such as /tmp, unless forced.
    daemon munged --foreground --force --socket="$folder/munge/socket" --key-file="$folder/munge/key" \
        --pid-file="$folder/munge/pid" --seed-file="$folder/munge/seed" --log-file="$folder/munge/log"
    await munged test -S "$folder/munge/socket"
    daemon slurmctld -D
    await slurmctld answers scontrol ping
    for node in $(seq "$nodes"); do
        daemon slurmd -D -N "here$node"
    done
    await slurmd all_idle
}

# Ranks of a node meet by the number of their job, so two Slurms on one machine must not give the same numbers.
write_conf() {
    local host base
    host=$(hostname -s)
    base=$(free_ports)
    cat <<CONF
ClusterName=here
FirstJobId=$(($$ * 10 + 1))
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthInfo=socket=$folder/munge/socket
SlurmctldPort=$base
SlurmctldPidFile=$folder/slurmctld.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmdLogFile=$folder/slurmd-%n.log
SlurmdSpoolDir=$folder/spool-%n
StateSaveLocation=$folder/state
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=bf_interval=1,batch_sched_delay=0,sched_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=5
ReturnToService=2
CONF
    for node in $(seq "$nodes"); do
        echo "NodeName=here$node NodeHostname=$host NodeAddr=127.0.0.1 Port=$((base + node)) CPUs=4"
    done
    echo "PartitionName=batch Nodes=ALL Default=YES GraceTime=30"
    echo "PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF"
}

# The first of a row of ports, below those that the system gives to clients, at which nobody listens. Two scripts that
# start at the same time look in different places.
free_ports() {
    local base port
    for base in $(seq $((20000 + $$ % 1000 * 10)) 10 31000); do
        for port in $(seq "$base" $((base + nodes))); do
            ! (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null || continue 2
        done
        echo "$base"
        return
    done
    fail "no free ports below 31000"
}

# Starts a daemon that ends with this script, however that ends.
daemon() {
    setpriv --pdeathsig TERM "$@" >>"$folder/$1.out" 2>&1 </dev/null &
    daemons+=($!)
}
daemons=()

# await NAME COMMAND...: until the command succeeds; the daemon says why it does not.
await() {
    local name=$1
    shift
    for _ in {1..300}; do
        if "$@" 2>/dev/null; then return; fi
        kill -0 "${daemons[-1]}" 2>/dev/null || break
        sleep 0.1
    done
    tail -n 20 "$folder"/*.out "$folder"/*.log >&2 || true
    fail "$name did not start; its last words are above"
}

answers() {
    "$@" >/dev/null
}

all_idle() {
    [ "$(sinfo --noheader --Node --partition batch --states idle --format %n | wc -l)" = "$nodes" ]
}

# Jobs first: they outlive slurmd.
stop() {
    trap '' INT TERM HUP
    if scontrol ping >/dev/null 2>&1; then
        scancel --quiet --partition batch,urgent 2>/dev/null || true
        for _ in {1..200}; do
            [ -n "$(squeue --noheader 2>/dev/null)" ] || break
            sleep 0.1
        done
    fi
    for ((i = ${#daemons[@]} - 1; i >= 0; i--)); do
        kill "${daemons[i]}" 2>/dev/null || true
        wait "${daemons[i]}" 2>/dev/null || true
    done
    rm -rf "$folder"
}

fail() {
    echo "scripts/slurm-here.sh: $*" >&2
    exit 1
}

main "$@"
