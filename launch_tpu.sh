#!/usr/bin/env bash
# Train one stage, or evaluate, on a Cloud TPU slice: create or reuse the slice, install this commit on every worker,
# run, stream the log, and restart after a preemption (train and evaluate continue from their folder).
#
#     ./launch_tpu.sh run --name=crab --zone=us-west4-a --type=v5e:16x16 --queued --spot \
#         --setup='sudo mkdir -p /mnt/crab && sudo mount 10.0.0.2:/crab /mnt/crab' \
#         --config=configs/finetune.py --config.init_from=/mnt/crab/base --config.data.root=/mnt/crab/data \
#         --config.steps=2000 --workdir=/mnt/crab/runs/finetune
#     ./launch_tpu.sh run --name=crab --zone=us-west4-a --type=v5e:16x16 -- evaluate \
#         --checkpoint=/mnt/crab/runs/finetune --data=/mnt/crab/data --out=/mnt/crab/results
#
# Commands
#   run      create or reuse, install, start, follow; if the run is already on the slice, it is only followed
#   logs     follow the log of one worker (--worker, 0 by default)
#   stop     make the run write a checkpoint and end; the slice is kept
#   create   create or reuse the slice and wait until it is ready
#   delete   delete the slice (and the queued resource)
#
# Slice
#   --name=NAME --zone=ZONE [--project=PROJECT]
#   --type=TYPE          v5e:16x16 as in `python -m crab_jax.compile --topology`, or Google's name, v5litepod-256
#   --queued             wait as a queued resource of the same name, instead of failing when there is no capacity
#   --spot | --reserved  cheaper and preemptible | from your reservation
#   --runtime=VERSION    TPU software version (default: chosen from the type)
#   --create-flag=FLAG   one more flag for gcloud's create, such as --create-flag=--network=tpus (repeatable)
#   --ssh-flag=FLAG      one more flag for gcloud's ssh and scp, such as --ssh-flag=--internal-ip (repeatable)
#
# Run
#   --config=FILE --config.key=value ... --workdir=DIR   as for `python -m crab_jax.train`; FILE is in this commit
#                        all workers must see DIR and every path in the config: a shared disk, or
#                        gs://bucket/path or s3://bucket/path
#   -- evaluate --checkpoint=DIR --out=DIR ...           last, in place of the line above: as for
#                        `python -m crab_jax.evaluate`; every worker evaluates its share, with paths as above
#   --setup=COMMAND      shell command on every worker before the run: mounts, copies; it may run repeatedly.
#                        Other users can list its command line: put no passwords in it
#   --env=NAME=VALUE     environment of the run, such as --env=LIBTPU_INIT_ARGS='...' (repeatable)
#   --env=NAME           the same, with the current value of NAME: for tokens and keys. Values of --env are sent
#                        through ssh and kept in a file that only you can read; they appear on no command line and in
#                        no message. (--env=NAME=VALUE itself does for a moment, and in your shell's history.)
#   --max-restarts=N     give up after N restarts (100)
#
# Always
#   --dry-run            print every command, quoted for pasting, without running it
#   --poll=SECONDS       pause between checks of the slice (20)
#   --help
#
# Exit codes: 0 done (or stopped by `stop`), 2 wrong command line, config or input, 1 anything else.
set -uo pipefail

input_error() {  # WHERE PROBLEM FIX
    printf 'error: %s: %s; %s\n' "${@//[[:cntrl:]]/?}" >&2
    exit 2
}

