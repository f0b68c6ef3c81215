#!/bin/bash
# What srun starts, once a rank:  slurm/rank.sh [--hold-signals] [--completion PATH] PROGRAM.py ARGUMENTS...
# The program then finds RANK, WORLD_SIZE, MASTER_ADDR and so on. With --hold-signals no early signal kills it.
[ "${1:-}" != --hold-signals ] || trap '' USR1 TERM
exec "$ECDIT_PYTHON" -S ecdit_ds/slurm/rank.py "$@"
