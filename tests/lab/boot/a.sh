# Boots Debian's kernel in vmrun in several ways; each has to reach its user space, beat, and power off.
one() { # one NAME CPUS KERNEL
  local log=/out/$1.log began=$EPOCHREALTIME pid
  : >"$log"
  $bin/vmrun --kernel "$3" --initrd $initrd --cmdline "$append" --cpus "$2" --memory 256M --name "$1" \
    --serial "file:$log" --control /run/vm.sock >/out/$1.out 2>&1 &
  pid=$!
  await GUEST-INIT "$log" 120 || { tail -5 "$log" /out/$1.out; kill -9 $pid; die "$1: no user space"; }
  result "$1 boot_s $(awk -v a="$began" -v b="$EPOCHREALTIME" 'BEGIN { printf "%.2f", b - a }')"
  await "GUEST-READY.* cpus=$2 clock=kvm-clock" "$log" 60 || { tail -5 "$log"; die "$1: not ready with $2 vCPUs and kvm-clock"; }
  await 'HB 30 ' "$log" 60 || die "$1: no heartbeat"
  grep -E 'GUEST-BAD|GUEST-FAIL' "$log" && die "$1: the guest complains"
  $bin/vmctl /run/vm.sock quit || die "$1: vmctl quit"
  wait $pid || die "$1: vmrun ended with $?"
}
one vmlinux-1 1 $kernel
one bzimage-1 1 /lab/guest/bzImage
one vmlinux-2 2 $kernel
