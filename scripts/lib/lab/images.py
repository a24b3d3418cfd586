"""What the emulated hosts and their guests boot: Debian's cloud kernel, initial RAM disks and root images.

Packages are downloaded with apt and unpacked without running their scripts, so that this needs no
root and changes nothing outside its folder. An image is made anew when what it is made of changed.
"""

import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

HOST_PACKAGES = """qemu-system-x86 busybox-static bash coreutils grep sed mawk tar util-linux procps iproute2
    iputils-ping socat python3 kmod findutils""".split()
# Pulled in by dependencies, of no use where no package script runs.
NOT_NEEDED = re.compile(
    r"(perl.*|libperl.*|.*-perl|usrmerge|iso-codes|adduser|passwd|debconf|dpkg|gcc-.*-base|init-system-helpers"
    r"|libpam-modules.*|readline-common|media-types)$"
)
LEFT_OUT = """usr/share/doc* usr/share/man* usr/share/locale* usr/share/info* usr/share/lintian* usr/share/zoneinfo*
    usr/share/qemu/edk2* usr/share/qemu/*.dtb usr/share/qemu/skiboot* usr/share/qemu/u-boot* usr/share/qemu/hppa*
    usr/share/perl* usr/share/icons* var/lib/*""".split()
HOST_EARLY_MODULES = ["virtio_pci", "virtio_blk", "overlay", "ext4"]
GUEST_PACKAGES = ["busybox-static"]
GUEST_MODULES = ["virtio_mmio", "virtio_blk", "virtio_net", "virtio-rng", "vmw_vsock_virtio_transport", "ext4"]
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


def run(*command, **options):
    return subprocess.run([str(c) for c in command], check=True, **options)


def make_ext4(image, size, tree=None):
    """A file system in a file; with what is in `tree`, owned by root and without a journal, or empty."""
    Path(image).unlink(missing_ok=True)
    content = ["-O", "^has_journal", "-m", 0, "-E", "root_owner=0:0", "-d", tree] if tree else []
    # Blocks of 4096 bytes: a disk may have sectors of that size.
    run("/sbin/mke2fs", "-qq", "-t", "ext4", "-b", 4096, *content, image, size, stdout=subprocess.DEVNULL)


