# shellcheck shell=bash
# Short flags (every other flag goes to finetune.py as it is, and yours win over the ones of this page):
#   -m, --model NAME       --model_name_or_path: a name on the Hub, or a folder
#   -d, --data FILE...     --data_path: files, folders or quoted globs, JSON or JSONL; has no default
#   -o, --output FOLDER    --output_dir; default output_qwen, in the current folder
#   -h, --help             this text; `python finetune.py --help` explains the flags of finetune.py
#
# Environment:
#   DRY_RUN=1        print the whole command instead of running it
#   PYTHON           the interpreter; default: .venv/bin/python of this repository, else python
#   GPUS_PER_NODE    processes on this machine; default: its visible GPUs, or 1 where there is none
#   MAX_RESTARTS     how many times a failed run may be started again; default 0
#   GRACE_PERIOD     seconds that all processes have to save and end after SIGTERM or Ctrl-C; default 300
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT, RDZV_ID
#                    several machines: start the same command once on each, with NNODES their number, NODE_RANK 0, 1,
#                    ... and MASTER_ADDR an address, MASTER_PORT a free port (default 6001) of machine 0. What SLURM
#                    (srun --ntasks-per-node=1), OpenMPI (all but the address) or PyTorchJob says is used otherwise.
#                    RDZV_ID, any word, the same on all machines and new for each run (default: SLURM's job id, or
#                    none), keeps runs apart that meet at the same port. Only on a network that you trust: whoever
#                    reaches these ports can disturb the run.

ROOT=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
[[ ${PYTHON-} ]] || { PYTHON=$ROOT/.venv/bin/python; [[ -x $PYTHON ]] || PYTHON=python; }

# A scheduler warns with these two, and they end a program that does not know them yet. finetune.py saves then.
trap '' USR1 USR2

# What all pages have in common. There is no --bf16 or --fp16: finetune.py takes what the hardware has.
# shellcheck disable=SC2034  # the pages use it
RECIPE=(
    --output_dir output_qwen
    --num_train_epochs 5
    --per_device_eval_batch_size 1
    --eval_strategy no
    --save_strategy steps
    --save_steps 1000
    --save_total_limit 10
    --lr_scheduler_type cosine
    --warmup_steps 0.01 # below 1: a share of all steps
    --weight_decay 0.1
    --adam_beta2 0.95
    --logging_steps 1
    --report_to none
    --model_max_length 512
    --join_batches True
)

# launch FLAGS... : finetune.py on every GPU of every machine. (exec: a signal to the launcher is one to torchrun.py.)
launch() {
    read_flags "$@"
    find_machines
    run env CUDA_DEVICE_MAX_CONNECTIONS=1 OMP_NUM_THREADS="$OMP_NUM_THREADS" \
        "$PYTHON" "$ROOT/mechanisms/torchrun.py" "${machines[@]}" --nproc_per_node "$GPUS_PER_NODE" \
        --max_restarts "$MAX_RESTARTS" --grace_period "$GRACE_PERIOD" "$ROOT/finetune.py" "${flags[@]}"
}

# launch_single FLAGS... : finetune.py as one process on one GPU, whatever a scheduler says about others. Were a second
# GPU visible, Trainer would split the batches over both with DataParallel.
launch_single() {
    read_flags "$@"
    local gpu=${CUDA_VISIBLE_DEVICES-0}
    run env -u RANK -u LOCAL_RANK -u WORLD_SIZE CUDA_DEVICE_MAX_CONNECTIONS=1 CUDA_VISIBLE_DEVICES="${gpu%%,*}" \
        "$PYTHON" "$ROOT/finetune.py" "${flags[@]}"
}

# Set `flags`: the arguments, with short flags spelled out. Answer -h, and miss the data before anything starts.
read_flags() {
    local argument name value data=''
    flags=()
    for argument; do
        name=${argument%%=*}
        value=${argument#"$name"}
        case $name in
            -m | --model) name=--model_name_or_path ;;
            -d | --data | --data-path) name=--data_path ;;
            -o | --output) name=--output_dir ;;
            --use_cpu | --use-cpu) GPUS_PER_NODE=${GPUS_PER_NODE:-1} ;;
            -h | --help) header "$0" && echo && header "$ROOT/finetune/launch.sh" && exit 0 ;;
        esac
        [[ $name == --data_path ]] && data=given
        flags+=("$name$value")
    done
    [[ $data ]] || die "no training data: give -d FILE (-h explains)"
}

