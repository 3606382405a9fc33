// The constants of the dither are in constants.h.
#pragma once

#include "constants.h"
