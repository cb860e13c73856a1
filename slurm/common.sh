# shellcheck shell=bash
# What the templates share. They source it from the repository's top directory; read `train` first, at the end.
set -uo pipefail

say() { echo "== $*"; }
refuse() { # CODE MESSAGE
    echo "slurm: ${*:2}" >&2
    exit "$1"
}

# --- Settings: --help shows these comments --------------------------------------------------------------------------

# Environment variables of every template:
#   ABBA_ENV             words, taken in their order: "module:cuda/12.8 venv:.venv"; a conda environment is a venv here;
#                        of an image everything comes but the repository: see slurm/abba.def       (venv:.venv)
#   ABBA_MOUNTS          more directories that a container needs, a,b                              (none)
#   ABBA_SCRATCH         node-local directory for what is temporary                                (/tmp)
#   ABBA_SCRATCH_GIB     that must be free there                                                   (10)
#   HF_HOME              the Hub's cache, on storage that all nodes see                       (~/.cache/huggingface)
#   NCCL_SOCKET_IFNAME   the network interface, where NCCL does not find it by itself
#   ABBA_RECIPE          for training: another recipe than the template's
#   ABBA_GPU_MEMORY_GIB  for training: of each GPU, for the plan                                   (80)
#   ABBA_PLAN            for training: no, and launch/plan.py is not asked whether it fits          (yes)
#   ABBA_CHAIN           for training: no, and slurm/convert_evaluate.sh does not follow           (yes)
#   ABBA_EVALUATE        arguments of launch/evaluate.py, such as "--task math --limit 200", once its rows are in the
#                        cache: hf download --repo-type dataset HuggingFaceH4/MATH-500; without --task what was
#                        trained on openai/gsm8k is scored on its test split, anything else is not scored  (none)
#   ABBA_MEET_SECONDS    for training: how far apart nodes may start, such as while they fetch an image   (60)
#   ABBA_MASTER_ADDR, ABBA_MASTER_PORT    where the ranks meet         (the first node, a port made of the job's number)
: "${ABBA_MOUNTS:=}" "${ABBA_SCRATCH_GIB:=10}" "${ABBA_GPU_MEMORY_GIB:=80}" "${ABBA_PLAN:=yes}" "${ABBA_CHAIN:=yes}" "${ABBA_EVALUATE:=}"
export ABBA_ENV ABBA_MOUNTS ABBA_SCRATCH ABBA_SCRATCH_GIB ABBA_EVALUATE # to the next job too
export HF_HOME=${HF_HOME:-$HOME/.cache/huggingface}

OWN=(TMPDIR TORCH_EXTENSIONS_DIR TRITON_CACHE_DIR) # variables that are this job's, and not the next one's
settings() {
    # The Hub: nothing is downloaded from compute nodes; its cache has to be on storage that all nodes see.
    export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
    # The checked-out abba is the one that runs, whether it is installed or not.
    export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
    # What lies in ~/.local would come before the packages of a container or a conda environment.
    export PYTHONNOUSERSITE=1
    # Of sbatch --export=NONE and the like srun would make: nothing of this shell's, not even PATH, for the steps.
    export SLURM_EXPORT_ENV=ALL
    # The network. On a node with several interfaces: NCCL_SOCKET_IFNAME=ib0 sbatch ...; more words: NCCL_DEBUG=INFO.
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
    # Where the ranks meet: a new port at each restart, because the old one may still be closing.
    MASTER_ADDR=${ABBA_MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
    MASTER_PORT=${ABBA_MASTER_PORT:-$((10000 + (SLURM_JOB_ID * 10 + ${SLURM_RESTART_COUNT:-0}) % 20000))}
    export MASTER_ADDR MASTER_PORT
    # sbatch's --cpus-per-task does not reach srun by itself (since SLURM 22.05).
    export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
    [ -n "${OMP_NUM_THREADS:-}" ] || OWN+=(OMP_NUM_THREADS)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SRUN_CPUS_PER_TASK}
}

