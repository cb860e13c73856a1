#!/usr/bin/env bash
# A real SLURM cluster on one machine, to be thrown away: munged, slurmctld and two slurmd with eight fake GPUs each.
#     cluster.sh up | down DIRECTORY      needs root; up writes DIRECTORY/etc/slurm.conf, which SLURM_CONF has to name
#     cluster.sh install                  what it needs, and MPI for the tests of mpirun, where root and apt are there
# Where the kernel allows it each node has its own address and host name (network and UTS namespaces); else all share
# the machine's and have a port each, which works in a container too.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
PROGRAMS=(slurmctld munged ip shellcheck mpirun mpiexec.hydra)
PACKAGES=(slurm-wlm munge iproute2 shellcheck openmpi-bin libopenmpi-dev mpich) # Open MPI's mpirun comes before mpich's
NODES=(node1 node2) GPUS=8 BRIDGE=abbaslurm0 NET=10.213.78 MODE=ports MARK='# abba test cluster'

die() { echo "cluster.sh: $*" >&2; exit 1; }

install() {
    command -v "${PROGRAMS[@]}" | wc -l | grep -qx "${#PROGRAMS[@]}" && return
    if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
        echo "cluster.sh: SLURM or MPI is missing, and without root and apt neither can be installed: tests are skipped"
    elif ! { apt-get -qq update && apt-get -qq install -y --no-install-recommends "${PACKAGES[@]}"; } > /dev/null; then
        echo "cluster.sh: SLURM or MPI is missing, and apt cannot install them: tests are skipped"
    fi
}

choose_mode() { # try what netns mode needs: veth pairs, a bridge, UTS namespaces
    command -v ip > /dev/null && unshare --uts true 2> /dev/null && ip netns add abba-try 2> /dev/null || return 0
    if ip link add abbatry0 type veth peer name abbatry1 && ip link add abbatrybr type bridge; then
        MODE=netns
    fi 2> /dev/null
    ip link del abbatry0 2> /dev/null || true
    ip link del abbatrybr 2> /dev/null || true
    ip netns del abba-try
}

address() { if [ "$MODE" = netns ]; then echo "$NET.$((10 + $1))"; else echo "127.0.1.$((10 + $1))"; fi; }

write_config() {
    local host controller=127.0.0.1 number name
    host=$(hostname -s)
    [ "$MODE" = ports ] || controller=$NET.1
    cat << CONF
ClusterName=abba
SlurmctldHost=$host($controller)
SlurmctldPort=17817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# cred_expire is also how long a requeued job waits before it may start again (default 120 s)
AuthInfo=socket=$D/munge/socket,cred_expire=5
CryptoType=crypto/munge
# a job about to be preempted gets the signal of its --signal
SlurmctldParameters=preempt_send_user_signal
StateSaveLocation=$D/state
SlurmdSpoolDir=$D/spool/%n
TmpFS=$D/tmp/%n
SlurmctldPidFile=$D/run/slurmctld.pid
SlurmdPidFile=$D/run/slurmd.%n.pid
SlurmctldLogFile=$D/log/slurmctld.log
SlurmdLogFile=$D/log/slurmd.%n.log
# no cgroups, no systemd, and more CPUs advertised than there are
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
# as sites have them: it prints into every task's stdout
TaskProlog=$D/etc/prolog
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=200000,bf_interval=1,batch_sched_delay=0,sched_interval=5
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=10
OverTimeLimit=0
MinJobAge=3600
MessageTimeout=30
AccountingStorageType=accounting_storage/none
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
CONF
    for number in "${!NODES[@]}"; do
        name=${NODES[number]}
        [ "$MODE" = ports ] || host=$name
        echo "NodeName=$name NodeHostname=$host NodeAddr=$(address "$number") Port=$((17900 + number))" \
            "CPUs=128 RealMemory=1000000 Gres=gpu:$GPUS Features=fast State=UNKNOWN"
    done
}

