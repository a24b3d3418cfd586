# The same guest with QEMU microvm, to compare with: one figure beside the other from one lab.
devices=()
# It stops the guest's clock while it moves it: how much that comes to is reported, and no failure.
clock_limit_ms=60000
if [ "$DEVICES" = 1 ]; then
  devices=(-drive "file=$root_image,if=none,id=root,format=raw,readonly=on" -device virtio-blk-device,drive=root
    -drive "file=$LAB_SHARED,if=none,id=data,format=raw,cache=none,file.locking=off" -device virtio-blk-device,drive=data
    -netdev tap,id=net,ifname=tap0,script=no,downscript=no -device "virtio-net-device,netdev=net,mac=$guest_mac")
fi
start_qemu() { # start_qemu LOG SOCKET [WORD...]
  local log=$1 socket=$2
  shift 2
  qemu-system-x86_64 -M microvm,rtc=on -accel kvm -cpu host -smp "$CPUS" -m "$MEMORY" -kernel $kernel -initrd $initrd \
    -append "$words" -nodefaults -display none -no-reboot -serial "file:$log" -qmp "unix:$socket,server=on,wait=off" \
    -global virtio-mmio.force-legacy=false "${devices[@]}" "$@" >>/out/qemu.out 2>&1 &
  qemu=$!
}
qmp() { python3 /lab/qmp.py "$@"; }
# What QMP is told to turn on: capabilities NAME…
capabilities() {
  local name all=
  for name; do all+=",{\"capability\":\"$name\",\"state\":true}"; done
  echo "{\"capabilities\":[${all#,}]}"
}
boot_guest() { start_qemu "$1" "$2"; }
receive() { # receive LOG SOCKET
  start_qemu "$1" "$2" -incoming defer
  [ "$MODE" = precopy ] || qmp "$2" migrate-set-capabilities "$(capabilities postcopy-ram)" >/dev/null || die "no postcopy"
  qmp "$2" migrate-incoming '{"uri":"tcp:0:7070"}' >/dev/null || { cat /out/qemu.out; die "QEMU does not wait"; }
}
received() { :; }
send() { # send SOCKET
  local limits='{"max-bandwidth":1000000000,"downtime-limit":300}' uri="{\"uri\":\"tcp:$LAB_PEER_IP:7070\"}" after=() capable=(events)
  if [ "$MODE" != precopy ]; then
    after=("postcopy-after=$POSTCOPY_AFTER")
    capable+=(postcopy-ram)
  fi
  qmp "$1" migrate-set-capabilities "$(capabilities "${capable[@]}")" migrate-set-parameters "$limits" migrate "$uri" await-migration "${after[@]}" >/out/send.json || { cat /out/send.json; die "QEMU did not send"; }
  tail -1 /out/send.json
  python3 - <<'END'
import json
said = json.loads(open("/out/send.json").read().splitlines()[-1])
print(f"LAB-RESULT moved total_s={said['total-time'] / 1000:.1f} passes={said['ram']['dirty-sync-count']} downtime total_ms={said['downtime']}")
END
  qmp "$1" quit >/dev/null
}
ended() { # ended SOCKET
  wait "$qemu" || { cat /out/qemu.out; die "QEMU ended with $?"; }
  rm -f "$1"
}
stop_guest() { qmp "$1" quit >/dev/null; }