environment() { # ABBA_ENV: words that are taken in their order
    SRUN=(srun --wait=0) INSIDE=()
    [[ $ABBA_CHAIN = yes || $ABBA_CHAIN = no ]] || refuse 64 "ABBA_CHAIN=$ABBA_CHAIN is neither yes nor no"
    local word value mounts="$PWD,$HF_HOME,$ABBA_SCRATCH${ABBA_MOUNTS:+,$ABBA_MOUNTS}"
    for word in $ABBA_ENV; do
        value=${word#*:}
        case $word in
            module:?*) load_module "$value" ;;
            venv:?*)
                PATH=$(realpath -m -s "$value")/bin:$PATH
                [ -x "${PATH%%:*}/python" ] || refuse 71 "ABBA_ENV: ${PATH%%:*} holds no python on $SLURMD_NODENAME"
                ;;
            apptainer:?*) INSIDE=(apptainer exec --nv --bind "$mounts" --pwd "$PWD" "$value") ;;
            pyxis:?*) SRUN+=(--container-image="$value" --container-workdir="$PWD"
                --container-mounts="$(as_pyxis_mounts "$mounts")") ;;
            *) refuse 64 "ABBA_ENV: '$word' is none of venv:DIRECTORY, module:NAME, apptainer:IMAGE, pyxis:IMAGE" ;;
        esac
    done
}

load_module() {
    set +u # not ours
    # shellcheck disable=SC1091  # the node's
    type module > /dev/null 2>&1 || . /etc/profile
    module load "$1" || refuse 71 "module load $1: failed on $(hostname -s); see what 'module avail' lists"
    set -u
}

as_pyxis_mounts() { # a,b -> a:a,b:b
    local path all=()
    IFS=, read -ra all <<< "$1"
    for path in "${all[@]}"; do printf '%s:%s\n' "$path" "$path"; done | paste -sd ,
}

# --- Steps: programs under srun, which the job's signals reach ------------------------------------------------------

ASKED='' STEP='' INTERRUPTED='' DIED_OF_USR1=138
# To SLURM the number of one element of an array means all of them.
JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID:-}}
JOB=${JOB:-${SLURM_JOB_ID:-}}

stop_asked() { # USR1 from SLURM: the end of the time limit, or a preemption. It is passed on to the running step.
    ASKED=yes INTERRUPTED=yes
    say "USR1 from SLURM: what runs is asked to save and end" >&2 # stdout may be a step's file just now
    [ -z "$STEP" ] || kill -USR1 "$STEP" 2> /dev/null
}

step() { # SRUN OPTIONS -- COMMAND: its exit code. In the background, because a trap has to wait for what is not.
    local options=() code=0
    [ -z "$ASKED" ] || return $DIED_OF_USR1
    while [ "$1" != -- ]; do options+=("$1") && shift; done
    "${SRUN[@]}" "${options[@]}" "${INSIDE[@]}" "${@:2}" &
    STEP=$! INTERRUPTED=yes
    [ -z "$ASKED" ] || kill -USR1 "$STEP" # it came just now
    while [ -n "$INTERRUPTED" ]; do # `wait` returns early at a signal
        INTERRUPTED='' code=0
        wait "$STEP" || code=$?
    done
    STEP=''
    return "$code"
}

on_first_node() { step --nodes=1 --ntasks=1 --ntasks-per-node=1 -- "$@"; }
on_every_node() { step --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 -- "$@"; }
# One task per GPU: no ssh, host file or agent; exit codes and signals pass unchanged. The alternative, torchrun, turns
# every exit code into 1 and dies of USR1, so that a job under it does not requeue itself:
#     srun --ntasks-per-node=1 bash -c 'trap "" USR1; exec torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 8 \
#         --node-rank "$SLURM_NODEID" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" launch/train.py ...'
on_every_gpu() { step --kill-on-bad-exit=1 -- "$@"; }

# --- Before training ------------------------------------------------------------------------------------------------

ranks_per_node() { # of 8(x2), as SLURM writes it; 8,4 is refused
    RANKS_PER_NODE=${SLURM_TASKS_PER_NODE%%[!0-9]*}
    [[ $SLURM_TASKS_PER_NODE != *,* && $SLURM_NTASKS = $((RANKS_PER_NODE * SLURM_JOB_NUM_NODES)) ]] ||
        refuse 71 "uneven nodes: $SLURM_NTASKS ranks on $SLURM_JOB_NODELIST; every node needs as many:" \
            "give --nodes and --ntasks-per-node, not --ntasks"
}

