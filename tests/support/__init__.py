"""What tests of all tiers stand on: the installed bundle, virtual machines, images, waiting, leaks."""
