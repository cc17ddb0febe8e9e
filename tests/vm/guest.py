"""What the guest boots: a Debian cloud kernel and a busybox initramfs."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.support import apt

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "vm"
BUSYBOX = Path("/bin/busybox")

_META_PACKAGE = "linux-image-cloud-amd64"
_NEEDS_APT = "needs apt to fetch a Debian cloud kernel"

# One line per fact on the serial console, and one command per line from it. The console stays in
# canonical mode: `read -t` then never takes half a line.
_INIT = """\
#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t devtmpfs dev /dev
mount -t tmpfs tmpfs /files
dmesg -n 1
stty -echo
cd /files

random() { dd if=/dev/urandom of="$1" bs=4k count="$2" 2>/dev/null; }
wipe() { dd if=/dev/zero of=pattern bs=4k seek="$1" count=128 conv=notrunc 2>/dev/null; }

nonce=$(head -c 32 /dev/urandom | sha256sum | cut -c 1-32)
echo "nonce drawn $nonce"
tr '\\0' '\\252' </dev/zero | head -c 1048576 >pattern
random boot 256
echo ready

tick=0
while :; do
    if read -r -t 1 command; then
        case $command in
            work) random work 512; random boot 128; wipe 0 ;;
            idle) sleep 2 ;;
            free) rm -f boot work more ;;
            more) random more 256; rm boot; wipe 128 ;;
            sums) sha256sum * | while read -r sum name; do echo "sum $name $sum"; done ;;
        esac
        echo "done $command"
    fi
    tick=$((tick + 1))
    echo "tick $tick nonce $nonce"
done
"""


class GuestUnavailableError(Exception):
    """This system cannot provide the guest; the message is the reason to skip."""


@dataclass(frozen=True)
class Guest:
    """A kernel and an initramfs, ready to boot.

    The init draws a nonce once per boot and prints `nonce drawn NONCE`, then `ready`; from then on
    it prints `tick N nonce NONCE` about once a second, N rising by one. A line `work` or `more` on
    its console makes it dirty its memory: it writes random files in a tmpfs, overwrites part of a
    file of 0xAA in place with zeros. `idle` is two seconds without work, and `free` deletes the
    random files. `sums` makes it print `sum NAME SHA256` for each file. Each command is answered
    with `done COMMAND` when its work is over.
    """

    kernel: Path
    initramfs: Path


def make_guest(directory: Path) -> Guest:
    """Write the initramfs into `directory` and give it with the (cached) kernel.

    Raises GuestUnavailableError where the kernel cannot be fetched or busybox is missing.
    """
    if not BUSYBOX.exists():
        raise GuestUnavailableError("needs busybox-static")
    initramfs = directory / "initramfs.cpio"
    initramfs.write_bytes(
        _newc(
            [
                *((name, stat.S_IFDIR | 0o755, b"") for name in ("bin", "dev", "proc", "files")),
                ("bin/busybox", stat.S_IFREG | 0o755, BUSYBOX.read_bytes()),
                ("init", stat.S_IFREG | 0o755, _INIT.encode()),
            ]
        )
    )
    return Guest(_kernel(), initramfs)


def _newc(entries: Iterable[tuple[str, int, bytes]]) -> bytes:
    """A cpio archive in the `newc` format of (name, mode, content) entries."""
    archive = bytearray()
    for number, (name, mode, content) in enumerate([*entries, ("TRAILER!!!", 0, b"")], start=1):
        fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0)
        archive += b"070701" + b"".join(b"%08X" % field for field in fields)
        archive += name.encode() + b"\0"
        archive += bytes(-len(archive) % 4)
        archive += content
        archive += bytes(-len(archive) % 4)
    return bytes(archive)


def _kernel() -> Path:
    """The kernel image in the cache; fetched with apt into it when it is not there yet."""
    kernel = CACHE / "vmlinuz"
    if kernel.exists():
        return kernel
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        raise GuestUnavailableError(_NEEDS_APT)
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as name:
        directory = Path(name)
        try:
            package = apt.with_lists(lambda: _download(directory))
        except subprocess.SubprocessError as error:
            reason = str(getattr(error, "stderr", None) or error).strip()
            raise GuestUnavailableError(f"{_NEEDS_APT}: {reason[-200:]}") from error
        _extract(package, directory / kernel.name)
        (directory / kernel.name).replace(kernel)
    return kernel


def _download(directory: Path) -> Path:
    """Fetch the package that the cloud kernel's meta package depends on into `directory`."""
    lines = apt.run("apt-cache", "depends", _META_PACKAGE).splitlines()
    names = [line.split()[-1] for line in lines if line.strip().startswith("Depends: linux-image-")]
    return apt.download(directory, names[0] if names else _META_PACKAGE)


def _extract(package: Path, target: Path) -> None:
    """Write the kernel image in `package` to `target`, and nothing else of its 100 MB."""
    with (
        subprocess.Popen(
            ["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE
        ) as unpacker,
        tarfile.open(fileobj=unpacker.stdout, mode="r|") as files,
    ):
        try:
            member = next(item for item in files if item.name.startswith("./boot/vmlinuz-"))
            content = files.extractfile(member)
            assert content is not None
            target.write_bytes(content.read())
        finally:
            unpacker.kill()
