"""Debian packages: downloaded with apt, and unpacked without running their scripts, so that this needs no root and changes
nothing outside its folder."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

# Pulled in by dependencies, of no use where no package script runs.
NOT_NEEDED = re.compile(
    r"(perl.*|libperl.*|.*-perl|usrmerge|iso-codes|adduser|passwd|debconf|dpkg|gcc-.*-base|init-system-helpers"
    r"|libpam-modules.*|readline-common|media-types)$"
)
LEFT_OUT = """usr/share/doc* usr/share/man* usr/share/locale* usr/share/info* usr/share/lintian* usr/share/zoneinfo*
    usr/share/qemu/edk2* usr/share/qemu/*.dtb usr/share/qemu/skiboot* usr/share/qemu/u-boot* usr/share/qemu/hppa*
    usr/share/perl* usr/share/icons* usr/lib/udev/hwdb* var/lib/*""".split()


def run(*command, **options):
    return subprocess.run([str(c) for c in command], check=True, **options)


class Debian:
    """What apt offers here; `work` is the folder for what it downloads, `say` is told what takes long."""

    def __init__(self, work, say):
        self.work, self.say = Path(work), say
        self.apt = self._options()

    def _options(self):
        """Options for apt: package lists of our own where the machine has none, as in a container."""
        # Root's downloads are not handed to another user, who could not write here.
        options = ["-o", "APT::Sandbox::User=root"]
        if subprocess.run(["apt-cache", "show", "linux-image-cloud-amd64"], capture_output=True).returncode == 0:
            return options
        lists, cache = self.work / "apt/lists", self.work / "apt/cache"
        for folder in (lists / "partial", cache / "archives/partial"):
            folder.mkdir(parents=True, exist_ok=True)
        options += ["-o", f"Dir::State::lists={lists}", "-o", f"Dir::Cache={cache}"]
        self.say("reading Debian's package lists")
        run("apt-get", *options, "-qq", "update")
        return options

    def packages(self, names):
        """Downloads packages with all that they need; gives their files."""
        # With an empty package database apt names everything that is needed, down to libc.
        empty = self.work / "status"
        empty.write_text("")
        options = [*self.apt, "-o", f"Dir::State::status={empty}", "-o", "Debug::NoLocking=1", "--no-install-recommends"]
        plan = run("apt-get", *options, "-s", "install", *names, capture_output=True, text=True).stdout
        needed = [n for n in re.findall(r"^Inst (\S+)", plan, re.M) if not NOT_NEEDED.match(n)]
        return self._fetch(needed, " ".join(names))

    def kernel(self, package):
        """The file of a kernel's package: of one that is named, or of what that depends on, or a file itself."""
        if package.endswith(".deb"):
            if not Path(package).is_file():
                sys.exit(f"lab: there is no file {package}")
            return Path(package)
        asked = subprocess.run(["apt-cache", *self.apt, "depends", package], capture_output=True, text=True)
        if asked.returncode != 0:
            sys.exit(f"lab: no package {package}: {asked.stderr.strip()}")
        if found := re.search(r"Depends: (linux-image\S+)", asked.stdout):
            package = found.group(1)
        return self._fetch([package], package)[0]

    def _fetch(self, names, what):
        """Downloads the packages of these names, unless they are there; gives their files."""
        folder = self.work / "debs" / hashlib.sha256(what.encode()).hexdigest()[:12]
        done = folder / "done"
        if not done.exists() or done.read_text().split() != names:
            self.say(f"downloading Debian packages: {what}")
            shutil.rmtree(folder, ignore_errors=True)
            (folder / "partial").mkdir(parents=True)
            run("apt-get", *self.apt, "-qq", "download", *names, cwd=folder)
            done.write_text("\n".join(names))
        return sorted(folder.glob("*.deb"))


def unpack(debs, tree):
    """Unpacks packages into one tree, as the root of a system."""
    shutil.rmtree(tree, ignore_errors=True)
    for folder in ("bin", "sbin", "lib", "lib64"):
        (tree / "usr" / folder).mkdir(parents=True)
        (tree / folder).symlink_to(f"usr/{folder}")
    left_out = [f"--exclude=./{pattern}" for pattern in LEFT_OUT]
    for deb in debs:
        content = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", deb], stdout=subprocess.PIPE)
        run("tar", "-x", "--no-same-owner", "--keep-directory-symlink", "-C", tree, *left_out, stdin=content.stdout)
        if content.wait() != 0:
            raise RuntimeError(f"dpkg-deb cannot unpack {deb.name}")
    _furnish(tree)


def _furnish(tree):
    """What package scripts would have made, as far as it is needed."""
    for folder in "proc sys dev run tmp root mnt etc var/tmp var/log".split():
        (tree / folder).mkdir(parents=True, exist_ok=True)
    (tree / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/bash\n")
    (tree / "etc/group").write_text("root:x:0:\ntty:x:5:\nkvm:x:106:\n")
    (tree / "etc/hosts").write_text("127.0.0.1 localhost\n10.77.0.1 a\n10.77.0.2 b\n")
    links = {"sh": "bash", "awk": "mawk"}
    busybox = tree / "usr/bin/busybox"
    names = run(busybox, "--list", capture_output=True, text=True).stdout.split()
    for name, to in [*links.items(), *((n, "busybox") for n in names)]:
        places = [tree / "usr/bin" / name, tree / "usr/sbin" / name]
        if not any(os.path.lexists(p) for p in places):
            places[0].symlink_to(to)
    run("/sbin/ldconfig", "-r", tree)
