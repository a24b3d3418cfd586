"""A Linux kernel out of a Debian package: the kernel as bzImage and as vmlinux, and its modules."""

import shutil
import subprocess
from pathlib import Path

# What the payload of a bzImage may be packed with, by how it begins.
UNPACKERS = {b"\x02\x21\x4c\x18": "lz4 -dc", b"\x28\xb5\x2f\xfd": "zstd -dc", b"\xfd7zX": "xz -dc --single-stream", b"\x1f\x8b": "gzip -dc"}
# The same for modules, by the end of their names.
MODULE_UNPACKERS = {".xz": "xz -dc", ".zst": "zstd -dc", ".gz": "gzip -dc"}


class Kernel:
    """The package `deb`, unpacked to `folder` without running its scripts."""

    def __init__(self, deb, folder):
        self.folder = Path(folder)
        shutil.rmtree(self.folder, ignore_errors=True)
        _run("dpkg-deb", "-x", deb, self.folder)
        if not (self.folder / "lib").exists():
            (self.folder / "lib").symlink_to("usr/lib")
        self.modules = next((self.folder / "lib/modules").iterdir())
        self.version = self.modules.name
        _run("/sbin/depmod", "-b", self.folder, self.version)
        self.bzimage, self.vmlinux = self.folder / "bzImage", self.folder / "vmlinux"
        shutil.move(next((self.folder / "boot").glob("vmlinuz-*")), self.bzimage)
        self.vmlinux.write_bytes(_elf(self.bzimage))

    def module_files(self, names):
        """Files of the modules of these names with all they need, in the order to load them; none of what is built in.
        A name that ends with a question mark is of one that not every kernel has."""
        needs = {}
        for line in (self.modules / "modules.dep").read_text().splitlines():
            module, _, rest = line.partition(":")
            needs[module] = rest.split()
        by_name = {Path(m).name.split(".ko")[0].replace("-", "_"): m for m in needs}
        builtin = {Path(m).name[:-3].replace("-", "_") for m in (self.modules / "modules.builtin").read_text().split()}
        order = []
        for word in names:
            name = word.rstrip("?").replace("-", "_")
            missing_is_fine = word.endswith("?") and name not in by_name
            if name not in builtin and not missing_is_fine:
                module = by_name[name]
                order += [m for m in [*reversed(needs[module]), module] if m not in order]
        return [self.modules / m for m in order]


def copy_module(file, folder):
    """Copies a module, unpacked, so that any insmod loads it; gives its name there."""
    tool = MODULE_UNPACKERS.get(file.suffix)
    name = file.name.removesuffix(file.suffix) if tool else file.name
    with open(folder / name, "wb") as out:
        _run(*(tool or "cat").split(), file, stdout=out)
    return name


def _elf(bzimage):
    """vmlinux out of a bzImage: the setup header says where the packed kernel is (boot protocol 2.08)."""
    packed = bzimage.read_bytes()
    number = lambda at, size: int.from_bytes(packed[at : at + size], "little")
    start = (number(0x1F1, 1) + 1) * 512 + number(0x248, 4)
    payload = packed[start : start + number(0x24C, 4)]
    tool = next((t for magic, t in UNPACKERS.items() if payload.startswith(magic)), None)
    if tool is None:
        raise RuntimeError(f"{bzimage} is packed in a way that is not known here")
    # The last four bytes are the size, which the tools take for garbage and say so.
    kernel = subprocess.run(tool.split(), input=payload, capture_output=True).stdout
    if not kernel.startswith(b"\x7fELF"):
        raise RuntimeError(f"{bzimage} does not hold an ELF kernel")
    return kernel


def _run(*command, **options):
    subprocess.run([str(c) for c in command], check=True, **options)
