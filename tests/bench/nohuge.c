/* Loaded before a program (LD_PRELOAD): its calls of madvise(MADV_HUGEPAGE) do nothing. */
#define _GNU_SOURCE
#include <stddef.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

int madvise(void *address, size_t length, int advice)
{
    return advice == MADV_HUGEPAGE ? 0 : (int)syscall(SYS_madvise, address, length, advice);
}
