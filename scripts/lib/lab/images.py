"""What the emulated hosts and their guests boot: Debian's kernels, initial RAM disks and root images.

An image is made anew when what it is made of changed.
"""

import hashlib
import shutil
import subprocess
from pathlib import Path

from debian import Debian, run, unpack
from kernel import Kernel, copy_module

HOST_KERNEL = "linux-image-cloud-amd64"
HOST_PACKAGES = """qemu-system-x86 busybox-static bash coreutils grep sed mawk tar util-linux procps iproute2
    iputils-ping socat python3 kmod findutils""".split()
# Folders of the kernel's modules that no emulated host has a use for.
UNUSED_MODULES = ["infiniband", "ethernet", "media", "gpu", "sound"]
HOST_EARLY_MODULES = ["virtio_pci", "virtio_blk", "overlay", "ext4"]
GUEST_PACKAGES = ["busybox-static"]
# Of the guest that is a whole Debian.
SYSTEM_PACKAGES = "systemd systemd-sysv udev busybox-static bash coreutils grep sed mawk util-linux procps iproute2 kmod diffutils".split()
# ext4 asks for crc32c by that name, and no dependency says so.
GUEST_MODULES = """virtio_mmio virtio_blk virtio_net virtio-rng vmw_vsock_virtio_transport crc32c_generic? ext4
    overlay""".split()
APPLETS = """sh mount umount cat echo insmod sleep ip grep sed awk dmesg uname mkdir switch_root poweroff reboot ping dd
    cut head tail date md5sum ls ln nc tr wc ps free sync rm mv seq cmp usleep true touch""".split()


# The rate of the TSC by the monotonic clock, over a tenth of a second: the pairs of readings that took least count.
TSC_KHZ = r"""
#include <stdio.h>
#include <time.h>
#include <x86intrin.h>
static double now(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC_RAW, &t); return t.tv_sec * 1e3 + t.tv_nsec / 1e6; }
static void pair(double *ms, double *tsc) {
    for (double best = 1e9, n = 0; n < 1000; n++) {
        double a = now(); unsigned long long t = __rdtsc(); double b = now();
        if (b - a < best) best = b - a, *ms = (a + b) / 2, *tsc = t;
    }
}
int main(void) {
    double ms[2], tsc[2];
    pair(ms, tsc);
    nanosleep(&(struct timespec){0, 100000000}, 0);
    pair(ms + 1, tsc + 1);
    printf("%.0f\n", (tsc[1] - tsc[0]) / (ms[1] - ms[0]));
}
"""


def make_ext4(image, size, tree=None):
    """A file system in a file; with what is in `tree`, owned by root and without a journal, or empty."""
    Path(image).unlink(missing_ok=True)
    content = ["-O", "^has_journal", "-m", 0, "-E", "root_owner=0:0", "-d", tree] if tree else []
    # Blocks of 4096 bytes: a disk may have sectors of that size.
    run("/sbin/mke2fs", "-qq", "-t", "ext4", "-b", 4096, *content, image, size, stdout=subprocess.DEVNULL)


