"""Process groups and their collectives: shared memory between the ranks of one host."""
