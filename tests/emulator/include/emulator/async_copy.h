// cp.async: from the start of a copy until it is waited for its destination is undefined, here NaN.
#pragma once

#include "emulator/place.h"

namespace emulator {

void start_copy(void* shared, const void* global, bool valid, Place place);
void commit_copies();
void wait_copies(int pending, Place place);
// The running thread is about to exit: copies that it has not waited for are an error.
void require_no_copies();

}  // namespace emulator