make_scratch() { # node-local; one per start: a job killed while it compiles leaves a lock in TORCH_EXTENSIONS_DIR
    local job=$ABBA_SCRATCH/abba-$SLURM_JOB_ID start=${SLURM_RESTART_COUNT:-0} directory
    directory=$job-$start
    export TMPDIR=$directory TORCH_EXTENSIONS_DIR=$directory/extensions TRITON_CACHE_DIR=$directory/triton
    # shellcheck disable=SC2016  # expanded on the nodes
    srun --wait=0 --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 bash -c '
        for ((earlier = 0; earlier < $1; earlier++)); do rm -rf "$0-$earlier"; done
        mkdir -p -m 700 "$0-$1" ||
            { echo "preflight: $SLURMD_NODENAME: ABBA_SCRATCH: cannot make $0-$1" >&2; exit 66; }' "$job" "$start" ||
        requeue_or_leave 66 "ABBA_SCRATCH=$ABBA_SCRATCH: nothing was started; choose a directory that every node can write"
}

remove_scratch() { srun --wait=0 --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 rm -rf "$TMPDIR"; }

check_nodes() { # RECIPE ARGUMENTS of preflight.py: sets RUN, BASE, REVISION, DTYPE, METHOD, TASK, the recipe's values
    ranks_per_node
    make_scratch
    say "preflight on $SLURM_JOB_NUM_NODES node(s) of $RANKS_PER_NODE rank(s)"
    on_every_node python slurm/preflight.py --recipe "$1" --gpus "$RANKS_PER_NODE" --free-gib "$ABBA_SCRATCH_GIB" \
        "${@:2}" > "$TMPDIR/preflight" ||
        requeue_or_leave $? "preflight: see the lines above that name a node; nothing was started"
    # shellcheck disable=SC2034  # the templates use them
    RUN=$(of_recipe RUN) BASE=$(of_recipe BASE) REVISION=$(of_recipe REVISION) DTYPE=$(of_recipe DTYPE) \
        METHOD=$(of_recipe METHOD) TASK=$(of_recipe TASK)
}

# By name, because a site's TaskProlog may print there too; with SLURM_LABELIO the task's number comes first.
of_recipe() { sed -n "s/^[ 0-9:]*abba-recipe $1=//p" "$TMPDIR/preflight"; } # NAME

check_plan() { # RECIPE OVERRIDES: does it fit these GPUs?
    [ "$ABBA_PLAN" = yes ] || { say "ABBA_PLAN=$ABBA_PLAN: not asked whether it fits" && return; }
    on_first_node python launch/plan.py --recipe "$1" --nodes "$SLURM_JOB_NUM_NODES" --gpus-per-node "$RANKS_PER_NODE" \
        --gpu-memory-gib "$ABBA_GPU_MEMORY_GIB" "${@:2}" ||
        requeue_or_leave $? "plan: see the lines above; nothing was started; ABBA_PLAN=no tries all the same"
}

# --- After it -------------------------------------------------------------------------------------------------------

chain() { # after check_nodes: the next job, once; it starts when this one has ended well and vanishes when it has not
    [ "$ABBA_CHAIN" = yes ] || return 0
    [ "$METHOD" != full ] || { say "no job follows: score what this one trains with evaluate.py --model $RUN/model" && return; }
    local note=$RUN/.next-of-$JOB # an earlier start of this job may have got that far, or not
    if [ -s "$note" ] && NEXT=$(< "$note") && [ -n "$(squeue -h -j "$NEXT" 2> /dev/null)" ]; then return; fi
    local constraint
    constraint=$(scontrol -o show job "$JOB" | sed -n 's/.* Features=\([^ ]*\).*/\1/p' | grep -vxF '(null)')
    local next=(sbatch --parsable --export=ALL --dependency="afterok:$JOB" --kill-on-invalid-dep=yes
        --partition="$SLURM_JOB_PARTITION" ${SLURM_JOB_ACCOUNT:+--account="$SLURM_JOB_ACCOUNT"}
        ${SLURM_JOB_QOS:+--qos="$SLURM_JOB_QOS"} ${SLURM_JOB_RESERVATION:+--reservation="$SLURM_JOB_RESERVATION"}
        ${constraint:+--constraint="$constraint"} --gpus-per-node="$RANKS_PER_NODE"
        --cpus-per-task="$((RANKS_PER_NODE * ${SLURM_CPUS_PER_TASK:-1}))"
        slurm/convert_evaluate.sh "$RUN")
    # This job's own SLURM_ variables would be the next one's defaults.
    # shellcheck disable=SC2046  # names, which hold no spaces
    if NEXT=$(unset "${OWN[@]}" $(compgen -e SLURM_ | grep -vx SLURM_CONF) && "${next[@]}"); then
        { mkdir -p "$RUN" && echo "$NEXT" > "$note"; } ||
            say "WARNING: $note cannot be written: requeued, this job will ask for another one like job $NEXT"
        say "job $NEXT converts what this one trains, and $(will_score "$ABBA_EVALUATE")"
    else
        say "WARNING: sbatch refused the next job; after this one run: sbatch slurm/convert_evaluate.sh '$RUN'"
    fi
}

