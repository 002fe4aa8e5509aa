/* Processes, signals, memory and floating point, with output that does not depend on chance:
 * a guest and its host must print the same. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <fenv.h>
#include <math.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static sigjmp_buf back;
static volatile sig_atomic_t seen, code;
static void *volatile where;

static void caught(int number, siginfo_t *info, void *context)
{
    (void)context;
    seen = number;
    code = info->si_code;
    where = info->si_addr;
    siglongjmp(back, 1);
}

static volatile sig_atomic_t ticks;

static void tick(int number)
{
    (void)number;
    ticks++;
}

static void handle(int number, int on_stack)
{
    struct sigaction action = { .sa_sigaction = caught,
                                .sa_flags = SA_SIGINFO | (on_stack ? SA_ONSTACK : 0) };
    sigaction(number, &action, NULL);
}

static int deep(int n)
{
    volatile char room[4096];

    room[0] = (char)n;
    return deep(n + 1) + room[0];
}

static void faults(void)
{
    static char other[1 << 16];
    stack_t stack = { .ss_sp = other, .ss_size = sizeof other };
    char *page = mmap(0, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    volatile int zero = 0;

    sigaltstack(&stack, NULL);
    int numbers[] = { SIGSEGV, SIGFPE, SIGILL, SIGTRAP, SIGBUS };
    for (unsigned n = 0; n < sizeof numbers / sizeof *numbers; n++)
        handle(numbers[n], 1);

    mprotect(page + 4096, 4096, PROT_READ);
    if (!sigsetjmp(back, 1))
        page[4096 + 5] = 1;
    printf("read-only: %d code %d offset %ld\n", seen, code, (long)((char *)where - page));
    mprotect(page + 4096, 4096, PROT_NONE);
    if (!sigsetjmp(back, 1))
        *(volatile uint64_t *)(page + 4092);
    printf("across pages: %d code %d offset %ld\n", seen, code, (long)((char *)where - page));
    if (!sigsetjmp(back, 1))
        ((void (*)(void))page)();
    printf("no-execute: %d code %d offset %ld\n", seen, code, (long)((char *)where - page));
    if (!sigsetjmp(back, 1))
        *(volatile char *)0x8000000000000000;
    printf("non-canonical: %d code %d\n", seen, code);
    if (!sigsetjmp(back, 1))
        zero = 5 / zero;
    printf("divide: %d code %d\n", seen, code);
    if (!sigsetjmp(back, 1))
        __asm__ volatile("ud2");
    printf("invalid: %d code %d\n", seen, code);
    if (!sigsetjmp(back, 1))
        __asm__ volatile("int3");
    printf("breakpoint: %d code %d\n", seen, code);
    if (!sigsetjmp(back, 1))
        __asm__ volatile("hlt");
    printf("privileged: %d code %d\n", seen, code);
    if (!sigsetjmp(back, 1))
        printf("deep %d\n", deep(0));
    else
        printf("stack overflow: %d\n", seen);
    munmap(page, 8192);
    if (!sigsetjmp(back, 1))
        page[0] = 1;
    printf("unmapped: %d code %d\n", seen, code);
}

static void processes(void)
{
    int status, there[2], back_pipe[2];
    long total = 0;
    char buffer[1 << 14];

    for (int n = 0; n < 20; n++) {
        pid_t child = fork();
        if (child == 0)
            _exit(n * 3);
        waitpid(child, &status, 0);
        total += WEXITSTATUS(status);
    }
    printf("exit statuses %ld\n", total);

    pid_t child = fork();
    if (child == 0)
        for (;;)
            pause();
    kill(child, SIGTERM);
    waitpid(child, &status, 0);
    printf("signalled %d by %d\n", WIFSIGNALED(status), WTERMSIG(status));

    child = fork();
    if (child == 0) {
        raise(SIGSTOP);
        _exit(4);
    }
    waitpid(child, &status, WUNTRACED);
    printf("stopped %d by %d\n", WIFSTOPPED(status), WSTOPSIG(status));
    kill(child, SIGCONT);
    waitpid(child, &status, 0);
    printf("then %d\n", WEXITSTATUS(status));

    if (pipe(there) || socketpair(AF_UNIX, SOCK_STREAM, 0, back_pipe))
        exit(1);
    child = fork();
    if (child == 0) {
        ssize_t length;
        unsigned sum = 0;

        close(there[1]);
        while ((length = read(there[0], buffer, sizeof buffer)) > 0)
            for (ssize_t n = 0; n < length; n++)
                sum = sum * 31 + (unsigned char)buffer[n];
        if (write(back_pipe[1], &sum, sizeof sum) != sizeof sum)
            _exit(1);
        _exit(0);
    }
    close(there[0]);
    for (int n = 0; n < 50; n++) {
        memset(buffer, n, sizeof buffer);
        if (write(there[1], buffer, sizeof buffer - n) != (ssize_t)sizeof buffer - n)
            exit(1);
    }
    close(there[1]);
    unsigned sum = 0;
    if (read(back_pipe[0], &sum, sizeof sum) != sizeof sum)
        exit(1);
    waitpid(child, &status, 0);
    printf("pipe %u\n", sum);
}

static void signals(void)
{
    struct sigaction action = { .sa_handler = tick };
    struct itimerval often = { { 0, 2000 }, { 0, 2000 } }, off = { { 0, 0 }, { 0, 0 } };
    sigset_t set, old, pending;

    sigaction(SIGUSR2, &action, NULL);
    sigemptyset(&set);
    sigaddset(&set, SIGUSR2);
    sigprocmask(SIG_BLOCK, &set, &old);
    raise(SIGUSR2);
    sigpending(&pending);
    printf("pending %d, handled %d\n", sigismember(&pending, SIGUSR2), (int)ticks);
    sigprocmask(SIG_SETMASK, &old, NULL);
    printf("handled %d\n", (int)ticks);

    /* Interrupted at any point, this sum must come out right, vector registers included. */
    sigaction(SIGALRM, &action, NULL);
    setitimer(ITIMER_REAL, &often, NULL);
    double sum = 0;
    unsigned long mixed = 1;
    ticks = 0;
    while (ticks < 25) {
        double part = 0;
        mixed = 1;
        for (int n = 1; n <= 50000; n++) {
            part += 1.0 / n;
            mixed = mixed * 6364136223846793005UL + 1442695040888963407UL;
        }
        if (sum != 0 && part != sum)
            printf("a signal changed the sum: %a, %a\n", sum, part);
        sum = part;
    }
    setitimer(ITIMER_REAL, &off, NULL);
    printf("%a %lx\n", sum, mixed);
}

