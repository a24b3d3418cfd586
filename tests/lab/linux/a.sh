. /payload/linux/common.sh
log=/out/serial-1 back=/out/serial-2
: >$log
: >$back
follow $log
follow $back
vsock_up start
boot_guest $log /run/vm1.sock
await GUEST-READY $log 180 || { cat /out/*.out; tail -5 $log; die "the guest does not come up"; }
post booted
await_beat 30 $log 180 || die "no heartbeat"
if [ "$DEVICES" = 1 ]; then
  python3 /lab/stream.py $guest_ip 9000 /run/stop >/out/stream 2>&1 &
  stream=$!
fi
vsock_works $log
clock_right start
post clock "$clock_ms"
ping_start there-from-a
peer ready-b 120 >/dev/null || die "b is not ready"
vsock_stays
echo LAB-MOVING
send /run/vm1.sock
post there "$(last_beat $log)"
ended /run/vm1.sock
vsock_gone
peer arrived 300 >/dev/null || die "b does not have it"
ping_end
# And back.
scrub
vsock_up back
receive $back /run/vm2.sock
ping_start back-from-a
post ready-a
goes_on $back back "$clock_ms"
vsock_works $back was
received
ping_end
if [ "$DEVICES" = 1 ]; then
  touch /run/stop
  wait $stream || { cat /out/stream; die "the TCP connection did not live through it"; }
  result "$(cat /out/stream)"
  # By itself: it stops writing, unmounts and powers off.
  : | timeout 10 busybox nc $guest_ip 9001
  await GUEST-OFF $back 120 || { tail -5 $back; die "the guest does not power off"; }
else
  stop_guest /run/vm2.sock
fi
ended /run/vm2.sock
post end
# What is published goes with its host.
peer heard-end 60 >/dev/null
true
