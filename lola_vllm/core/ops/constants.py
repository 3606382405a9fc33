"""Numeric constants of the algorithm and of its bounds; `docs/bounds.md` says why.

The C++ and CUDA kernels have them in `csrc/constants.h`; a test compares the two. Imports nothing.
"""

FEATURE_FLOOR = 1e-12  # least entry of a feature map, as in LoLCATs' code
RECALL_EPS = 1e-6  # added to phi.s in the self-recall error; also the least ||v|| that divides it

MAX_LOG_IMPORTANCE = 20.0  # largest size of the logarithm of a pair's importance

# Rounding errors that bounds on recall errors allow for (Lemma 1).
BOUND_SLACK = 2e-5  # of the lengths in a recall error, when a bound is set
BOUND_FACTOR = 1.0001  # on a product of norms that a fold takes from a bound
DISTANCE_SLACK = 1e-6  # of the lengths in ||v - p||, at each fold that carries p
CANCELLATION_SLACK = 1e-5  # of ||phi||^2, in the difference ||phi||^2 - (phi.s)^2 / ||s||^2

PAIR_MAX = 127  # largest entry of a sparse pair that is kept as int8

# The dither of folds (Lemma 3): place = UPDATE * update + ROW * row modulo 2^32.
DITHER_UPDATE = 0x9E3779B9  # 2^32 / the golden ratio
DITHER_ROW = 0xC13FA9A9  # 2^32 / the plastic ratio, 1.3247...
DITHER_UNIT = 2.0**-55  # 2^-32 of the last place of a float32 1, which is 2^-23
EXPONENT_BITS = 0x7F800000  # of a float32

# Longest chunk of a prompt that is attended at once. It bounds the logits to
# rows x num_heads x 256 x (ring + sparse cache) where the update interval is very long.
MAX_CHUNK = 256
