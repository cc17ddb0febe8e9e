/*
 * Faults of a guest's memory that a page server fills, and the floor for such a server.
 *
 *   faults guest SOCKET SIZE PAGES SEED   plays Firecracker: hands memory of SIZE bytes to the server
 *                                         at SOCKET, and touches so many random pages of it in turn.
 *                                         Prints the seconds and a sum of what it read.
 *   faults serve SOCKET FILE              the floor: one thread copies each page from one mapping of
 *                                         FILE, for one guest after another. Prints a line when ready.
 *
 * Both stay on CPU 0.
 */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL

static struct sockaddr_un address(const char *path)
{
    struct sockaddr_un found = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof found.sun_path)
        errx(1, "%s: too long for a socket", path);
    strcpy(found.sun_path, path);
    return found;
}

static void send_with(int connection, char *text, int fd)
{
    union {
        char bytes[CMSG_SPACE(sizeof fd)];
        struct cmsghdr align;
    } control = {{0}};
    struct iovec data = {text, strlen(text)};
    struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1, .msg_control = &control,
                             .msg_controllen = sizeof control};
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof fd);
    memcpy(CMSG_DATA(header), &fd, sizeof fd);
    if (sendmsg(connection, &message, 0) < 0)
        err(1, "sendmsg");
}

static int receive_with(int connection, char *text, size_t room)
{
    union {
        char bytes[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } control = {{0}};
    struct iovec data = {text, room - 1};
    struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1, .msg_control = &control,
                             .msg_controllen = sizeof control};
    ssize_t count = recvmsg(connection, &message, 0);
    struct cmsghdr *header = count > 0 ? CMSG_FIRSTHDR(&message) : NULL;
    int fd;
    if (!header || header->cmsg_type != SCM_RIGHTS)
        errx(1, "no descriptor came");
    text[count] = 0;
    memcpy(&fd, CMSG_DATA(header), sizeof fd);
    return fd;
}

static void guest(const char *path, size_t size, size_t pages, unsigned seed)
{
    int fault = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_EVENT_REMOVE};
    if (fault < 0 || ioctl(fault, UFFDIO_API, &api))
        err(1, "userfaultfd");
    char *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        err(1, "mmap");
    madvise(memory, size, MADV_NOHUGEPAGE);
    struct uffdio_register range = {.range = {(uintptr_t)memory, size},
                                    .mode = UFFDIO_REGISTER_MODE_MISSING};
    if (ioctl(fault, UFFDIO_REGISTER, &range))
        err(1, "UFFDIO_REGISTER");

    struct sockaddr_un where = address(path);
    int connection = socket(AF_UNIX, SOCK_STREAM, 0);
    if (connect(connection, (struct sockaddr *)&where, sizeof where))
        err(1, "%s", path);
    char text[256];
    snprintf(text, sizeof text,
             "[{\"base_host_virt_addr\":%" PRIuPTR ",\"size\":%zu,\"offset\":0,"
             "\"page_size\":%lu,\"page_size_kib\":%lu}]",
             (uintptr_t)memory, size, PAGE, PAGE);
    send_with(connection, text, fault);

    size_t all = size / PAGE, *order = malloc(all * sizeof *order);
    for (size_t n = 0; n < all; n++)
        order[n] = n;
    srandom(seed);
    for (size_t n = 0; n < pages; n++) {
        size_t other = n + random() % (all - n), kept = order[n];
        order[n] = order[other];
        order[other] = kept;
    }
    (void)*(volatile char *)(memory + order[0] * PAGE); /* the server has begun by then */
    struct timespec began, ended;
    uint64_t sum = 0;
    clock_gettime(CLOCK_MONOTONIC, &began);
    for (size_t n = 1; n < pages; n++)
        sum = sum * 31 + *(volatile uint64_t *)(memory + order[n] * PAGE);
    clock_gettime(CLOCK_MONOTONIC, &ended);
    printf("%.9f\n%" PRIu64 "\n",
           ended.tv_sec - began.tv_sec + (ended.tv_nsec - began.tv_nsec) / 1e9, sum);
}

static void fill(int fault, uint64_t base, const char *memory)
{
    struct uffd_msg event;
    if (read(fault, &event, sizeof event) != sizeof event)
        return;
    if (event.event != UFFD_EVENT_PAGEFAULT)
        errx(1, "event %d", event.event);
    uint64_t at = event.arg.pagefault.address & ~(PAGE - 1);
    struct uffdio_copy copy = {.dst = at, .src = (uintptr_t)memory + (at - base), .len = PAGE};
    if (ioctl(fault, UFFDIO_COPY, &copy) && errno != EEXIST && errno != ESRCH)
        err(1, "UFFDIO_COPY");
}

static void serve(const char *path, const char *file)
{
    int fd = open(file, O_RDONLY);
    struct stat status;
    if (fd < 0 || fstat(fd, &status))
        err(1, "%s", file);
    char *memory = mmap(NULL, status.st_size, PROT_READ, MAP_SHARED | MAP_POPULATE, fd, 0);
    if (memory == MAP_FAILED)
        err(1, "mmap");
    struct sockaddr_un where = address(path);
    int listening = socket(AF_UNIX, SOCK_STREAM, 0);
    if (bind(listening, (struct sockaddr *)&where, sizeof where) || listen(listening, 1))
        err(1, "%s", path);
    puts("ready");
    fflush(stdout);
    for (;;) {
        char text[256];
        int connection = accept(listening, NULL, NULL);
        int fault = receive_with(connection, text, sizeof text);
        char *number = strstr(text, "addr\":");
        if (!number)
            errx(1, "%s", text);
        uint64_t base = strtoull(number + 6, NULL, 10);
        struct pollfd waits[] = {{fault, POLLIN, 0}, {connection, POLLIN, 0}};
        while (poll(waits, 2, -1) > 0 && !waits[1].revents)
            fill(fault, base, memory);
        close(fault);
        close(connection);
    }
}

int main(int count, char **words)
{
    cpu_set_t cpus;
    CPU_ZERO(&cpus);
    CPU_SET(0, &cpus);
    if (sched_setaffinity(0, sizeof cpus, &cpus))
        err(1, "sched_setaffinity");
    if (count == 6 && !strcmp(words[1], "guest"))
        guest(words[2], strtoull(words[3], NULL, 10), strtoull(words[4], NULL, 10), atoi(words[5]));
    else if (count == 4 && !strcmp(words[1], "serve"))
        serve(words[2], words[3]);
    else
        errx(2, "see the comment in faults.c");
    return 0;
}
