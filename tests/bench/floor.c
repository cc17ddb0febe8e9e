/*
 * The floor: a FUSE server that does nothing but answer. One file, served by one thread out of one
 * mapping; every answer is a copy from there by the kernel.
 *
 *   floor FILE MOUNTPOINT       shows FILE as MOUNTPOINT/image until it is unmounted
 */
#define FUSE_USE_VERSION 34
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <fuse_lowlevel.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

#define INODE 2
#define FOREVER 86400.0

static const char *memory;
static size_t size;

static int fill(fuse_ino_t inode, struct stat *status)
{
    memset(status, 0, sizeof *status);
    status->st_ino = inode;
    status->st_mode = inode == FUSE_ROOT_ID ? S_IFDIR | 0755 : S_IFREG | 0444;
    status->st_nlink = 1;
    status->st_size = inode == INODE ? size : 0;
    status->st_blocks = status->st_size / 512;
    return inode == INODE || inode == FUSE_ROOT_ID ? 0 : ENOENT;
}

static void do_lookup(fuse_req_t request, fuse_ino_t parent, const char *name)
{
    struct fuse_entry_param entry = {.ino = INODE, .attr_timeout = FOREVER, .entry_timeout = FOREVER};
    if (parent != FUSE_ROOT_ID || strcmp(name, "image")) {
        fuse_reply_err(request, ENOENT);
        return;
    }
    fill(INODE, &entry.attr);
    fuse_reply_entry(request, &entry);
}

static void do_getattr(fuse_req_t request, fuse_ino_t inode, struct fuse_file_info *info)
{
    struct stat status;
    (void)info;
    if (fill(inode, &status))
        fuse_reply_err(request, ENOENT);
    else
        fuse_reply_attr(request, &status, FOREVER);
}

static void do_open(fuse_req_t request, fuse_ino_t inode, struct fuse_file_info *info)
{
    (void)inode;
    info->keep_cache = 1;
    fuse_reply_open(request, info);
}

static void do_read(fuse_req_t request, fuse_ino_t inode, size_t length, off_t offset,
                    struct fuse_file_info *info)
{
    (void)inode;
    (void)info;
    if ((size_t)offset >= size)
        length = 0;
    else if (length > size - offset)
        length = size - offset;
    fuse_reply_buf(request, memory + offset, length);
}

static const struct fuse_lowlevel_ops operations = {
    .lookup = do_lookup,
    .getattr = do_getattr,
    .open = do_open,
    .read = do_read,
};

int main(int count, char **given)
{
    if (count != 3)
        errx(2, "usage: floor FILE MOUNTPOINT");
    struct stat status;
    int fd = open(given[1], O_RDONLY);
    if (fd < 0 || fstat(fd, &status))
        err(1, "%s", given[1]);
    size = status.st_size;
    void *found = mmap(NULL, size, PROT_READ, MAP_SHARED | MAP_POPULATE, fd, 0);
    if (found == MAP_FAILED)
        err(1, "mmap");
    memory = found;
    char *words[] = {given[0], "-o", "ro,fsname=floor,subtype=floor"};
    struct fuse_args arguments = FUSE_ARGS_INIT(3, words);
    struct fuse_session *session =
        fuse_session_new(&arguments, &operations, sizeof operations, NULL);
    if (!session || fuse_session_mount(session, given[2]))
        errx(1, "cannot mount");
    int failed = fuse_session_loop(session);
    fuse_session_unmount(session);
    fuse_session_destroy(session);
    return failed != 0;
}
