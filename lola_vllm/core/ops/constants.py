"""Numeric constants of the algorithm and of its bounds; `docs/bounds.md` says why.

The C++ and CUDA kernels have them in `csrc/constants.h`; a test compares the two. Imports nothing.
"""

FEATURE_FLOOR = 1e-12  # least entry of a feature map, as in LoLCATs' code
RECALL_EPS = 1e-6  # added to phi.s in the self-recall error; also the least ||v|| that divides it

MAX_LOG_IMPORTANCE = 20.0  # largest size of the logarithm of a pair's importance

# Rounding errors that bounds on recall errors allow for (Lemma 1).
# Of the lengths in a recall error, when a bound is set: sums of float32 products err by some 1e-6
# of these lengths, and rounded folds move a prediction by some 1e-5 of its length in 100,000 folds.
BOUND_SLACK = 2e-5
# On a product of norms that a fold takes from a bound: a float32 product of two norms of n entries
# errs by at most n 2^-24, which is 1e-4 for n = 1,600.
BOUND_FACTOR = 1.0001
# Of the lengths in ||v - p||, at each fold that carries p: p and its distance from v take some
# 2^-24 = 6e-8 each.
DISTANCE_SLACK = 1e-6
# Of ||phi||^2, in the difference ||phi||^2 - (phi.s)^2 / ||s||^2 of two nearly equal numbers, each
# of which errs by some 1e-6 of itself. z stands in for phi.s there, which lowers it by up to
# 2e-6 z / s.s: less than this share once F / 10 pairs are folded.
CANCELLATION_SLACK = 1e-5

PAIR_MAX = 127  # largest entry of a sparse pair that is kept as int8

# The dither of folds (Lemma 3): place = UPDATE * update + ROW * row modulo 2^32.
DITHER_UPDATE = 0x9E3779B9  # 2^32 / the golden ratio, whose multiples spread most evenly
DITHER_ROW = 0xC13FA9A9  # 2^32 / the plastic ratio, 1.3247...: no multiple of the other step
DITHER_UNIT = 2.0**-55  # 2^-32 of the last place of a float32 1, which is 2^-23
EXPONENT_BITS = 0x7F800000  # of a float32

# Longest chunk of a prompt that is attended at once. It bounds the logits to
# rows x num_heads x 256 x (ring + sparse cache) where the update interval is very long.
MAX_CHUNK = 256
