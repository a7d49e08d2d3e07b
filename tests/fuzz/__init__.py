"""Damaged inputs for every reader: each is read, or refused with an InputError.

    make fuzz                                            10,000 inputs over all targets
    python -m tests.fuzz --target gguf --inputs 2000     one target
    python -m tests.fuzz --target gguf --only 123        one input again, with its traceback

A target is a module of `tests.fuzz.targets` with two functions, and two more where they are
needed: bytes and JSON values changed at random may rarely get past the first check.

    seeds(folder)          writes valid inputs: each entry of the folder, a file or a folder, is one
    read(path)             reads one input as the command would
    mutate(random, path)   damages one in place (default: tests.fuzz.mutate.mutate)
    prepare()              what a process compiles before its first input (default: nothing)

A module whose inputs each take as long as n of others says so: COST = n; it is given an nth.

Anything but a return or an InputError is a failure; so are more than 20 s, more than 1 GiB of
memory, and the death of the process. Inputs are a function of the seed, the target and a number.
"""
