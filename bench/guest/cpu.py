"""A CPU-bound script: arithmetic, calls, lists, dictionaries, strings. Argument: rounds."""

import sys


def fannkuch(n):
    """Longest sequence of pancake flips over all permutations of n."""
    permutation = list(range(n))
    count = [0] * n
    most = checksum = parity = 0
    r = n
    while True:
        while r != 1:
            count[r - 1] = r
            r -= 1
        flips = 0
        row = permutation[:]
        k = row[0]
        while k:
            row[: k + 1] = row[k::-1]
            flips += 1
            k = row[0]
        most = max(most, flips)
        checksum += -flips if parity else flips
        while True:
            if r == n:
                return checksum, most
            permutation[: r + 1] = [*permutation[1 : r + 1], permutation[0]]
            count[r] -= 1
            if count[r] > 0:
                break
            r += 1
        parity ^= 1
        r = max(r, 1)


class Body:
    """A point that is pulled towards the origin."""

    def __init__(self, x, v):
        self.x, self.v = x, v

    def step(self, dt):
        """One step of the leapfrog."""
        self.v -= self.x / (1 + self.x * self.x) * dt
        self.x += self.v * dt


def words(n):
    """Count made-up words in a dictionary."""
    seen = {}
    state = 12345
    for _ in range(n):
        state = (state * 1103515245 + 12345) & 0x7FFFFFFF
        word = f"w{state >> 16 & 0x3FF:x}"
        seen[word] = seen.get(word, 0) + 1
    return len(seen), max(seen.values()), "".join(sorted(seen))[:20]


def primes(n):
    """How many primes there are below n."""
    sieve = bytearray([1]) * n
    for i in range(2, int(n**0.5) + 1):
        if sieve[i]:
            for j in range(i * i, n, i):
                sieve[j] = 0
    return sum(sieve) - 2


def main():
    """All of it, as often as asked."""
    result = None
    for _ in range(int(sys.argv[1])):
        bodies = [Body(i / 7, 1 - i / 5) for i in range(50)]
        for _ in range(300):
            for body in bodies:
                body.step(0.01)
        result = (
            words(20000),
            primes(40000),
            [round(sum(b.x for b in bodies), 9)],
            sum(i * i % 7 for i in range(30000)),
            fannkuch(6),
        )
    print(result)


main()
