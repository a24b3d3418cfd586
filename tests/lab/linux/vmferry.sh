# The guest with the programs under test.
devices=() remaps=()
if [ "$DEVICES" = 1 ]; then
  # The data disk is the same on both hosts, so that neither may keep any of it in its page cache.
  devices=(--disk "$root_image,readonly,id=root" --disk "$LAB_SHARED,direct,id=data" --net "tap=tap0,mac=$guest_mac,id=net")
  # A disk's image at the destination is for the receiver to name.
  remaps=(--remap root=$root_image,readonly --remap "data=$LAB_SHARED,direct")
fi
if [ "$VSOCK" = 1 ]; then
  words+=" guest.vsock=1"
  devices+=(--vsock "cid=7,path=$vsock,id=vsock")
  remaps+=(--remap "vsock=$vsock")
fi
boot_guest() { # boot_guest LOG SOCKET
  $bin/vmrun --kernel $kernel --initrd $initrd --cmdline "$words" --cpus "$CPUS" --memory "$MEMORY" --name linux \
    --serial "file:$1" --control "$2" "${devices[@]}" $VMRUN_WORDS >/out/vmrun.out 2>&1 &
  vmrun=$!
}
receive() { # receive LOG SOCKET: the host ends of devices have the same names on both hosts
  $bin/vmrecv tcp:0.0.0.0:7070 --insecure --control "$2" --serial "file:$1" "${remaps[@]}" >/out/vmrecv.out 2>&1 &
  vmrecv=$!
  await 'waiting for a machine' /out/vmrecv.out 30 || { cat /out/vmrecv.out; die "vmrecv does not wait"; }
}
received() { wait $vmrecv || { cat /out/vmrecv.out; die "vmrecv ended with $?"; }; }
send() { # send SOCKET
  $bin/vmsend --vm "$1" --mode "$MODE" $SEND_WORDS --insecure --json "tcp:$LAB_PEER_IP:7070" >/out/send.json 2>/out/send.err
  local rc=$?
  [ $rc = 0 ] || { cat /out/send.err; tail -3 /out/send.json; die "vmsend ended with $rc"; }
  tail -1 /out/send.json
  python3 - <<'END'
import json
said = json.loads(open("/out/send.json").read().splitlines()[-1])["result"]
phases = " ".join(f"{k}={v:.0f}" for k, v in said["downtime"].items())
print(f"LAB-RESULT moved total_s={said['total_ms'] / 1000:.1f} passes={said['passes']} downtime {phases}")
END
}
# The guest of SOCKET is gone from here, and so is its process, by sending or by its own power-off.
ended() { # ended SOCKET
  local until=$((SECONDS + 60))
  [ -z "$vmrun" ] || wait "$vmrun" || { cat /out/vmrun.out; die "vmrun ended with $?"; }
  vmrun=
  while [ -S "$1" ] && [ $SECONDS -lt $until ]; do sleep 0.1; done
  [ ! -S "$1" ] || die "vmrun is still there"
}
stop_guest() { $bin/vmctl "$1" quit || die "vmctl quit"; }
