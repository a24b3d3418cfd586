. /payload/linux/common.sh
log=/out/serial-1
: >$log
follow $log
# As hosts have it who keep their clocks by NTP.
peer up 60 >/dev/null || die "a is not up"
result "hosts $(python3 /lab/clock.py "$LAB_PEER_IP" --set) before they were set"
peer booted 240 >/dev/null || die "there is no guest"
scrub
vsock_up there
receive $log /run/vm.sock
ping_start from-b
post ready-b
clock_ms=$(peer clock) || die "a has not told of the guest's clock"
goes_on $log there "$clock_ms"
vsock_works $log was
received
result "hosts $(python3 /lab/clock.py "$LAB_PEER_IP") now"
post arrived
peer ready-a 60 >/dev/null || die "a is not ready"
vsock_stays
echo LAB-MOVING
send /run/vm.sock
post back "$(last_beat $log)"
ended /run/vm.sock
vsock_gone
peer end 300 >/dev/null || die "a did not end"
post heard-end
ping_end
sleep 2
