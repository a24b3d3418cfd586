# What scripts/demo and scripts/lib/demo-linux have in common; sourced with $bin, the folder of the programs.
# A guest is told by its stays: 1 on what is called host A, 2 on B, 3 on A again.
if [ -t 1 ]; then bold=$(printf '\033[1m') plain=$(printf '\033[0m'); else bold='' plain=''; fi
say() { printf '%s\n' "${bold}$*${plain}"; }
die() { printf 'demo: %s\n' "$*" >&2; exit 1; }

work=$(mktemp -d -t vmferry-demo.XXXXXX)
pids=() # everything started here
finish() {
  local status=$? pid stay
  trap - EXIT INT TERM HUP
  # A vmrun that vmrecv has started is not our child: its socket tells who it is.
  for stay in 1 2 3; do
    if [ -S "$work/$stay.sock" ]; then pids+=("$(pid_of "$stay" 2>/dev/null || true)"); fi
  done
  for pid in ${pids[@]+"${pids[@]}"}; do kill -TERM "$pid" 2>/dev/null || true; done
  sleep 0.3 # vmrecv ends the vmrun that it has started
  for pid in ${pids[@]+"${pids[@]}"}; do kill -KILL "$pid" 2>/dev/null || true; done
  wait 2>/dev/null || true
  rm -rf "$work"
  exit "$status"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP

# Reads what a guest prints at one stay from a FIFO, with the time of each line.
listen() {
  mkfifo "$work/serial-$1"
  {
    while IFS= read -r line; do printf '%s %s\n' "$EPOCHREALTIME" "${line%$'\r'}"; done
    printf '%s' "$line" >"$work/rest-$1" # a line that the guest finishes elsewhere
  } <"$work/serial-$1" >"$work/log-$1" 2>/dev/null &
  pids+=($!)
}

# Waits up to $1 seconds until the rest of the arguments, as a command, succeeds.
await() {
  local until=$((SECONDS + $1))
  shift
  until "$@"; do
    if [ $SECONDS -ge $until ]; then return 1; fi
    sleep 0.02
  done
}
logged() { grep -q "$2" "$work/log-$1" 2>/dev/null; }
# A heartbeat is a line of $beat, a number, and anything else.
beats() { grep -c " $beat [0-9]" "$work/log-$1" 2>/dev/null || true; }
has_beats() { [ "$(beats "$1")" -ge "$2" ]; }
says_port() { grep -qs "waiting for a machine at" "$work/recv-$1.err"; }
pid_of() { "$bin/vmctl" "$work/$1.sock" status --json | grep -o '"pid":[0-9]*' | cut -d: -f2; }

# Moves the guest from the vmrun of stay $1 to a new one of stay $2, on what is called host $3, and waits for
# $enough heartbeats there. Further arguments go to vmsend; those of the array `remaps` go to vmrecv.
remaps=()
move() {
  local from=$1 to=$2 host=$3 port receiver
  shift 3
  listen "$to"
  "$bin/vmrecv" tcp:127.0.0.1:0 --control "$work/$to.sock" --serial "file:$work/serial-$to" \
    ${remaps[@]+"${remaps[@]}"} 2>"$work/recv-$to.err" &
  receiver=$!
  pids+=("$receiver")
  await 20 says_port "$to" || die "vmrecv does not start: $(cat "$work/recv-$to.err")"
  port=$(grep -o '127\.0\.0\.1:[0-9]*' "$work/recv-$to.err" | head -1)
  echo
  say "Moving the guest to host $host: vmsend${*:+ $*} --vm $from.sock tcp:$port"
  "$bin/vmsend" "$@" --vm "$work/$from.sock" "tcp:$port" || die "vmsend ended with exit code $?"
  wait "$receiver" || die "vmrecv failed: $(cat "$work/recv-$to.err")"
  await 60 has_beats "$to" "$enough" || die "the guest does not go on at host $host"
}

# Puts the line together that a guest began at one stay and finished at the next, and checks that no heartbeat is
# missing or there twice, by this host's clock; sets $total, their number.
count_beats() {
  local stay rest skips
  for stay in 2 3; do
    rest=$(cat "$work/rest-$((stay - 1))")
    if [ -n "$rest" ]; then sed -i "1s/^[0-9.]* /&$rest/" "$work/log-$stay"; fi
  done
  for stay in 1 2 3; do
    awk -v beat="$beat" '$2 == beat && $3 ~ /^[0-9]+$/ { print $1, $3 }' "$work/log-$stay" >"$work/beats-$stay"
  done
  skips=$(cat "$work"/beats-[123] | awk 'NR > 1 && $2 != last + 1 { n++ } { last = $2 } END { print n + 0 }')
  total=$(cat "$work"/beats-[123] | wc -l)
  if [ "$skips" != 0 ]; then die "the heartbeat counter skipped $skips times in $total beats"; fi
}
gap() { # milliseconds from the last heartbeat of stay $1 to the first of stay $2
  awk -v last="$(tail -n 1 "$work/beats-$1" | cut -d' ' -f1)" 'NR == 1 { printf "%.1f", ($1 - last) * 1000 }' "$work/beats-$2"
}
