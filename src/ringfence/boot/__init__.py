"""How a guest gets its first instruction: the Linux 64-bit boot protocol, and what it loads."""
