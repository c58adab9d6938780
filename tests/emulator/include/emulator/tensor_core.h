// ldmatrix and mma.sync, with the register layouts of the PTX ISA.
#pragma once

#include "emulator/place.h"

namespace emulator {

// to[m] is this lane's part of matrix m of count; lane l < 8 * count gives the address of row l % 8 of matrix l / 8.
void load_matrices(unsigned* to, int count, bool transposed, const void* row, Place place);

// sums[16x8] += a[16x16] @ b[16x8]; sums are added up in float32, the products by rising k.
void mma_float16(float (&sums)[4], const unsigned (&a)[4], const unsigned (&b)[2], Place place);
void mma_bfloat16(float (&sums)[4], const unsigned (&a)[4], const unsigned (&b)[2], Place place);

}  // namespace emulator
