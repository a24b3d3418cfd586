# Both hosts of the scenario: a Linux guest goes A → B → A.
# MODE precopy, hybrid or postcopy; CPUS; MEMORY; DEVICES=1 gives the guest disks and a network card.
: "${MODE:=precopy}" "${CPUS:=1}" "${MEMORY:=256M}" "${DEVICES:=0}" "${LEG_BEATS:=40}"
guest_ip=10.77.0.9
words="$append guest.sum=16"
devices=() remaps=()
if [ "$DEVICES" = 1 ]; then
  # The data disk is the same on both hosts, so that neither may keep any of it in its page cache.
  devices=(--disk "/lab/guest/root.ext4,readonly,id=root" --disk "$LAB_SHARED,direct,id=data" --net "tap=tap0,mac=52:54:00:77:01:09,id=net")
  # A disk's image at the destination is for the receiver to name.
  remaps=(--remap root=/lab/guest/root.ext4,readonly --remap "data=$LAB_SHARED,direct")
  words="$words root=/dev/vda guest.ip=$guest_ip/24 guest.data=/dev/vdb"
  bridge_up
  tap_up tap0
fi
boot_guest() { # boot_guest LOG SOCKET
  $bin/vmrun --kernel $kernel --initrd $initrd --cmdline "$words" --cpus "$CPUS" --memory "$MEMORY" --name linux \
    --serial "file:$1" --control "$2" "${devices[@]}" >/out/vmrun.out 2>&1 &
  vmrun=$!
}
receive() { # receive LOG SOCKET: the host ends of devices have the same names on both hosts
  $bin/vmrecv tcp:0.0.0.0:7070 --insecure --control "$2" --serial "file:$1" "${remaps[@]}" >/out/vmrecv.out 2>&1 &
  vmrecv=$!
  await 'waiting for a machine' /out/vmrecv.out 30 || { cat /out/vmrecv.out; die "vmrecv does not wait"; }
}
send() { # send SOCKET
  $bin/vmsend --vm "$1" --mode "$MODE" --insecure --json "tcp:$LAB_PEER_IP:7070" >/out/send.json 2>/out/send.err
  local rc=$?
  [ $rc = 0 ] || { cat /out/send.err; tail -3 /out/send.json; die "vmsend ended with $rc"; }
  tail -1 /out/send.json
}
# The guest goes on at LOG, beyond the beats that were posted as NAME, and says of itself that it is well.
goes_on() { # goes_on LOG NAME
  local before
  before=$(peer "$2" 300) || die "the other host did not send"
  await "^HB $((before + LEG_BEATS)) " "$1" 180 || { tail -5 "$1"; die "the guest does not go on after beat $before"; }
  grep -aE 'GUEST-HEALTH' "$1" | tail -1
  grep -aqE 'GUEST-BAD|GUEST-FAIL' "$1" && die "the guest complains"
  grep -a GUEST-HEALTH "$1" | grep -av 'clock=kvm-clock' && die "the guest has left kvm-clock"
  return 0
}
