// The kernels for any machine that the build targets.
#include "cpu/kernels_impl.h"
