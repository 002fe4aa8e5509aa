/* Writes to RAM at a rate. usage: dirty MEGABYTES MEGABYTES_PER_SECOND
 *
 * One word in each page of an area, round and round; a page counts as 4 KiB written.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define PAGE 4096

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

int main(int argc, char **argv)
{
    size_t pages = strtoul(argc > 1 ? argv[1] : "16", NULL, 10) << 8;
    double rate = strtod(argc > 2 ? argv[2] : "0", NULL) * 256;
    volatile uint64_t *area = aligned_alloc(PAGE, pages * PAGE);

    for (size_t i = 0; i < pages * PAGE / 8; i++)
        area[i] = i * 0x9E3779B97F4A7C15ull;
    puts("dirty: ready");
    fflush(stdout);
    double began = now();
    for (uint64_t written = 0, at = 0;;) {
        while (written < (now() - began) * rate) {
            area[at * (PAGE / 8)]++;
            at = (at + 1) % pages;
            written++;
        }
        struct timespec rest = {0, 1000000};
        nanosleep(&rest, NULL);
    }
}
