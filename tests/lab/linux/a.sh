. /payload/linux/common.sh
log=/out/serial-1 back=/out/serial-2
: >$log
: >$back
follow $log
follow $back
boot_guest $log /run/vm1.sock
await GUEST-READY $log 180 || { cat /out/vmrun.out; tail -5 $log; die "the guest does not come up"; }
await '^HB 30 ' $log 60 || die "no heartbeat"
if [ "$DEVICES" = 1 ]; then
  python3 /lab/stream.py $guest_ip 9000 /run/stop >/out/stream 2>&1 &
  stream=$!
  ping -D -i 0.1 -O $guest_ip >/out/ping 2>&1 &
  ping=$!
  await 'bytes from' /out/ping 30 || { tail -3 /out/ping; die "no ping"; }
fi
peer ready-b 60 >/dev/null || die "b is not ready"
send /run/vm1.sock
post there "$(last_beat $log)"
wait $vmrun || { cat /out/vmrun.out; die "the source's vmrun ended with $?"; }
# And back.
receive $back /run/vm2.sock
post ready-a
goes_on $back back
wait $vmrecv || { cat /out/vmrecv.out; die "vmrecv ended with $?"; }
if [ "$DEVICES" = 1 ]; then
  touch /run/stop
  wait $stream || { cat /out/stream; die "the TCP connection did not live through it"; }
  result "$(cat /out/stream)"
  kill -INT $ping
  wait $ping
  awk -F'[][]' '/bytes from/ { if (last && $2 - last > most) most = $2 - last; last = $2 } END { printf "LAB-RESULT ping gap_s=%.2f\n", most }' /out/ping
  grep -a GUEST-HEALTH $back | tail -1 | grep -qE 'files=[0-9]{1,}' || die "the guest wrote no file"
fi
$bin/vmctl /run/vm2.sock quit || die "vmctl quit"
post end
