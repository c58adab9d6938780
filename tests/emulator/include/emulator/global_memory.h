// Accesses of several elements at once, which hardware wants aligned.
#pragma once

#include <vector_types.h>

#include "emulator/place.h"

namespace emulator {

// Of memory that nobody writes during the launch.
uint4 load16_constant(const void* address, Place place);
uint2 load8_constant(const void* address, Place place);
unsigned load4_constant(const void* address, Place place);
unsigned char load1_constant(const void* address, Place place);

uint4 load16(const void* address, Place place);
void store16(void* address, const uint4& value, Place place);

}  // namespace emulator
