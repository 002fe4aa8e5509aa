/* Reads all clocks over and over until a file appears, on one CPU after the other; says whether one
   ever went backwards.

   clocks FILE        until FILE exists: "backwards N step S" (the largest step of CLOCK_MONOTONIC, ns)
   clocks -n COUNT    so many readings of CLOCK_MONOTONIC, then "done" */

#define _GNU_SOURCE
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include <x86intrin.h>

static const clockid_t clocks[] = {
	CLOCK_MONOTONIC, CLOCK_MONOTONIC_RAW, CLOCK_BOOTTIME, CLOCK_REALTIME,
};
enum { CLOCKS = sizeof clocks / sizeof *clocks };

static long long now(clockid_t clock)
{
	struct timespec at;
	clock_gettime(clock, &at);
	return at.tv_sec * 1000000000LL + at.tv_nsec;
}

static void move_to(int cpu)
{
	cpu_set_t set;
	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	sched_setaffinity(0, sizeof set, &set);
}

int main(int argc, char **argv)
{
	if (argc == 3 && !strcmp(argv[1], "-n")) {
		for (long left = atol(argv[2]); left; left--)
			now(CLOCK_MONOTONIC);
		puts("done");
		return 0;
	}
	long long last[CLOCKS] = { 0 }, step = 0, backwards = 0;
	unsigned long long ticks = 0;
	unsigned aux;
	long cpus = sysconf(_SC_NPROCESSORS_ONLN);
	for (unsigned turn = 0; turn % 4096 || access(argv[1], F_OK); turn++) {
		if (cpus > 1 && turn % 64 == 0)
			move_to(turn / 64 % cpus);
		for (int n = 0; n < CLOCKS; n++) {
			long long at = now(clocks[n]);
			if (at < last[n])
				backwards++;
			if (n == 0 && last[0] && at - last[0] > step)
				step = at - last[0];
			last[n] = at;
		}
		unsigned long long first = __rdtsc(), second = __rdtscp(&aux);
		if (first < ticks || second < first)
			backwards++;
		ticks = second;
	}
	printf("backwards %lld step %lld\n", backwards, step);
	return 0;
}
