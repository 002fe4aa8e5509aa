"""How Python source becomes native code that the guest's hot path may call."""