make_files() {
    local gpu
    mkdir -p "$D"/{etc,log,run,state,munge,dev}
    chmod 755 "$D" "$D"/*
    (umask 077 && head -c 1024 /dev/urandom > "$D/munge/key")
    write_config > "$D/etc/slurm.conf"
    for ((gpu = 0; gpu < GPUS; gpu++)); do # SLURM counts character devices only
        mknod "$D/dev/gpu$gpu" c 1 3
    done
    printf 'AutoDetect=off\nName=gpu File=%s/dev/gpu[0-%d]\n' "$D" $((GPUS - 1)) > "$D/etc/gres.conf"
    printf '#!/bin/sh\necho print welcome to this node\n' > "$D/etc/prolog"
    chmod 755 "$D/etc/prolog"
    printf 'CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n' > "$D/etc/cgroup.conf"
}

make_network() {
    local number name
    for number in "${!NODES[@]}"; do echo "$(address "$number") ${NODES[number]} $MARK"; done >> /etc/hosts
    [ "$MODE" = netns ] || return 0
    ip link add $BRIDGE type bridge
    ip addr add $NET.1/24 dev $BRIDGE
    ip link set $BRIDGE up
    for number in "${!NODES[@]}"; do
        name=${NODES[number]}
        ip netns add "abba-$name"
        ip link add "abba$number" type veth peer name eth0 netns "abba-$name"
        ip link set "abba$number" master $BRIDGE up
        ip -n "abba-$name" addr add "$(address "$number")/24" dev eth0
        ip -n "abba-$name" link set lo up
        ip -n "abba-$name" link set eth0 up
    done
}

start_node() {
    mkdir -p "$D/spool/$1" "$D/tmp/$1"
    if [ "$MODE" = netns ]; then
        # shellcheck disable=SC2016  # expanded in the namespace
        ip netns exec "abba-$1" unshare --uts bash -c 'hostname "$0" && exec slurmd -N "$0"' "$1"
    else
        slurmd -N "$1"
    fi
}

up() {
    local name try
    [ "$(id -u)" = 0 ] || die "needs root"
    [ ! -e "$D" ] || [ -O "$D" ] || die "$D belongs to somebody else"
    down
    choose_mode
    make_files
    make_network
    munged --key-file="$D/munge/key" --socket="$D/munge/socket" --pid-file="$D/run/munged.pid" \
        --log-file="$D/log/munged.log" --seed-file="$D/munge/seed" || die "munged; see $D/log"
    slurmctld -c || die "slurmctld; see $D/log"
    for name in "${NODES[@]}"; do start_node "$name" || die "slurmd of $name; see $D/log"; done
    for ((try = 0; try < 300; try++)); do
        [ "$(sinfo -h -p gpu -t idle -o %D 2> /dev/null)" != ${#NODES[@]} ] || { echo $MODE > "$D/mode"; return 0; }
        sleep 0.2
    done
    sinfo -N -l >&2
    die "the nodes do not become idle; see $D/log"
}

running() { [[ $(ps -o stat= -p "$1" 2> /dev/null) == [!Z]* ]]; } # a zombie waits for pid 1, not for us

stop() { # PID FILE, NAME: if the process still is the one that we started
    local pid try
    [ -s "$1" ] || return 0
    pid=$(< "$1")
    [[ $(ps -o comm= -p "$pid" 2> /dev/null) == "$2"* ]] || return 0
    kill "$pid"
    for ((try = 0; try < 100; try++)); do running "$pid" || return 0; sleep 0.1; done
    kill -9 "$pid"
}

end_jobs() {
    local jobs try
    jobs=$(timeout 10 squeue -h -o %A 2> /dev/null | sort -u) || return 0
    [ -n "$jobs" ] || return 0
    # shellcheck disable=SC2086  # one word each
    timeout 10 scancel $jobs || true
    for ((try = 0; try < 100; try++)); do [ -n "$(timeout 5 squeue -h)" ] || return 0; sleep 0.2; done
}

down() {
    local file hosts name
    if [ -s "$D/run/slurmctld.pid" ] && running "$(< "$D/run/slurmctld.pid")"; then end_jobs; fi
    for file in "$D"/run/slurmd.*.pid; do stop "$file" slurmd; done
    stop "$D/run/slurmctld.pid" slurmctld
    stop "$D/run/munged.pid" munged
    for name in "${NODES[@]}"; do ip netns del "abba-$name" 2> /dev/null || true; done
    ip link del $BRIDGE 2> /dev/null || true
    hosts=$(grep -v "$MARK" /etc/hosts || true)
    printf '%s\n' "$hosts" > /etc/hosts # often a mount: rewritten, not renamed
    rm -rf "$D"
}

case ${1:-} in
    install) install ;;
    up | down)
        D=${2:?say which DIRECTORY}
        export SLURM_CONF=$D/etc/slurm.conf
        "$1"
        ;;
    *) sed -n '2,6p' "$0" && exit 2 ;;
esac
