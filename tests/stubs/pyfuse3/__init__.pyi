# The part of pyfuse3 that this repository uses, so that mypy needs no pyfuse3 (whose source needs
# libfuse's headers). tests/project/test_stubs.py compares it with the installed pyfuse3.

from collections.abc import Sequence, Set

from trio.lowlevel import TrioToken

FileHandleT = int
FileNameT = bytes
FlagT = int
InodeT = int
ModeT = int
XAttrNameT = bytes

ENOATTR: int
ROOT_INODE: InodeT
__version__: str
default_options: frozenset[str]
trio_token: TrioToken | None

class ReaddirToken: ...

class RequestContext:
    @property
    def uid(self) -> int: ...
    @property
    def pid(self) -> int: ...
    @property
    def gid(self) -> int: ...
    @property
    def umask(self) -> int: ...

class EntryAttributes:
    st_ino: InodeT
    generation: int
    entry_timeout: float
    attr_timeout: float
    st_mode: ModeT
    st_nlink: int
    st_uid: int
    st_gid: int
    st_rdev: int
    st_size: int
    st_blksize: int
    st_blocks: int
    st_atime_ns: int
    st_ctime_ns: int
    st_mtime_ns: int

class FileInfo:
    fh: FileHandleT
    direct_io: bool
    keep_cache: bool
    nonseekable: bool

    def __new__(
        cls,
        fh: FileHandleT = ...,
        direct_io: bool = ...,
        keep_cache: bool = ...,
        nonseekable: bool = ...,
    ) -> FileInfo: ...

class StatvfsData:
    f_bsize: int
    f_frsize: int
    f_blocks: int
    f_bfree: int
    f_bavail: int
    f_files: int
    f_ffree: int
    f_favail: int
    f_namemax: int

class FUSEError(Exception):
    @property
    def errno(self) -> int: ...
    def __init__(self, errno: int) -> None: ...

class Operations:
    supports_dot_lookup: bool
    enable_writeback_cache: bool
    enable_acl: bool

    def init(self) -> None: ...
    def stacktrace(self) -> None: ...
    async def lookup(
        self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext
    ) -> EntryAttributes: ...
    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None: ...
    async def getattr(self, inode: InodeT, ctx: RequestContext) -> EntryAttributes: ...
    async def open(self, inode: InodeT, flags: FlagT, ctx: RequestContext) -> FileInfo: ...
    async def read(self, fh: FileHandleT, off: int, size: int) -> bytes: ...
    async def release(self, fh: FileHandleT) -> None: ...
    async def opendir(self, inode: InodeT, ctx: RequestContext) -> FileHandleT: ...
    async def readdir(self, fh: FileHandleT, start_id: int, token: ReaddirToken) -> None: ...
    async def releasedir(self, fh: FileHandleT) -> None: ...
    async def statfs(self, ctx: RequestContext) -> StatvfsData: ...
    async def getxattr(self, inode: InodeT, name: XAttrNameT, ctx: RequestContext) -> bytes: ...
    async def listxattr(self, inode: InodeT, ctx: RequestContext) -> Sequence[XAttrNameT]: ...
    async def access(self, inode: InodeT, mode: ModeT, ctx: RequestContext) -> bool: ...

def init(ops: Operations, mountpoint: str, options: Set[str] = ...) -> None: ...
async def main(min_tasks: int = ..., max_tasks: int = ...) -> None: ...
def terminate() -> None: ...
def close(unmount: bool = ...) -> None: ...
def notify_store(inode: InodeT, offset: int, data: bytes) -> None: ...
def readdir_reply(
    token: ReaddirToken, name: FileNameT, attr: EntryAttributes, next_id: int
) -> bool: ...
