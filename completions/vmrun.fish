complete -c vmrun -l kernel -d 'Boot this kernel: a PVH ELF, a bzImage, or builtin:heartbeat' -r -F
complete -c vmrun -l initrd -d 'Give the kernel this initial RAM disk; none by default' -r -F
complete -c vmrun -l cmdline -d 'Give the kernel this command line; empty by default' -r
complete -c vmrun -s m -l memory -d 'Size of the guest\'s memory, a multiple of 2M' -r
complete -c vmrun -s c -l cpus -d 'Number of vCPUs, from 1 to what KVM allows' -r
complete -c vmrun -l hugepages -d 'Make the guest\'s memory of pages of this size: 4K, 2M or thp' -r
complete -c vmrun -l name -d 'The guest\'s name, in status and messages' -r
complete -c vmrun -l disk -d 'Give the guest a disk (virtio-block): a raw image, or a block device' -r -F
complete -c vmrun -l net -d 'Give the guest a network card (virtio-net) on a tap' -r
complete -c vmrun -l vsock -d 'Connect sockets of the guest (virtio-vsock) with Unix sockets of the host' -r
complete -c vmrun -l control -d 'Make a control socket for vmctl, vmsend and vmrecv; none by default' -r -F
complete -c vmrun -l serial -d 'What the guest\'s serial port is connected to: stdio, file:PATH, pty or none' -r
complete -c vmrun -l log -d 'Log messages of this level and above on standard error' -r -f -a "error\t'What went wrong'
warn\t'Also what deserves attention'
info\t'Also what happens'
debug\t'Also why'
trace\t'Everything'"
complete -c vmrun -l rng -d 'Give the guest a source of random numbers (virtio-rng), with the id rng0'
complete -c vmrun -l paused -d 'Do not start the guest before `vmctl SOCK resume`'
complete -c vmrun -l incoming -d 'Hold no guest, and wait for one that vmrecv brings in'
complete -c vmrun -l no-sandbox -d 'Do not confine this program, for debugging'
complete -c vmrun -s h -l help -d 'Print help (see more with \'--help\')'
complete -c vmrun -s V -l version -d 'Print version'
