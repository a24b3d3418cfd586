. /payload/linux/common.sh
log=/out/serial-1
: >$log
follow $log
receive $log /run/vm.sock
post ready-b
goes_on $log there
wait $vmrecv || { cat /out/vmrecv.out; die "vmrecv ended with $?"; }
peer ready-a 60 >/dev/null || die "a is not ready"
send /run/vm.sock
post back "$(last_beat $log)"
peer end 300 >/dev/null || die "a did not end"
