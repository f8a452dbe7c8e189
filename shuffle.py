"""The order in which rows are drawn: it depends on (seed, epoch) alone, so that a resumed run and any number of ranks
see the same data."""

import itertools

import numpy as np

MANY = 2**20  # rows from which on their permutation is not held in memory, where it would take 8 bytes a row


def order(n, seed, epoch):
    """The epoch's permutation of n rows; the same on every rank."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def index_stream(n, seed, start=0):
    """Row numbers forever, a fresh permutation each epoch, from the start-th draw on (to resume)."""
    epoch, k = divmod(start, n)
    while True:
        yield from order(n, seed, epoch)[k:] if n < MANY else scattered(n, seed, epoch, k)
        epoch, k = epoch + 1, 0


def scattered(n, seed, epoch, start=0):
    """The numbers below n in an order of their own, from the start-th on. Nothing is held in memory.

    A Feistel network turns the two halves of a number's bits into one another, and so is a permutation of all numbers
    of that many bits. One that leads to n or above is sent through again until it does not: what is left is a
    permutation of the numbers below n (Black and Rogaway, 2002)."""
    keys = [int(key) for key in np.random.SeedSequence([seed, epoch]).generate_state(6, np.uint64)]
    half = max(1, (int(n - 1).bit_length() + 1) // 2)
    low = 2**half - 1
    for x in itertools.islice(itertools.count(start), n - start):
        while True:
            left, right = x >> half, x & low
            for key in keys:
                left, right = right, left ^ (mixed(right + key) & low)
            x = left << half | right
            if x < n:
                break
        yield x


def mixed(x):
    """64 bits -> 64 bits that look random (the last step of SplitMix64)."""
    x &= 2**64 - 1
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31
