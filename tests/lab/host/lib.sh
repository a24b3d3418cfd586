# Helpers for the scenarios, on the emulated hosts. What is put in /out comes back.
[ -e /payload/settings ] && . /payload/settings
bin=/payload/bin
kernel=/lab/guest/vmlinux initrd=/lab/guest/initrd
append="console=ttyS0 reboot=t panic=-1 mitigations=off loglevel=5 noxsave"
say() { echo "[$LAB_HOST] $*"; }
# What is left behind by a failure: the network, and what each thread of a vmrun is at.
wreck() {
  ip -s link
  bridge fdb
  ip neigh
  local pid task
  for pid in $(pgrep -x vmrun); do
    for task in /proc/$pid/task/*; do
      echo "$task $(cat $task/comm) at $(cat $task/wchan), $(cut -d' ' -f3,14,15 $task/stat), $(cat $task/syscall)"
    done
    grep -H '' /proc/$pid/fdinfo/* | grep -E 'eventfd-count|ino'
    ls -l /proc/$pid/fd
  done
}
# Ends the scenario; the other host, if it waits for something of this one, ends with it.
die() {
  echo "LAB-DIE $LAB_HOST: $*"
  wreck >/out/wreck 2>&1
  post died
  sleep 3
  exit 1
}
# What the scenario measured, for the report: result NAME VALUE [UNIT]
result() { echo "LAB-RESULT $*"; }
# Nothing here looks again and again: a process that starts costs an emulated CPU a tenth of a second, which the guest
# and its movers on it would lack while they are timed.
#
# Tells the other host: post NAME [VALUE]. It waits with: peer NAME [SECONDS], which prints the value.
post() { board 127.0.0.1 10 "post $1 ${2:-1}" >/dev/null; }
peer() {
  local said
  said=$(board "$LAB_PEER_IP" "${2:-120}" "wait $1") || return 1
  [ "$said" != died ] || die "the other host has failed"
  echo "${said#is }"
}
# Asks a host's board (board.py): board ADDRESS SECONDS REQUEST
board() {
  local until=$((SECONDS + $2)) said
  while [ $SECONDS -lt $until ]; do
    if exec {line}<>"/dev/tcp/$1/80"; then
      echo "$3" >&$line
      read -r -t $((until - SECONDS)) said <&$line
      exec {line}>&-
      [ -z "$said" ] || { echo "$said" && return 0; }
    fi 2>/dev/null
    sleep 0.5
  done
  return 1
}
# Waits until FILE has a line that matches, or so many of them: await RE FILE [SECONDS], await_count COUNT RE FILE [SECONDS]
await() { await_count 1 "$@"; }
await_count() { [ "$(watch "$3" "${4:-60}" grep -acEm"$1" -- "$2")" = "$1" ]; }
# Runs a command on FILE as it grows, until the command ends: watch FILE SECONDS COMMAND…
watch() {
  local file=$1 seconds=$2 rc growing lines
  shift 2
  exec {lines}< <(exec tail -n +1 -F "$file" 2>/dev/null)
  growing=$!
  timeout "$seconds" "$@" <&$lines
  rc=$?
  kill $growing
  exec {lines}<&-
  return $rc
}
# Copies FILE to the console as it grows: lines are stamped outside, with one clock for both hosts.
follow() { (tail -n +1 -F "$1" 2>/dev/null | sed -u "s/^/GUEST@$LAB_HOST /") & }
# Writes over the free memory, before a guest comes. Where a host's CPU has run code (a guest's that is gone, say), its
# emulator keeps what it made of it, and until that is gone each byte that is written there takes a microsecond:
# milliseconds for a page.
scrub() {
  local began=$EPOCHREALTIME
  python3 - <<'END'
import mmap
free = next(int(line.split()[1]) for line in open("/proc/meminfo") if line.startswith("MemFree:")) * 1024
mmap.mmap(-1, max(free - (64 << 20), 1 << 20), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
END
  say "scrubbed in $(awk -v a="$began" -v b="$EPOCHREALTIME" 'BEGIN { printf "%.1f", b - a }') s"
}
# A bridge takes over eth0 and its address: guests on taps are on the wire of both hosts.
bridge_up() {
  ip link add br0 type bridge forward_delay 0
  ip addr flush dev eth0
  ip link set eth0 master br0
  ip link set br0 up
  ip addr add "$LAB_IP/24" dev br0
}
tap_up() { ip tuntap add "$1" mode tap vnet_hdr && ip link set "$1" master br0 up; }
# The highest heartbeat that FILE has, 0 for none. The guest's kernel may have had its say within the line.
last_beat() { grep -aE '^HB [0-9]+ [0-9.]+(.?$|\[)' "$1" 2>/dev/null | tail -1 | cut -d' ' -f2 | grep . || echo 0; }
# Waits for that beat or a later one, any of which may be a line that one host begins and the other ends:
# await_beat NUMBER FILE SECONDS
await_beat() { watch "$2" "$3" mawk -W interactive -v "least=$1" '/^HB [0-9]+ [0-9.]+(.?$|\[)/ && $2 >= least { exit }'; }
