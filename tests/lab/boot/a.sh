# Boots Debian's kernel in vmrun in several ways; each has to reach its user space, find its
# devices by ACPI, beat, and end as it is told: by quit, or by what the guest does (poweroff, reboot).
one() { # one NAME CPUS KERNEL END
  local log=/out/$1.log began=$EPOCHREALTIME pid words=$append
  # The last word about reboots counts: here by ACPI's reset register.
  [ "$4" = quit ] || words+=" reboot=acpi guest.end=$4"
  : >"$log"
  $bin/vmrun --kernel "$3" --initrd $initrd --cmdline "$words" --cpus "$2" --memory 256M --name "$1" --rng \
    --serial "file:$log" --control /run/vm.sock >/out/$1.out 2>&1 &
  pid=$!
  await GUEST-INIT "$log" 120 || { tail -5 "$log" /out/$1.out; kill -9 $pid; die "$1: no user space"; }
  result "$1 boot_s $(awk -v a="$began" -v b="$EPOCHREALTIME" 'BEGIN { printf "%.2f", b - a }')"
  await "GUEST-READY.* cpus=$2 clock=kvm-clock" "$log" 60 || { tail -5 "$log"; die "$1: not ready with $2 vCPUs and kvm-clock"; }
  await 'HB 30 ' "$log" 60 || die "$1: no heartbeat"
  grep -E 'GUEST-BAD|GUEST-FAIL' "$log" && die "$1: the guest complains"
  grep -q 'GUEST-FOUND virtio=1' "$log" || die "$1: the guest has not found its virtio device"
  case $4 in
    quit) $bin/vmctl /run/vm.sock quit || die "$1: vmctl quit" ;;
    poweroff) await 'the guest has powered off' /out/$1.out 30 || { tail -5 "$log"; die "$1: no power-off"; } ;;
    reboot) await 'the guest has asked for a reset' /out/$1.out 30 || { tail -5 "$log"; die "$1: no reset"; } ;;
  esac
  wait $pid || die "$1: vmrun ended with $?"
}
one vmlinux-1 1 $kernel reboot
one bzimage-1 1 /lab/guest/bzImage quit
one vmlinux-2 2 $kernel poweroff
