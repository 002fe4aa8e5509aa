"""Longer texts below the help of commands: examples, and what exit statuses mean."""

from __future__ import annotations

STATUSES = """\
[bold]Exit status[/bold]
0      the guest powered off, or you ended it (Ctrl-A x, ringfence stop)
2      wrong usage
3      bad image (kernel, initrd, stored image)
4      the guest crashed; its registers are on stderr
5      time limit (--timeout) reached
6      the host lacks something that is needed
7      the guest asked for a reset (with --on-reset exit, the default)
odd    with --test-devices or --debug-exit: what the guest wrote to the exit port
70     a bug of Ringfence's
128+N  ended by signal N: 130 SIGINT, 143 SIGTERM, 141 nobody reads stdout
"""

RUN_EXAMPLES = """\
[bold]Examples[/bold]
ringfence run
ringfence run --kernel bzImage --initrd initrd.gz --append console=ttyS0
echo 'uname -a; poweroff -f' | ringfence run debian --timeout 60
ringfence run builtin --stats - --trace exits
ringfence run --net user --forward 8080:80
ringfence run --share ~/src,ro               (in the guest: /mnt/src)
ringfence run --bios seabios --disk disk.img
ringfence run --bios seabios --disk cloud.qcow2,snapshot --ssh-key id.pub --hostname web
ringfence run --kernel test.elf --test-devices --append "first second"
ringfence run --gdb :1234 --gdb-wait
ringfence run debian-disk --ephemeral --net user
ringfence run --name web --detach; ringfence console web; ringfence stop web

The first one fetches Debian's kernel and busybox if need be, and boots to a shell.
On a terminal, Ctrl-A x leaves and Ctrl-A h lists the other keys.
"""

FIRST_EXAMPLES = """\
[bold]Examples[/bold]
ringfence run                                  (Debian's kernel and a shell; Ctrl-A x leaves)
ringfence run --name web --net user --detach; ringfence exec web -- uname -a; ringfence stop web
ringfence doctor                               (what this host offers)
ringfence --show-completion >> ~/.bashrc       (completion of commands, machines, images)
"""

SYMBOLS_EXAMPLES = """\
[bold]Examples[/bold]
ringfence symbols debian -o debian.symbols
ringfence run --gdb :1234 --gdb-wait
gdb debian.symbols -ex 'target remote :1234' -ex 'break start_kernel' -ex continue -ex backtrace
"""
