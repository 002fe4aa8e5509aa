/* Small workloads that stress one thing each: micro getpid|pipe|mmap COUNT. */

#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static int getpid_loop(long count)
{
    long same = 0, me = getpid();

    for (long i = 0; i < count; i++)
        same += syscall(SYS_getpid) == me;
    printf("%ld\n", same);
    return 0;
}

/* One byte to a child process and back, count times. */
static int ping_pong(long count)
{
    int there[2], back[2];
    char byte = 0;

    if (pipe(there) || pipe(back))
        return 1;
    pid_t child = fork();
    if (child == 0) {
        for (long i = 0; i < count; i++) {
            if (read(there[0], &byte, 1) != 1)
                _exit(1);
            byte++;
            if (write(back[1], &byte, 1) != 1)
                _exit(1);
        }
        _exit(0);
    }
    for (long i = 0; i < count; i++)
        if (write(there[1], &byte, 1) != 1 || read(back[0], &byte, 1) != 1)
            return 1;
    int status;
    waitpid(child, &status, 0);
    printf("%d %d\n", (unsigned char)byte, status);
    return 0;
}

/* Map 64 MiB, touch each page, unmap; count times. */
static int map_touch_unmap(long count)
{
    const size_t size = 64 << 20;
    unsigned long sum = 0;

    for (long i = 0; i < count; i++) {
        char *at = mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (at == MAP_FAILED)
            return 1;
        madvise(at, size, MADV_NOHUGEPAGE);
        for (size_t offset = 0; offset < size; offset += 4096)
            at[offset] = (char)(offset >> 12);
        for (size_t offset = 0; offset < size; offset += 1 << 20)
            sum += (unsigned char)at[offset + 4096];
        munmap(at, size);
    }
    printf("%lu\n", sum);
    return 0;
}

int main(int argc, char **argv)
{
    long count = argc > 2 ? atol(argv[2]) : 0;

    if (count > 0 && !strcmp(argv[1], "getpid"))
        return getpid_loop(count);
    if (count > 0 && !strcmp(argv[1], "pipe"))
        return ping_pong(count);
    if (count > 0 && !strcmp(argv[1], "mmap"))
        return map_touch_unmap(count);
    fprintf(stderr, "usage: micro getpid|pipe|mmap COUNT\n");
    return 2;
}
