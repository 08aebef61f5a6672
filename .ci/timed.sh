# For .ci/run and .ci/all: runs parts one after the other, measures each, and prints a table at the end, also after a failure.

rows=()
failed=0
current=

clock() { printf '%d:%02d' $(($1 / 60)) $(($1 % 60)); }

row() { # NAME SECONDS-OR-EMPTY BUDGET-IN-SECONDS-OR-0 REMARK
  local took='' budget=''
  test -z "$2" || took=$(clock "$2")
  test "$3" -eq 0 || budget=$(clock "$3")
  rows+=("$(printf '  %-16s %7s %7s  %s' "$1" "$took" "$budget" "$4")")
}

# part NAME BUDGET-IN-SECONDS COMMAND…: 0 is no budget. A part that fails does not stop the others; its status is in $status.
part() {
  local name=$1 budget=$2 began=$SECONDS remark=passed
  shift 2
  printf '\n== %s\n' "$name"
  current=$name
  status=0
  "$@" </dev/null || status=$?
  current=
  local took=$((SECONDS - began))
  if test "$status" -eq 3 && test "$name" = audit; then
    remark="NOT AUDITED: the list of known vulnerabilities was not reached"
  elif test "$status" -ne 0; then
    remark=FAILED
    failed=1
  elif test "$budget" -ne 0 && test "$took" -gt "$budget"; then
    remark="passed, OVER ITS BUDGET"
  fi
  row "$name" "$took" "$budget" "$remark"
}

# A part that the others need: without it the rest would only fail after it.
needed() {
  part "$@"
  test "$status" -eq 0 || exit 1
}

table() {
  test -z "$current" || row "$current" "" 0 "ENDED FROM OUTSIDE"
  printf '\n  %-16s %7s %7s\n' part took budget
  printf '%s\n' "${rows[@]}"
  printf '  %-16s %7s\n' "all of it" "$(clock $SECONDS)"
}
