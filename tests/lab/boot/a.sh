# Boots Debian's kernel in vmrun in several ways, on its initial RAM disk or a root disk; each has to reach its user space, find its
# devices by ACPI, beat, hear what is said on its console, and end as it is told: by quit, or by what the
# guest does (poweroff, reboot, panic with panic=-1). QEMU's microvm boots the same, to compare with.
append+=" guest.hear=1"
up() { # up NAME CPUS PID BEGAN: the guest reaches its user space, and works
  local log=/out/$1.log
  await GUEST-INIT "$log" 120 || { tail -5 "$log" /out/$1.out; kill -9 $3; die "$1: no user space"; }
  result "$1 boot_s $(awk -v a="$4" -v b="$EPOCHREALTIME" 'BEGIN { printf "%.2f", b - a }')"
  await "GUEST-READY.* cpus=$2 clock=kvm-clock" "$log" 60 || { tail -5 "$log"; die "$1: not ready with $2 vCPUs and kvm-clock"; }
  await_beat 30 "$log" 120 || die "$1: no heartbeat"
  grep -E 'GUEST-BAD|GUEST-FAIL' "$log" && die "$1: the guest complains"
}
one() { # one NAME CPUS KERNEL END [ROOT]: with memory in pages of $pages, or of the default
  local log=/out/$1.log began pid words=$append said found='virtio=1 root=rootfs' devices=(--rng ${pages:+--hugepages "$pages"})
  if [ -n "$5" ]; then
    words+=" root=/dev/vda" found='virtio=2 root=/dev/vda'
    devices+=(--disk "$5,readonly")
  fi
  case $4 in
    # The last word about reboots counts: here by ACPI's reset register.
    reboot | poweroff) words+=" reboot=acpi guest.end=$4" ;;
    panic) words+=" guest.end=$4" ;;
  esac
  rm -f /run/typed && mkfifo /run/typed
  began=$EPOCHREALTIME
  $bin/vmrun --kernel "$3" --initrd $initrd --cmdline "$words" --cpus "$2" --memory 256M --name "$1" "${devices[@]}" \
    --control /run/vm.sock <>/run/typed >"$log" 2>/out/$1.out &
  pid=$!
  up "$1" "$2" $pid "$began"
  grep -q "GUEST-FOUND $found" "$log" || die "$1: the guest has not found: $found"
  echo "hello, $1" >/run/typed
  await "GUEST-HEARD hello, $1" "$log" 30 || { tail -5 "$log"; die "$1: the guest has heard nothing on its console"; }
  case $4 in
    quit) $bin/vmctl /run/vm.sock quit || die "$1: vmctl quit" ;;
    poweroff) said='the guest has powered off' ;;
    reboot) said='the guest has asked for a reset' ;;
    # reboot=t: by a triple fault.
    panic) said='the guest has reset itself by a triple fault' ;;
  esac
  [ -z "$said" ] || await "$said" /out/$1.out 60 || { tail -5 "$log" /out/$1.out; die "$1: not ended by $4"; }
  wait $pid || die "$1: vmrun ended with $?"
}
with_qemu() { # with_qemu NAME CPUS
  local began=$EPOCHREALTIME pid
  qemu-system-x86_64 -M microvm,rtc=on -accel kvm -cpu host -smp "$2" -m 256 -kernel $kernel -initrd $initrd -append "$append" \
    -nodefaults -display none -no-reboot -serial "file:/out/$1.log" >/out/$1.out 2>&1 &
  pid=$!
  up "$1" "$2" $pid "$began"
  kill $pid
  wait $pid
}
one vmlinux-1 1 $kernel reboot
one bzimage-1 1 /lab/guest/bzImage panic
one vmlinux-2 2 $kernel poweroff
one bzimage-3 3 /lab/guest/bzImage poweroff /lab/guest/root.ext4
one bzimage-4 4 /lab/guest/bzImage quit
one vmlinux-4 4 $kernel quit
pages=4K one vmlinux-4K-1 1 $kernel quit
pages=4K one vmlinux-4K-2 2 $kernel quit
with_qemu qemu-1 1
with_qemu qemu-2 2
with_qemu qemu-4 4
