"""What kdcache needs of the machine: files, locks, signals, progress, energy, other machines and other processes."""
