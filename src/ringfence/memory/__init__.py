"""What the guest sees as RAM, and how an address gets from guest-virtual to host."""