static void memory(void)
{
    const size_t size = 4 << 20;
    unsigned *shared = mmap(0, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    unsigned *own = mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    unsigned sum = 0;

    for (size_t n = 0; n < size / 4; n += 512)
        shared[n] = own[n] = (unsigned)n;
    if (fork() == 0) {
        for (size_t n = 0; n < size / 4; n += 512) {
            shared[n] *= 3;
            own[n] *= 5;
        }
        _exit(0);
    }
    wait(NULL);
    for (size_t n = 0; n < size / 4; n += 512)
        sum += shared[n] * 7 + own[n];
    printf("shared and copied %u\n", sum);
    own = mremap(own, size, 2 * size, MREMAP_MAYMOVE);
    printf("moved %u %u\n", own[512 * 9], own[size / 4 + 3]);
    madvise(own, size, MADV_DONTNEED);
    printf("dropped %u\n", own[512 * 9]);

    int file = open("mapped", O_RDWR | O_CREAT | O_TRUNC, 0600);
    if (ftruncate(file, 8192))
        exit(1);
    char *bytes = mmap(0, 8192, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    strcpy(bytes + 4090, "across the pages");
    char text[17] = "";
    if (pread(file, text, 16, 4090) != 16)
        exit(1);
    printf("file %s\n", text);
    if (ftruncate(file, 4096))
        exit(1);
    handle(SIGBUS, 1);
    if (!sigsetjmp(back, 1))
        *(volatile char *)(bytes + 4096);
    printf("behind the end: %d code %d\n", seen, code);
    unlink("mapped");

    /* Code that is written, run, changed, and run again. */
    unsigned char *made = mmap(0, 4096, PROT_READ | PROT_WRITE | PROT_EXEC,
                               MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    long total = 0;
    for (int n = 0; n < 300; n++) {
        unsigned char function[] = { 0xb8, (unsigned char)n, (unsigned char)(n >> 8), 0, 0, 0xc3 };
        memcpy(made, function, sizeof function);
        total += ((int (*)(void))made)();
    }
    printf("made code %ld\n", total);
    /* It changes an instruction just ahead of itself: mov byte [rip+1], 42; mov eax, 1; ret. */
    unsigned char itself[] = { 0xc6, 0x05, 1, 0, 0, 0, 42, 0xb8, 1, 0, 0, 0, 0xc3 };
    memcpy(made + 64, itself, sizeof itself);
    int first = ((int (*)(void))(made + 64))();
    made[64 + 8] = 1;
    printf("changes itself %d %d\n", first, ((int (*)(void))(made + 64))());
}

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t turn = PTHREAD_COND_INITIALIZER;
static __thread int mine;
static long counter, weighted;

static void *work(void *argument)
{
    long number = (long)argument;

    for (int n = 0; n < 5000; n++) {
        mine++;
        __atomic_fetch_add(&counter, 1, __ATOMIC_SEQ_CST);
    }
    pthread_mutex_lock(&lock);
    weighted += mine * number;
    pthread_cond_signal(&turn);
    pthread_mutex_unlock(&lock);
    return (void *)(number * number);
}

static void threads(void)
{
    pthread_t all[6];
    long sum = 0;

    for (long n = 0; n < 6; n++)
        pthread_create(&all[n], NULL, work, (void *)n);
    for (int n = 0; n < 6; n++) {
        void *result;
        pthread_join(all[n], &result);
        sum += (long)result;
    }
    printf("threads %ld %ld %ld %d\n", sum, counter, weighted, mine);
}

static void floating(void)
{
    int modes[] = { FE_TONEAREST, FE_UPWARD, FE_DOWNWARD, FE_TOWARDZERO };
    volatile double zero = 0, one = 1, three = 3;
    volatile double tiny = 4.9406564584124654e-324;
    volatile double huge = 1.7976931348623157e308;
    volatile float single = 1.1f;
    volatile long double wide = 1;

    for (int n = 0; n < 4; n++) {
        fesetround(modes[n]);
        wide = 1;
        for (int k = 1; k < 40; k++)
            wide += wide / (k + 2);
        printf("%d: %a %a %La %ld\n", n, one / three, -one / three, wide, lrint(2.5 * three));
    }
    fesetround(FE_TONEAREST);
    feclearexcept(FE_ALL_EXCEPT);
    volatile double result = one / zero;
    printf("%f %d", result, !!fetestexcept(FE_DIVBYZERO));
    result = huge * 2;
    printf(" %f %d", result, !!fetestexcept(FE_OVERFLOW));
    result = tiny / 2;
    printf(" %a %d", result, !!fetestexcept(FE_UNDERFLOW));
    result = sqrt(-one);
    printf(" %d %d\n", isnan(result), !!fetestexcept(FE_INVALID));
    printf("%a %a %a\n", tiny * 3, (double)(single * single), fma(one / three, three, -one));
    for (int n = 1; n < 8; n++)
        printf("%.13g %.13g %.13g %.13g %.15Lg\n", sin(n * 100.0), log(n / 7.0), pow(n, 1.7),
               tgamma(n / 3.0), expl(n / 5.0L));
    printf("%d %ld %lu\n", (int)-3.99, (long)9e18, (unsigned long)1.8e19);

    /* An unmasked exception of each unit arrives as a signal, with its code. */
    handle(SIGFPE, 1);
    feenableexcept(FE_DIVBYZERO);
    if (!sigsetjmp(back, 1))
        result = one / zero;
    printf("sse: %d code %d\n", seen, code);
    seen = 0;
    feenableexcept(FE_DIVBYZERO);
    if (!sigsetjmp(back, 1)) {
        wide = wide / (long double)0;
        wide = wide + 1;
    }
    printf("x87: %d code %d\n", seen, code);
    fedisableexcept(FE_ALL_EXCEPT);
}

static void times(void)
{
    struct timespec last, now, pause = { 0, 20000000 };
    int backwards = 0;

    clock_gettime(CLOCK_MONOTONIC, &last);
    for (int n = 0; n < 20000; n++) {
        clock_gettime(CLOCK_MONOTONIC, &now);
        backwards += now.tv_sec < last.tv_sec
            || (now.tv_sec == last.tv_sec && now.tv_nsec < last.tv_nsec);
        last = now;
    }
    nanosleep(&pause, NULL);
    clock_gettime(CLOCK_MONOTONIC, &now);
    long slept = (now.tv_sec - last.tv_sec) * 1000000000L + now.tv_nsec - last.tv_nsec;
    printf("backwards %d, slept enough %d\n", backwards, slept >= 20000000);
}

int main(void)
{
    setvbuf(stdout, NULL, _IONBF, 0);
    faults();
    processes();
    signals();
    memory();
    threads();
    floating();
    times();
    return 23;
}