# Every user of a machine can list its command lines, and this script runs for days. Therefore values of --env are moved
# to the environment, as CRAB_RUN_<name>, and the script restarts without them. This must precede all assignments, because
# --env=NAME takes the value that NAME has in the caller's environment.
conceal() {
    local _word _words=() _name _moved=0 _count=0 _next=0
    while (($#)) && [[ $1 != -- ]]; do
        _word=$1
        shift
        if ((_next)); then
            _word=--env=$_word _next=0
        elif [[ $_word == --env && $# -gt 0 ]]; then
            _next=1
            continue
        fi
        if [[ $_word == --env=* ]]; then
            _word=${_word#--env=} _count=$((_count + 1))
            _name=${_word%%=*}
            [[ $_name =~ ^[A-Za-z_][A-Za-z_0-9]*$ ]] ||
                input_error --env "number $_count has no name" "write --env=NAME=VALUE"
            if [[ $_word == *=* ]]; then
                export "CRAB_RUN_$_name=${_word#*=}"
                _moved=1
            else
                _word=CRAB_RUN_$_name
                [[ -n ${!_word+set}${!_name+set} ]] ||
                    input_error --env "number $_count names a variable that is not set" "export it, or write NAME=VALUE"
                [[ -n ${!_word+set} ]] || export "$_word=${!_name}"
            fi
            _word=--env=$_name
        fi
        _words+=("$_word")
    done
    ((_moved == 0)) || exec "$BASH" "$0" "${_words[@]}" ${1+"$@"}
}

conceal ${1+"$@"}
cd "$(dirname "${BASH_SOURCE[0]}")" || exit 1
exec 3>&1  # for --dry-run, which prints from inside $(...) too
SCRATCH=$(mktemp -d "${TMPDIR:-/tmp}/crab_jax.XXXXXXXXXX") ||
    input_error "${TMPDIR:-/tmp}" "no folder can be made in it" "set TMPDIR to a folder that can be written"
trap 'rm -rf "$SCRATCH"' EXIT

NAME='' ZONE='' PROJECT='' TYPE='' RUNTIME='' QUEUED=0 CAPACITY=() CREATE_FLAGS=() SSH_FLAGS=()
CONFIG='' WORKDIR='' OVERRIDES=() EVALUATE=() SETUP='' ENVIRONMENT=()
DRY=0 POLL=20 MAX_RESTARTS=100 WORKER=0

# ------------------------------------------------------------------------------------------------------------ output

note() {
    if ((DRY)); then printf '# %s\n' "$*" >&3; else printf '%s  %s\n' "$(date +%H:%M:%S)" "$*" >&2; fi
}

quote() {  # one word, as any shell reads it back
    local mark="'" escaped="'\\''"
    case $1 in
        '' | *[!A-Za-z0-9_./:=,@%+-]*) printf "'%s'" "${1//$mark/$escaped}" ;;
        *) printf '%s' "$1" ;;
    esac
}

quote_all() {
    local word line=''
    for word in "$@"; do line+=" $(quote "$word")"; done
    printf '%s' "${line# }"
}

act() {  # run a command, or print it
    if ((DRY)); then printf '%s\n' "$(quote_all "$@")" >&3; else "$@" </dev/null; fi
}

# ------------------------------------------------------------------------------------------------- the command line

parse() {
    COMMAND=${1:-}
    local word
    for word in ${1+"$@"}; do
        if [[ $word == --help || $word == -h ]]; then COMMAND=--help; fi
    done
    case $COMMAND in
        run | logs | stop | create | delete) shift ;;
        --help | '') awk 'NR > 1 && !/^#/ {exit} NR > 1 {sub(/^# ?/, ""); print}' "$(basename "$0")"; exit 0 ;;
        *) input_error "command line" "'$COMMAND' is not a command" "use run, logs, stop, create or delete; see --help" ;;
    esac
    local flag value
    while (($#)); do
        flag=${1%%=*}
        case $flag in
            --queued) QUEUED=1; shift; continue ;;
            --spot | --reserved) CAPACITY+=("$flag"); shift; continue ;;
            --dry-run) DRY=1; shift; continue ;;
            --)
                [[ ${2:-} == evaluate ]] || input_error "command line" "'${2:-}' follows --" "write -- evaluate ..."
                shift 2
                to_evaluate "$@"
                break
                ;;
            --*) ;;
            *) input_error "command line" "'${1%%=*}' is not a flag" "see --help" ;;
        esac
        if [[ $1 == *=* ]]; then
            value=${1#*=}
            shift
        elif (($# > 1)); then
            value=$2
            shift 2
        else
            input_error "command line" "$1 needs a value" "write $1=VALUE"
        fi
        case $flag in
            --name) NAME=$value ;;
            --zone) ZONE=$value ;;
            --project) PROJECT=$value ;;
            --type) TYPE=$value ;;
            --runtime) RUNTIME=$value ;;
            --create-flag) CREATE_FLAGS+=("$value") ;;
            --ssh-flag) SSH_FLAGS+=("$value") ;;
            --config) CONFIG=$value ;;
            --config.*) OVERRIDES+=("$flag=$value") ;;
            --workdir) WORKDIR=$value ;;
            --setup) SETUP=$value ;;
            --env)
                word=CRAB_RUN_$value
                ENVIRONMENT+=("$value=${!word}")
                ;;
            --max-restarts) MAX_RESTARTS=$value ;;
            --poll) POLL=$value ;;
            --worker) WORKER=$value ;;
            *) input_error "command line" "$flag is not a flag" "see --help" ;;
        esac
    done
    for word in ${!CRAB_RUN_@}; do unset "$word"; done
}

