"""Process groups and their collectives: shared memory between the ranks of one host, TCP between hosts."""
