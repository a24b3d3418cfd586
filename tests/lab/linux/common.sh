# Both hosts of the scenario: a Linux guest goes A → B → A.
# MODE precopy, hybrid or postcopy; CPUS; MEMORY; DEVICES=0 leaves out disks and network; VSOCK=1 adds sockets
# between host and guest; VMM=qemu moves it with QEMU, to compare with; SYSTEM=debian is a guest with systemd;
# SEND_WORDS are more words for vmsend, VMRUN_WORDS for vmrun; POSTCOPY_AFTER are the seconds of precopy before
# QEMU's postcopy.
: "${MODE:=precopy}" "${CPUS:=1}" "${MEMORY:=256M}" "${DEVICES:=1}" "${VSOCK:=0}" "${LEG_BEATS:=40}" "${VMM:=vmferry}" "${SYSTEM:=small}"
: "${POSTCOPY_AFTER:=0.5}"
guest_ip=10.77.0.9 guest_mac=52:54:00:77:01:09
# How much the guest's clock may change against its host's by a move.
clock_limit_ms=50
words="$append guest.sum=16" root_image=/lab/guest/root.ext4
if [ "$SYSTEM" = debian ]; then
  words+=" guest.init=/sbin/init net.ifnames=0 systemd.show_status=0" root_image=/lab/guest/system.ext4
fi
if [ "$DEVICES" = 1 ]; then
  words="$words root=/dev/vda guest.ip=$guest_ip/24 guest.data=/dev/vdb"
  bridge_up
  tap_up tap0
fi
. /payload/linux/vsock.sh
# boot_guest, receive, received, send, ended
. "/payload/linux/$VMM.sh"
# How far the guest's clock is from this host's: clock_right NAME [WAS]. After a move it is as far as it was before.
# (At the start it may be seconds: a guest counts ticks until it uses kvm-clock, and an emulated CPU loses some.)
clock_right() {
  local said rc
  [ "$DEVICES" = 1 ] || return 0
  said=$(python3 /lab/clock.py $guest_ip ${2:+--was "$2" --limit $clock_limit_ms})
  rc=$?
  clock_ms=${said#*=} clock_ms=${clock_ms%% *}
  result "clock $1 $said${2:+ change_ms=$(awk -v is="$clock_ms" -v was="$2" 'BEGIN { printf "%.1f", is - was }')}"
  [ $rc = 0 ] || die "the guest's clock has changed by more than $clock_limit_ms ms: $said, was $2"
}
# Pings the guest every 0.1 s: ping_start NAME, and ping_end.
ping_start() {
  [ "$DEVICES" = 1 ] || return 0
  ping -D -i 0.1 -O $guest_ip >"/out/ping-$1" 2>&1 &
  ping=$!
  await 'bytes from' "/out/ping-$1" 60 || { tail -3 "/out/ping-$1"; die "no ping"; }
  echo "LAB-CLOCK $EPOCHREALTIME"
}
ping_end() {
  [ "$DEVICES" = 1 ] || return 0
  kill -INT $ping
  wait $ping
}
health() { grep -a GUEST-HEALTH "$1" | tail -1 | grep -oE "$2=[0-9]+" | cut -d= -f2 | grep . || echo 0; }
more() { # more WORD BEFORE LOG
  watch "$3" 60 mawk -W interactive -v "word=$1=" -v "before=$2" \
    '/GUEST-HEALTH/ && (at = index($0, word)) && substr($0, at + length(word)) + 0 > before + 0 { exit }'
}
# The guest goes on at LOG, beyond the beats that were posted as NAME, works, and says of itself that it is well.
goes_on() { # goes_on LOG NAME CLOCK_MS
  local before rounds files
  before=$(peer "$2" 300) || die "the other host did not send"
  await_beat $((before + 1)) "$1" 180 || { tail -5 "$1"; die "the guest does not go on after beat $before"; }
  clock_right "$2" "$3"
  await GUEST-HEALTH "$1" 180 || { tail -5 "$1"; die "no word of the guest's health"; }
  rounds=$(health "$1" rounds) files=$(health "$1" files)
  await_beat $((before + LEG_BEATS)) "$1" 180 || { tail -5 "$1"; die "the guest stops"; }
  more rounds $rounds "$1" || die "the guest checks its memory no more"
  [ "$DEVICES" = 0 ] || more files $files "$1" || die "the guest writes no files"
  grep -a GUEST-HEALTH "$1" | tail -1
  grep -aqE 'GUEST-BAD|GUEST-FAIL' "$1" && die "the guest complains"
  grep -a GUEST-HEALTH "$1" | grep -av 'clock=kvm-clock' && die "the guest has left kvm-clock"
  return 0
}
