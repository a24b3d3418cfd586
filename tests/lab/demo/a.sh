# What scripts/demo --linux does once it has built everything, on this host, whose KVM can boot Linux.
guest=/payload/demo
ln -s $kernel $guest/vmlinux
ln -s $initrd $guest/guest-initrd
LINUX_WORDS=noxsave bash $guest/demo-linux $bin $guest || die "the demo ended with $?"
