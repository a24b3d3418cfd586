# Helpers for the scenarios, on the emulated hosts. What is put in /out comes back.
[ -e /payload/settings ] && . /payload/settings
bin=/payload/bin
kernel=/lab/guest/vmlinux initrd=/lab/guest/initrd
append="console=ttyS0 reboot=t panic=-1 mitigations=off quiet noxsave"
say() { echo "[$LAB_HOST] $*"; }
die() {
  echo "LAB-DIE $LAB_HOST: $*"
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
  local until=$((SECONDS + ${2:-120})) said
  while [ $SECONDS -lt $until ]; do
    if said=$(timeout 5 bash -c 'exec 3<>"/dev/tcp/$1/80" && printf "GET /%s HTTP/1.0\r\n\r\n" "$2" >&3 && cat <&3' - "$LAB_PEER_IP" "$1" 2>/dev/null) &&
      [[ $said == *" 200 OK"* ]]; then
      echo "${said##*$'\n'}"
      return 0
    fi
    sleep 0.2
  done
  return 1
}
# Waits until FILE has a line that matches: await RE FILE [SECONDS]
await() {
  local until=$((SECONDS + ${3:-60}))
  while [ $SECONDS -lt $until ]; do
    grep -qE -m1 -- "$1" "$2" 2>/dev/null && return 0
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
# The highest heartbeat that FILE has, 0 for none; whole lines only.
last_beat() { grep -aE '^HB [0-9]+ [0-9.]+.?$' "$1" 2>/dev/null | tail -1 | cut -d' ' -f2 | grep . || echo 0; }