number() {  # FLAG VALUE
    [[ $2 =~ ^[0-9]+$ ]] || input_error "$1" "'$2' is not a whole number" "write $1=N"
}

to_evaluate() {  # WORDS -> EVALUATE, and WORKDIR, the folder of --out
    local word before=''
    EVALUATE=(crab_jax.evaluate "$@")
    for word in "$@"; do
        if [[ $word == --out=* || $before == --out ]]; then WORKDIR=${word#--out=}; fi
        before=$word
    done
}

check_place() {
    [[ $NAME =~ ^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$ ]] ||
        input_error --name "'$NAME' is not a name for a slice" "use small letters, digits and dashes, a letter first"
    [[ $ZONE =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] ||
        input_error --zone "'$ZONE' is not a zone" "give one that has your TPU type, such as us-west4-a"
    number --max-restarts "$MAX_RESTARTS"
    number --poll "$POLL"
    number --worker "$WORKER"
    PLACE=("--zone=$ZONE" ${PROJECT:+"--project=$PROJECT"})
    if ! ((DRY)) && ! command -v gcloud >/dev/null; then
        input_error gcloud "is not installed" \
            "install the Google Cloud CLI (https://cloud.google.com/sdk/docs/install), then run: gcloud auth login"
    fi
}

check_type() {  # TYPE -> ACCELERATOR, Google's name of it, and RUNTIME
    local generation=${TYPE%%[:-]*} shape=${TYPE#*:} cores=1
    local fix='give --type=v5e:16x16, v5p:2x2x4, v6e:4x4, v4:4x4x4 or a name of Google such as v5litepod-256'
    case $generation in
        v4) cores=2 RUNTIME=${RUNTIME:-tpu-ubuntu2204-base} ;;
        v5e | v5litepod) generation=v5litepod RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite} ;;
        v5p) cores=2 RUNTIME=${RUNTIME:-v2-alpha-tpuv5} ;;
        v6e) RUNTIME=${RUNTIME:-v2-alpha-tpuv6e} ;;
        *) input_error --type "'$TYPE' is not a TPU that is known here" "$fix" ;;
    esac
    if [[ $TYPE =~ ^v[0-9a-z]+-[0-9]+$ ]]; then
        ACCELERATOR="$generation-${TYPE#*-}"
    elif [[ $TYPE == *:* && $shape =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]]; then
        ACCELERATOR="$generation-$((${shape//x/*} * cores))"  # v4 and v5p are named by cores, two per chip
    else
        input_error --type "'$TYPE' has no size" "$fix"
    fi
    ((${#CAPACITY[@]} < 2)) || input_error --spot "cannot be combined with --reserved" "choose one"
}

check_run() {
    local changed python=${PYTHON:-.venv/bin/python} out=--workdir check words
    if ((${#EVALUATE[@]})); then
        [[ -z $CONFIG${OVERRIDES[*]-} ]] || input_error --config "cannot be combined with -- evaluate" "choose one"
        out=--out words=("${EVALUATE[@]}") check="from crab_jax.evaluate import parse_arguments as parse
from crab_jax.io.errors import run_verb
run_verb(lambda: parse(sys.argv[2:]) and None)"
    else
        [[ -n $CONFIG ]] || input_error --config "is not given" "write --config=configs/finetune.py"
        [[ -f $CONFIG ]] || input_error --config "there is no file $CONFIG" "give a path from the top of the repository"
        words=(crab_jax.train "--config=$CONFIG" ${OVERRIDES[@]+"${OVERRIDES[@]}"} "--workdir=$WORKDIR")
        check="from crab_jax.config import parse_flags
from crab_jax.io.errors import run_verb
run_verb(lambda: parse_flags(sys.argv[1:], None) and None)"
    fi
    [[ $WORKDIR == /* || $WORKDIR =~ ^(gs|s3)://[^/] ]] ||
        input_error $out "'$WORKDIR' would lie on one worker's own disk, which a preemption deletes" \
            "give gs://bucket/path or the absolute path of a disk that all workers share"
    COMMIT=$(git rev-parse --short=12 HEAD 2>/dev/null) ||
        input_error "$PWD" "is not a git checkout, and a commit is what is installed" "clone the repository with git"
    [[ -z $CONFIG ]] || git cat-file -e "$COMMIT:$CONFIG" 2>/dev/null ||
        input_error --config "$CONFIG is not in commit $COMMIT, which is what is installed" "git add and commit it first"
    changed=$(git status --porcelain --untracked-files=no | wc -l)
    ((changed == 0)) || printf 'warning: %d changed files are not committed and will not be on the slice\n' "$changed" >&2
    if [[ -x $python ]]; then  # a mistyped override is found here, not on every worker
        JAX_PLATFORMS=cpu "$python" -c "import sys
$check" "${words[@]}" || exit 2
    fi
    RUN=$(quote_all ../venv/bin/python -u -m "${words[@]}")
    # The form written by earlier versions, by which their runs are recognised.
    OLD_RUN=$(quote_all env ${ENVIRONMENT[@]+"${ENVIRONMENT[@]}"} ../venv/bin/python -u -m "${words[@]}")
}

# -------------------------------------------------------------------------------------------------------- the slice

DRY_VM='' DRY_QUEUE=''  # the states assumed by --dry-run: nothing exists yet
LOOKS=1                 # number of attempts to query a state; one, until gcloud has worked

describe() {  # tpu-vm|queued-resources FIELD -> its state, or nothing when it does not exist
    local look state
    local command=(gcloud compute tpus "$1" describe "$NAME" "${PLACE[@]}" "--format=value($2)")
    if ((DRY)); then
        act "${command[@]}"
        if [[ $1 == tpu-vm ]]; then printf '%s' "$DRY_VM"; else printf '%s' "$DRY_QUEUE"; fi
        return 0
    fi
    for ((look = 1; look <= LOOKS; look++)); do
        if state=$(act "${command[@]}" 2>"$SCRATCH/errors"); then
            printf '%s' "$state"
            return 0
        fi
        if grep -qi 'not.found' "$SCRATCH/errors"; then return 0; fi
        if ((look < LOOKS)); then sleep "$POLL"; fi
    done
    cat "$SCRATCH/errors" >&2
    return 1
}

slice_state() {  # -> missing, ready, stopped, gone (preempted), refused (by the queue) or what it is busy with
    local state
    if ((QUEUED)); then
        state=$(describe queued-resources state.state) || return 1
        case $state in
            '') echo missing; return ;;
            ACTIVE) ;;
            SUSPENDED) echo gone; return ;;
            FAILED) echo refused; return ;;
            *) echo "$state"; return ;;
        esac
    fi
    state=$(describe tpu-vm state) || return 1
    case $state in
        '') if ((QUEUED)); then echo PROVISIONING; else echo missing; fi ;;
        READY) echo ready ;;
        STOPPED) echo stopped ;;
        PREEMPTED | TERMINATED) echo gone ;;
        *) echo "$state" ;;
    esac
}

create_slice() {
    note "create $ACCELERATOR as $NAME"
    local options=("${PLACE[@]}" "--accelerator-type=$ACCELERATOR" ${CAPACITY[@]+"${CAPACITY[@]}"}
                   ${CREATE_FLAGS[@]+"${CREATE_FLAGS[@]}"} --quiet)
    DRY_VM=READY DRY_QUEUE=ACTIVE
    if ((QUEUED)); then
        act gcloud compute tpus queued-resources create "$NAME" "--node-id=$NAME" "--runtime-version=$RUNTIME" \
            "${options[@]}"
    else
        act gcloud compute tpus tpu-vm create "$NAME" "--version=$RUNTIME" "${options[@]}"
    fi
}

delete_slice() {
    if ((QUEUED)); then
        act gcloud compute tpus queued-resources delete "$NAME" "${PLACE[@]}" --force --quiet
    else
        act gcloud compute tpus tpu-vm delete "$NAME" "${PLACE[@]}" --quiet
    fi
}

ensure_slice() {  # wait until the slice is ready; create it, start it, or replace what a preemption left
    local state said='' created=0
    while :; do
        state=$(slice_state) || return 1
        LOOKS=30
        [[ $state == "$said" ]] || note "slice $NAME is $state"
        said=$state
        case $state in
            ready) return 0 ;;
            missing) create_slice || return 1; created=1 ;;
            stopped) act gcloud compute tpus tpu-vm start "$NAME" "${PLACE[@]}" --quiet || return 1 ;;
            refused) ((created == 0)) || return 1; delete_slice || return 1 ;;
            gone) delete_slice || return 1 ;;
            *) sleep "$POLL" ;;
        esac
    done
}

# ------------------------------------------------------------------------------------------------------ the workers
# A worker has in ~/crab_jax, which only its user can enter, a folder per installed commit, venv/, and of its run
# command, environment (NAME=VALUE entries and the word end, each followed by NUL; emptied when the run ends), pid, log,
# rc (the exit code, once it ended) and stopped (when `stop` ended it).

ssh_words() {  # all|NUMBER SCRIPT -> SSH, the words of the command
    SSH=(gcloud compute tpus tpu-vm ssh "$NAME" "${PLACE[@]}" "--worker=$1" ${SSH_FLAGS[@]+"${SSH_FLAGS[@]}"} --quiet
         "--command=$2")
}

on_workers() {  # all|NUMBER SCRIPT
    local SSH
    ssh_words "$@"
    act "${SSH[@]}"
}

DRY_RUN=none

run_state() {  # of worker 0 -> running, stopped (by `stop`), interrupted (by another SIGTERM, as before a preemption),
               # lost (ended without an exit code), none, or the exit code; then a line with the digest of its
               # environment, or none; then its command.
               # Nothing when the worker cannot be reached.
    # shellcheck disable=SC2016  # expanded by the worker, as below
    on_workers 0 'cd crab_jax 2>/dev/null && [ -e pid ] || { echo none; exit 0; }
if kill -0 "$(cat pid)" 2>/dev/null; then echo running; elif [ -e stopped ]; then echo stopped
elif tail -n 5 log | grep -q "^stopped on request"; then echo interrupted
elif [ -e rc ]; then cat rc; else echo lost; fi
if [ -s environment ]; then sha256sum <environment; else echo none; fi; cat command'
    if ((DRY)); then echo "$DRY_RUN"; fi
}

install() {
    local archive=$SCRATCH/crab_jax-$COMMIT.tar.gz there=${SCRATCH##*/}.tar.gz
    note "install commit $COMMIT on every worker"
    if ((DRY)); then act mkdir -m 700 "$SCRATCH"; fi
    act git archive --format=tar.gz "--output=$archive" "$COMMIT" &&
        act gcloud compute tpus tpu-vm scp "$archive" "$NAME:$there" "${PLACE[@]}" --worker=all \
            ${SSH_FLAGS[@]+"${SSH_FLAGS[@]}"} --quiet &&
        act rm "$archive" || return 1
    if ((DRY)); then act rmdir "$SCRATCH"; fi
    # Only the packages in the commit's lists, by version and hash: a slice that replaces a preempted one is identical.
    on_workers all "set -e; mkdir -p crab_jax/$COMMIT; chmod 700 crab_jax
tar -xzf $there -C crab_jax/$COMMIT; rm $there; lists=crab_jax/$COMMIT/constraints
export PATH=\"\$HOME/.local/bin:\$PATH\" VIRTUAL_ENV=\"\$PWD/crab_jax/venv\"
command -v uv >/dev/null || python3 -m pip install --quiet --user --require-hashes -r \$lists/uv.txt
uv venv --quiet --allow-existing --python 3.11 crab_jax/venv
uv pip install --quiet --require-hashes -r \$lists/build.txt
uv pip sync --quiet --require-hashes --no-build-isolation \$lists/build.txt \$lists/py311.txt \$lists/py311-tpu.txt
uv pip install --quiet --no-deps --no-build-isolation --editable './crab_jax/${COMMIT}[tpu]'"
}

environment() {  # what a worker keeps as ~/crab_jax/environment
    printf '%s\0' "${ENVIRONMENT[@]}" end
}

digest() { if command -v sha256sum >/dev/null; then sha256sum; else shasum -a 256; fi; }

# Sent through ssh's standard input, to each worker separately: with --worker=all, gcloud lets all ssh processes read the
# same input, so that each would get a part of it.
hand_over() {  # the values of --env
    local SSH count worker word line jobs=() code=0 job
    local ask='echo crab_jax worker'
    # shellcheck disable=SC2016
    local receive='set -e; cd crab_jax; umask 077; file=$(mktemp environment.XXXXXXXXXX); trap "rm -f $file" EXIT; cat >"$file"
[ "$(tail -c 5 "$file" | tr "\0" .)" = .end. ] || { echo "the values of --env did not arrive" >&2; exit 1; }
mv -f "$file" environment'
    ((${#ENVIRONMENT[@]})) || return 0
    line=''
    for word in "${ENVIRONMENT[@]}"; do line+=" ${word%%=*}=***"; done
    note "hand$line over to every worker"
    if ((DRY)); then
        ssh_words all "$ask"
        note "the next lines take the values from the shell that runs them: export the names first"
        printf "workers=\$(%s | grep -c '^crab_jax worker')\n" "$(quote_all "${SSH[@]}")" >&3
        line='for ((worker = 0; worker < workers; worker++)); do printf '"'%s\\0'"
        for word in "${ENVIRONMENT[@]}"; do
            word=${word%%=*}
            line+=" \"$word=\${$word?export it first}\""
        done
        ssh_words "@" "$receive"
        line+=" end | $(quote_all "${SSH[@]}"); done"
        printf '%s\n' "${line/--worker=@/\"--worker=\$worker\"}" >&3
        return
    fi
    count=$(on_workers all "$ask" | grep -c '^crab_jax worker') || return 1
    for ((worker = 0; worker < count; worker++)); do
        ssh_words "$worker" "$receive"
        environment | "${SSH[@]}" &
        jobs+=($!)
        if ((${#jobs[@]} == 8 || worker == count - 1)); then
            for job in "${jobs[@]}"; do wait "$job" || code=1; done
            jobs=()
        fi
    done
    return "$code"
}

set_up() {
    if [[ -n $SETUP ]]; then
        note "set up every worker"
        on_workers all "set -e; $SETUP" || return 1
    fi
}

start() {
    local run values='rm -f ../environment'
    note "start the run on every worker"
    DRY_RUN=0
    run=$(quote "$RUN")
    # shellcheck disable=SC2016
    local keep_code='if [ -s ../environment ]; then
while read -r -d ""; do case $REPLY in *=*) export "$REPLY" ;; esac; done <../environment; fi
. ../command; echo $? >../rc; : >../environment'
    ((${#ENVIRONMENT[@]} == 0)) || values="[ -s ../environment ] || { echo 'no values of --env' >&2; exit 1; }"
    # The outer shell detaches the run, so that it outlives this connection; the inner one stores its exit code. A running
    # run is not started twice: gcloud repeats a command whose connection broke, and another launcher may be faster.
    on_workers all "set -e; cd crab_jax/$COMMIT
if [ -e ../pid ] && kill -0 \"\$(cat ../pid)\" 2>/dev/null; then
if [ \"\$(cat ../command)\" = $run ]; then exit; fi; echo 'another run was started meanwhile' >&2; exit 1; fi
$values
rm -f ../rc ../stopped; printf '%s\n' $run >../command; [ ! -e ../log ] || mv ../log ../log.previous
setsid nohup bash -c $(quote "$keep_code") >../log 2>&1 </dev/null & echo \$! >../pid"
}

follow() {  # WORKER LINES: until its run ends or the connection breaks
    on_workers "$1" "cd crab_jax && tail --pid=\"\$(cat pid)\" -s 0.2 -n $2 -f log"
}

# ----------------------------------------------------------------------------------------------------- the commands

attach_or_start() {  # STATE: what run_state said
    local rest=${1#*$'\n'} values=none
    local theirs=${rest%%$'\n'*} running=${rest#*$'\n'}
    if [[ $1 == running* ]]; then
        ((${#ENVIRONMENT[@]} == 0)) || values=$(environment | digest)
        if [[ $running == "$RUN" && $theirs == "$values" || $running == "$OLD_RUN" && $theirs == none ]]; then
            note "this run is on the slice already"
            return
        fi
        [[ $running != "$RUN" ]] || running='the same, with other values of --env'
        # Without the words before the interpreter, where earlier versions kept the values of --env.
        input_error "$NAME" "another run is on it: ${running##*../venv/bin/}" \
            "end that one first: $0 stop --name=$NAME --zone=$ZONE"
    else
        install && set_up && hand_over && start
    fi
}

RESTARTS=0

again() {  # WHY
    if ((++RESTARTS > MAX_RESTARTS)); then
        printf 'error: %s; gave up after %d restarts\n' "$1" "$MAX_RESTARTS" >&2
        exit 1
    fi
    note "$1; restart $RESTARTS of at most $MAX_RESTARTS"
    sleep $((POLL * (RESTARTS < 15 ? RESTARTS : 15)))
}

run() {
    local state lines reached=0
    trap 'note "the run goes on; follow it with the same command, end it with: $0 stop --name=$NAME --zone=$ZONE"; exit 1' INT
    while :; do
        if ! ensure_slice; then
            ((RESTARTS)) || exit 1
            again "the slice cannot be had"
            continue
        fi
        state=$(run_state)
        if [[ -z $state ]]; then
            ((reached)) || {
                printf 'error: worker 0 cannot be reached by ssh; look at the messages above and at --ssh-flag\n' >&2
                exit 1
            }
            again "worker 0 does not answer"
            continue
        fi
        reached=1
        if ! attach_or_start "$state"; then
            [[ $(slice_state) != ready ]] || exit 1
            again "the slice was lost before the run started"
            continue
        fi
        lines=+1
        while :; do
            follow 0 $lines
            state=$(run_state)
            [[ $state == running* ]] || break
            lines=20  # the connection broke: show the last lines again
            sleep "$POLL"
        done
        state=${state%%$'\n'*}
        case $state in
            0) note "done: $WORKDIR"; exit 0 ;;
            stopped) note "stopped; the same command resumes it"; exit 0 ;;
        esac
        sleep "$POLL"  # a preempted slice reports it a moment after its processes end
        # 143: SIGTERM before train handles it, which is an interruption too.
        if [[ $state =~ ^[0-9]+$ && $state != 143 && $(slice_state) == ready ]]; then
            # shellcheck disable=SC2016
            on_workers all 'tail -n 30 crab_jax/log | sed "s/^/$(hostname): /"' >&2
            printf 'error: the run ended with exit code %s; the last lines of every worker are above\n' "$state" >&2
            exit $((state == 2 ? 2 : 1))
        fi
        again "the run did not end by itself (${state:-no answer})"
    done
}

logs() { follow "$WORKER" +1; }

stop() {
    note "ask the run on $NAME to write a checkpoint and end"
    # shellcheck disable=SC2016
    on_workers all 'cd crab_jax 2>/dev/null && kill -0 "$(cat pid)" || { echo "no run" >&2; exit 1; }
touch stopped; pkill -TERM -P "$(cat pid)"; tail --pid="$(cat pid)" -s 0.2 -n 3 -f log'
}

parse "$@"
check_place
case $COMMAND in
    run) check_type; check_run; run ;;
    create) check_type; ensure_slice || exit 1 ;;
    logs | stop) "$COMMAND" || exit 1 ;;
    delete) delete_slice || exit 1 ;;
esac
