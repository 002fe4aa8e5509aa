"""What is plugged into the board: devices on the PCI bus."""
