/* A first process that asks as little of its machine as one can: it goes over its memory again and
 * again and counts its turns, and what it found changed, in a page that begins with "humble page".
 * It says once, by system call, that it begins; a software KVM knows no system calls.
 */
#define WORDS (64 * 4096 / 8)

static struct {
    char name[16];
    volatile unsigned long turns, wrong;
} page __attribute__((aligned(4096))) = {"humble page", 0, 0};

static volatile unsigned long memory[WORDS];

void _start(void)
{
    static const char begins[] = "humble\n";
    long result = 1;
    __asm__ volatile("syscall"
                     : "+a"(result)
                     : "D"(1), "S"(begins), "d"(sizeof begins - 1)
                     : "rcx", "r11", "memory");
    for (;;) {
        for (unsigned n = 0; n < WORDS; n += 8)
            memory[n] = n * page.turns;
        for (unsigned n = 0; n < WORDS; n += 8)
            page.wrong += memory[n] != n * page.turns;
        page.turns++;
    }
}
