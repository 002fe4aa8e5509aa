/* What a user program can see of its CPU: exceptions with all their details, flags, selectors,
 * bases, vector state over system calls and faults, code that changes.
 *
 * All of it is written down, round after round; each has to be like the first. The log is the same
 * on any Linux, but for the lines that begin with "identity", which show whose CPU it is. */
#define _GNU_SOURCE
#include <asm/prctl.h>
#include <cpuid.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#define ROUNDS 4
static char first[16384], log_now[16384];
static size_t filled;
static sigjmp_buf back;
static char *area; /* three pages: read-write, read-only, inaccessible */
static unsigned char *code; /* readable, writable, executable */

static void note(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    filled += vsnprintf(log_now + filled, sizeof log_now - filled, format, arguments);
    va_end(arguments);
}

static void caught(int number, siginfo_t *info, void *context)
{
    greg_t *r = ((ucontext_t *)context)->uc_mcontext.gregs;
    long address = (long)info->si_addr, rip = r[REG_RIP] - (greg_t)code;
    int fault = r[REG_TRAPNO] == 14;
    note(" signal %d code %d trap %d error %#llx address %lx rip %ld", number, info->si_code,
         (int)r[REG_TRAPNO], fault ? r[REG_ERR] : 0, fault ? address : 0,
         (unsigned long)rip < 4096 ? (long)rip : -1);
    siglongjmp(back, 1);
}

/* Run bytes of code with RDI and RSI given; its RAX is noted. Fresh bytes each time: the page
 * changes between being written and being executed. */
static void attempt(const char *name, const char *bytes, size_t size, void *rdi, long rsi)
{
    memcpy(code, bytes, size);
    code[size] = 0xC3;
    note("%s:", name);
    if (!sigsetjmp(back, 1))
        note(" gives %lx", ((long (*)(void *, long))code)(rdi, rsi));
    note("\n");
}
#define TRY(name, bytes, rdi, rsi) attempt(name, bytes, sizeof bytes - 1, rdi, rsi)

static void spin(double seconds)
{
    struct timespec begin, now;
    volatile long count = 0;
    clock_gettime(CLOCK_MONOTONIC, &begin);
    do {
        for (int n = 0; n < 2000000; n++)
            count += n;
        clock_gettime(CLOCK_MONOTONIC, &now);
    } while (now.tv_sec - begin.tv_sec + (now.tv_nsec - begin.tv_nsec) / 1e9 < seconds);
}

static void exceptions(void)
{
    TRY("ud2", "\x0f\x0b", 0, 0);
    TRY("int3", "\x90\xcc", 0, 0);
    TRY("int 3", "\xcd\x03", 0, 0);
    TRY("icebp", "\xf1", 0, 0);
    TRY("int 0x40", "\xcd\x40", 0, 0);
    TRY("divide by 0", "\x31\xc0\x99\x31\xc9\xf7\xf1", 0, 0);
    TRY("load", "\x48\x8b\x07", area, 0);
    TRY("store", "\x48\x89\x07", area + 8, 0);
    TRY("load, read-only", "\x48\x8b\x07", area + 4096, 0);
    TRY("store, read-only", "\x48\x89\x07", area + 4096, 0);
    TRY("load, none", "\x48\x8b\x07", area + 8192, 0);
    TRY("store, none", "\x48\x89\x07", area + 8192, 0);
    TRY("load into none", "\x48\x8b\x07", area + 8188, 0);
    TRY("jump to data", "\xff\xe7", area + 16, 0);
    TRY("jump to none", "\xff\xe7", area + 8200, 0);
    TRY("not canonical", "\x48\x8b\x07", (void *)(1L << 60), 0);
    TRY("kernel", "\x48\x8b\x07", (void *)-4096L, 0);
    TRY("hlt", "\xf4", 0, 0);
    TRY("cli", "\xfa", 0, 0);
    TRY("in", "\xec", 0, 0);
    TRY("cr3", "\x0f\x20\xd8", 0, 0);
    TRY("rdmsr", "\x0f\x32", 0, 0);
    TRY("aligned", "\x66\x0f\x6f\x07", area + 8, 0);
    TRY("trap flag", "\x9c\x81\x0c\x24\0\1\0\0\x9d\x90\x90", 0, 0);
    TRY("sse division", "\x6a\0\x0f\xae\x14\x24\x58\x0f\x57\xc0\x0f\x5e\xc0", area, 0);
    asm volatile("ldmxcsr %0" : : "m"((int){0x1f80}));
    TRY("x87 division", "\x6a\0\xd9\x2c\x24\x58\xd9\xe8\xd9\xee\xde\xf9\x9b", area, 0);
    asm volatile("fninit");
    TRY("flags", "\x9c\x58", 0, 0);
    TRY("cs", "\x66\x8c\xc8", 0, 0);
    TRY("ss", "\x66\x8c\xd0", 0, 0);
    TRY("ds", "\x31\xc0\x66\x8c\xd8", 0, 0);
    TRY("load ds", "\xb8\x2b\0\0\0\x8e\xd8\x31\xc0\x8c\xd8\x31\xc9\x8e\xd9", 0, 0);
    TRY("bad ds", "\xb8\x08\0\0\0\x8e\xd8", 0, 0);
    TRY("far return", "\x6a\x33\x48\x8d\x05\x05\0\0\0\x50\x48\xcb\xf4\xf4\xb0\x07", 0, 0);
    TRY("int 0x80", "\xb8\xe7\x03\0\0\xcd\x80", 0, 0);
    TRY("getppid", "\xb8\x6e\0\0\0\x0f\x05\x0f\xb6\xc0\x31\xc0", 0, 0);
    TRY("bad call", "\xb8\xff\xff\0\0\x0f\x05", 0, 0);
    TRY("store into own page", "\xc6\x47\x40\x07\x0f\xb6\x47\x40", code, 0);
    TRY("store ahead", "\xc6\x47\x08\x05\x90\x90\x90\xb8\0\0\0\0", code, 0);
    TRY("wrgsbase", "\xf3\x48\x0f\xae\xdf\x31\xc0\xf3\x48\x0f\xae\xc8", area, 0);
}