class Images:
    """Downloads and builds in `work`; `sources` is the folder tests/lab."""

    def __init__(self, work, sources):
        self.work, self.sources = Path(work), Path(sources)
        self.debs, self.tree = self.work / "debs", self.work / "root"
        self.vmlinux, self.bzimage = self.work / "vmlinux", self.work / "bzImage"
        self.host_initrd, self.host_root = self.work / "host-initrd", self.work / "host-root.ext4"
        self.guest_initrd, self.guest_root = self.work / "guest-initrd", self.work / "guest-root.ext4"
        self.guest_data = self.work / "data.ext4"

    def build(self, say):
        """Makes everything that the lab needs and is not there or out of date."""
        if self._fresh():
            return
        version = self._unpack(self._download(HOST_PACKAGES, say), say)
        self._guest(version)
        self._guest_root()
        self._initrd(self.host_initrd, self.sources / "host/early-init", version, HOST_EARLY_MODULES)
        self._host_root()
        self._stamp()

    def build_guest(self, say):
        """Makes a guest alone: its kernel, its initial RAM disk, and a disk for its files."""
        if self._fresh():
            return
        self._guest(self._unpack(self._download(GUEST_PACKAGES, say), say))
        make_ext4(self.guest_data, "64M")
        self._stamp()

    def _guest(self, version):
        self._unpack_kernel()
        vsock = self.work / "vsock"
        run("cc", "-O1", "-static", "-s", "-o", vsock, self.sources / "guest/vsock.c")
        more = [self.sources / "guest/main", vsock]
        self._initrd(self.guest_initrd, self.sources / "guest/init", version, GUEST_MODULES, more)

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
        digest = hashlib.sha256(Path(__file__).read_bytes())
        for folder in ("host", "guest"):
            for path in sorted((self.sources / folder).iterdir()):
                digest.update(path.name.encode() + path.read_bytes())
        return digest.hexdigest()

    def _apt(self, say):
        """Options for apt: package lists of our own where the machine has none, as in a container."""
        # Root's downloads are not handed to another user, who could not write here.
        options = ["-o", "APT::Sandbox::User=root"]
        if subprocess.run(["apt-cache", "show", "linux-image-cloud-amd64"], capture_output=True).returncode == 0:
            return options
        lists, cache = self.work / "apt/lists", self.work / "apt/cache"
        for folder in (lists / "partial", cache / "archives/partial"):
            folder.mkdir(parents=True, exist_ok=True)
        options += ["-o", f"Dir::State::lists={lists}", "-o", f"Dir::Cache={cache}"]
        say("reading Debian's package lists")
        run("apt-get", *options, "-qq", "update")
        return options

    def _download(self, packages, say):
        """Downloads packages with all that they need, and the kernel's, of which it gives the file."""
        (self.debs / "partial").mkdir(parents=True, exist_ok=True)
        apt = self._apt(say)
        depends = run("apt-cache", *apt, "depends", "linux-image-cloud-amd64", capture_output=True, text=True).stdout
        kernel = re.search(r"Depends: (linux-image\S+)", depends).group(1)
        done = self.debs / "done"
        wanted = " ".join([*packages, kernel])
        if not done.exists() or done.read_text() != wanted:
            say("downloading Debian packages: " + " ".join([kernel, *packages]))
            empty = self.debs / "status"
            empty.write_text("")
            # With an empty package database apt names everything that is needed, down to libc.
            options = [*apt, "-o", f"Dir::State::status={empty}", "-o", "Debug::NoLocking=1", "--no-install-recommends"]
            plan = run("apt-get", *options, "-s", "install", *packages, capture_output=True, text=True).stdout
            names = [n for n in re.findall(r"^Inst (\S+)", plan, re.M) if not NOT_NEEDED.match(n)]
            run("apt-get", *apt, "-qq", "download", *names, kernel, cwd=self.debs)
            done.write_text(wanted)
        return max(self.debs.glob(f"{kernel}_*.deb"))

    def _unpack(self, kernel, say):
        """Unpacks all packages into one tree, as it will be the hosts' root; gives the kernel's version."""
        say("unpacking, and making images")
        shutil.rmtree(self.tree, ignore_errors=True)
        for folder in ("bin", "sbin", "lib", "lib64"):
            (self.tree / "usr" / folder).mkdir(parents=True)
            (self.tree / folder).symlink_to(f"usr/{folder}")
        left_out = [f"--exclude=./{pattern}" for pattern in LEFT_OUT]
        for deb in sorted(self.debs.glob("*.deb")):
            if deb == kernel:
                continue
            content = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", deb], stdout=subprocess.PIPE)
            run("tar", "-x", "--no-same-owner", "--keep-directory-symlink", "-C", self.tree, *left_out, stdin=content.stdout)
            if content.wait() != 0:
                raise RuntimeError(f"dpkg-deb cannot unpack {deb.name}")
        unpacked = self.work / "kernel"
        shutil.rmtree(unpacked, ignore_errors=True)
        run("dpkg-deb", "-x", kernel, unpacked)
        version = next((unpacked / "lib/modules").iterdir()).name
        modules = self.tree / "usr/lib/modules" / version
        shutil.copytree(unpacked / "lib/modules" / version, modules, symlinks=True)
        for big in ("drivers/infiniband", "drivers/net/ethernet", "drivers/media", "drivers/gpu", "sound"):
            shutil.rmtree(modules / "kernel" / big, ignore_errors=True)
        run("/sbin/depmod", "-b", self.tree, version)
        shutil.copy(next((unpacked / "boot").glob("vmlinuz-*")), self.bzimage)
        self._furnish()
        return version

    def _furnish(self):
        """What package scripts would have made, as far as it is needed."""
        tree = self.tree
        for folder in "proc sys dev run tmp root mnt payload out etc var/tmp var/log lab/guest".split():
            (tree / folder).mkdir(parents=True, exist_ok=True)
        (tree / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/bash\n")
        (tree / "etc/group").write_text("root:x:0:\nkvm:x:106:\n")
        (tree / "etc/hosts").write_text("127.0.0.1 localhost\n10.77.0.1 a\n10.77.0.2 b\n")
        links = {"sh": "bash", "awk": "mawk"}
        busybox = tree / "usr/bin/busybox"
        names = run(busybox, "--list", capture_output=True, text=True).stdout.split()
        for name, to in [*links.items(), *((n, "busybox") for n in names)]:
            places = [tree / "usr/bin" / name, tree / "usr/sbin" / name]
            if not any(os.path.lexists(p) for p in places):
                places[0].symlink_to(to)
        run("/sbin/ldconfig", "-r", tree)

    def _unpack_kernel(self):
        """vmlinux out of the bzImage: the setup header says where the packed kernel is (boot protocol 2.08)."""
        packed = self.bzimage.read_bytes()
        number = lambda at, size: int.from_bytes(packed[at : at + size], "little")
        start = (number(0x1F1, 1) + 1) * 512 + number(0x248, 4)
        payload = packed[start : start + number(0x24C, 4)]
        tools = {b"\x02\x21\x4c\x18": "lz4 -dc", b"\x28\xb5\x2f\xfd": "zstd -dc", b"\xfd7zX": "xz -dc --single-stream", b"\x1f\x8b": "gzip -dc"}
        tool = next((t for magic, t in tools.items() if payload.startswith(magic)), None)
        if tool is None:
            raise RuntimeError(f"{self.bzimage} is packed in a way that is not known here")
        # The last four bytes are the size, which the tools take for garbage and say so.
        kernel = subprocess.run(tool.split(), input=payload, capture_output=True).stdout
        if not kernel.startswith(b"\x7fELF"):
            raise RuntimeError(f"{self.bzimage} does not hold an ELF kernel")
        self.vmlinux.write_bytes(kernel)

    def _modules(self, version, names):
        """Files of the modules with all they need, in the order to load them."""
        base = self.tree / "usr/lib/modules" / version
        needs = {}
        for line in (base / "modules.dep").read_text().splitlines():
            module, _, rest = line.partition(":")
            needs[module] = rest.split()
        by_name = {Path(m).name.split(".ko")[0].replace("-", "_"): m for m in needs}
        builtin = {Path(m).name[:-3].replace("-", "_") for m in (base / "modules.builtin").read_text().split()}
        order = []
        for name in (n.replace("-", "_") for n in names):
            if name in builtin:
                continue
            module = by_name[name]
            order += [m for m in [*reversed(needs[module]), module] if m not in order]
        return [base / m for m in order]

    def _initrd(self, out, init, version, modules, more=()):
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
        files = self._modules(version, modules)
        for file in files:
            shutil.copy(file, tree / "mods")
        (tree / "mods/order").write_text("".join(f"{f.name}\n" for f in files))
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

    def _host_root(self):
        lab = self.tree / "lab"
        for name in ("init", "lib.sh", "stream.py", "clock.py", "vsock.py", "qmp.py"):
            shutil.copy(self.sources / "host" / name, lab)
        (lab / "init").chmod(0o755)
        for image, name in [(self.vmlinux, "vmlinux"), (self.bzimage, "bzImage"), (self.guest_initrd, "initrd"), (self.guest_root, "root.ext4")]:
            shutil.copy(image, lab / "guest" / name)
        make_ext4(self.host_root, "900M", self.tree)
