/*
 * Ways in which a diff is laid over a base. The new file is fsynced, as that of `diffmergefs flatten`
 * is. The first two are in use today; the third is the floor of them all where files share blocks.
 *
 *   copier sendfile OUT BASE DIFF...    a new file: each layer's data extents, oldest layer first,
 *                                       by sendfile(2), as Firecracker writes its merged snapshots
 *   copier overwrite OUT DIFF...        an existing copy of the base: each diff's data extents over
 *                                       it by pread(2) and pwrite(2) of at most 1 MiB
 *   copier reflink OUT BASE DIFF...     a new file that shares all: FICLONE of the base, then
 *                                       FICLONERANGE of each diff's data extents, oldest diff first
 *
 * Prints the seconds that it took.
 */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define BLOCK (1 << 20)

static void send_extent(int out, int in, off_t start, off_t stop)
{
    if (lseek(out, start, SEEK_SET) < 0)
        err(1, "lseek");
    while (start < stop)
        if (sendfile(out, in, &start, stop - start) <= 0)
            err(1, "sendfile");
}

static void copy_extent(int out, int in, off_t start, off_t stop)
{
    static char buffer[BLOCK];
    while (start < stop) {
        size_t wanted = stop - start < BLOCK ? stop - start : BLOCK;
        ssize_t got = pread(in, buffer, wanted, start);
        if (got <= 0 || pwrite(out, buffer, got, start) != got)
            err(1, "copy");
        start += got;
    }
}

static void share_extent(int out, int in, off_t start, off_t stop)
{
    struct file_clone_range range = {.src_fd = in, .src_offset = start, .src_length = stop - start,
                                     .dest_offset = start};
    if (ioctl(out, FICLONERANGE, &range))
        err(1, "FICLONERANGE");
}

typedef void way_t(int out, int in, off_t start, off_t stop);

static void each_extent(way_t *way, int out, int in, const char *name)
{
    off_t stop = 0, start;
    while ((start = lseek(in, stop, SEEK_DATA)) >= 0) {
        stop = lseek(in, start, SEEK_HOLE);
        way(out, in, start, stop);
    }
    if (errno != ENXIO)
        err(1, "%s", name);
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

int main(int count, char **given)
{
    if (count < 4)
        errx(2, "usage: copier sendfile|overwrite|reflink OUT LAYER...");
    double began = now();
    int sharing = !strcmp(given[1], "reflink"), fresh = sharing || !strcmp(given[1], "sendfile");
    way_t *way = sharing ? share_extent : fresh ? send_extent : copy_extent;
    int out = open(given[2], fresh ? O_WRONLY | O_CREAT | O_EXCL : O_WRONLY, 0600);
    if (out < 0)
        err(1, "%s", given[2]);
    for (int n = 3; n < count; n++) {
        struct stat status;
        int in = open(given[n], O_RDONLY);
        if (in < 0 || fstat(in, &status) || (fresh && ftruncate(out, status.st_size)))
            err(1, "%s", given[n]);
        if (sharing && n == 3) {
            if (ioctl(out, FICLONE, in))
                err(1, "FICLONE");
        } else {
            each_extent(way, out, in, given[n]);
        }
        close(in);
    }
    if (fsync(out))
        err(1, "fsync");
    printf("%.9f\n", now() - began);
    return 0;
}