will_score() { # ARGUMENTS of launch/evaluate.py: says so, and returns 1 where nothing is scored
    if [[ " $*" = *" --task"* ]]; then
        echo "scores it with $*"
    elif [ -n "$TASK" ]; then
        echo "scores it on $TASK"
    else
        echo "does not score it: no --task in ABBA_EVALUATE"
        return 1
    fi
}

leave() { # CODE MESSAGE
    remove_scratch
    say "job $SLURM_JOB_ID ends with code $1 after $((SECONDS / 3600)) h $((SECONDS / 60 % 60)) min $((SECONDS % 60)) s"
    say "${*:2}"
    exit "$1"
}

preempted() { # for a job of a higher partition; SLURM's own requeue would come later, and not to a job that has ended
    scontrol -o show job "$JOB" | grep -q ' PreemptTime=[0-9]'
}

# Asked to stop, training saves and ends with 75; what does not listen, or not yet, dies of the signal, which is no fault
# of its own. Only these two requeue: scancel sends TERM as well, and what was cancelled must not come back.
requeue_or_leave() { # CODE MESSAGE
    [ "$1" != 0 ] || leave "$@"
    [ -n "$ASKED" ] || { [[ $1 = 75 || $1 = 143 ]] && preempted; } || leave "$@"
    # Under a time limit too short to begin it would be asked at once, each time.
    [ "$1" = 75 ] || [ "${SLURM_RESTART_COUNT:-0}" -lt 10 ] ||
        leave "$1" "asked to stop before it could save, and not for the first time; is the time limit too short?"
    say "asked to stop: requeued, to continue where it stands"
    remove_scratch
    scontrol requeue "$JOB" || leave "$1" "it cannot be requeued; the same sbatch command continues"
    exit "$1"
}

what_next() { # CODE
    case $1 in
        0) echo "trained${NEXT:+; converted next by job $NEXT: squeue -j $NEXT}" ;;
        64 | 65 | 66) echo "mend what the message above names; the same sbatch command continues" ;;
        1) echo "see the traceback above; the same sbatch command continues from the newest checkpoint" ;;
        70) echo "not finite: see the rows that are named, or lower train.learning_rate" ;;
        75) echo "stopped by neither the time limit nor a preemption; the same sbatch command continues" ;;
        76) echo "three starts without a new checkpoint: something fails again and again; see the lines above" ;;
        *) echo "a rank was lost; the same sbatch command continues from the newest checkpoint" ;;
    esac
}

# --- A template -----------------------------------------------------------------------------------------------------

begin() { # the template's arguments
    if [ "${1:-}" = --help ]; then
        sed -n '/^#SBATCH\|^##SBATCH\|^#!/d; /^$/q; s/^# \{0,1\}//p' "$SELF"
        sed -n '/^# Environment variables/,/^:/{ s/^# \{0,1\}//p }' slurm/common.sh
        exit 0
    fi
    [ -n "${SLURM_JOB_ID:-}" ] || refuse 64 "this is a batch job: sbatch slurm/$(basename "$SELF"); --help explains it"
    trap stop_asked USR1
    settings
    environment
    say "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), on $SLURM_JOB_NODELIST, $(date '+%F %T')"
}

train() { # RECIPE OVERRIDES
    local code=0
    check_nodes "$@" --gpu-memory-gib "$ABBA_GPU_MEMORY_GIB"
    check_plan "$@"
    chain
    say "python launch/train.py --recipe ${*@Q}"
    on_every_gpu python launch/train.py --recipe "$@" || code=$?
    requeue_or_leave $code "$(what_next $code)"
}