# Set GPUS_PER_NODE, MAX_RESTARTS, GRACE_PERIOD, OMP_NUM_THREADS and `machines` (the flags to find the others).
find_machines() {
    # shellcheck disable=SC2034  # `first` reads these two by name
    if [[ ${WORLD_SIZE-} && ${RANK-} && ${MASTER_ADDR-} && ! ${LOCAL_RANK-} ]]; then
        local pods=$WORLD_SIZE pod=$RANK # PyTorchJob counts machines under the names torchrun has for processes
    fi
    [[ ${OMPI_COMM_WORLD_LOCAL_SIZE:-1} == 1 && ${SLURM_LOCALID:-0} == 0 ]] ||
        die "started more than once on this machine, but torchrun itself starts a process per GPU:" \
            "use srun --ntasks-per-node=1, or mpirun --map-by ppr:1:node"
    NNODES=$(first NNODES OMPI_COMM_WORLD_SIZE PET_NNODES SLURM_STEP_NUM_NODES SLURM_NNODES SLURM_JOB_NUM_NODES pods)
    NNODES=${NNODES:-1} MAX_RESTARTS=${MAX_RESTARTS:-0} GRACE_PERIOD=${GRACE_PERIOD:-300}
    MASTER_PORT=$(first MASTER_PORT PET_MASTER_PORT)
    whole NNODES 1 100000
    whole MAX_RESTARTS 0 1000
    whole GRACE_PERIOD 0 1000000
    [[ ! $MASTER_PORT ]] || whole MASTER_PORT 1 65535

    machines=(--nnodes "$NNODES")
    if ((NNODES > 1)); then
        MASTER_ADDR=$(first MASTER_ADDR PET_MASTER_ADDR)
        MASTER_ADDR=${MASTER_ADDR:-$(first_slurm_host)} MASTER_PORT=${MASTER_PORT:-6001}
        NODE_RANK=$(first NODE_RANK OMPI_COMM_WORLD_RANK PET_NODE_RANK SLURM_NODEID pod)
        RDZV_ID=$(first RDZV_ID PET_RDZV_ID SLURM_JOB_ID)
        [[ $MASTER_ADDR && $NODE_RANK ]] ||
            die "NNODES=$NNODES needs MASTER_ADDR and NODE_RANK. On every machine: export NNODES=$NNODES" \
                "NODE_RANK=<0 to $((NNODES - 1))> MASTER_ADDR=<address of machine 0> MASTER_PORT=$MASTER_PORT"
        machines+=(--node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT"
            --rdzv_id "${RDZV_ID:-none}")
    fi
    NODE_RANK=${NODE_RANK:-0}
    whole NODE_RANK 0 $((NNODES - 1))
    ((NNODES == 1)) || say "NODE_RANK=$NODE_RANK of NNODES=$NNODES, which meet at $MASTER_ADDR:$MASTER_PORT"
    GPUS_PER_NODE=${GPUS_PER_NODE:-$(count_gpus)}
    whole GPUS_PER_NODE 1 1000
    # torchrun would set 1: an optimizer that is offloaded to the CPU would run on one core.
    local cores && cores=$(nproc 2>/dev/null || echo 1)
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > GPUS_PER_NODE ? cores / GPUS_PER_NODE : 1))}
}

count_gpus() {
    local count devices device
    count=${SLURM_GPUS_ON_NODE:-$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)}
    if [[ $count != 0 && ${CUDA_VISIBLE_DEVICES+set} ]]; then
        IFS=, read -ra devices <<<"$CUDA_VISIBLE_DEVICES" && count=0
        for device in "${devices[@]// /}"; do # CUDA stops at the first that is not one, such as -1
            [[ $device =~ ^([0-9]+|(GPU|MIG)-.+)$ ]] || break
            count=$((count + 1))
        done
    fi
    [[ $count != 0 ]] || { count=1 && say "no GPU here: 1 process on the CPU (GPUS_PER_NODE starts more)"; }
    echo "$count"
}

first_slurm_host() { # "gpu[03-05,9],x1" -> gpu03
    local hosts names && hosts=$(first SLURM_STEP_NODELIST SLURM_JOB_NODELIST SLURM_NODELIST)
    if [[ $hosts ]] && names=$(scontrol show hostnames "$hosts" 2>/dev/null); then
        echo "${names%%$'\n'*}"
    elif [[ ${hosts%%,*} == *"["* ]]; then # no scontrol, as in many containers
        names=${hosts#*"["} && echo "${hosts%%"["*}${names%%[],-]*}"
    else
        echo "${hosts%%,*}"
    fi
}

first() { # the value of the first of these variables that has one
    local name
    for name; do [[ ! ${!name-} ]] || { echo "${!name}" && return; }; done
}

whole() { # whole NAME LOWEST HIGHEST
    [[ ${!1} =~ ^(0|[1-9][0-9]{0,8})$ ]] && ((${!1} >= $2 && ${!1} <= $3)) && return
    die "$1=${!1} is not a whole number from $2 to $3"
}

header() { # the comment at the top of a file
    awk '/^#!|^# shellcheck/ { next } !/^#/ { exit } { sub(/^# ?/, ""); print }' "$1"
}

say() { echo "${0##*/}: $*" >&2; }
die() { say "$@" && exit 2; }

run() { # run the command or, with DRY_RUN, print it a flag a line, to be pasted into a shell
    [[ ${DRY_RUN:-0} != 0 ]] || exec "$@"
    local word line='' quote="'\\''"
    for word; do
        [[ $word =~ ^[A-Za-z0-9_./:=,+@%-]+$ ]] || word="'${word//\'/$quote}'"
        [[ $word != --* && $word != *finetune.py* ]] || { printf '%s \\\n' "$line" && line='   '; }
        line+="${line:+ }$word"
    done
    printf '%s\n' "$line"
}
