# shellcheck shell=bash
# shellcheck disable=SC2034 # variables for the scripts that source this
# Sourced by the launch scripts: the flags they share, and the one way in which they run a command.

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || {
  echo "error: bash $BASH_VERSION is too old: start the script with bash 4.4 or newer" >&2
  exit 2
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
dry_run=false
stage=run
workdir=
gin_file=()
gin=()
pass=()
stage_flags=() # what stands after --
words=()       # of the stage, after python -m mlp_memory

# fail MESSAGE [CODE]: ends the script with one line; 2 is for what the user can mend in the command.
fail() {
  echo "error: $1" >&2
  exit "${2:-2}"
}

# The words as one line that can be pasted into bash.
quoted() {
  local word line=
  for word; do
    [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || word=${word@Q}
    line+=" $word"
  done
  printf '%s\n' "${line:1}"
}

# Runs the command, or with --dry-run prints it.
run() {
  if $dry_run; then
    quoted "$@"
  else
    echo "+ $(quoted "$@")" >&2
    "$@"
  fi
}

# The same for a command that goes on beside the script.
start() {
  if $dry_run; then
    echo "$(quoted "$@") &"
  else
    echo "+ $(quoted "$@") &" >&2
    "$@" &
  fi
}

# ask NAME COMMAND...: sets the variable NAME to what the command prints, to nothing where it fails.
ask() {
  local -n answer=$1
  shift
  answer=
  if $dry_run; then run "$@"; else answer=$("$@" 2>/dev/null) || answer=; fi
}

common_flags() {
  cat <<'END'
Of the job:
  --workdir DIR       where all artifacts go; the same command goes on with what lies there
  --gin-file FILE     recipe; may be given again
  --gin BINDING       name.param=value; may be given again
  --stage STAGE       one stage instead of all that are missing (run)
  -- FLAGS            more flags for that stage

Of this script:
  --dry-run           print the commands, quoted for bash, and run nothing
  --help              print this
END
}

# parse VALUES SWITCHES ARGUMENT...: sets one variable a flag: VALUES are the script's own flags that
# take a value, SWITCHES those that do not, all written as variables. --flag=x and --flag x are the same.
parse() {
  local values=" workdir stage gin_file gin pass $1 " switches=" dry_run $2 " flag variable value
  shift 2
  while (($#)); do
    flag=${1%%=*}
    variable=${flag#--}
    variable=${variable//-/_}
    if [[ $1 == --help || $1 == -h ]]; then
      usage
      exit 0
    elif [[ $1 == -- ]]; then
      shift
      stage_flags=("$@")
      break
    elif [[ ! $flag =~ ^--[a-z][a-z_-]*$ ]]; then
      fail "$(quoted "$1"): a flag was expected: see $0 --help"
    elif [[ $switches == *" $variable "* ]]; then
      [[ $1 != *=* ]] || fail "$flag takes no value"
      printf -v "$variable" true
      shift
    elif [[ $values == *" $variable "* ]]; then
      if [[ $1 == *=* ]]; then
        value=${1#*=}
        shift
      else
        (($# > 1)) || fail "$flag needs a value"
        value=$2
        shift 2
      fi
      [[ -n $value ]] || fail "$flag needs a value"
      case $variable in
        gin_file | gin | pass)
          local -n list=$variable
          list+=("$value")
          ;;
        *) printf -v "$variable" %s "$value" ;;
      esac
    else
      fail "$flag: there is no such flag: see $0 --help"
    fi
  done
}

# need NAME...: flags that must have been given.
need() {
  local flag
  for flag; do
    [[ -n ${!flag} ]] || fail "--${flag//_/-} is missing: see $0 --help"
  done
}

# need_whole NAME...: flags that must be whole numbers.
need_whole() {
  local flag
  for flag; do
    [[ ${!flag} =~ ^(0|[1-9][0-9]{0,8})$ ]] || fail "--${flag//_/-}=${!flag}: give a whole number"
  done
}

# need_positive NAME...: whole numbers of 1 or more.
need_positive() {
  local flag
  need_whole "$@"
  for flag; do
    ((${!flag} > 0)) || fail "--${flag//_/-}=${!flag}: give 1 or more"
  done
}

need_bucket() {
  [[ $workdir == gs://?* ]] || fail "--workdir=$workdir: give gs://BUCKET/FOLDER, which all machines see"
}

# need_program PROGRAM HOW: a dry run goes without.
need_program() {
  $dry_run || command -v "$1" >/dev/null || fail "$1 was not found: $2"
}

# The recipes are there, in this checkout when the job runs in a copy of it.
need_recipes_of_checkout() {
  local file
  for file in "${gin_file[@]}"; do
    [[ $file != /* && -f $root/$file ]] ||
      fail "--gin-file=$file: give a file of this checkout, as gin_configs/recipes/demo.gin"
  done
}

need_recipes() {
  local file
  for file in "${gin_file[@]}"; do
    [[ -f $file ]] || fail "--gin-file=$file: there is no such file"
  done
}

# set_words WORKDIR: the words of the stage, whose WORKDIR may be another name for --workdir.
set_words() {
  words=("$stage" --workdir="$1" "${gin_file[@]/#/--gin_file=}" "${gin[@]/#/--gin=}" "${stage_flags[@]}")
}
