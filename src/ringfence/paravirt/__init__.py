"""What an enlightened guest asks of the VMM."""
