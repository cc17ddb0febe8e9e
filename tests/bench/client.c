/*
 * Reads a file as programs and guests do, and prints the seconds that it took. Whatever the kernel
 * has cached of it can be dropped first; all preparations are outside of what is timed.
 *
 *   client read FILE PASSES DROP        read(2) from start to end, 1 MiB a call; a line a pass
 *   client touch FILE PAGES SEED THREADS CPU DROP
 *                                       first byte of so many different random pages through a
 *                                       mapping, the pages dealt among the threads; CPU -1: any
 *   client touchall FILE SEED           like touch, of all pages, after a read of the whole file
 *   client populate FILE                MADV_POPULATE_READ, after a read of the whole file
 *   client reads FILE READS SEED THREADS DROP
 *                                       pread(2) of 4 KiB at random pages, so many in each thread
 *   client watch FILE SECONDS           random reads of 4 KiB, none cached, until SIGTERM: a line
 *                                       for each, of when it was done (CLOCK_MONOTONIC) and how
 *                                       long it took
 */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096
#define BLOCK (1 << 20)

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static uint64_t state;

static uint64_t number(void) /* splitmix64 */
{
    uint64_t z = state += 0x9e3779b97f4a7c15ull;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
}

static int fd;
static uint64_t pages;

static void open_file(const char *path, int drop)
{
    struct stat status;
    fd = open(path, O_RDONLY);
    if (fd < 0 || fstat(fd, &status) < 0)
        err(1, "%s", path);
    pages = status.st_size / PAGE;
    if (drop && (errno = posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED)))
        err(1, "posix_fadvise");
}

static double read_all(void)
{
    static char buffer[BLOCK] __attribute__((aligned(PAGE)));
    double began = now();
    uint64_t at = 0;
    ssize_t got;
    while ((got = pread(fd, buffer, BLOCK, at)) > 0)
        at += got;
    if (got < 0 || at != pages * PAGE)
        err(1, "read");
    return now() - began;
}

/* All page numbers in a random order. */
static uint64_t *shuffled(uint64_t seed)
{
    uint64_t *order = malloc(pages * sizeof *order);
    state = seed;
    for (uint64_t n = 0; n < pages; n++)
        order[n] = n;
    for (uint64_t n = pages - 1; n > 0; n--) {
        uint64_t other = number() % (n + 1), kept = order[n];
        order[n] = order[other];
        order[other] = kept;
    }
    return order;
}

static volatile const char *memory;

static void map_file(int advice)
{
    void *found = mmap(NULL, pages * PAGE, PROT_READ, MAP_PRIVATE, fd, 0);
    if (found == MAP_FAILED || (advice >= 0 && madvise(found, pages * PAGE, advice)))
        err(1, "mmap");
    memory = found;
}

static pthread_barrier_t barrier;

struct share {
    pthread_t thread;
    uint64_t *order, count;
    int mapped;
};

static void *work(void *given)
{
    struct share *share = given;
    char buffer[PAGE];
    pthread_barrier_wait(&barrier);
    for (uint64_t n = 0; n < share->count; n++) {
        if (share->mapped)
            (void)memory[share->order[n] * PAGE];
        else if (pread(fd, buffer, PAGE, share->order[n] * PAGE) != PAGE)
            err(1, "pread");
    }
    return NULL;
}

/* The seconds that the threads take for `each` pages in each. */
static double at_once(uint64_t *order, uint64_t each, int threads, int mapped)
{
    struct share shares[threads];
    if (each * threads > pages)
        errx(1, "only %ju pages", (uintmax_t)pages);
    pthread_barrier_init(&barrier, NULL, threads + 1);
    for (int n = 0; n < threads; n++) {
        shares[n] = (struct share){.order = order + n * each, .count = each, .mapped = mapped};
        if (pthread_create(&shares[n].thread, NULL, work, &shares[n]))
            errx(1, "pthread_create");
    }
    double began = now();
    pthread_barrier_wait(&barrier);
    for (int n = 0; n < threads; n++)
        pthread_join(shares[n].thread, NULL);
    return now() - began;
}

static double touch(uint64_t *order, uint64_t count)
{
    double began = now();
    for (uint64_t n = 0; n < count; n++)
        (void)memory[order[n] * PAGE];
    return now() - began;
}

static void pin(int cpu)
{
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    if (cpu >= 0 && sched_setaffinity(0, sizeof set, &set))
        err(1, "sched_setaffinity");
}

static volatile sig_atomic_t ended;

static void end_it(int number)
{
    (void)number;
    ended = 1;
}

static void watch(double seconds)
{
    signal(SIGTERM, end_it);
    char buffer[PAGE];
    uint64_t *order = shuffled(7);
    double end = now() + seconds, began;
    for (uint64_t n = 0; !ended && (began = now()) < end; n = (n + 1) % pages) {
        if (pread(fd, buffer, PAGE, order[n] * PAGE) != PAGE)
            err(1, "pread");
        double done = now();
        printf("%.6f %.6f\n", done, done - began);
        posix_fadvise(fd, order[n] * PAGE, PAGE, POSIX_FADV_DONTNEED);
    }
}

int main(int count, char **given)
{
    if (count < 3)
        errx(2, "usage: client MODE FILE ...");
    const char *mode = given[1];
    long argument[6] = {0};
    for (int n = 3; n < count && n < 9; n++)
        argument[n - 3] = atol(given[n]);
    if (!strcmp(mode, "read")) {
        open_file(given[2], argument[1]);
        for (long pass = 0; pass < argument[0]; pass++)
            printf("%.9f\n", read_all());
    } else if (!strcmp(mode, "touch")) {
        open_file(given[2], argument[4]);
        uint64_t *order = shuffled(argument[1]);
        map_file(MADV_RANDOM);
        pin(argument[3]);
        long threads = argument[2];
        printf("%.9f\n", threads == 1 ? touch(order, argument[0])
                                      : at_once(order, argument[0] / threads, threads, 1));
    } else if (!strcmp(mode, "touchall")) {
        open_file(given[2], 0);
        uint64_t *order = shuffled(argument[0]);
        read_all();
        map_file(MADV_RANDOM);
        printf("%.9f\n", touch(order, pages));
    } else if (!strcmp(mode, "populate")) {
        open_file(given[2], 0);
        read_all();
        map_file(-1);
        double began = now();
        if (madvise((void *)memory, pages * PAGE, MADV_POPULATE_READ))
            err(1, "madvise");
        printf("%.9f\n", now() - began);
    } else if (!strcmp(mode, "reads")) {
        open_file(given[2], argument[3]);
        posix_fadvise(fd, 0, 0, POSIX_FADV_RANDOM);
        printf("%.9f\n", at_once(shuffled(argument[1]), argument[0], argument[2], 0));
    } else if (!strcmp(mode, "watch")) {
        open_file(given[2], 1);
        posix_fadvise(fd, 0, 0, POSIX_FADV_RANDOM);
        watch(argument[0]);
    } else {
        errx(2, "no mode %s", mode);
    }
    return 0;
}