static void code_that_changes(void)
{
    long sum = 0;
    for (int n = 0; n < 500; n++) {
        code[0] = 0xB8;
        memcpy(code + 1, &n, 4);
        code[5] = 0xC3;
        sum += ((long (*)(void))code)();
    }
    note("code written 500 times: %ld\n", sum);
    sum = 0;
    for (int n = 0; n < 50; n++) {
        mprotect(code, 4096, PROT_READ | PROT_WRITE);
        memcpy(code + 1, &n, 4);
        mprotect(code, 4096, PROT_READ | PROT_EXEC);
        sum += ((long (*)(void))code)();
    }
    mprotect(code, 4096, PROT_READ | PROT_WRITE | PROT_EXEC);
    note("protected between: %ld\n", sum);
}

static void registers(void)
{
    uint64_t sum = 0;
    for (int n = 0; n < 300; n++) {
        uint64_t in[2] = {n * 0x9E3779B97F4A7C15u, ~(uint64_t)n}, out[2], top;
        asm volatile("movdqu %3, %%xmm13\n mov $110, %%eax\n mov %4, %%r13\n syscall\n"
                     "movdqu %%xmm13, %0\n mov %%r13, %1"
                     : "=m"(out), "=r"(top), "+m"(in)
                     : "m"(in), "r"(in[0])
                     : "rax", "rcx", "r11", "r13", "xmm13", "memory");
        sum += out[0] ^ out[1] ^ top;
    }
    note("registers over system calls: %lx\n", (long)sum);
    long base = 0;
    syscall(SYS_arch_prctl, ARCH_SET_GS, area);
    asm volatile("mov %%gs:8, %0" : "=r"(base));
    note("gs: %lx\n", base);
    syscall(SYS_arch_prctl, ARCH_SET_GS, 0);
    int child = fork();
    if (child == 0) {
        memset(area, 7, 4096);
        _exit(area[100]);
    }
    int status = 0;
    waitpid(child, &status, 0);
    note("child: %x, parent: %d\n", status, area[100]);
    char *many = mmap(0, 1 << 22, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    long total = 0;
    for (int n = 0; n < 1 << 22; n += 4096)
        total += many[n];
    for (int n = 0; n < 1 << 22; n += 4096)
        many[n] = n >> 12;
    spin(0.02);
    for (int n = 0; n < 1 << 22; n += 4096)
        total += many[n];
    madvise(many, 1 << 21, MADV_DONTNEED);
    for (int n = 0; n < 1 << 22; n += 4096)
        total += many[n];
    munmap(many, 1 << 22);
    note("pages: %ld\n", total);
    double x = 1.5;
    for (int n = 0; n < 100; n++) {
        asm volatile("fldl %0\n fsqrt\n fstpl %0" : "+m"(x));
        x += 1;
        if (n % 10 == 0)
            usleep(100);
    }
    note("x87: %.17g\n", x);
}

static void identity(void)
{
    unsigned a, b, c, d;
    __cpuid(1, a, b, c, d);
    note("identity: cpuid %x %x %x\n", a, c & ~(1u << 27), d);
    __cpuid(0x40000000, a, b, c, d);
    note("identity: hypervisor %.4s%.4s%.4s\n", (char *)&b, (char *)&c, (char *)&d);
    asm volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
    note("identity: xcr0 %x\n", a);
    TRY("identity: rdpid", "\xf3\x48\x0f\xc7\xf8", 0, 0);
    TRY("identity: lsl", "\xb8\x7b\0\0\0\x0f\x03\xc0", 0, 0);
    note("identity: vsyscall");
    time_t now = time(0);
    if (!sigsetjmp(back, 1))
        note(" %d", ((time_t (*)(time_t *))0xffffffffff600400)(0) - now < 2);
    note("\n");
    uint32_t low, high, cpu;
    asm volatile("rdtscp" : "=a"(low), "=d"(high), "=c"(cpu));
    note("identity: rdtscp %x\n", cpu);
}

int main(void)
{
    cpu_set_t here;
    CPU_ZERO(&here);
    CPU_SET(sched_getcpu(), &here);
    sched_setaffinity(0, sizeof here, &here);
    stack_t stack = {.ss_sp = malloc(65536), .ss_size = 65536};
    sigaltstack(&stack, 0);
    struct sigaction action = {.sa_sigaction = caught, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    for (int number = 1; number < 32; number++)
        if (number != SIGKILL && number != SIGSTOP && number != SIGCHLD && number != SIGTERM)
            sigaction(number, &action, 0);
    area = mmap((void *)0x10000000, 3 * 4096, PROT_READ | PROT_WRITE,
                MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    memset(area, 0x5A, 8192);
    mprotect(area + 4096, 4096, PROT_READ);
    mprotect(area + 8192, 4096, PROT_NONE);
    code = mmap((void *)0x20000000, 4096, PROT_READ | PROT_WRITE | PROT_EXEC,
                MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    for (int round = 0; round < ROUNDS; round++) {
        filled = 0;
        memset(area, 0x5A, 4096);
        spin(round ? 0.06 : 0);
        exceptions();
        code_that_changes();
        registers();
        identity();
        if (round == 0)
            strcpy(first, log_now);
        else if (strcmp(first, log_now)) {
            printf("round %d differs:\n%s", round, log_now);
            return 1;
        }
    }
    printf("%s", first);
    return 0;
}
