/*
 * Two ways in which a diff is laid over a base today. The new file is fsynced, as that of
 * `diffmergefs flatten` is.
 *
 *   copier sendfile OUT BASE DIFF...    a new file: each layer's data extents, oldest layer first,
 *                                       by sendfile(2), as Firecracker writes its merged snapshots
 *   copier overwrite OUT DIFF...        an existing copy of the base: each diff's data extents over
 *                                       it by pread(2) and pwrite(2) of at most 1 MiB
 */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
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

int main(int count, char **given)
{
    if (count < 4)
        errx(2, "usage: copier sendfile|overwrite OUT LAYER...");
    int sending = !strcmp(given[1], "sendfile");
    int out = open(given[2], sending ? O_WRONLY | O_CREAT | O_EXCL : O_WRONLY, 0600);
    if (out < 0)
        err(1, "%s", given[2]);
    for (int n = 3; n < count; n++) {
        struct stat status;
        int in = open(given[n], O_RDONLY);
        if (in < 0 || fstat(in, &status) || (sending && ftruncate(out, status.st_size)))
            err(1, "%s", given[n]);
        off_t stop = 0, start;
        while ((start = lseek(in, stop, SEEK_DATA)) >= 0) {
            stop = lseek(in, start, SEEK_HOLE);
            (sending ? send_extent : copy_extent)(out, in, start, stop);
        }
        if (errno != ENXIO)
            err(1, "%s", given[n]);
        close(in);
    }
    if (fsync(out))
        err(1, "fsync");
    return 0;
}
