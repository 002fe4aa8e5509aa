"""How does GDB look into a machine: the remote serial protocol over a socket."""
