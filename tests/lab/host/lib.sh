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
# Tells the other host: post NAME [VALUE]. It waits with: peer NAME [SECONDS], which prints the value.
post() {
  echo "${2:-1}" >"/run/pub/.$1"
  mv "/run/pub/.$1" "/run/pub/$1"
}
peer() {
  local until=$((SECONDS + ${2:-120}))
  while [ $SECONDS -lt $until ]; do
    published "$1" && return 0
    ! published died >/dev/null || die "the other host has failed"
    sleep 0.2
  done
  return 1
}
published() {
  local said
  said=$(timeout 5 bash -c 'exec 3<>"/dev/tcp/$1/80" && printf "GET /%s HTTP/1.0\r\n\r\n" "$2" >&3 && cat <&3' - "$LAB_PEER_IP" "$1" 2>/dev/null)
  [[ $said == *" 200 OK"* ]] && echo "${said##*$'\n'}"
}
# Waits until FILE has a line that matches, or so many of them: await RE FILE [SECONDS], await_count COUNT RE FILE [SECONDS]
await() { await_count 1 "$@"; }
await_count() {
  local until=$((SECONDS + ${4:-60}))
  while [ $SECONDS -lt $until ]; do
    [ "$(grep -acE -m"$1" -- "$2" "$3" 2>/dev/null)" = "$1" ] && return 0
    sleep 0.1
  done
  return 1
}
# Copies FILE to the console as it grows: lines are stamped outside, with one clock for both hosts.
follow() { (tail -n +1 -F "$1" 2>/dev/null | sed -u "s/^/GUEST@$LAB_HOST /") & }
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
await_beat() {
  local until=$((SECONDS + $3))
  while [ "$(last_beat "$2")" -lt "$1" ]; do
    [ $SECONDS -lt $until ] || return 1
    sleep 0.1
  done
}
