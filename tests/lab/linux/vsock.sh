# Sockets between the guest and the host that it is on, where VSOCK=1. Each host has a service, which the guest calls
# again whenever its connection is gone, and speaks with a service of the guest. No connection outlives a move.
vsock=/run/vsock
vsock_up() { # vsock_up NAME: this host's service
  [ "$VSOCK" = 1 ] || return 0
  [ -z "$server" ] || kill $server
  served=/out/vsock-served-$1
  python3 /lab/vsock.py serve ${vsock}_6000 >$served 2>&1 &
  server=$!
}
vsock_works() { # vsock_works LOG [WAS]: both reach each other; what WAS connected elsewhere was told that it is over
  [ "$VSOCK" = 1 ] || return 0
  timeout 120 python3 /lab/vsock.py talk $vsock 5000 5 >/out/vsock-talk 2>&1 || { cat /out/vsock-talk; die "the host does not reach the guest"; }
  await '^guest line 3$' $served 120 || { cat $served; die "the guest does not reach the host"; }
  if [ -n "$2" ]; then
    await 'GUEST-VSOCK call ends' "$1" 30 || die "the guest is not told that its connection is over"
    # Of what was connected there, and of what was just now.
    await_count 2 'GUEST-VSOCK taken: ' "$1" 30 || die "the guest is not told that the host's connection is over"
  fi
  result "vsock works, $(tail -1 /out/vsock-talk)"
}
vsock_stays() { # a connection that lasts until the guest is gone
  [ "$VSOCK" = 1 ] || return 0
  python3 /lab/vsock.py talk $vsock 5000 >/out/vsock-stays 2>&1 &
  stays=$!
  await '^3$' /out/vsock-stays 60 || { cat /out/vsock-stays; die "no connection to the guest"; }
}
vsock_gone() { # what was connected here has ended by itself
  [ "$VSOCK" = 1 ] || return 0
  wait $stays || { cat /out/vsock-stays; die "a connection to the guest was wrong"; }
  await '^ended$' $served 30 || die "the guest's connection to the host has not ended"
  [ ! -e $vsock ] || die "the guest is gone, and its socket is not"
  result "vsock gone, $(tail -1 /out/vsock-stays)"
}
