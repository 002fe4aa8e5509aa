/* A program for a debugger to stop in: main calls outer, which calls inner. */
#include <stdio.h>

volatile long counter;

__attribute__((noinline)) long inner(long value)
{
    counter = value;
    return value * 3;
}

__attribute__((noinline)) long outer(long value)
{
    return inner(value + 1) + 1;
}

int main(void)
{
    printf("outer gives %ld\n", outer(41));
    return 0;
}
