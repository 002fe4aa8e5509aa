/* Watches for what a guest must not notice when it is paused, saved or moved: clocks that go back
 * or leap, memory that changes by itself, sums that come out wrong. Prints a line whenever all is
 * well, and one that says TROUBLE when it isn't.
 *
 * usage: steady MEGABYTES  (of patterns that are written over and over, each page in turn)
 */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096
#define LEAP 5000000000LL /* ns that a busy host may take a vCPU away */

static volatile int over;

static void trouble(const char *what, long long one, long long other)
{
    printf("TROUBLE: %s (%lld, %lld)\n", what, one, other);
    fflush(stdout);
}

static long long now(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static unsigned long long ticks(void)
{
    unsigned low, high;
    __asm__ volatile("lfence; rdtsc" : "=a"(low), "=d"(high));
    return (unsigned long long)high << 32 | low;
}

static void *clocks(void *nothing)
{
    static const clockid_t all[] = {CLOCK_MONOTONIC, CLOCK_REALTIME, CLOCK_BOOTTIME,
                                    CLOCK_MONOTONIC_RAW};
    long long last[4];
    unsigned long long counter = ticks();
    for (int i = 0; i < 4; i++)
        last[i] = now(all[i]);
    while (!over) {
        for (int i = 0; i < 4; i++) {
            long long at = now(all[i]);
            if (at < last[i])
                trouble("a clock went back", last[i], at);
            if (at > last[i] + LEAP)
                trouble("a clock leapt", last[i], at);
            last[i] = at;
        }
        unsigned long long count = ticks();
        if (count < counter)
            trouble("the counter went back", (long long)counter, (long long)count);
        counter = count;
        usleep(500);
    }
    return nothing;
}

static uint64_t pattern(uint64_t page, uint64_t round, uint64_t word)
{
    uint64_t x = page * 0x9E3779B97F4A7C15ull + round * 0xD1B54A32D192ED03ull + word;
    x ^= x >> 29;
    return x * 0xBF58476D1CE4E5B9ull;
}

static uint64_t checksum(uint64_t seed)
{
    uint64_t sum = seed;
    double fraction = 1.0 + seed % 7;
    for (uint64_t i = 0; i < 200000; i++) {
        sum = (sum << 7 | sum >> 57) ^ i * 0x100000001B3ull;
        fraction = fraction * 1.0000001 + 0.25;
    }
    return sum ^ (uint64_t)fraction;
}

int main(int argc, char **argv)
{
    size_t pages = (argc > 1 ? strtoul(argv[1], NULL, 10) : 8) << 8;
    uint64_t *area = aligned_alloc(PAGE, pages * PAGE);
    uint64_t *rounds = calloc(pages, sizeof *rounds);
    uint64_t known[4];
    pthread_t watcher;

    for (size_t p = 0; p < pages; p++)
        for (size_t w = 0; w < PAGE / 8; w++)
            area[p * (PAGE / 8) + w] = pattern(p, 0, w);
    for (int i = 0; i < 4; i++)
        known[i] = checksum(i);
    pthread_create(&watcher, NULL, clocks, NULL);

    size_t next = 0;
    long long told = 0;
    for (unsigned long turn = 1;; turn++) {
        for (int n = 0; n < 64; n++, next = (next + 1) % pages) {
            uint64_t *page = area + next * (PAGE / 8);
            for (size_t w = 0; w < PAGE / 8; w++)
                if (page[w] != pattern(next, rounds[next], w)) {
                    trouble("memory changed", (long long)next, (long long)w);
                    break;
                }
            rounds[next]++;
            for (size_t w = 0; w < PAGE / 8; w++)
                page[w] = pattern(next, rounds[next], w);
        }
        if (checksum(turn % 4) != known[turn % 4])
            trouble("a sum came out wrong", (long long)turn, 0);
        if (now(CLOCK_MONOTONIC) > told + 50000000) {
            told = now(CLOCK_MONOTONIC);
            printf("steady %lu\n", turn);
            fflush(stdout);
        }
    }
}