class Images:
    """Downloads and builds in `work`; `sources` is the folder tests/lab, `guest_kernel` a Debian package of a kernel,
    by its name or as a file."""

    def __init__(self, work, sources, guest_kernel):
        self.work, self.sources, self.guest_kernel = Path(work), Path(sources), guest_kernel
        self.tree = self.work / "root"
        self.host_vmlinux = self.work / "host-kernel/vmlinux"
        self.host_initrd, self.host_root = self.work / "host-initrd", self.work / "host-root.ext4"
        self.vmlinux, self.bzimage = self.work / "vmlinux", self.work / "bzImage"
        self.guest_initrd, self.guest_root = self.work / "guest-initrd", self.work / "guest-root.ext4"
        self.guest_system = self.work / "guest-system.ext4"
        self.guest_data = self.work / "data.ext4"

    def build(self, say):
        """Makes everything that the lab needs and is not there or out of date."""
        if self._fresh():
            return
        debian = Debian(self.work, say)
        packages, system = debian.packages(HOST_PACKAGES), debian.packages(SYSTEM_PACKAGES)
        host, guest = debian.kernel(HOST_KERNEL), debian.kernel(self.guest_kernel)
        say("unpacking, and making images")
        unpack(packages, self.tree)
        host = Kernel(host, self.work / "host-kernel")
        self._guest(guest)
        self._guest_root()
        self._guest_system(system)
        self._initrd(self.host_initrd, self.sources / "host/early-init", host, HOST_EARLY_MODULES)
        self._host_root(host)
        self._stamp()

    def build_guest(self, say):
        """Makes a guest alone: its kernel, its initial RAM disk, and a disk for its files."""
        if self._fresh():
            return
        debian = Debian(self.work, say)
        packages, guest = debian.packages(GUEST_PACKAGES), debian.kernel(self.guest_kernel)
        say("unpacking, and making images")
        unpack(packages, self.tree)
        self._guest(guest)
        make_ext4(self.guest_data, "64M")
        self._stamp()

    def _guest(self, package):
        kernel = Kernel(package, self.work / "guest-kernel")
        shutil.move(kernel.vmlinux, self.vmlinux)
        shutil.move(kernel.bzimage, self.bzimage)
        run("cc", "-O1", "-static", "-s", "-o", self.work / "vsock", self.sources / "guest/vsock.c")
        self._initrd(self.guest_initrd, self.sources / "guest/init", kernel, GUEST_MODULES, self._programs())

    def _programs(self):
        """What the guest runs, whatever system it has."""
        return [self.sources / "guest/main", self.work / "vsock"]

    def _fresh(self):
        """Whether all is there; else what has to be made is marked as not there."""
        self.work.mkdir(parents=True, exist_ok=True)
        stamp = self.work / "stamp"
        fresh = stamp.exists() and stamp.read_text() == self._fingerprint()
        if not fresh:
            stamp.unlink(missing_ok=True)
        return fresh

    def _stamp(self):
        (self.work / "stamp").write_text(self._fingerprint())

    def tsc_khz(self):
        """The rate of this machine's TSC, in kHz."""
        program = self.work / "tsc-khz"
        if not program.exists():
            run("cc", "-O1", "-x", "c", "-", "-o", program, input=TSC_KHZ.encode())
        return int(run(program, capture_output=True).stdout)

    def _fingerprint(self):
        digest = hashlib.sha256(self.guest_kernel.encode())
        if Path(self.guest_kernel).is_file():
            digest.update(Path(self.guest_kernel).read_bytes())
        for name in ("images.py", "kernel.py", "debian.py"):
            digest.update((Path(__file__).parent / name).read_bytes())
        for folder in ("host", "guest"):
            for path in sorted((self.sources / folder).iterdir()):
                digest.update(path.name.encode() + path.read_bytes())
        return digest.hexdigest()

    def _initrd(self, out, init, kernel, modules, more=()):
        tree = self.work / "initrd"
        shutil.rmtree(tree, ignore_errors=True)
        for folder in "bin dev proc sys tmp mods root etc data".split():
            (tree / folder).mkdir(parents=True)
        shutil.copy(self.tree / "usr/bin/busybox", tree / "bin/busybox")
        for applet in APPLETS:
            (tree / "bin" / applet).symlink_to("busybox")
        for source, name in [(init, "init"), *((m, m.name) for m in more)]:
            shutil.copy(source, tree / name)
            (tree / name).chmod(0o755)
        names = [copy_module(file, tree / "mods") for file in kernel.module_files(modules)]
        (tree / "mods/order").write_text("".join(f"{name}\n" for name in names))
        # Not packed: a slow guest is up sooner.
        with open(out, "wb") as image:
            names = "\n".join(sorted(str(p.relative_to(tree)) for p in tree.rglob("*")))
            run("cpio", "-o", "-H", "newc", "--quiet", "-R", "0:0", input=f".\n{names}".encode(), stdout=image, cwd=tree)

    def _guest_root(self):
        """The guest's root disk: the same user space as its initial RAM disk, without the modules."""
        tree = self.work / "initrd"
        shutil.rmtree(tree / "mods")
        (tree / "mods").mkdir()
        (tree / "mods/order").write_text("")
        make_ext4(self.guest_root, "24M", tree)

    def _guest_system(self, packages):
        """The disk of a guest that is a Debian with systemd, which runs the same programs."""
        tree = self.work / "system"
        unpack(packages, tree)
        for program in self._programs():
            shutil.copy(program, tree)
            (tree / program.name).chmod(0o755)
        (tree / "data").mkdir()
        units = tree / "etc/systemd/system"
        wanted = units / "multi-user.target.wants"
        wanted.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.sources / "guest/main.service", units)
        (wanted / "main.service").symlink_to("../main.service")
        # Without, systemd takes it for a first boot, and asks for a time zone.
        (tree / "etc/machine-id").write_text("")
        # Nobody logs in; a getty would take the console away from the programs.
        (units / "serial-getty@ttyS0.service").symlink_to("/dev/null")
        make_ext4(self.guest_system, "192M", tree)

    def _host_root(self, kernel):
        left_out = shutil.ignore_patterns(*UNUSED_MODULES)
        shutil.copytree(kernel.modules, self.tree / "usr/lib/modules" / kernel.version, symlinks=True, ignore=left_out)
        for folder in ("payload", "out", "lab/guest"):
            (self.tree / folder).mkdir(parents=True, exist_ok=True)
        lab = self.tree / "lab"
        for name in ("init", "lib.sh", "board.py", "stream.py", "clock.py", "vsock.py", "qmp.py"):
            shutil.copy(self.sources / "host" / name, lab)
        (lab / "init").chmod(0o755)
        images = {"vmlinux": self.vmlinux, "bzImage": self.bzimage, "initrd": self.guest_initrd, "root.ext4": self.guest_root,
            "system.ext4": self.guest_system}
        for name, image in images.items():
            shutil.copy(image, lab / "guest" / name)
        make_ext4(self.host_root, "900M", self.tree)
